package convert

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
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
	tw      *tar.Writer
	allowed *allowance
	// decided are paths that a layer above brings (true: as a directory, in which
	// layers below may have more).
	decided map[string]bool
	// gone are deleted paths, cleared directories of which nothing below is left.
	gone, cleared map[string]bool
	// deleted are what is gone in the end, each by its name or by that of a directory.
	deleted map[string]bool
}

func newFlat(w io.Writer) *flat {
	return &flat{
		tw:      tar.NewWriter(w),
		allowed: newAllowance(math.MaxInt64), // its layers are here already
		decided: make(map[string]bool), gone: make(map[string]bool), cleared: make(map[string]bool), deleted: make(map[string]bool),
	}
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
	return f.cleared["."]
}

// read gives take the entries of a layer, as those of a set of changes. Some tools leave
// out the mark at a layer's end; that it is whole its digest says.
func (f *flat) read(ctx context.Context, r io.Reader, take func(h *tar.Header, name string, content io.Reader) error) error {
	err := readTar(ctx, r, f.allowed, func(h *tar.Header, content io.Reader) error {
		out, err := changed(h, true)
		if err != nil || out == nil {
			return err
		}
		return take(out, strings.TrimSuffix(out.Name, "/"), content)
	})
	if errors.Is(err, errCutOff) {
		return nil
	}
	return err
}

// layer takes the next lower layer.
func (f *flat) layer(ctx context.Context, r io.Reader) error {
	var gone, cleared []string
	decided := make(map[string]bool)
	err := f.read(ctx, r, func(h *tar.Header, name string, content io.Reader) error {
		dir, base := path.Split(name)
		switch target, deletes := strings.CutPrefix(base, whiteout); {
		case base == opaque:
			cleared = append(cleared, path.Clean(dir))
			return nil
		case deletes:
			gone = append(gone, path.Join(dir, target))
			return nil
		}
		if f.hidden(name) {
			return nil
		}
		if dir, ok := f.decided[name]; ok {
			if dir && h.Typeflag != tar.TypeDir {
				// The directory above took its place, and not that of one further below.
				cleared = append(cleared, name)
			}
			return nil
		}
		if h.Typeflag == tar.TypeLink && !has(decided, h.Linkname) {
			return fmt.Errorf("%q is a link to %q, which another layer brings; make a new checkpoint of a container of this image", name, h.Linkname)
		}
		decided[name] = h.Typeflag == tar.TypeDir
		if err := f.tw.WriteHeader(h); err != nil {
			return err
		}
		_, err := io.Copy(f.tw, content)
		return err
	})
	if err != nil {
		return err
	}
	// Deletions are about the layers below this one.
	for _, name := range gone {
		if !has(f.decided, name) && !has(decided, name) && !f.hidden(name) {
			f.deleted[name] = true
		}
		f.gone[name] = true
	}
	for _, name := range cleared {
		f.cleared[name] = true
	}
	maps.Copy(f.decided, decided)
	return nil
}

func has(m map[string]bool, key string) bool {
	_, ok := m[key]
	return ok
}

// needsBase tells whether something of the base may be gone that nobody has named: what was
// in a directory that was cleared, or deleted and made again.
func (f *flat) needsBase() bool {
	if len(f.cleared) > 0 {
		return true
	}
	for name := range f.gone {
		if f.decided[name] {
			return true
		}
	}
	return false
}

// base finds what of a layer of the base image that is.
func (f *flat) base(ctx context.Context, r io.Reader) error {
	return f.read(ctx, r, func(_ *tar.Header, name string, _ io.Reader) error {
		if !strings.HasPrefix(path.Base(name), whiteout) && !has(f.decided, name) && f.hidden(name) && !f.goes(name) {
			f.deleted[name] = true
		}
		return nil
	})
}

// goes tells whether a path goes with what is deleted, or is replaced by a file.
func (f *flat) goes(name string) bool {
	for p := name; p != "."; p = path.Dir(p) {
		if dir, ok := f.decided[p]; ok && !dir || f.deleted[p] {
			return true
		}
	}
	return false
}

// flatten writes the changes of a checkpoint image's layers as a tar.
func (e *export) flatten(ctx context.Context, w io.Writer, changed, base []ocispec.Descriptor) (deleted []string, err error) {
	f := newFlat(w)
	tell := reading(e.emit, "the changed files", changed...)
	for _, desc := range slices.Backward(changed) {
		if err := e.read(ctx, desc, tell, func(r io.Reader) error { return f.layer(ctx, r) }); err != nil {
			return nil, err
		}
	}
	if f.needsBase() {
		tell := reading(e.emit, "the base image, for what was deleted of it", base...)
		for _, desc := range base {
			if err := e.read(ctx, desc, tell, func(r io.Reader) error { return f.base(ctx, r) }); err != nil {
				return nil, err
			}
		}
	}
	return slices.Sorted(maps.Keys(f.deleted)), f.tw.Close()
}
