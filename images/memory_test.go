package images

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/oci/criuimage"
)

const page = 4096

// pagesFile has a page for each letter: all of it that letter, and '0' is zero.
func pagesFile(letters string) string {
	var b strings.Builder
	for _, l := range letters {
		if l == '0' {
			l = 0
		}
		b.WriteString(strings.Repeat(string(l), page))
	}
	return b.String()
}

// mappings is an mm-*.img of mappings, each from, pages, status and flags.
func mappings(all ...[4]uint64) string {
	advised := make([][5]uint64, len(all))
	for i, m := range all {
		copy(advised[i][:], m[:])
	}
	return advisedMappings(advised...)
}

// advisedMappings is the same with what madvise(2) was given.
func advisedMappings(all ...[5]uint64) string {
	var mm message
	for _, m := range all {
		mm = mm.msg(mmMappings, message{}.num(vmaStart, m[0]).num(vmaEnd, m[0]+m[1]*page).num(vmaFlagsField, m[3]).num(vmaStatus, m[2]).num(vmaMadvise, m[4]))
	}
	return image(criuimage.MM, mm)
}

func runs(wide bool, all ...Run) string {
	return string((&Pagemap{ID: 3, Runs: all, wide: wide}).encode())
}

const (
	anonymous = vmaRegular | vmaAnonymous
	private   = 0x22
	mapped    = vmaRegular | 1<<6 // a file, privately
)

// toldMemory is a parent's memory: a letter for a page.
type toldMemory map[uint64]byte

func (m toldMemory) Sum(pid uint32, at uint64) (PageSum, bool) {
	l, ok := m[at]
	return SumPage(bytes.Repeat([]byte{l}, page)), ok && pid == 7
}

