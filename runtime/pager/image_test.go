package pager

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/crac-shim/crac/oci/criuimage"
)

// A message of numbers, field by field.
func numbers(pairs ...uint64) []byte {
	var m []byte
	for i := 0; i < len(pairs); i += 2 {
		m = protowire.AppendTag(m, protowire.Number(pairs[i]), protowire.VarintType)
		m = protowire.AppendVarint(m, pairs[i+1])
	}
	return m
}

func pagemapOfPages(id uint64, entries ...[]byte) []byte {
	return criuimage.New(criuimage.Pagemap, append([][]byte{numbers(1, id)}, entries...)...)
}

func pageEntry(page, n, flags uint64) []byte { return numbers(1, page*pageSize, 2, n, 4, flags) }

func mmOf(areas ...[]byte) []byte {
	var m []byte
	for _, a := range areas {
		m = protowire.AppendTag(m, 14, protowire.BytesType)
		m = protowire.AppendBytes(m, a)
	}
	return criuimage.New(criuimage.MM, m)
}

func vmaEntry(page, n, flags, madv uint64) []byte {
	return numbers(1, page*pageSize, 2, (page+n)*pageSize, 6, flags, 7, 0x201, 9, madv)
}

const private = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS

// writeDump writes image files; pages-*.img are given as the numbers of pages.
func writeDump(t testing.TB, dir string, files map[string][]byte) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for name, data := range files {
		if strings.HasPrefix(name, "pages-") {
			numbers := data
			data = make([]byte, len(numbers)*int(pageSize))
			for i, n := range numbers {
				data[i*int(pageSize)] = n
			}
		}
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func openTestDump(dir string) (*dump, error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	return openDump(f)
}

// contents gives the lazy pages as "page:number" in order.
func contents(t *task) string {
	var s []string
	for _, e := range t.extents {
		for i := 0; i < len(e.data); i += int(pageSize) {
			s = append(s, fmt.Sprintf("%d:%d", (e.addr+uint64(i))/pageSize, e.data[i]))
		}
	}
	return strings.Join(s, " ")
}

func TestOpenDump(t *testing.T) {
	const lazy, present, parent = entryLazy, entryPresent, entryParent
	area := vmaEntry(10, 100, private, 0)
	for name, c := range map[string]struct {
		files, parent, grandparent map[string][]byte
		want, err                  string
	}{
		"lazy pages alone": {
			files: map[string][]byte{
				"mm-1.img":            mmOf(area),
				"pagemap-1.img":       pagemapOfPages(5, pageEntry(10, 2, lazy|present), pageEntry(12, 1, present), pageEntry(20, 1, lazy|present)),
				"pages-5.img":         {1, 2, 3, 4},
				"pagemap-shmem-9.img": pagemapOfPages(6),
			},
			want: "10:1 11:2 20:4",
		},
		"across areas, one of them to come up empty": {
			files: map[string][]byte{
				"mm-1.img":      mmOf(vmaEntry(10, 2, private, 0), vmaEntry(12, 2, private, madvWipeOnFork), vmaEntry(14, 2, private, 0)),
				"pagemap-1.img": pagemapOfPages(1, pageEntry(11, 4, lazy|present)),
				"pages-1.img":   {1, 2, 3, 4},
			},
			want: "11:1 14:4",
		},
		"a chain": {
			files: map[string][]byte{
				"mm-1.img":      mmOf(area),
				"pagemap-1.img": pagemapOfPages(1, pageEntry(10, 4, lazy|parent), pageEntry(14, 1, lazy|present), pageEntry(15, 1, parent)),
				"pages-1.img":   {1},
			},
			parent: map[string][]byte{
				"pagemap-1.img": pagemapOfPages(1, pageEntry(9, 2, present), pageEntry(11, 2, parent), pageEntry(13, 1, present|lazy)),
				"pages-1.img":   {2, 3, 4},
			},
			grandparent: map[string][]byte{
				"pagemap-1.img": pagemapOfPages(2, pageEntry(10, 9, present)),
				"pages-2.img":   {11, 12, 13, 14, 15, 16, 17, 18, 19},
			},
			want: "10:3 11:12 12:13 13:4 14:1",
		},
		"a page that the parent lacks": {
			files: map[string][]byte{
				"mm-1.img":      mmOf(area),
				"pagemap-1.img": pagemapOfPages(1, pageEntry(10, 4, lazy|parent)),
				"pages-1.img":   {},
			},
			parent: map[string][]byte{
				"pagemap-1.img": pagemapOfPages(1, pageEntry(10, 3, present)),
				"pages-1.img":   {1, 2, 3},
			},
			err: "lacks the page at 0xd000",
		},
		"no parent": {
			files: map[string][]byte{
				"mm-1.img":      mmOf(area),
				"pagemap-1.img": pagemapOfPages(1, pageEntry(10, 4, lazy|parent)),
				"pages-1.img":   {},
			},
			err: "the dump has no `parent`",
		},
		"a short file of pages": {
			files: map[string][]byte{
				"mm-1.img":      mmOf(area),
				"pagemap-1.img": pagemapOfPages(1, pageEntry(10, 4, lazy|present)),
				"pages-1.img":   {1, 2, 3},
			},
			err: "damaged or incomplete",
		},
		"pages in no file": {
			files: map[string][]byte{
				"mm-1.img":      mmOf(area),
				"pagemap-1.img": pagemapOfPages(1, pageEntry(10, 4, lazy)),
				"pages-1.img":   {1},
			},
			err: "--lazy-pages",
		},
		"no file of pages": {
			files: map[string][]byte{"mm-1.img": mmOf(area), "pagemap-1.img": pagemapOfPages(1)},
			err:   "pages-1.img",
		},
		"no process": {files: map[string][]byte{"mm-1.img": mmOf(area)}, err: "no pagemap-*.img"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			writeDump(t, filepath.Join(dir, "0"), c.files)
			for i, files := range []map[string][]byte{c.parent, c.grandparent} {
				if files != nil {
					writeDump(t, filepath.Join(dir, fmt.Sprint(i+1)), files)
					link := filepath.Join(dir, fmt.Sprint(i), "parent")
					if err := os.Symlink(fmt.Sprintf("../%d", i+1), link); err != nil {
						t.Fatal(err)
					}
				}
			}
			d, err := openTestDump(filepath.Join(dir, "0"))
			if c.err != "" {
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Fatalf("error %v instead of one with %q", err, c.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer d.close()
			if got := contents(d.tasks[1]); got != c.want {
				t.Errorf("%s instead of %s", got, c.want)
			}
		})
	}
}

// A chain that leads to itself ends.
func TestOpenDumpLoop(t *testing.T) {
	dir := t.TempDir()
	writeDump(t, dir, map[string][]byte{"mm-1.img": mmOf(), "pagemap-1.img": pagemapOfPages(1), "pages-1.img": {}})
	if err := os.Symlink(".", filepath.Join(dir, "parent")); err != nil {
		t.Fatal(err)
	}
	if _, err := openTestDump(dir); err == nil || !strings.Contains(err.Error(), "build on each other") {
		t.Error(err)
	}
}

// A link could lead anywhere.
func TestOpenDumpLink(t *testing.T) {
	dir := t.TempDir()
	writeDump(t, dir, map[string][]byte{"mm-1.img": mmOf(), "pagemap-1.img": pagemapOfPages(1), "elsewhere": {1}})
	if err := os.Symlink("elsewhere", filepath.Join(dir, "pages-1.img")); err != nil {
		t.Fatal(err)
	}
	if _, err := openTestDump(dir); !errors.Is(err, unix.ELOOP) {
		t.Error(err)
	}
}

func TestAreas(t *testing.T) {
	for name, c := range map[string]struct {
		area        area
		lazy, wiped bool
	}{
		"anonymous":  {area{flags: private}, true, false},
		"shared":     {area{flags: unix.MAP_SHARED | unix.MAP_ANONYMOUS}, false, false},
		"of a file":  {area{flags: unix.MAP_PRIVATE}, false, false},
		"locked":     {area{flags: private | unix.MAP_LOCKED}, false, false},
		"huge":       {area{flags: private | unix.MAP_HUGETLB}, false, false},
		"vDSO":       {area{flags: private, status: vmaVDSO}, false, false},
		"wipeonfork": {area{flags: private, madv: madvWipeOnFork}, true, true},
		"droppable":  {area{flags: mapDroppable | unix.MAP_ANONYMOUS}, false, true},
		"grows down": {area{flags: private | unix.MAP_GROWSDOWN}, true, false},
	} {
		if c.area.lazy() != c.lazy || c.area.wiped() != c.wiped {
			t.Errorf("%s: lazy %v, wiped %v", name, c.area.lazy(), c.area.wiped())
		}
	}
}

func FuzzPagemap(f *testing.F) {
	f.Add(pagemapOfPages(1, pageEntry(10, 2, entryLazy|entryPresent), numbers(1, 1<<40, 2, 1, 5, 1<<30)))
	f.Fuzz(func(t *testing.T, data []byte) {
		_, entries, err := parsePagemap(data, pageSize)
		if err != nil {
			if !errors.Is(err, errImage) {
				t.Fatal(err)
			}
			return
		}
		end := uint64(0)
		for _, e := range entries {
			if e.addr < end || e.addr%pageSize != 0 || e.len%pageSize != 0 || e.len == 0 || e.end() <= e.addr {
				t.Fatalf("%+v after %#x", e, end)
			}
			end = e.end()
		}
	})
}

func FuzzMM(f *testing.F) {
	f.Add(mmOf(vmaEntry(1, 2, private, 0), vmaEntry(5, 1, private, 1<<18)))
	f.Fuzz(func(t *testing.T, data []byte) {
		areas, err := parseMM(data, pageSize)
		if err != nil {
			if !errors.Is(err, errImage) {
				t.Fatal(err)
			}
			return
		}
		end := uint64(0)
		for _, a := range areas {
			if a.start < end || a.end <= a.start || a.start%pageSize != 0 || a.end%pageSize != 0 {
				t.Fatalf("%+v after %#x", a, end)
			}
			end = a.end
		}
	})
}
