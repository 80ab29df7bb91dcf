// Package tmpfs fills a small tmpfs from the archive that a dump has of it, and
// makes that archive, as `tar` would, which CRIU executes once per mount.
package tmpfs

import (
	"archive/tar"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// maxEntries bounds the entries of an archive.
const maxEntries = 1024

// Unpack fills the empty directory that dir is open on, which nobody else uses
// yet, from a compressed archive, and returns how many bytes of contents that
// were; more than most is an error.
//
// The archive is hostile. It is refused if it holds anything that `tar` does not
// write there by itself, before or after some of it is unpacked: then the
// directory is of no use.
func Unpack(dir int, archive io.Reader, most int64) (size int64, err error) {
	unzipped, err := gzip.NewReader(archive)
	if err != nil {
		return 0, err
	}
	// Headers are read into memory, and some of them are of any size.
	all := &io.LimitedReader{R: unzipped, N: most + maxEntries*2048}
	u := unpacker{dir: dir, left: most}
	entries := tar.NewReader(all)
	for n := 0; ; n++ {
		h, err := entries.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return 0, err
		}
		if n == maxEntries {
			return 0, fmt.Errorf("holds more than %d entries", maxEntries)
		}
		if err := u.entry(h, entries); err != nil {
			return 0, fmt.Errorf("%q: %w", h.Name, err)
		}
	}
	// The checksum comes last.
	if _, err := io.Copy(io.Discard, all); err != nil {
		return 0, err
	}
	if all.N <= 0 {
		return 0, errors.New("is too large")
	}
	return most - u.left, u.finish()
}

type unpacker struct {
	dir  int
	left int64
	dirs []metadata
}

// metadata is what an entry says beside its contents.
type metadata struct {
	name     string
	uid, gid int
	mode     uint32
	times    []unix.Timespec // of access, of change
}

func (u *unpacker) entry(h *tar.Header, contents io.Reader) error {
	for key := range h.PAXRecords {
		switch key {
		case "path", "linkpath", "size", "uid", "gid", "mtime", "atime", "ctime":
		default:
			return fmt.Errorf("has the record %q", key)
		}
	}
	name, err := relative(h.Name)
	if err != nil {
		return err
	}
	if h.Uid < 0 || h.Gid < 0 || int64(h.Uid) >= math.MaxUint32 || int64(h.Gid) >= math.MaxUint32 {
		return fmt.Errorf("belongs to %d:%d", h.Uid, h.Gid)
	}
	changed, err := unix.TimeToTimespec(h.ModTime)
	if err != nil {
		return err
	}
	m := metadata{name: name, uid: h.Uid, gid: h.Gid, mode: uint32(h.Mode) & 0o7777, times: []unix.Timespec{{Nsec: unix.UTIME_NOW}, changed}}
	if name == "." {
		if h.Typeflag != tar.TypeDir {
			return errors.New("is no directory")
		}
		u.dirs = append(u.dirs, m)
		return nil
	}
	parent, err := u.open(path.Dir(name))
	if err != nil {
		return err
	}
	defer unix.Close(parent)
	base := path.Base(name)
	switch h.Typeflag {
	case tar.TypeDir:
		// What is made in it changes its time, and needs no permission now.
		u.dirs = append(u.dirs, m)
		return os.NewSyscallError("mkdirat", unix.Mkdirat(parent, base, 0o700))
	case tar.TypeReg, tar.TypeGNUSparse:
		return u.file(parent, base, h, contents, m)
	case tar.TypeSymlink:
		if err := unix.Symlinkat(h.Linkname, parent, base); err != nil {
			return os.NewSyscallError("symlinkat", err)
		}
		if err := unix.Fchownat(parent, base, m.uid, m.gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return os.NewSyscallError("fchownat", err)
		}
		return os.NewSyscallError("utimensat", unix.UtimesNanoAt(parent, base, m.times, unix.AT_SYMLINK_NOFOLLOW))
	case tar.TypeLink:
		return u.link(h.Linkname, parent, base)
	}
	kind, ok := map[byte]uint32{tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK, tar.TypeFifo: unix.S_IFIFO}[h.Typeflag]
	if !ok {
		return fmt.Errorf("has the type %q", h.Typeflag)
	}
	if h.Devmajor < 0 || h.Devminor < 0 || h.Devmajor > math.MaxUint32 || h.Devminor > math.MaxUint32 {
		return fmt.Errorf("is the device %d:%d", h.Devmajor, h.Devminor)
	}
	if err := unix.Mknodat(parent, base, kind|0o600, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)))); err != nil {
		return os.NewSyscallError("mknodat", err)
	}
	return m.apply(parent, base)
}