func TestMemoryIsStored(t *testing.T) {
	const a, b = 0x10000, 0x80000
	for _, tt := range []struct {
		name   string
		maps   string
		mm     string
		pages  string
		parent ParentMemory
		want   string // the runs: start, pages, flags
		left   string // pages
	}{
		{"as it was", runs(true, Run{a, 3, 4}), mappings([4]uint64{a, 3, anonymous, private}), "abc", nil, "10000+3:4", "abc"},
		{"zeroes", runs(true, Run{a, 6, 4}), mappings([4]uint64{a, 6, anonymous, private}), "0ab00c", nil, "11000+2:4 15000+1:4", "abc"},
		{"of a lazy run", runs(true, Run{a, 3, 6}), mappings([4]uint64{a, 3, anonymous, private}), "a0b", nil, "10000+1:6 12000+1:6", "ab"},
		{"before 4.2", runs(false, Run{a, 3, 4}), mappings([4]uint64{a, 3, anonymous, private}), "a0b", nil, "10000+1:4 12000+1:4", "ab"},
		{"nothing but zeroes", runs(true, Run{a, 2, 4}), mappings([4]uint64{a, 2, anonymous, private}), "00", nil, "", ""},
		{"a file's are content", runs(true, Run{a, 2, 4}), mappings([4]uint64{a, 2, mapped, 2}), "0a", nil, "10000+2:4", "0a"},
		{"shared memory", runs(true, Run{a, 2, 4}), mappings([4]uint64{a, 2, anonymous, 0x21}), "0a", nil, "10000+2:4", "0a"},
		{"huge pages", runs(true, Run{a, 2, 4}), mappings([4]uint64{a, 2, anonymous, private | 0x40000}), "0a", nil, "10000+2:4", "0a"},
		{"something later", runs(true, Run{a, 2, 4}), mappings([4]uint64{a, 2, anonymous | 1<<20, private}), "0a", nil, "10000+2:4", "0a"},
		{"two mappings", runs(true, Run{a, 4, 4}), mappings([4]uint64{a + 2*page, 2, mapped, 2}, [4]uint64{a, 2, anonymous, private}), "0000", nil, "12000+2:4", "00"},
		{"outside of all", runs(true, Run{b, 1, 4}), mappings([4]uint64{a, 2, anonymous, private}), "0", nil, "80000+1:4", "0"},
		{
			"wiped on fork", runs(true, Run{a, 4, 4}), advisedMappings([5]uint64{a, 1, anonymous, private, 1 << 14}, [5]uint64{a + page, 2, anonymous, private, 1<<14 | 1<<18}, [5]uint64{a + 3*page, 1, anonymous, private}),
			"abcd", nil, "10000+1:4 13000+1:4", "ad",
		},
		{"droppable", runs(true, Run{a, 2, 4}), mappings([4]uint64{a, 1, anonymous, 0x28}, [4]uint64{a + page, 1, anonymous, private}), "ab", nil, "11000+1:4", "b"},
		{"wiped, though it is the parent's", runs(true, Run{a, 1, 4}), advisedMappings([5]uint64{a, 1, anonymous, private, 1 << 18}), "a", toldMemory{a: 'a'}, "", ""},

		{
			"a parent's", runs(true, Run{a, 4, 4}, Run{b, 1, 4}), mappings([4]uint64{a, 4, anonymous, private}), "abcde",
			toldMemory{a: 'a', a + page: 'x', a + 2*page: 'c', a + 3*page: 'd', b: 'e'},
			"10000+1:1 11000+1:4 12000+2:1 80000+1:1", "b",
		},
		{"zero, though the parent's is not", runs(true, Run{a, 2, 4}), mappings([4]uint64{a, 2, anonymous, private}), "a0", toldMemory{a: 'a', a + page: 'x'}, "10000+1:1", ""},
		{"a file's zero that the parent has", runs(true, Run{a, 1, 4}), mappings([4]uint64{a, 1, mapped, 2}), "0", toldMemory{a: 0}, "10000+1:1", ""},
		{"what the parent lacks", runs(true, Run{a, 2, 4}), mappings([4]uint64{a, 2, anonymous, private}), "ab", toldMemory{b: 'a'}, "10000+2:4", "ab"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := dump(t)
			write(t, filepath.Join(dir, "pagemap-7.img"), tt.maps)
			write(t, filepath.Join(dir, "mm-7.img"), tt.mm)
			write(t, filepath.Join(dir, "pages-3.img"), pagesFile(tt.pages))
			m := facts()
			m.Host.PageSize = page
			if tt.parent != nil {
				m.Parent = &oci.Parent{Manifest: "sha256:" + strings.Repeat("a", 64), Depth: 1}
			}
			var buf bytes.Buffer
			if _, err := WriteLayer(&buf, dir, []byte("{}"), &m, tt.parent); err != nil {
				t.Fatal(err)
			}
			out := t.TempDir()
			untar(t, &buf, out)
			got, err := os.ReadFile(filepath.Join(out, ".crac/v1/criu/pagemap-7.img"))
			if err != nil {
				t.Fatal(err)
			}
			p, err := ParsePagemap(got, page)
			if err != nil {
				t.Fatal(err)
			}
			var said []string
			for _, r := range p.Runs {
				said = append(said, fmt.Sprintf("%x+%d:%d", r.Start, r.Pages, r.flags))
			}
			if s := strings.Join(said, " "); s != tt.want || p.ID != 3 {
				t.Errorf("page map %d: %s, want %s", p.ID, s, tt.want)
			}
			if p.wide != (tt.name != "before 4.2") && len(p.Runs) > 0 {
				t.Error("the numbers of pages are where this CRIU does not look")
			}
			if pages, err := os.ReadFile(filepath.Join(out, ".crac/v1/criu/pages-3.img")); err != nil || string(pages) != pagesFile(tt.left) {
				t.Errorf("%d bytes are left, %v; want the pages %q", len(pages), err, tt.left)
			}
			// And the manifest is of what is stored.
			c := &Checkpoint{Dir: filepath.Join(out, ".crac/v1"), Layer: out, Manifest: &m}
			if err := c.VerifyAll(); err != nil {
				t.Error(err)
			}
		})
	}

	for name, change := range map[string]func(dir string){
		"fewer pages":     func(dir string) { write(t, filepath.Join(dir, "pages-3.img"), pagesFile("a")) },
		"part of a page":  func(dir string) { write(t, filepath.Join(dir, "pages-3.img"), pagesFile("ab")+"x") },
		"more pages":      func(dir string) { write(t, filepath.Join(dir, "pages-3.img"), pagesFile("abc")) },
		"no pages":        func(dir string) { remove(t, filepath.Join(dir, "pages-3.img")) },
		"another's, too":  func(dir string) { write(t, filepath.Join(dir, "pagemap-8.img"), runs(true, Run{a, 2, 4})) },
		"broken page map": func(dir string) { write(t, filepath.Join(dir, "pagemap-7.img"), "x") },
		"link to a page map": func(dir string) {
			file := filepath.Join(dir, "pagemap-7.img")
			write(t, filepath.Join(dir, "x"), runs(true, Run{a, 2, 4}))
			remove(t, file)
			if err := os.Symlink("x", file); err != nil {
				t.Fatal(err)
			}
		},
		"large page map":  func(dir string) { grow(t, filepath.Join(dir, "pagemap-7.img")) },
		"large mappings":  func(dir string) { grow(t, filepath.Join(dir, "mm-7.img")) },
		"broken mappings": func(dir string) { write(t, filepath.Join(dir, "mm-7.img"), "x") },
		"unaligned":       func(dir string) { write(t, filepath.Join(dir, "pagemap-7.img"), runs(true, Run{a + 1, 2, 4})) },
		"over the end":    func(dir string) { write(t, filepath.Join(dir, "pagemap-7.img"), runs(true, Run{1<<64 - page, 2, 4})) },
		"runs that overlap": func(dir string) {
			write(t, filepath.Join(dir, "pagemap-7.img"), runs(true, Run{a, 2, 4}, Run{a, 1, 4}))
		},
	} {
		dir := dump(t)
		write(t, filepath.Join(dir, "pagemap-7.img"), runs(true, Run{a, 2, 4}))
		// As many zeroes as it takes to be looked at twice.
		write(t, filepath.Join(dir, "pages-3.img"), pagesFile("00"))
		write(t, filepath.Join(dir, "mm-7.img"), mappings([4]uint64{a, 2, anonymous, private}))
		change(dir)
		m := facts()
		m.Host.PageSize = page
		if _, err := WriteLayer(io.Discard, dir, nil, &m, nil); !errors.Is(err, ErrNotDump) {
			t.Errorf("%s: %v, want ErrNotDump", name, err)
		}
	}
}

