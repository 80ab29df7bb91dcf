package inspect

import (
	"bytes"
	"errors"
	"maps"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/crac-shim/crac/images"
)

// FuzzReadLayer: whatever lies in a registry is a layer or ErrDamaged.
func FuzzReadLayer(f *testing.F) {
	dir := f.TempDir()
	for _, name := range []string{"inventory.img", "pstree.img", "core-1.img"} {
		data, err := os.ReadFile(filepath.Join("testdata", "dump", name))
		if err != nil {
			f.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			f.Fatal(err)
		}
	}
	f.Add(tarLayer(f, dir))
	f.Add(claims(f, math.MaxInt64))
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := readLayer(bytes.NewReader(data), Options{Digests: true, Pages: true})
		if err != nil {
			if !errors.Is(err, images.ErrDamaged) {
				t.Fatalf("%v does not wrap ErrDamaged", err)
			}
			return
		}
		if err := l.Verify(); err != nil && !errors.Is(err, images.ErrDamaged) {
			t.Fatal(err)
		}
		compare(t, []*Layer{l}, []*Layer{l})
	})
}

// compare is Diff of what may be damaged.
func compare(t *testing.T, x, y []*Layer) {
	d, err := Diff(t.Context(), new(Image), new(Image), x, y)
	if err != nil {
		if !errors.Is(err, images.ErrDamaged) {
			t.Fatalf("%v does not wrap ErrDamaged", err)
		}
		return
	}
	pages := 0
	for _, l := range append(x, y...) {
		for _, sums := range l.Pages {
			pages += len(sums)
		}
	}
	if m := d.Memory; m.Equal+m.Changed+m.Added+m.Removed > int64(pages)*images.SumSize {
		t.Fatalf("of %d pages there are %+v", pages, m)
	}
}

// FuzzMemory: whatever the page maps of two dumps say of each other, their memory is damaged, or
// no more than there is.
func FuzzMemory(f *testing.F) {
	files := testDump(f)
	maps.DeleteFunc(files, func(name string, _ []byte) bool { return strings.HasPrefix(name, "pagemap-") })
	f.Add(pagemap(1, run{0x1000, 2, inParent}, run{0x8000, 3, present}), pagemap(1, run{0x1000, 3, present}))
	f.Add(pagemap(1, run{0, 1 << 51, inParent}), pagemap(1, run{0, 1 << 51, present}))
	f.Fuzz(func(t *testing.T, top, below []byte) {
		var chain []*Layer
		for _, pagemap := range [][]byte{top, below} {
			l := dumped(3, maps.Clone(files))
			l.Images["pagemap-1.img"] = pagemap
			chain = append(chain, l)
		}
		compare(t, chain, chain[1:])
		compare(t, chain[1:], chain)
	})
}

// testDump are the files of a real dump, without its memory.
func testDump(f *testing.F) map[string][]byte {
	f.Helper()
	entries, err := os.ReadDir(filepath.Join("testdata", "dump"))
	if err != nil {
		f.Fatal(err)
	}
	files := make(map[string][]byte)
	for _, e := range entries {
		if files[e.Name()], err = os.ReadFile(filepath.Join("testdata", "dump", e.Name())); err != nil {
			f.Fatal(err)
		}
	}
	return files
}

// FuzzProcesses changes one file of a real dump.
func FuzzProcesses(f *testing.F) {
	good := testDump(f)
	for name, data := range good {
		if len(data) < 4096 {
			f.Add(name, data)
		}
	}
	f.Fuzz(func(t *testing.T, name string, data []byte) {
		m := facts()
		l := &Layer{Manifest: &m, Images: maps.Clone(good)}
		l.Images[name] = data
		all, err := l.Processes()
		if err != nil {
			if !errors.Is(err, images.ErrDamaged) {
				t.Fatalf("%v does not wrap ErrDamaged", err)
			}
			return
		}
		for _, p := range all {
			if p.Mapped < 0 || p.Dumped < 0 || p.Dumped > p.Mapped || p.InParent < 0 {
				t.Fatalf("process %d: mapped %d, dumped %d, in parent %d", p.PID, p.Mapped, p.Dumped, p.InParent)
			}
		}
	})
}