// relative takes a name of an archive that was made of ".". All others are
// refused, and with them those that lead out of the directory.
func relative(name string) (string, error) {
	inner, ok := strings.CutPrefix(name, "./")
	if name == "." || ok && inner == "" {
		return ".", nil
	}
	inner = strings.TrimSuffix(inner, "/")
	if !ok || inner == "." || !fs.ValidPath(inner) {
		return "", errors.New("has an odd name")
	}
	return inner, nil
}

// open opens a directory of the tmpfs, and of nothing else.
func (u *unpacker) open(name string) (int, error) {
	fd, err := unix.Openat2(u.dir, name, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	})
	return fd, os.NewSyscallError("openat2", err)
}

func (u *unpacker) file(parent int, base string, h *tar.Header, contents io.Reader, m metadata) error {
	if h.Size < 0 || h.Size > u.left {
		return errors.New("is too large")
	}
	u.left -= h.Size
	fd, err := unix.Openat(parent, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return os.NewSyscallError("openat", err)
	}
	f := os.NewFile(uintptr(fd), base)
	defer f.Close()
	if h.Typeflag == tar.TypeGNUSparse {
		err = writeSparse(f, contents, h.Size)
	} else {
		_, err = io.Copy(f, contents)
	}
	if err != nil {
		return err
	}
	return m.apply(parent, base)
}

// writeSparse leaves holes where a page is zero.
func writeSparse(f *os.File, contents io.Reader, size int64) error {
	if err := f.Truncate(size); err != nil {
		return err
	}
	page, zero := make([]byte, 4096), make([]byte, 4096)
	for at := int64(0); at < size; at += int64(len(page)) {
		n, err := io.ReadFull(contents, page[:min(int64(len(page)), size-at)])
		if err != nil {
			return err
		}
		if string(page[:n]) == string(zero[:n]) {
			continue
		}
		if _, err := f.WriteAt(page[:n], at); err != nil {
			return err
		}
	}
	return nil
}

// link gives a file that was unpacked before another name.
func (u *unpacker) link(to string, parent int, base string) error {
	from, err := relative(to)
	if err != nil || from == "." {
		return fmt.Errorf("is another name of %q", to)
	}
	dir, err := u.open(path.Dir(from))
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	return os.NewSyscallError("linkat", unix.Linkat(dir, path.Base(from), parent, base, 0))
}

// apply does so for anything but a symbolic link.
func (m metadata) apply(parent int, base string) error {
	// A change of the owner takes bits away from the mode.
	if err := unix.Fchownat(parent, base, m.uid, m.gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return os.NewSyscallError("fchownat", err)
	}
	if err := unix.Fchmodat(parent, base, m.mode, 0); err != nil {
		return os.NewSyscallError("fchmodat", err)
	}
	return os.NewSyscallError("utimensat", unix.UtimesNanoAt(parent, base, m.times, unix.AT_SYMLINK_NOFOLLOW))
}

// finish gives the directories what they were not to have before.
func (u *unpacker) finish() error {
	for i := len(u.dirs) - 1; i >= 0; i-- {
		m := u.dirs[i]
		parent, err := u.open(path.Dir(m.name))
		if err != nil {
			return err
		}
		err = m.apply(parent, path.Base(m.name))
		unix.Close(parent)
		if err != nil {
			return fmt.Errorf("%q: %w", m.name, err)
		}
	}
	return nil
}