// grow makes a file larger than what is read of one, with a hole.
func grow(t *testing.T, file string) {
	t.Helper()
	if err := os.Truncate(file, maxMap+1); err != nil {
		t.Fatal(err)
	}
}

func FuzzPagemap(f *testing.F) {
	f.Add([]byte(runs(true, Run{0x1000, 2, 4}, Run{0x8000, 1, 1})))
	f.Add([]byte(runs(false, Run{0x1000, 2, 6})))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := ParsePagemap(data, page)
		if err != nil {
			return
		}
		last := uint64(0)
		for _, r := range p.Runs {
			if r.Start < last || r.End(page) <= r.Start {
				t.Fatalf("run %+v after %#x", r, last)
			}
			last = r.End(page)
		}
		again, err := ParsePagemap(p.encode(), page)
		if err != nil || len(again.Runs) != len(p.Runs) {
			t.Fatalf("not as it was: %v", err)
		}
	})
}

// chained unpacks a dump and others that it continues, the topmost first.
func chained(t *testing.T, depth int, tag string) (layers []string) {
	t.Helper()
	var parent *oci.Parent
	for i := range depth + 1 {
		m := facts()
		m.Container.ID = fmt.Sprint(tag, i)
		m.Parent = parent
		var buf bytes.Buffer
		if _, err := WriteLayer(&buf, dump(t), []byte("{}"), &m, nil); err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		untar(t, &buf, dir)
		layers = append([]string{dir}, layers...)
		l, err := readLayer(dir)
		if err != nil {
			t.Fatal(err)
		}
		parent = &oci.Parent{Manifest: l.checkpoint.digest, Depth: i + 1}
	}
	return layers
}

