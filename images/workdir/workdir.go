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

// New makes one in parent, or in the system's temporary directory if that is empty.
func New(parent string) (*Dir, error) {
	if parent == "" {
		parent = os.TempDir()
	}
	sweep(parent)
	for {
		path, err := os.MkdirTemp(parent, prefix)
		if err != nil {
			return nil, err
		}
		lock, err := open(path)
		if errors.Is(err, errOthers) || errors.Is(err, fs.ErrNotExist) {
			continue // swept before it was locked
		}
		if err != nil && !errors.Is(err, errNoLocks) {
			return nil, errors.Join(err, os.RemoveAll(path))
		}
		return &Dir{path, lock}, nil
	}
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
	// errOthers is about a directory that a process has, or that is another user's.
	errOthers = errors.New("somebody else's")
	// errNoLocks is about a file system, such as NFS, on which a directory cannot be
	// locked. Nothing is swept there.
	errNoLocks = errors.New("no lock")
)

// open locks a directory: until the file is closed, which the end of a process does.
func open(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
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
	var held, there unix.Stat_t
	if err := unix.Fstat(fd, &held); err != nil {
		return fmt.Errorf("stat %s: %w", path, err)
	}
	if int(held.Uid) != os.Geteuid() {
		return errOthers
	}
	switch err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); {
	case errors.Is(err, unix.EWOULDBLOCK):
		return errOthers
	case err != nil:
		return errNoLocks
	}
	// It may have been removed before it was locked.
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
		if f, err := open(path); err == nil {
			_ = os.RemoveAll(path)
			f.Close()
		}
	}
}
