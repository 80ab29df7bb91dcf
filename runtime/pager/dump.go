package pager

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sort"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxChain bounds how many dumps may build on each other.
const maxChain = 64

// maxMetadata bounds an image file that is read into memory, in bytes.
const maxMetadata = 1 << 30

// An extent is a run of pages with contents: where it was at the time of the
// dump, and the bytes, which are a mapping of the file of pages.
type extent struct {
	addr  uint64
	data  []byte
	first int // the number of the first page, counted over all extents of the task
}

func (e extent) end() uint64 { return e.addr + uint64(len(e.data)) }

// task is the lazy memory of one dumped process.
type task struct {
	pid     int
	areas   []area   // lazy ones alone
	extents []extent // sorted by address, without overlap
	pages   int      // in all extents
}

// dump is the memory of a dump's processes. It does not change after openDump.
type dump struct {
	tasks map[int]*task
	files []*pagesFile
}

// pagesFile is a mapped pages-*.img.
type pagesFile struct {
	path string
	data []byte
}

// dumpDir is an open directory of image files, and that of the dump it builds on.
type dumpDir struct {
	dir    *os.File
	path   string
	parent *dumpDir
	pages  map[uint32]*pagesFile
}

// openDump maps the memory of every process in a dump. All that can be known to
// be wrong with it is an error here, before anything runs. It closes dir.
func openDump(dir *os.File) (_ *dump, err error) {
	d := &dump{tasks: make(map[int]*task)}
	defer func() {
		if err != nil {
			d.close()
		}
	}()
	top, err := openChain(dir)
	if err != nil {
		return nil, err
	}
	defer top.close()
	names, err := top.dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		pid, ok := pagemapOf(name)
		if !ok {
			continue
		}
		t, err := d.openTask(top, pid)
		if err != nil {
			return nil, err
		}
		d.tasks[pid] = t
	}
	if len(d.tasks) == 0 {
		return nil, fmt.Errorf("%s has no pagemap-*.img: not the dump of a process", top.path)
	}
	return d, nil
}

// pagemapOf gives the process of a pagemap-PID.img. Those of shared memory have
// other names, and are not ours.
func pagemapOf(name string) (pid int, ok bool) {
	s, ok := strings.CutPrefix(name, "pagemap-")
	if !ok {
		return 0, false
	}
	if s, ok = strings.CutSuffix(s, ".img"); !ok {
		return 0, false
	}
	pid, err := strconv.Atoi(s)
	return pid, err == nil && pid > 0 && strconv.Itoa(pid) == s
}

func (d *dump) close() {
	for _, f := range d.files {
		_ = unix.Munmap(f.data)
	}
	d.files, d.tasks = nil, nil
}

// openChain opens a directory and those that its `parent` links lead to, as CRIU
// does.
func openChain(dir *os.File) (*dumpDir, error) {
	top := newDumpDir(dir)
	last := top
	for n := 1; ; n++ {
		parent, err := openDumpDir(int(last.dir.Fd()), "parent", last.path+"/parent")
		if errors.Is(err, os.ErrNotExist) {
			return top, nil
		}
		if err == nil && n == maxChain {
			parent.close()
			err = fmt.Errorf("dump %s: more than %d dumps build on each other", top.path, maxChain)
		}
		if err != nil {
			top.close()
			return nil, err
		}
		last.parent, last = parent, parent
	}
}