func TestFindParents(t *testing.T) {
	l := chained(t, 2, "one ")
	other := chained(t, 0, "other ")[0]
	base := baseLayer(t)
	overlay := func(dirs ...string) []Mount {
		return []Mount{{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=" + strings.Join(dirs, ":"), "upperdir=/u", "workdir=/w"}}}
	}
	for _, tt := range []struct {
		name    string
		mounts  []Mount
		parents []string
		err     string
	}{
		{"whole", overlay(l[2], base), nil, ""},
		{"one", overlay(l[1], l[2], base), []string{l[2]}, ""},
		{"two", overlay(l[0], l[1], l[2], base), []string{l[1], l[2]}, ""},
		{"others between", overlay(l[0], base, l[1], other, l[2]), []string{l[1], l[2]}, ""},
		{"none there", overlay(l[1], base), nil, "cracctl flatten"},
		{"one missing", overlay(l[0], l[1], base), nil, "in no layer below"},
		{"another's", overlay(l[1], other, base), nil, "in no layer below"},
		{"in the wrong order", overlay(l[0], l[2], l[1], base), nil, "in no layer below"},
		{"in one directory", []Mount{{Type: "bind", Source: l[1]}}, nil, "in no layer below"},
	} {
		c, rest, err := Find(tt.mounts)
		if tt.err != "" {
			if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%s: %v, want ErrDamaged with %q", tt.name, err, tt.err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		var parents []string
		for _, p := range c.Parents {
			parents = append(parents, p.Layer)
		}
		if strings.Join(parents, " ") != strings.Join(tt.parents, " ") || len(c.ParentDirs()) != len(parents) {
			t.Errorf("%s: parents %v, want %v", tt.name, parents, tt.parents)
		}
		for _, dir := range append(l, other) {
			if strings.Contains(strings.Join(rest[0].Options, ","), dir) {
				t.Errorf("%s: the container would see %s: %v", tt.name, dir, rest)
			}
		}
		if err := c.VerifyAll(); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
	// A parent that was changed is not restored from.
	c, _, err := Find(overlay(l[0], l[1], l[2], base))
	if err != nil {
		t.Fatal(err)
	}
	remove(t, filepath.Join(l[2], ".crac/v1/criu/pages-1.img"))
	if err := c.Verify(); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "in parent 2: ") {
		t.Errorf("a damaged parent: %v", err)
	}
}

// Where a dump continues a pre-dump, its link to it goes, and what is shared between processes is
// put together like what is not.
func TestContinuesPreDump(t *testing.T) {
	const a = 0x10000
	for _, tt := range []struct {
		name, link, preDump string // below the directory of both
		want                bool
		wantErr             string
	}{
		{name: "without", want: false},
		{name: "after one that could not be used", preDump: "pre", want: false},
		{name: "after one", preDump: "pre", link: "../pre", want: true},
		{name: "after another", preDump: "pre", link: "../other", wantErr: "../other"},
		{name: "after one that nobody knows", link: "../pre", wantErr: "continues an earlier dump"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			top := t.TempDir()
			dir, pre := filepath.Join(top, "dump"), ""
			if err := os.Rename(dump(t), dir); err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(dir, "pagemap-shmem-7.img"), runs(true, Run{a, 1, 1}, Run{a + page, 1, 4}))
			write(t, filepath.Join(dir, "pages-3.img"), pagesFile("X"))
			if tt.preDump != "" {
				pre = filepath.Join(top, tt.preDump)
				if err := os.Mkdir(pre, 0o700); err != nil {
					t.Fatal(err)
				}
				write(t, filepath.Join(pre, "pagemap-shmem-7.img"), runs(true, Run{a, 2, 4}))
				write(t, filepath.Join(pre, "pages-3.img"), pagesFile("ab"))
			}
			if tt.link != "" {
				if err := os.Symlink(tt.link, filepath.Join(dir, "parent")); err != nil {
					t.Fatal(err)
				}
			}
			got, err := ContinuesPreDump(dir, pre)
			if tt.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), tt.wantErr) {
					t.Errorf("got %v, want an error with %q", err, tt.wantErr)
				}
				return
			}
			if err != nil || got != tt.want {
				t.Fatalf("got %v, %v; want %v", got, err, tt.want)
			}
			if !got {
				return
			}
			if n, err := Merge(t.Context(), []string{dir, pre}, page); err != nil || n != 1 {
				t.Fatalf("%d pages came from the pre-dump, want 1; %v", n, err)
			}
			pages, err := os.ReadFile(filepath.Join(dir, "pages-3.img"))
			if err != nil || string(pages) != pagesFile("aX") {
				t.Errorf("%d bytes of pages, %v", len(pages), err)
			}
			if _, err := DumpFiles(dir); err != nil {
				t.Error(err)
			}
		})
	}
}

