// Package inspect reads checkpoint images where they lie, in a content store,
// without unpacking them: what is inside, and whether it is what it says.
//
// It is cracctl's. It understands CRIU's image files with go-criu's messages,
// which register themselves at program start and so are nothing for the shim.
package inspect

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/crypt"
	"github.com/crac-shim/crac/oci"
)

// maxImages bounds how many bytes of a layer are kept in memory: all but the
// workload's memory. The largest files of that kind are those of the mappings, a
// few hundred bytes for each.
const maxImages = 256 << 20

// Layer is what a checkpoint layer holds.
type Layer struct {
	Manifest *oci.Manifest
	// Spec is the runtime spec of the dumped container, as stored.
	Spec []byte
	// Images are the files of the dump by name, but for pages-*.img.
	Images map[string][]byte
	// Found are the files of the dump as they are, in the layer's order. They have
	// digests if they were asked for.
	Found []oci.File
	// Pages are the hashes of the pages in pages-*.img, by name and in order, if
	// they were asked for: see images.SumPage.
	Pages map[string][]images.PageSum
	// ManifestDigest is that of manifest.json: dumps that continue this one name
	// it by that.
	ManifestDigest string
}

// Options say what a layer is read for. The zero value reads what is inside.
type Options struct {
	// Digests of all files are computed.
	Digests bool
	// Pages are hashed.
	Pages bool
	// Extract, if it is not empty, is a directory that the files of the dump, memory
	// included, are written into. It has to be empty.
	Extract string
	// Keys decrypt an encrypted layer.
	Keys *crypt.Keys
	// Progress, if there is one, is told how many bytes of the layer as stored were
	// read since it was told last.
	Progress func(n int64)
}

// readLayer reads an uncompressed checkpoint layer in one pass. What it finds is
// hostile: only the format's own entries are taken, each once, and what is kept
// is bounded. Errors wrap images.ErrDamaged.
func readLayer(ctx context.Context, r io.Reader, o Options) (*Layer, error) {
	l := &Layer{Images: make(map[string][]byte), Pages: make(map[string][]images.PageSum)}
	var (
		manifest []byte
		kept     int64
		seen     = make(map[string]bool)
	)
	keep := func(r io.Reader, size int64) ([]byte, error) {
		if kept += size; size < 0 || kept > maxImages {
			return nil, fmt.Errorf("holds more than %d bytes besides the memory", int64(maxImages))
		}
		// The size is a claim: memory is taken for what is really there.
		var data bytes.Buffer
		_, err := io.CopyN(&data, r, size)
		return data.Bytes(), err
	}
	tr := tar.NewReader(r)
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, damaged(err)
		}
		name, dump, err := entry(h)
		switch {
		case err != nil:
			return nil, damaged(err)
		case name == "": // a directory
			continue
		case seen[name]:
			return nil, damaged(fmt.Errorf("%s is there twice", name))
		case len(seen) > oci.MaxFiles+2:
			return nil, damaged(fmt.Errorf("it holds more than %d files", oci.MaxFiles))
		}
		seen[name] = true
		if !dump {
			data, err := keep(tr, h.Size)
			if err != nil {
				return nil, damaged(fmt.Errorf("%s: %w", name, err))
			}
			switch name {
			case oci.ManifestName:
				manifest = data
			case oci.SpecName:
				l.Spec = data
			}
			continue
		}
		if err := l.file(tr, name, h.Size, o, keep); err != nil {
			return nil, damaged(fmt.Errorf("%s: %w", name, err))
		}
	}
	if manifest == nil {
		return nil, damaged(fmt.Errorf("it has no %s/%s", oci.Dir, oci.ManifestName))
	}
	var err error
	if l.Manifest, err = oci.DecodeManifest(strings.NewReader(string(manifest))); err != nil {
		return nil, damaged(err)
	}
	sum := sha256.Sum256(manifest)
	l.ManifestDigest = "sha256:" + hex.EncodeToString(sum[:])
	return l, nil
}

// file reads one file of the dump.
func (l *Layer) file(r io.Reader, name string, size int64, o Options, keep func(io.Reader, int64) ([]byte, error)) error {
	found := oci.File{Name: name, Size: size}
	var digest hash.Hash
	if o.Digests {
		digest = sha256.New()
		r = io.TeeReader(r, digest)
	}
	var extracted *os.File
	if o.Extract != "" {
		// The name is a plain one: see entry.
		f, err := os.OpenFile(filepath.Join(o.Extract, name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		extracted = f
		defer f.Close()
		r = io.TeeReader(r, f)
	}
	switch {
	case !images.IsPages(name):
		data, err := keep(r, size)
		if err != nil {
			return err
		}
		l.Images[name] = data
	case o.Pages:
		hashes, err := hashPages(r)
		if err != nil {
			return err
		}
		l.Pages[name] = hashes
	default:
		if _, err := io.Copy(io.Discard, r); err != nil {
			return err
		}
	}
	if o.Digests {
		found.Digest = "sha256:" + hex.EncodeToString(digest.Sum(nil))
	}
	l.Found = append(l.Found, found)
	if extracted != nil {
		return extracted.Close()
	}
	return nil
}

func hashPages(r io.Reader) (sums []images.PageSum, err error) {
	page := make([]byte, images.SumSize)
	for {
		switch n, err := io.ReadFull(r, page); {
		case errors.Is(err, io.EOF):
			return sums, nil
		case errors.Is(err, io.ErrUnexpectedEOF):
			return nil, fmt.Errorf("does not hold whole pages: %d bytes are left over", n)
		case err != nil:
			return nil, err
		}
		sums = append(sums, images.SumPage(page))
	}
}

// entry knows the format's entries. name is empty for a directory; dump says that
// it is a file of CRIU's.
func entry(h *tar.Header) (name string, dump bool, err error) {
	clean := path.Clean(strings.TrimPrefix(h.Name, "./"))
	switch {
	case h.Typeflag == tar.TypeDir && (clean == oci.Root || clean == oci.Dir || clean == oci.Dir+"/"+oci.CRIUDirName):
		return "", false, nil
	case h.Typeflag != tar.TypeReg:
	case clean == oci.Dir+"/"+oci.ManifestName, clean == oci.Dir+"/"+oci.SpecName:
		return path.Base(clean), false, nil
	case path.Dir(clean) == oci.Dir+"/"+oci.CRIUDirName && oci.ValidFileName(path.Base(clean)):
		return path.Base(clean), true, nil
	}
	return "", false, fmt.Errorf("%q is no entry of a checkpoint layer", h.Name)
}

func damaged(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("%w: %w", images.ErrDamaged, err)
}

// Verify compares the files of a layer that was read with Digests with its
// manifest, in the words of images.Checkpoint.Verify.
func (l *Layer) Verify() error {
	return images.CompareFiles(l.Manifest, l.Found)
}
