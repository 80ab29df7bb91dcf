package inspect

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
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
	f.Fuzz(func(t *testing.T, data []byte) {
		l, err := readLayer(t.Context(), bytes.NewReader(data), Options{Digests: true})
		if err != nil {
			if !errors.Is(err, images.ErrDamaged) {
				t.Fatalf("%v does not wrap ErrDamaged", err)
			}
			return
		}
		if err := l.Verify(); err != nil && !errors.Is(err, images.ErrDamaged) {
			t.Fatal(err)
		}
	})
}

// FuzzProcesses changes one file of a real dump.
func FuzzProcesses(f *testing.F) {
	entries, err := os.ReadDir(filepath.Join("testdata", "dump"))
	if err != nil {
		f.Fatal(err)
	}
	good := make(map[string][]byte)
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join("testdata", "dump", e.Name()))
		if err != nil {
			f.Fatal(err)
		}
		good[e.Name()] = data
		if len(data) < 4096 {
			f.Add(e.Name(), data)
		}
	}
	f.Fuzz(func(t *testing.T, name string, data []byte) {
		m := facts()
		l := &Layer{Manifest: &m, Images: make(map[string][]byte)}
		for k, v := range good {
			l.Images[k] = v
		}
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