func openDumpDir(at int, name, path string) (*dumpDir, error) {
	fd, err := unix.Openat(at, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return newDumpDir(os.NewFile(uintptr(fd), path)), nil
}

func newDumpDir(dir *os.File) *dumpDir {
	return &dumpDir{dir: dir, path: dir.Name(), pages: make(map[uint32]*pagesFile)}
}

func (dir *dumpDir) close() {
	for ; dir != nil; dir = dir.parent {
		dir.dir.Close()
	}
}

// open opens a regular file of the directory; not what a link leads to, for the
// dump may have come from anywhere.
func (dir *dumpDir) open(name string) (*os.File, int64, error) {
	path := dir.path + "/" + name
	fd, err := unix.Openat(int(dir.dir.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, 0, &os.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(fd), path)
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, st.Size(), nil
}

// read reads a small image file.
func (dir *dumpDir) read(name string) ([]byte, error) {
	f, size, err := dir.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if size > maxMetadata {
		return nil, fmt.Errorf("%s has %d bytes, more than the %d that are read", f.Name(), size, maxMetadata)
	}
	data := make([]byte, size)
	if _, err := io.ReadFull(f, data); err != nil {
		return nil, fmt.Errorf("read %s: %w", f.Name(), err)
	}
	return data, nil
}

// openTask reads what one process's memory was.
func (d *dump) openTask(dir *dumpDir, pid int) (*task, error) {
	name := fmt.Sprintf("mm-%d.img", pid)
	image, err := dir.read(name)
	if err != nil {
		return nil, err
	}
	areas, err := parseMM(image, pageSize)
	if err != nil {
		return nil, fmt.Errorf("%s/%s: %w", dir.path, name, err)
	}
	maps, err := d.openPagemap(dir, pid)
	if err != nil {
		return nil, err
	}
	t := &task{pid: pid}
	for _, a := range areas {
		if a.lazy() {
			t.areas = append(t.areas, a)
		}
	}
	return t, t.collect(maps)
}

// pagemap is one process's page map in one dump of a chain.
type pagemap struct {
	name    string
	runs    []run
	parent  *pagemap
	missing error // why there is no parent
}

// run is an entry with its contents, if they are in this dump.
type run struct {
	entry
	data []byte
}

// openPagemap reads a process's page map, and those of the dumps below it.
func (d *dump) openPagemap(dir *dumpDir, pid int) (*pagemap, error) {
	name := fmt.Sprintf("pagemap-%d.img", pid)
	image, err := dir.read(name)
	if err != nil {
		return nil, err
	}
	m := &pagemap{name: dir.path + "/" + name}
	id, entries, err := parsePagemap(image, pageSize)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", m.name, err)
	}
	file, err := d.openPages(dir, id)
	if err != nil {
		return nil, err
	}
	var offset uint64
	for _, e := range entries {
		r := run{entry: e}
		if e.flags&entryPresent != 0 {
			if e.len > uint64(len(file.data))-offset {
				return nil, fmt.Errorf("%s has %d bytes, but %s needs more: the dump is damaged or incomplete", file.path, len(file.data), m.name)
			}
			r.data = file.data[offset : offset+e.len : offset+e.len]
			offset += e.len
		}
		m.runs = append(m.runs, r)
	}
	if dir.parent == nil {
		m.missing = errors.New("there is none: the dump has no `parent`")
	} else if m.parent, err = d.openPagemap(dir.parent, pid); errors.Is(err, os.ErrNotExist) {
		m.missing = err // a process that started between the two dumps
	} else if err != nil {
		return nil, err
	}
	return m, nil
}

// openPages maps a file of pages.
func (d *dump) openPages(dir *dumpDir, id uint32) (*pagesFile, error) {
	if f, ok := dir.pages[id]; ok {
		return f, nil
	}
	f, size, err := dir.open(fmt.Sprintf("pages-%d.img", id))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	file := &pagesFile{path: f.Name()}
	if size >= int64(pageSize) {
		// Not the part of a page at the end: an access to it succeeds, and reads zeroes.
		file.data, err = unix.Mmap(int(f.Fd()), 0, int(size-size%int64(pageSize)), unix.PROT_READ, unix.MAP_SHARED)
		if err != nil {
			return nil, &os.PathError{Op: "mmap", Path: f.Name(), Err: err}
		}
		d.files = append(d.files, file)
	}
	dir.pages[id] = file
	return file, nil
}

// fileOf names the file that data is a part of.
func (d *dump) fileOf(data []byte) string {
	p := uintptr(unsafe.Pointer(unsafe.SliceData(data)))
	for _, f := range d.files {
		if start := uintptr(unsafe.Pointer(unsafe.SliceData(f.data))); start <= p && p-start < uintptr(len(f.data)) {
			return f.path
		}
	}
	return "a file of pages"
}

// collect finds the contents of every lazy page, in whatever dump of the chain
// they are.
func (t *task) collect(m *pagemap) error {
	for _, r := range m.runs {
		// CRIU reads all others itself.
		if r.flags&entryLazy == 0 {
			continue
		}
		if err := m.resolve(r.addr, r.end(), t.add); err != nil {
			return err
		}
	}
	return nil
}

// add appends contents, except for areas that must come up empty.
func (t *task) add(addr uint64, data []byte) {
	for len(data) > 0 {
		i := sort.Search(len(t.areas), func(i int) bool { return t.areas[i].end > addr })
		n := uint64(len(data))
		empty := false
		if i < len(t.areas) && t.areas[i].start <= addr {
			n = min(n, t.areas[i].end-addr)
			empty = t.areas[i].wiped()
		} else if i < len(t.areas) {
			n = min(n, t.areas[i].start-addr)
		}
		if !empty {
			t.extents = append(t.extents, extent{addr: addr, data: data[:n:n], first: t.pages})
			t.pages += int(n / pageSize)
		}
		addr += n
		data = data[n:]
	}
}

// resolve calls add for the contents of [addr, end), in order.
func (m *pagemap) resolve(addr, end uint64, add func(addr uint64, data []byte)) error {
	i := sort.Search(len(m.runs), func(i int) bool { return m.runs[i].end() > addr })
	for ; addr < end; i++ {
		if i == len(m.runs) || m.runs[i].addr > addr {
			return fmt.Errorf("%s lacks the page at %#x: the dump is damaged or incomplete", m.name, addr)
		}
		r := m.runs[i]
		stop := min(end, r.end())
		switch {
		case r.flags&entryParent != 0 && m.parent == nil:
			return fmt.Errorf("%s: the page at %#x is in the parent's dump: %w", m.name, addr, m.missing)
		case r.flags&entryParent != 0:
			if err := m.parent.resolve(addr, stop, add); err != nil {
				return err
			}
		case r.flags&entryPresent != 0:
			add(addr, r.data[addr-r.addr:stop-r.addr])
		default:
			return fmt.Errorf("%s: the page at %#x is in no file: a dump made with --lazy-pages cannot be restored from its images", m.name, addr)
		}
		addr = stop
	}
	return nil
}

var pageSize = uint64(os.Getpagesize())
