package images

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/oci/criuimage"
)

// SumSize is the unit in bytes that pages are compared by. It divides every size
// that pages have.
const SumSize = 4096

// PageSum is a hash of SumSize bytes. It means something in this process alone:
// its seeds are random, so that nobody can make two pages of one sum. That two
// others have one is less likely than that the memory errs.
type PageSum [2]uint64

var sumSeeds = [2]maphash.Seed{maphash.MakeSeed(), maphash.MakeSeed()}

// SumPage hashes a page of SumSize bytes.
func SumPage(page []byte) PageSum {
	return PageSum{maphash.Bytes(sumSeeds[0], page), maphash.Bytes(sumSeeds[1], page)}
}

// ParentMemory is the memory of a dump that another one continues.
type ParentMemory interface {
	// Sum is that of the SumSize bytes at an address in a process; ok is false for
	// what the dump does not hold.
	Sum(pid uint32, address uint64) (sum PageSum, ok bool)
}

// memory is how the memory in a dump is stored: without pages that are nothing
// but zeroes where a restore finds zeroes anyway, without those that two processes
// must not share (see area.wiped), and without those that a parent has. Files that
// are as CRIU wrote them are not in it.
type memory struct {
	maps   map[string][]byte // pagemap-*.img
	pages  map[string]kept   // pages-*.img
	reused int64             // bytes that the parent has
}

// kept are the parts of a file that are stored, in order.
type kept struct {
	size   int64
	ranges []byteRange
}

type byteRange struct{ offset, size int64 }

func (k *kept) add(offset, size int64) {
	k.size += size
	if n := len(k.ranges); n > 0 && k.ranges[n-1].offset+k.ranges[n-1].size == offset {
		k.ranges[n-1].size += size
		return
	}
	k.ranges = append(k.ranges, byteRange{offset, size})
}

func (k kept) reader(f io.ReaderAt) io.Reader {
	parts := make([]io.Reader, len(k.ranges))
	for i, r := range k.ranges {
		parts[i] = io.NewSectionReader(f, r.offset, r.size)
	}
	return io.MultiReader(parts...)
}

// planMemory reads a dump's memory once and decides what of it is stored. parent
// may be nil.
func planMemory(dir string, files []oci.File, pageSize uint64, parent ParentMemory) (*memory, error) {
	m := &memory{maps: make(map[string][]byte), pages: make(map[string]kept)}
	for _, f := range files {
		rest, ok := strings.CutPrefix(f.Name, "pagemap-")
		if !ok {
			continue
		}
		// Those of shared memory, pagemap-shmem-*.img, are no process's.
		pid, err := strconv.ParseUint(strings.TrimSuffix(rest, ".img"), 10, 32)
		if err != nil {
			continue
		}
		if err := m.plan(dir, f.Name, uint32(pid), pageSize, parent); err != nil {
			return nil, fmt.Errorf("%w: %s: %w", ErrNotDump, filepath.Join(dir, f.Name), err)
		}
	}
	return m, nil
}

