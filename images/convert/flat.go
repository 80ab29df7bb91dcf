package convert

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// opaque marks a directory in which nothing of the layers below is left.
const opaque = whiteout + whiteout + ".opq"

// flat makes one set of changes of several layers: what is new or changed, written as
// a tar, and what of the base is gone. It reads them from the top, and takes of each
// what the ones above have not decided.
type flat struct {
	tw *tar.Writer
	// decided are paths that a layer above brings (true: as a directory, in which
	// layers below may have more).
	decided map[string]bool
	// gone are deleted paths, cleared directories of which nothing below is left.
	gone, cleared map[string]bool
	deleted       []string
}

func newFlat(w io.Writer) *flat {
	return &flat{tw: tar.NewWriter(w), decided: make(map[string]bool), gone: make(map[string]bool), cleared: make(map[string]bool)}
}

// hidden tells whether a path of a lower layer is covered by what is above.
func (f *flat) hidden(name string) bool {
	if dir, ok := f.decided[name]; ok && !dir || f.gone[name] {
		return true
	}
	for p := path.Dir(name); p != "."; p = path.Dir(p) {
		if dir, ok := f.decided[p]; ok && !dir || f.gone[p] || f.cleared[p] {
			return true
		}
	}
	return false
}

// layer takes the next lower layer.
func (f *flat) layer(r io.Reader) error {
	plain, err := decompress(r)
	if err != nil {
		return err
	}
	defer plain.Close()
	var gone, cleared []string
	decided := make(map[string]bool)
	for tr := tar.NewReader(plain); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		out, err := changed(h, true)
		if err != nil {
			return err
		}
		if out == nil {
			continue
		}
		name := strings.TrimSuffix(out.Name, "/")
		dir, base := path.Split(name)
		switch target, deletes := strings.CutPrefix(base, whiteout); {
		case base == opaque:
			cleared = append(cleared, path.Clean(dir))
			continue
		case deletes:
			gone = append(gone, path.Join(dir, target))
			continue
		}
		if _, again := f.decided[name]; again || f.hidden(name) {
			continue
		}
		if out.Typeflag == tar.TypeLink && !has(decided, out.Linkname) {
			return fmt.Errorf("%s is a link to %s, which another layer brings; make a new checkpoint of a container of this image", name, out.Linkname)
		}
		decided[name] = out.Typeflag == tar.TypeDir
		if err := f.tw.WriteHeader(out); err != nil {
			return err
		}
		if _, err := io.Copy(f.tw, tr); err != nil {
			return err
		}
	}
	// Deletions are about the layers below this one.
	for _, name := range gone {
		if _, again := f.decided[name]; !again && !has(decided, name) && !f.hidden(name) {
			f.deleted = append(f.deleted, name)
		}
		f.gone[name] = true
	}
	for _, name := range cleared {
		f.cleared[name] = true
	}
	for name, dir := range decided {
		f.decided[name] = dir
	}
	return nil
}

func has(m map[string]bool, key string) bool {
	_, ok := m[key]
	return ok
}

// base finds what of a layer of the base image is in directories that were cleared: it
// is gone, but nobody has said so by name.
func (f *flat) base(r io.Reader) error {
	plain, err := decompress(r)
	if err != nil {
		return err
	}
	defer plain.Close()
	for tr := tar.NewReader(plain); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		name, err := cleanName(strings.TrimPrefix(h.Name, "/"))
		if err != nil {
			return err
		}
		if !f.cleared[path.Dir(name)] || has(f.decided, name) || strings.HasPrefix(path.Base(name), whiteout) || slices.Contains(f.deleted, name) {
			continue
		}
		f.deleted = append(f.deleted, name)
	}
}

// flatten writes the changes of a checkpoint image's layers as a tar.
func (e *export) flatten(ctx context.Context, w io.Writer, changed, base []ocispec.Descriptor) (deleted []string, err error) {
	f := newFlat(w)
	for _, desc := range slices.Backward(changed) {
		if err := e.read(ctx, desc, f.layer); err != nil {
			return nil, err
		}
	}
	if len(f.cleared) > 0 {
		for _, desc := range base {
			if err := e.read(ctx, desc, f.base); err != nil {
				return nil, err
			}
		}
	}
	slices.Sort(f.deleted)
	return slices.Compact(f.deleted), f.tw.Close()
}
