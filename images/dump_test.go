package images

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/crac-shim/crac/oci/criuimage"
)

// openedDump is a dump that nothing is said of.
func openedDump(t testing.TB, dir string) *Dump {
	t.Helper()
	d, err := OpenDump(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	return d
}

func TestOpenDump(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "file"), "")
	if err := os.Symlink(".", filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"none", "file", "link"} {
		if d, err := OpenDump(filepath.Join(dir, name)); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v, %v", name, d, err)
		}
	}
	write(t, filepath.Join(dir, "pages-1.img"), "memory")
	write(t, filepath.Join(dir, "pages-22.img"), "more")
	write(t, filepath.Join(dir, "pagemap-1.img"), "map")
	d := openedDump(t, dir)
	if want := []string{"file", "link", "pagemap-1.img", "pages-1.img", "pages-22.img"}; !slices.Equal(d.names, want) || d.Memory() != 10 {
		t.Errorf("%q, with %d bytes of memory", d.names, d.Memory())
	}
}

// What was read once is not read again, unless there is too much of it.
func TestDumpKeepsFiles(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "small"), "as it was")
	for _, name := range []string{"large", "other"} {
		write(t, filepath.Join(dir, name), strings.Repeat("x", maxKept*3/4))
	}
	d := openedDump(t, dir)
	for _, name := range []string{"small", "large", "other"} {
		if _, err := d.file(name); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, name), "otherwise")
	}
	for name, again := range map[string]bool{"small": false, "large": false, "other": true} {
		if data, err := d.file(name); err != nil || (string(data) == "otherwise") != again {
			t.Errorf("%s: %.20q, %v", name, data, err)
		}
	}
	d.Close()
	d.Close()
	if data, err := d.file("small"); err == nil {
		t.Errorf("%q is read after the end", data)
	}
}

func verifiable(t *testing.T) *Checkpoint {
	t.Helper()
	c, _, err := Find([]Mount{{Type: "bind", Source: checkpointLayer(t)}})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// What Verify has seen is what CheckPrivileges and the others see, and all that the
// directory is asked for.
func TestDumpIsWhatWasVerified(t *testing.T) {
	ck := verifiable(t)
	d, err := ck.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	before := maps.Clone(d.kept)
	if len(before) == 0 {
		t.Fatal("nothing is kept")
	}
	for name := range before {
		write(t, filepath.Join(ck.CRIUDir(), name), "otherwise")
	}
	if _, err := d.CheckPrivileges(Privileges{}); err != nil {
		t.Error(err)
	}
	if _, err := d.mountsHere(exists, true); err != nil {
		t.Error(err)
	}
	if !maps.EqualFunc(before, d.kept, slices.Equal[[]byte]) {
		t.Error("more was read")
	}
	// A parent that is not what its manifest says spoils it, too.
	whole := verifiable(t)
	whole.Parents = []*Checkpoint{ck}
	if _, err := whole.Open(); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "in parent 1: ") {
		t.Errorf("a damaged parent: %v", err)
	}
}

// All mount tables are held together.
func TestMountTablesAreBounded(t *testing.T) {
	half := make([]message, maxMessages/2)
	for i := range half {
		half[i] = message{}.num(2, uint64(i))
	}
	large := []message{message{}.str(7, strings.Repeat("x", maxImage/2))}
	for name, tables := range map[string][]string{
		"messages": {mountImage(half...), mountImage(half...), mountImage(mounted(fsTmpfs, 1, 0, "/", "/"))},
		"bytes":    {mountImage(large...), mountImage(large...)},
	} {
		dir := t.TempDir()
		for i, table := range tables {
			write(t, filepath.Join(dir, fmt.Sprintf("mountpoints-%d.img", i)), table)
		}
		d := openedDump(t, dir)
		if _, err := d.mountsHere(exists, true); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "more than") {
			t.Errorf("too many %s: %v", name, err)
		}
		if len(d.tables) != len(tables)-1 {
			t.Errorf("too many %s: %d tables", name, len(d.tables))
		}
	}
}

func TestFields(t *testing.T) {
	f, err := parse(message{}.num(1, 7).str(2, "text").num(3, 1, 2).msg(4, nil).str(2000, "far"))
	if err != nil {
		t.Fatal(err)
	}
	if n, err := f.number(1); n != 7 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if s, err := f.text(2000); s != "far" || err != nil {
		t.Errorf("%q, %v", s, err)
	}
	if _, err := f.number(2); err == nil {
		t.Error("text is a number")
	}
	if _, err := f.number(3); err == nil {
		t.Error("two are one")
	}
	if all, err := f.numbers(3); err != nil || !slices.Equal(all, []uint32{1, 2}) {
		t.Errorf("%d, %v", all, err)
	}
	if m, err := f.message(4); m == nil || err != nil {
		t.Errorf("an empty message: %v, %v", m, err)
	}
	if m, err := f.message(5); m != nil || err != nil {
		t.Errorf("no message: %v, %v", m, err)
	}
	if !f.has(4) || f.has(5) {
		t.Error("has what it has not")
	}
	if none, err := parse(nil); none == nil || err != nil {
		t.Errorf("%v, %v", none, err)
	}
}

// BenchmarkRestore is what a warm start does with a dump's metadata.
func BenchmarkRestore(b *testing.B) {
	names, err := filepath.Glob(filepath.Join("testdata", "dumps", "*"))
	if err != nil || len(names) == 0 {
		b.Fatalf("%q, %v", names, err)
	}
	want := Confinement{NoNewPrivileges: true}
	for _, dir := range names {
		tree := criuimage.New(criuimage.Pstree, message{}.num(1, 1).num(5, 1))
		copied := b.TempDir()
		if err := os.CopyFS(copied, os.DirFS(dir)); err != nil {
			b.Fatal(err)
		}
		write(b, filepath.Join(copied, "pstree.img"), string(tree))
		b.Run(filepath.Base(dir), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				d, err := OpenDump(copied)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := d.CheckPrivileges(Privileges{}); err != nil {
					b.Fatal(err)
				}
				if _, err := want.Images(d); err != nil {
					b.Fatal(err)
				}
				mounts, err := d.MountsHere()
				if err != nil {
					b.Fatal(err)
				}
				mounts.MadeBefore(nil)
				_ = mounts.Images()
				d.Close()
			}
		})
	}
}
