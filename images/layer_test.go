package images

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/crac-shim/crac/oci"
)

func untar(t testing.TB, r io.Reader, dir string) {
	t.Helper()
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, h.Name)
		if h.Typeflag == tar.TypeDir {
			if err := os.Mkdir(path, os.FileMode(h.Mode)); err != nil {
				t.Fatal(err)
			}
			continue
		}
		f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, os.FileMode(h.Mode))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(f, tr); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestWriteLayer(t *testing.T) {
	dir, spec := dump(t), []byte(`{"a": 1}`)
	var first, second bytes.Buffer
	m := facts()
	if _, err := WriteLayer(&first, dir, spec, &m, nil); err != nil {
		t.Fatal(err)
	}
	// Other times, owners and modes on disk make no difference.
	for _, name := range []string{"core-1.img", "pages-1.img"} {
		if err := os.Chtimes(filepath.Join(dir, name), m.Created, m.Created); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(dir, name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	m2 := facts()
	if _, err := WriteLayer(&second, dir, spec, &m2, nil); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first.Bytes(), second.Bytes()) {
		t.Error("the same dump gave two layers")
	}

	var entries []string
	tr := tar.NewReader(bytes.NewReader(first.Bytes()))
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		want := int64(0o600)
		if h.Typeflag == tar.TypeDir {
			want = 0o700
		}
		if h.Mode != want || h.Uid != 0 || h.Gid != 0 || h.ModTime.Unix() != 0 {
			t.Errorf("%s: mode %o, owner %d:%d, time %v", h.Name, h.Mode, h.Uid, h.Gid, h.ModTime)
		}
		entries = append(entries, h.Name)
	}
	want := ".crac/ .crac/v1/ .crac/v1/criu/ .crac/v1/criu/core-1.img .crac/v1/criu/descriptors.json .crac/v1/criu/empty-1.img " +
		".crac/v1/criu/inventory.img .crac/v1/criu/pages-1.img .crac/v1/manifest.json .crac/v1/spec.json"
	if got := strings.Join(entries, " "); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}

	root := t.TempDir()
	untar(t, &first, root)
	c, _, err := Find([]Mount{{Type: "bind", Source: root}})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.VerifyAll(); err != nil {
		t.Error(err)
	}
	if got, err := os.ReadFile(c.SpecPath()); err != nil || !bytes.Equal(got, spec) {
		t.Errorf("spec: %q, %v", got, err)
	}
	if got, err := os.ReadFile(filepath.Join(c.CRIUDir(), "core-1.img")); err != nil || string(got) != oneCore() {
		t.Errorf("core-1.img: %q, %v", got, err)
	}
}

func TestWriteLayerRefuses(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(dir string) error
		want   error
	}{
		"no inventory":         {func(dir string) error { return os.Remove(filepath.Join(dir, "inventory.img")) }, ErrNotDump},
		"an incremental dump":  {func(dir string) error { return os.Symlink("../before", filepath.Join(dir, "parent")) }, ErrNotDump},
		"a link as an image":   {func(dir string) error { return os.Symlink("/etc/passwd", filepath.Join(dir, "x.img")) }, ErrNotDump},
		"a directory as image": {func(dir string) error { return os.Mkdir(filepath.Join(dir, "x.img"), 0o700) }, ErrNotDump},
		"an odd name":          {func(dir string) error { return os.WriteFile(filepath.Join(dir, "a b.img"), nil, 0o600) }, ErrNotDump},
		"no directory":         {os.RemoveAll, os.ErrNotExist},
	} {
		t.Run(name, func(t *testing.T) {
			dir := dump(t)
			if err := tt.change(dir); err != nil {
				t.Fatal(err)
			}
			m := facts()
			if _, err := WriteLayer(io.Discard, dir, nil, &m, nil); !errors.Is(err, tt.want) {
				t.Errorf("got %v, want %v", err, tt.want)
			}
		})
	}

	m := facts()
	m.Container.Args = nil
	if _, err := WriteLayer(io.Discard, dump(t), nil, &m, nil); !errors.Is(err, oci.ErrInvalid) {
		t.Errorf("a manifest without arguments: %v", err)
	}
	m = facts()
	full := errors.New("disk full")
	if _, err := WriteLayer(failAfter(full), dump(t), nil, &m, nil); !errors.Is(err, full) {
		t.Errorf("a writer that fails: %v", err)
	}
}

type failAfterWriter struct {
	n   int
	err error
}

func failAfter(err error) *failAfterWriter { return &failAfterWriter{n: 4000, err: err} }

func (w *failAfterWriter) Write(p []byte) (int, error) {
	if w.n -= len(p); w.n < 0 {
		return 0, w.err
	}
	return len(p), nil
}

func TestVerify(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(t *testing.T, criu string)
		file   string // named in the error; none: no error
		all    bool   // only VerifyAll sees it
	}{
		{name: "whole", change: func(*testing.T, string) {}},
		{name: "missing", file: "core-1.img", change: func(t *testing.T, dir string) { remove(t, filepath.Join(dir, "core-1.img")) }},
		{name: "no memory", file: "pages-1.img", change: func(t *testing.T, dir string) { remove(t, filepath.Join(dir, "pages-1.img")) }},
		{name: "short memory", file: "pages-1.img", change: func(t *testing.T, dir string) {
			if err := os.Truncate(filepath.Join(dir, "pages-1.img"), 100); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "changed", file: "core-1.img", change: func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, "core-1.img"), strings.Replace(oneCore(), "app", "ppa", 1))
		}},
		{name: "changed memory", file: "pages-1.img", all: true, change: func(t *testing.T, dir string) {
			write(t, filepath.Join(dir, "pages-1.img"), strings.Repeat("Memory", 10000))
		}},
		{name: "a link instead of a file", file: "core-1.img", change: func(t *testing.T, dir string) {
			good := filepath.Join(t.TempDir(), "core")
			if err := os.Rename(filepath.Join(dir, "core-1.img"), good); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(good, filepath.Join(dir, "core-1.img")); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "a link instead of the directory", file: "v1/criu", change: func(t *testing.T, dir string) {
			good := filepath.Join(t.TempDir(), "criu")
			if err := os.Rename(dir, good); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(good, dir); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "one more image", file: "pages-2.img", change: func(t *testing.T, dir string) { write(t, filepath.Join(dir, "pages-2.img"), "") }},
		{name: "a parent", file: "parent", change: func(t *testing.T, dir string) {
			if err := os.Symlink("/", filepath.Join(dir, "parent")); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "a log", change: func(t *testing.T, dir string) { write(t, filepath.Join(dir, "restore.log"), "x") }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, _, err := Find([]Mount{{Type: "bind", Source: checkpointLayer(t)}})
			if err != nil {
				t.Fatal(err)
			}
			tt.change(t, c.CRIUDir())
			for all, verify := range map[bool]func() error{false: c.Verify, true: c.VerifyAll} {
				err := verify()
				if tt.file == "" || tt.all && !all {
					if err != nil {
						t.Errorf("all=%v: %v", all, err)
					}
					continue
				}
				if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), tt.file) {
					t.Errorf("all=%v: got %v, want ErrDamaged that names %s", all, err, tt.file)
				}
			}
		})
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}