func (m *memory) plan(dir, name string, pid uint32, pageSize uint64, parent ParentMemory) error {
	data, err := readMap(dir, name)
	if err != nil {
		return err
	}
	old, err := ParsePagemap(data, pageSize)
	if err != nil {
		return err
	}
	anonymous, err := anonymousMemory(dir, pid)
	if err != nil {
		return err
	}
	file := fmt.Sprintf("pages-%d.img", old.ID)
	if _, twice := m.pages[file]; twice {
		return fmt.Errorf("%s belongs to another process, too", file)
	}
	f, err := os.OpenFile(filepath.Join(dir, file), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	var (
		stored kept
		left   = &Pagemap{ID: old.ID, wide: old.wide}
		offset int64
		in     = pageReader{f: f, page: make([]byte, pageSize)}
	)
	for _, r := range old.Runs {
		if !r.Present() {
			left.append(r.Start, r.Pages, r.flags, pageSize)
			continue
		}
		for i := range r.Pages {
			at := r.Start + i*pageSize
			page, err := in.next()
			if err != nil {
				return fmt.Errorf("%s: %w", file, err)
			}
			own, anonymous := anonymous.find(at)
			switch {
			case anonymous && (own.wiped || isZero(page)):
			case parent != nil && sameAs(parent, pid, at, page):
				left.append(at, 1, pageInParent, pageSize)
				m.reused += int64(pageSize)
			default:
				left.append(at, 1, r.flags, pageSize)
				stored.add(offset, int64(pageSize))
			}
			offset += int64(pageSize)
		}
	}
	if rest, err := in.rest(); err != nil || rest {
		return errors.Join(fmt.Errorf("%s holds more pages than it says", file), err)
	}
	if stored.size == offset {
		return nil // as it was
	}
	m.maps[name], m.pages[file] = left.encode(), stored
	return nil
}

// maxMap bounds, in bytes, what is read of how a process's memory is laid out: some 20
// for a run of pages, 80 for a mapping.
const maxMap = 256 << 20

// readMap reads a page map, or the mappings.
func readMap(dir, name string) ([]byte, error) {
	d, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(d)
	f, err := openDumpFile(d, name)
	if err != nil {
		return nil, err
	}
	defer f.close()
	if f.size > maxMap {
		return nil, fmt.Errorf("%s has more than %d bytes", name, maxMap)
	}
	data := make([]byte, f.size)
	return data, f.readFull(data)
}

// pageReader reads a file page by page, in large parts.
type pageReader struct {
	f    io.Reader
	page []byte
	buf  []byte
	full []byte
}

func (r *pageReader) next() ([]byte, error) {
	if len(r.buf) < len(r.page) {
		if r.full == nil {
			r.full = make([]byte, max(1<<20, len(r.page)))
		}
		n := copy(r.full, r.buf)
		for n < len(r.page) {
			k, err := r.f.Read(r.full[n:])
			n += k
			if errors.Is(err, io.EOF) && n < len(r.page) {
				return nil, errors.New("holds fewer pages than its page map says")
			}
			if err != nil && !errors.Is(err, io.EOF) {
				return nil, err
			}
		}
		r.buf = r.full[:n]
	}
	page := r.buf[:len(r.page)]
	r.buf = r.buf[len(r.page):]
	return page, nil
}

// rest tells whether there is more.
func (r *pageReader) rest() (bool, error) {
	if len(r.buf) > 0 {
		return true, nil
	}
	n, err := r.f.Read(make([]byte, 1))
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return n > 0, err
}

func isZero(page []byte) bool {
	// Most pages that are not zero show it at once.
	return binary.NativeEndian.Uint64(page) == 0 && bytes.Equal(page[:len(page)-8], page[8:])
}

func sameAs(parent ParentMemory, pid uint32, at uint64, page []byte) bool {
	for i := 0; i < len(page); i += SumSize {
		sum, ok := parent.Sum(pid, at+uint64(i))
		if !ok || sum != SumPage(page[i:i+SumSize]) {
			return false
		}
	}
	return true
}

// area is a range of addresses of a process that a restore makes anew as memory of
// its own, which is zero.
type area struct {
	start, end uint64
	// wiped says that the process has marked it as not to be had by a fork of its
	// own, MADV_WIPEONFORK or MAP_DROPPABLE, as random generators mark their state.
	// A clone is one as well, and finds it empty.
	wiped bool
	// locked memory is there before the process runs, also in a restore on demand.
	locked bool
}

// areas are sorted and do not overlap.
type areas []area

func (a areas) find(at uint64) (area, bool) {
	i, _ := slices.BinarySearchFunc(a, at, func(e area, at uint64) int {
		if e.end <= at {
			return -1
		}
		return 1
	})
	if i == len(a) || a[i].start > at {
		return area{}, false
	}
	return a[i], true
}

// Flags of a vma_entry: which mappings a restore makes anew as memory of its own,
// which is zero (CRIU's image.h).
const (
	vmaRegular    = 1 << 0
	vmaStack      = 1 << 1
	vmaHeap       = 1 << 5
	vmaAnonymous  = 1 << 9
	vmaOnlyThese  = vmaRegular | vmaStack | vmaHeap | vmaAnonymous
	maxMappings   = 1 << 20
	mmMappings    = 14
	vmaStart      = 1
	vmaEnd        = 2
	vmaFlagsField = 6
	vmaStatus     = 7
	vmaMadvise    = 9

	// What madvise(2) was given is a bit each. The kernel sets this one of droppable
	// memory as well, and so it is known also where CRIU knows of no such memory and
	// dumps it.
	vmaWipeOnFork = 1 << unix.MADV_WIPEONFORK
	mapTypeMask   = 0x0f
	mapDroppable  = 0x08
)

// anonymousMemory finds where pages that are not stored are zero after a restore.
// None of a process without mm-*.img of its own.
func anonymousMemory(dir string, pid uint32) (areas, error) {
	name := fmt.Sprintf("mm-%d.img", pid)
	data, err := readMap(dir, name)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	message, err := criuimage.One(data, criuimage.MM)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	mm, err := parse(message)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	var all areas
	for v := range mm.all(mmMappings) {
		if v.kind != protowire.BytesType || len(all) > maxMappings {
			return nil, fmt.Errorf("%s has mappings that are none", name)
		}
		f, err := parse(v.bytes)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		number := func(n protowire.Number) uint64 {
			v, _, err := f.single(n, protowire.VarintType)
			if err != nil {
				return 0
			}
			return v.number
		}
		status, flags := number(vmaStatus), number(vmaFlagsField)
		if status&vmaAnonymous == 0 || status&^vmaOnlyThese != 0 || flags&unix.MAP_HUGETLB != 0 || flags&unix.MAP_SHARED != 0 {
			continue
		}
		all = append(all, area{
			start: number(vmaStart), end: number(vmaEnd),
			wiped:  number(vmaMadvise)&vmaWipeOnFork != 0 || flags&mapTypeMask == mapDroppable,
			locked: flags&unix.MAP_LOCKED != 0,
		})
	}
	slices.SortFunc(all, func(a, b area) int { return cmp.Compare(a.start, b.start) })
	return all, nil
}
