package hook

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// maxNames bounds what is read of a directory. MakeDir allows fewer.
const maxNames = 1024

// directory is a container's /run/crac, held open, so that what is done in it is
// done in it, whatever becomes of its path. The workload can write there: names
// are opened below it and never followed.
type directory struct{ *os.File }

func openDirectory(path string) (directory, error) {
	f, err := os.OpenFile(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	return directory{f}, err
}

func (d directory) fd() int { return int(d.Fd()) }

// path names something in the directory for calls that know only paths. Unlike
// the directory's own path it is short: a socket's may have 108 bytes (unix(7)).
func (d directory) path(name string) string { return fdPath(d.File) + "/" + name }

// fdPath is a path of an open file. Opening it opens just that file again.
func fdPath(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

// openat opens a name in the directory, not following a link.
func (d directory) openat(name string, flags int, mode uint32) (*os.File, error) {
	fd, err := unix.Openat(d.fd(), name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// find opens a name in the directory for nothing but to know what it is, which
// never blocks and has no effect.
func (d directory) find(name string) (*os.File, fs.FileMode, error) {
	f, err := d.openat(name, unix.O_PATH, 0)
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, info.Mode(), nil
}

// sockets lists the names at which participants may listen, sorted.
func (d directory) sockets() ([]string, error) {
	f, err := d.openat(".", unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(maxNames + 1)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	if len(names) > maxNames {
		return nil, fmt.Errorf("it holds more than %d names: remove what is not a participant's socket", maxNames)
	}
	names = slices.DeleteFunc(names, func(name string) bool {
		return name == ControlName || strings.HasPrefix(name, ".") || !d.isSocket(name)
	})
	slices.Sort(names)
	return names, nil
}

func (d directory) isSocket(name string) bool {
	f, mode, err := d.find(name)
	if err != nil {
		return false
	}
	f.Close()
	return mode.Type() == fs.ModeSocket
}

// remove removes a name, unless it is a directory with something in it. What is
// not there is fine.
func (d directory) remove(name string) error {
	err := unix.Unlinkat(d.fd(), name, 0)
	if errors.Is(err, unix.EISDIR) {
		err = unix.Unlinkat(d.fd(), name, unix.AT_REMOVEDIR)
	}
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return &fs.PathError{Op: "remove", Path: name, Err: err}
	}
	return nil
}

// rename puts one name in the place of another.
func (d directory) rename(from, to string) error {
	if err := unix.Renameat(d.fd(), from, d.fd(), to); err != nil {
		return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
	}
	return nil
}

// write makes a file that one user may read, whole or not at all, in the place of
// what had its name.
func (d directory) write(name string, data []byte, uid, gid int) (err error) {
	draft := hidden(name)
	f, err := d.openat(draft, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = d.remove(draft)
		}
	}()
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(0o600), f.Chown(uid, gid), f.Close()) // whatever the umask
	if err != nil {
		return err
	}
	return d.rename(draft, name)
}

// read reads a regular file of at most max bytes.
func (d directory) read(name string, max int64) ([]byte, error) {
	found, mode, err := d.find(name)
	if err != nil {
		return nil, err
	}
	defer found.Close()
	if !mode.IsRegular() {
		return nil, fmt.Errorf("%s is %s and must be a regular file", name, kind(mode))
	}
	// It is regular and stays what it is, whatever its name stands for by now.
	// O_NONBLOCK, because a lease that the workload holds on it would make us wait
	// (fcntl(2), F_SETLEASE).
	f, err := os.OpenFile(fdPath(found), unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, max+1))
	if err == nil && int64(len(data)) > max {
		err = fmt.Errorf("%s is longer than %d bytes", name, max)
	}
	return data, err
}

// kind names what a file is, for messages.
func kind(mode fs.FileMode) string {
	switch {
	case mode.IsRegular():
		return "a regular file"
	case mode&fs.ModeSymlink != 0:
		return "a symbolic link"
	case mode&fs.ModeNamedPipe != 0:
		return "a FIFO"
	case mode.IsDir():
		return "a directory"
	case mode&fs.ModeSocket != 0:
		return "a socket"
	}
	return "a device"
}

// hidden makes a name for a moment, which nobody can guess and which no
// participant has.
func hidden(name string) string { return "." + name + "-" + NewID() }
