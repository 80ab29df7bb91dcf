package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	coreimages "github.com/containerd/containerd/v2/core/images"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// byType is content by its media type, whatever digest it is asked for by.
type byType map[string][]byte

type blobOf struct{ *bytes.Reader }

func (blobOf) Close() error { return nil }

func (b byType) ReaderAt(_ context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	return blobOf{bytes.NewReader(b[desc.MediaType])}, nil
}

// FuzzNative: whatever containerd's index, the spec and the tar of the dump hold, it is a
// source, unpacked as files of its directory, or refused as what it is.
func FuzzNative(f *testing.F) {
	index, err := json.Marshal(ocispec.Index{
		Manifests: []ocispec.Descriptor{
			{MediaType: ocispec.MediaTypeImageManifest},
			{MediaType: coreimages.MediaTypeContainerd1Checkpoint, Size: 1 << 40},
			{MediaType: coreimages.MediaTypeContainerd1CheckpointConfig},
			{MediaType: ocispec.MediaTypeImageLayerGzip},
		},
		Annotations: map[string]string{indexImage: "x:1"},
	})
	if err != nil {
		f.Fatal(err)
	}
	spec, err := proto.Marshal(&anypb.Any{TypeUrl: specType, Value: []byte(`{"process":{"args":["app"]},"linux":{}}`)})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(index, spec, tarOf(f, entry{name: "inventory.img", data: "i"}, entry{name: "dump.log"}), packed(f, "gzip", tarOf(f, entry{name: "bin/.wh.vi"})))
	f.Add(index, []byte("\x12\x01{"), tarOf(f, entry{name: "../x.img"}), []byte{})
	f.Fuzz(func(t *testing.T, index, spec, dump, layer []byte) {
		top := t.TempDir()
		dir := filepath.Join(top, "work")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		store := byType{
			ocispec.MediaTypeImageIndex: index, coreimages.MediaTypeContainerd1Checkpoint: dump, coreimages.MediaTypeContainerd1CheckpointConfig: spec,
			ocispec.MediaTypeImageLayerGzip: layer, ocispec.MediaTypeImageLayer: layer, ocispec.MediaTypeImageLayerZstd: layer,
		}
		i, err := readIndex(t.Context(), store, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex})
		if err == nil && i.has(coreimages.MediaTypeContainerd1Checkpoint) {
			var s *source
			if s, err = i.open(t.Context(), store, "x:1", dir, 1<<20, silent); err == nil && s.changes != nil {
				err = s.changes(io.Discard)
			}
		}
		if err != nil && !errors.Is(err, ErrSource) {
			t.Errorf("%v does not wrap ErrSource", err)
		}
		if left, err := os.ReadDir(top); err != nil || len(left) != 1 {
			t.Errorf("beside the work directory lie %v, %v", left, err)
		}
		onlyFiles(t, dir)
	})
}

// FuzzFlat: of whatever layers, an export names nothing outside of the root file system, in no
// dump, and nothing that it deletes as well.
func FuzzFlat(f *testing.F) {
	dir := func(name string) entry { return entry{name: name, kind: tar.TypeDir} }
	f.Add(tarOf(f, dir("d"), entry{name: "d/.wh..wh..opq"}, dir("d/lib")), tarOf(f, entry{name: ".wh.x"}, entry{name: "h", data: "1"}),
		tarOf(f, dir("d"), dir("d/lib"), entry{name: "d/lib/old"}, entry{name: "x"}))
	f.Add(tarOf(f, entry{name: ".wh..wh..opq"}, entry{name: "a", data: "1"}), tarOf(f, entry{name: ".crac/x"}), tarOf(f, entry{name: "/../x"}))
	f.Fuzz(func(t *testing.T, upper, lower, base []byte) {
		var out bytes.Buffer
		fl := newFlat(&out)
		fl.allowed = newAllowance(1 << 20)
		for _, l := range [][]byte{upper, lower} {
			if err := fl.layer(t.Context(), bytes.NewReader(l)); err != nil {
				return
			}
		}
		if err := fl.base(t.Context(), bytes.NewReader(base)); err != nil {
			return
		}
		if err := fl.tw.Close(); err != nil {
			t.Fatal(err)
		}
		for tr := tar.NewReader(&out); ; {
			h, err := tr.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			name := strings.TrimSuffix(h.Name, "/")
			if path.Clean(name) != name || path.IsAbs(name) || strings.HasPrefix(name, "../") || inDump(name) || fl.deleted[name] {
				t.Errorf("%q is written", h.Name)
			}
		}
		for name := range fl.deleted {
			if path.Clean(name) != name || path.IsAbs(name) || strings.HasPrefix(name, "../") || has(fl.decided, name) {
				t.Errorf("%q is deleted", name)
			}
		}
	})
}
