package tmpfs

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Pack makes the compressed archive of a tmpfs that nobody changes meanwhile, and of
// what is mounted on it nothing, as CRIU has tar make one; the same for the same
// files. More than most bytes of contents is an error, as is what an archive could
// not give back as tar would: a hole in a file, more entries than Unpack takes.
// Sockets are left out.
func Pack(dir int, most int64) ([]byte, error) {
	root, err := os.OpenRoot(fmt.Sprintf("/proc/self/fd/%d", dir))
	if err != nil {
		return nil, err
	}
	defer root.Close()
	var out bytes.Buffer
	zipped, err := gzip.NewWriterLevel(&out, gzip.BestSpeed)
	if err != nil {
		return nil, err
	}
	p := packer{root: root, to: tar.NewWriter(zipped), left: most, names: map[uint64]string{}}
	if err := fs.WalkDir(root.FS(), ".", p.entry); err != nil {
		return nil, err
	}
	if err := errors.Join(p.to.Close(), zipped.Close()); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

type packer struct {
	root    *os.Root
	to      *tar.Writer
	left    int64
	entries int
	names   map[uint64]string // of files with several, by their inodes
}

func (p *packer) entry(name string, _ fs.DirEntry, err error) error {
	if err != nil {
		return err
	}
	if p.entries++; p.entries > maxEntries {
		return fmt.Errorf("more than %d files", maxEntries)
	}
	info, err := p.root.Lstat(name)
	if err != nil {
		return err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("%s: no status", name)
	}
	h := &tar.Header{
		Format: tar.FormatGNU, Name: "./" + name, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid),
		ModTime: time.Unix(st.Mtim.Sec, 0), // all that this format holds
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		h.Typeflag, h.Name = tar.TypeDir, "./"+name+"/"
		if name == "." {
			h.Name = "./"
		}
	case unix.S_IFREG:
		h.Typeflag, h.Size = tar.TypeReg, st.Size
	case unix.S_IFLNK:
		h.Typeflag = tar.TypeSymlink
		if h.Linkname, err = p.root.Readlink(name); err != nil {
			return err
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = tar.TypeChar
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor, h.Devminor = int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFSOCK:
		return nil // made by who binds it
	}
	if h.Typeflag != tar.TypeDir && st.Nlink > 1 {
		if first := p.names[st.Ino]; first != "" {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		} else {
			p.names[st.Ino] = h.Name
		}
	}
	if h.Typeflag != tar.TypeReg {
		return p.to.WriteHeader(h)
	}
	return p.file(name, h, st)
}

func (p *packer) file(name string, h *tar.Header, st *syscall.Stat_t) error {
	if st.Blocks*512 < st.Size {
		return fmt.Errorf("%s has holes", name)
	}
	if p.left -= st.Size; p.left < 0 {
		return errors.New("is too large")
	}
	if err := p.to.WriteHeader(h); err != nil {
		return err
	}
	if h.Size == 0 {
		return nil
	}
	f, err := p.root.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.CopyN(p.to, f, h.Size)
	return err
}
