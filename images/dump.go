package images

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/oci/criuimage"
)

// Limits of a dump and its image files. CRIU's largest of the files read here are a
// few kilobytes per process and mount.
const (
	maxImage    = 16 << 20
	maxImages   = 1 << 20
	maxMessages = 1 << 16

	// maxKept bounds, in bytes, what of a dump's files is held in memory from one look
	// at them to the next. What is beyond it is read again. keptFile is what one takes
	// besides its content.
	maxKept  = 8 << 20
	keptFile = 1 << 10
)

// Dump is a dump that somebody looks at, before it is restored or packed. It is hostile.
// Its directory is opened and listed once, and each small file is read and taken apart
// once for all looks: what was verified is what they see. It is not for two at a time.
type Dump struct {
	path  string
	dir   *os.File
	names []string // sorted

	// What was read, by name, and how much more may be kept.
	kept   map[string][]byte
	cores  map[string]core
	tables map[string]*mountTable
	room   int
}

// OpenDump opens a dump that is no checkpoint's: nothing says what is in it. Errors wrap
// ErrDamaged.
func OpenDump(dir string) (*Dump, error) {
	d, err := openDump(dir)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	return d, nil
}

func openDump(dir string) (*Dump, error) {
	f, err := os.OpenFile(dir, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	return newDump(dir, f)
}

// newDump lists an open directory, which is closed if that fails.
func newDump(path string, dir *os.File) (*Dump, error) {
	names, err := dir.Readdirnames(maxImages)
	if err == nil && len(names) == maxImages {
		err = fmt.Errorf("%s holds more than %d files", path, maxImages)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		dir.Close()
		return nil, err
	}
	slices.Sort(names)
	return &Dump{
		path: path, dir: dir, names: names,
		kept: make(map[string][]byte), cores: make(map[string]core), tables: make(map[string]*mountTable), room: maxKept,
	}, nil
}

// Close lets the directory go. It may be called again.
func (d *Dump) Close() {
	_ = d.dir.Close()
	d.kept, d.cores, d.tables, d.room = nil, nil, nil, 0
}

// Memory is the size of the memory in the dump, in bytes.
func (d *Dump) Memory() (size int64) {
	for _, name := range d.names {
		var st unix.Stat_t
		if IsPages(name) && unix.Fstatat(int(d.dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil {
			size += st.Size
		}
	}
	return size
}

// one reads an image that holds one message.
func (d *Dump) one(name string, kind criuimage.Kind) ([]byte, error) {
	data, err := d.file(name)
	if err != nil {
		return nil, err
	}
	return criuimage.One(data, kind)
}

func (d *Dump) read(name string, kind criuimage.Kind) ([][]byte, error) {
	data, err := d.file(name)
	if err != nil {
		return nil, err
	}
	return criuimage.Split(data, kind, maxMessages)
}

// file reads a file, which others may have read as well: it is not to be changed.
func (d *Dump) file(name string) ([]byte, error) { return d.small(name, maxImage) }

// small is file for one of no more than so many bytes.
func (d *Dump) small(name string, most int64) ([]byte, error) {
	if data, ok := d.kept[name]; ok && int64(len(data)) <= most {
		return data, nil
	}
	f, err := openDumpFile(int(d.dir.Fd()), name)
	if err != nil {
		return nil, err
	}
	defer f.close()
	if f.size > most {
		return nil, fmt.Errorf("has more than %d bytes", most)
	}
	data := make([]byte, f.size)
	if err := f.readFull(data); err != nil {
		return nil, err
	}
	d.keep(name, data)
	return data, nil
}

// keep holds a file for the looks to come.
func (d *Dump) keep(name string, data []byte) {
	if size := keptFile + len(data); size <= d.room {
		d.kept[name], d.room = data, d.room-size
	}
}

// core is the image of a thread, and what it says.
type core struct {
	message []byte
	task
}

func (d *Dump) core(name string) (core, error) {
	if c, ok := d.cores[name]; ok {
		return c, nil
	}
	message, err := d.one(name, criuimage.Core)
	if err != nil {
		return core{}, err
	}
	t, err := parseCore(message)
	if err != nil {
		return core{}, err
	}
	c := core{message, t}
	if _, ok := d.kept[name]; ok {
		d.cores[name] = c
	}
	return c, nil
}

// mountTable is the image of a mount namespace: its messages, and what they say.
type mountTable struct {
	name     string
	messages [][]byte
	entries  []mountEntry
}

// mounts reads such an image. All of them are held, and so they may not be larger
// together than one may be.
func (d *Dump) mounts(name string) (*mountTable, error) {
	if t, ok := d.tables[name]; ok {
		return t, nil
	}
	count, size := 0, int64(maxImage)
	for _, t := range d.tables {
		count += len(t.messages)
		for _, m := range t.messages {
			size -= int64(len(m))
		}
	}
	data, err := d.small(name, size)
	if err != nil {
		return nil, err
	}
	t := &mountTable{name: name}
	if t.messages, err = criuimage.Split(data, criuimage.Mountpoints, maxMessages-count); err != nil {
		return nil, err
	}
	t.entries = make([]mountEntry, len(t.messages))
	for i, data := range t.messages {
		if t.entries[i], err = parseMount(data); err != nil {
			return nil, err
		}
	}
	d.tables[name] = t
	return t, nil
}

// dumpFile is an open regular file. An *os.File would ask the kernel more about each
// than it takes to read it, and a JVM's dump has one for each of some forty threads.
type dumpFile struct {
	fd   int
	size int64
}

// openDumpFile opens one. Errors do not say its name.
func openDumpFile(dirfd int, name string) (f dumpFile, err error) {
	if f.fd, err = openat2(dirfd, name, 0); err != nil {
		return f, err
	}
	var st unix.Stat_t
	err = unix.Fstat(f.fd, &st)
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = errors.New("is not a regular file")
	}
	if err != nil {
		f.close()
	}
	f.size = st.Size
	return f, err
}

func (f dumpFile) close() { _ = unix.Close(f.fd) }

// readFull fills data with what comes next.
func (f dumpFile) readFull(data []byte) error {
	for len(data) > 0 {
		n, err := unix.Read(f.fd, data)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		case n == 0:
			return io.ErrUnexpectedEOF
		}
		data = data[n:]
	}
	return nil
}