// What is left out for a parent comes back.
func TestMerge(t *testing.T) {
	const a = 0x10000
	level := func(maps, letters string) string {
		dir := dump(t)
		if maps != "" {
			write(t, filepath.Join(dir, "pagemap-7.img"), maps)
			write(t, filepath.Join(dir, "pages-3.img"), pagesFile(letters))
			write(t, filepath.Join(dir, "mm-7.img"), mappings([4]uint64{a, 8, anonymous, private}, [4]uint64{a + 8*page, 8, anonymous, private | unix.MAP_LOCKED}))
		}
		return dir
	}
	at := func(index int, n uint64, flags uint64) Run { return Run{a + uint64(index)*page, n, flags} }
	for _, tt := range []struct {
		name string
		dirs []string
		want string // runs and pages; an error if it begins with !
	}{
		{"whole", []string{level(runs(true, at(0, 2, 4)), "ab")}, "10000+2:4 ab"},
		{"one parent", []string{level(runs(true, at(0, 1, 1), at(1, 1, 4), at(2, 1, 1)), "X"), level(runs(true, at(0, 4, 4)), "abcd")}, "10000+3:4 aXc"},
		{"two parents", []string{
			level(runs(true, at(0, 4, 1)), ""), level(runs(true, at(0, 1, 4), at(1, 3, 1)), "X"), level(runs(true, at(1, 3, 4)), "bcd"),
		}, "10000+4:4 Xbcd"},
		{"lazy pages stay so", []string{level(runs(true, at(0, 1, 6), at(1, 1, 1)), "X"), level(runs(true, at(1, 1, 4)), "b")}, "10000+1:6 11000+1:4 Xb"},
		{"lazy ones of a parent, too", []string{level(runs(true, at(0, 1, 1), at(1, 1, 6)), "X"), level(runs(true, at(0, 2, 6)), "ab")}, "10000+2:6 aX"},
		{"unless they were locked since", []string{level(runs(true, at(7, 2, 1)), ""), level(runs(true, at(7, 2, 6)), "ab")}, "17000+1:6 18000+1:4 ab"},
		{"a hole", []string{level(runs(true, at(0, 1, 1), at(3, 1, 4)), "X"), level(runs(true, at(0, 1, 4)), "a")}, "10000+1:4 13000+1:4 aX"},
		{"no parent", []string{level(runs(true, at(0, 1, 1)), "")}, "!none of the dumps"},
		{"not in the parent", []string{level(runs(true, at(0, 1, 1)), ""), level(runs(true, at(1, 1, 4)), "b")}, "!0x10000"},
		{"parent without the process", []string{level(runs(true, at(0, 1, 1)), ""), level("", "")}, "!none of the dumps"},
		{"parent cut off", []string{level(runs(true, at(1, 1, 1)), ""), level(runs(true, at(0, 2, 4)), "a")}, "!EOF"},
		{"large parent", []string{level(runs(true, at(0, 1, 1)), ""), func() string {
			dir := level(runs(true, at(0, 1, 4)), "a")
			grow(t, filepath.Join(dir, "pagemap-7.img"))
			return dir
		}()}, "!more than"},
		{"broken parent", []string{level(runs(true, at(0, 1, 1)), ""), level("x", "a")}, "!pagemap-7.img"},
	} {
		_, err := Merge(t.Context(), tt.dirs, page)
		if want, bad := strings.CutPrefix(tt.want, "!"); bad {
			if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want ErrDamaged with %q", tt.name, err, want)
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		data, err := os.ReadFile(filepath.Join(tt.dirs[0], "pagemap-7.img"))
		if err != nil {
			t.Fatal(err)
		}
		p, err := ParsePagemap(data, page)
		if err != nil {
			t.Fatal(err)
		}
		var said []string
		for _, r := range p.Runs {
			said = append(said, fmt.Sprintf("%x+%d:%d", r.Start, r.Pages, r.flags))
		}
		pages, err := os.ReadFile(filepath.Join(tt.dirs[0], "pages-3.img"))
		wantRuns, letters := tt.want[:strings.LastIndexByte(tt.want, ' ')], tt.want[strings.LastIndexByte(tt.want, ' ')+1:]
		if err != nil || strings.Join(said, " ") != wantRuns || string(pages) != pagesFile(letters) {
			t.Errorf("%s: %v and %d bytes, %v; want %s", tt.name, said, len(pages), err, tt.want)
		}
		if left, _ := filepath.Glob(filepath.Join(tt.dirs[0], ".merge-*")); len(left) > 0 {
			t.Errorf("%s: left %v", tt.name, left)
		}
	}
}

// FuzzMerge: whatever page maps say, what they are put together to is a whole dump, of pages
// that are there, or damaged.
func FuzzMerge(f *testing.F) {
	f.Add([]byte(runs(true, Run{0x1000, 2, 1}, Run{0x8000, 1, 4})), []byte(runs(true, Run{0x1000, 2, 4})))
	f.Add([]byte(runs(true, Run{0, 1 << 51, 1})), []byte(runs(true, Run{0, 1 << 51, 4})))
	f.Add([]byte(runs(false, Run{0, 1 << 51, 4})), []byte(nil))
	good := f.TempDir()
	f.Fuzz(func(t *testing.T, top, below []byte) {
		dirs := []string{filepath.Join(good, "0"), filepath.Join(good, "1")}
		for i, maps := range [][]byte{top, below} {
			if err := os.RemoveAll(dirs[i]); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(dirs[i], 0o700); err != nil {
				t.Fatal(err)
			}
			write(t, filepath.Join(dirs[i], "inventory.img"), "")
			write(t, filepath.Join(dirs[i], "pagemap-7.img"), string(maps))
			write(t, filepath.Join(dirs[i], "pages-3.img"), pagesFile("abcd"))
		}
		fromParents, err := Merge(t.Context(), dirs, page)
		if err != nil && !errors.Is(err, ErrDamaged) {
			t.Fatalf("%v does not wrap ErrDamaged", err)
		}
		if err != nil || fromParents == 0 {
			return // it was whole, and is left alone
		}
		data, err := os.ReadFile(filepath.Join(dirs[0], "pagemap-7.img"))
		if err != nil {
			t.Fatal(err)
		}
		p, err := ParsePagemap(data, page)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range p.Runs {
			if r.InParent() || r.Present() && r.Pages > 4+4 {
				t.Errorf("run %+v", r)
			}
		}
	})
}
