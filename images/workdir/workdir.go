// Package workdir makes directories in which dumps lie unpacked, in the open, for as long as
// their process needs them.
//
// A directory is locked (flock) while its process lives. What a process left that was
// killed is removed by the next that makes one in the same place. systemd-tmpfiles leaves
// locked directories alone, too.
package workdir

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const prefix = "crac-work-"

// Dir is a directory of this process's own, which nobody else can look into.
type Dir struct {
	Path string
	lock *os.File // nil where the file system has no such locks
}

// tries bounds how often a new directory may be taken away before it is locked.
const tries = 100

// New makes one in parent, or in the system's temporary directory if that is empty.
func New(parent string) (*Dir, error) {
	if parent == "" {
		parent = os.TempDir()
	}
	sweep(parent)
	return newIn(parent, openLocked)
}

// newIn makes one, which open opens and locks.
func newIn(parent string, open func(path string) (*os.File, error)) (*Dir, error) {
	for range tries {
		path, err := os.MkdirTemp(parent, prefix)
		if err != nil {
			return nil, err
		}
		lock, err := open(path)
		switch {
		case err == nil, errors.Is(err, errNoLocks):
			return &Dir{path, lock}, nil
		case !errors.Is(err, errLocked) && !errors.Is(err, fs.ErrNotExist):
			return nil, errors.Join(err, os.RemoveAll(path))
		}
		_ = os.Remove(path) // it is empty; most likely somebody sweeps it
	}
	return nil, fmt.Errorf("%d new directories in %s were locked or removed by somebody else at once; name another place (--work-dir, or TMPDIR)", tries, parent)
}

// Remove removes it with all that is in it.
func (d *Dir) Remove() error {
	err := os.RemoveAll(d.Path)
	if d.lock != nil {
		err = errors.Join(err, d.lock.Close())
	}
	return err
}

var (
	// errLocked is about a directory that a process has.
	errLocked = errors.New("somebody else's")
	// errNoLocks is about a file system, such as NFS, on which a directory cannot be
	// locked. Nothing is swept there.
	errNoLocks = errors.New("no lock")
)

func open(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
}

// openLocked locks a directory: until the file is closed, which the end of a process does.
func openLocked(path string) (*os.File, error) {
	f, err := open(path)
	if err != nil {
		return nil, err
	}
	if err := lock(f, path); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func lock(f *os.File, path string) error {
	fd := int(f.Fd())
	switch err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); {
	case errors.Is(err, unix.EWOULDBLOCK):
		return errLocked
	case err != nil:
		return errNoLocks
	}
	// It may have been removed before it was locked.
	var held, there unix.Stat_t
	if err := unix.Fstat(fd, &held); err != nil {
		return fmt.Errorf("stat %s: %w", path, err)
	}
	if err := unix.Lstat(path, &there); err != nil {
		return &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	if held.Dev != there.Dev || held.Ino != there.Ino {
		return fs.ErrNotExist
	}
	return nil
}

// sweep removes the directories of processes that are no more. What cannot be removed is
// no reason not to make another.
func sweep(parent string) {
	entries, _ := os.ReadDir(parent)
	for _, e := range entries {
		if !e.IsDir() || !strings.HasPrefix(e.Name(), prefix) {
			continue
		}
		path := filepath.Join(parent, e.Name())
		f, err := open(path)
		if err != nil {
			continue
		}
		if isOurs(f) && lock(f, path) == nil {
			_ = os.RemoveAll(path)
		}
		f.Close()
	}
}

// isOurs tells whether a directory is this user's: everybody may use the place. Where all
// that is made belongs to somebody else (vfat, CIFS, some NFS) nothing is.
func isOurs(f *os.File) bool {
	var st unix.Stat_t
	return unix.Fstat(int(f.Fd()), &st) == nil && int(st.Uid) == os.Geteuid()
}
