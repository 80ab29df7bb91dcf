// Package compress packs and unpacks layers and archives, in the forms that others read.
package compress

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/crac-shim/crac/oci"
)

// Format is a way to store a layer.
type Format struct {
	// MediaType is that of a layer which is stored so.
	MediaType string
	NewWriter func(io.Writer) (io.WriteCloser, error)
}

// Of gives the format that an option names.
func Of(name oci.Compression) (Format, error) {
	switch name {
	case "", oci.CompressionZstd:
		// The fastest level: on a JVM's dump the default one takes twice as
		// long to save 5 %.
		return Format{ocispec.MediaTypeImageLayerZstd, func(w io.Writer) (io.WriteCloser, error) {
			return zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedFastest))
		}}, nil
	case oci.CompressionGzip:
		return Format{ocispec.MediaTypeImageLayerGzip, func(w io.Writer) (io.WriteCloser, error) {
			return gzip.NewWriterLevel(w, gzip.BestSpeed)
		}}, nil
	}
	return Format{}, oci.CheckCompression(name)
}

// maxWindow bounds the memory that a compressed stream can ask for. Ours needs
// 4 MiB, zstd's highest level 128 MiB.
const maxWindow = 128 << 20

func newZstd(r io.Reader) (io.ReadCloser, error) {
	z, err := zstd.NewReader(r, zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return nil, err
	}
	return z.IOReadCloser(), nil
}

// NewReader unpacks a layer of a media type.
func NewReader(r io.Reader, mediaType string) (io.ReadCloser, error) {
	switch {
	case strings.HasSuffix(mediaType, "zstd"):
		return newZstd(r)
	case strings.HasSuffix(mediaType, "gzip"):
		return gzip.NewReader(r)
	case strings.HasSuffix(mediaType, ".tar"):
		return io.NopCloser(r), nil
	}
	return nil, fmt.Errorf("its media type is %q, which this version cannot unpack", mediaType)
}

// ErrUnknown is wrapped by errors about compressed data that Detect cannot unpack.
var ErrUnknown = errors.New("compressed with bzip2 or xz; unpack it and compress it with zstd or gzip")

// Detect unpacks gzip, zstd or plain data, whatever it is.
func Detect(r io.Reader) (io.ReadCloser, error) {
	b := bufio.NewReaderSize(r, 64<<10)
	magic, err := b.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		return gzip.NewReader(b)
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		return newZstd(b)
	case bytes.HasPrefix(magic, []byte("BZh")), bytes.HasPrefix(magic, []byte("\xfd7zX")):
		return nil, ErrUnknown
	}
	return io.NopCloser(b), nil
}
