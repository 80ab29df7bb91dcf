package runtime

import (
	"errors"
	"fmt"
	"os"
	"path"
	"strings"

	securejoin "github.com/cyphar/filepath-securejoin/pathrs-lite"
	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"
)

// makeMountPoints makes what the mounts of a container go onto: CRIU restores
// mounts, and makes no places for them.
//
// As in a cold start, a mount below a bind mount has its place in the files that
// are bound. Nothing runs in the root file system yet, but its links are hostile,
// and files that are bound may be changed by other containers meanwhile.
func makeMountPoints(rootfs string, mounts []*configs.Mount) error {
	for i, m := range mounts {
		if m.Device == "cgroup" || inTmpfs(m.Destination, mounts) {
			continue // the dump has it
		}
		root, dest := rootfs, m.Destination
		for _, above := range mounts[:i] {
			if rest, ok := strings.CutPrefix(m.Destination, strings.TrimSuffix(above.Destination, "/")+"/"); ok && above.Device == "bind" {
				root, dest = above.Source, rest
			}
		}
		file := false
		if m.Device == "bind" {
			st, err := os.Stat(m.Source)
			if err != nil {
				return fmt.Errorf("source of mount %s: %w", m.Destination, err)
			}
			file = !st.IsDir()
		}
		if err := makeMountPoint(root, dest, file); err != nil {
			return fmt.Errorf("mount point %s: %w", m.Destination, err)
		}
	}
	return nil
}

func inTmpfs(destination string, mounts []*configs.Mount) bool {
	for _, m := range mounts {
		if m.Device == "tmpfs" && strings.HasPrefix(destination, strings.TrimSuffix(m.Destination, "/")+"/") {
			return true
		}
	}
	return false
}

// makeMountPoint makes a directory, or an empty file, below root unless there is
// anything at the place.
func makeMountPoint(root, dest string, file bool) error {
	top, err := os.OpenFile(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer top.Close()
	there, err := securejoin.OpenatInRoot(top, dest)
	if err == nil {
		return there.Close()
	}
	if !errors.Is(err, unix.ENOENT) {
		return err
	}
	if !file {
		dir, err := securejoin.MkdirAllHandle(top, dest, 0o755)
		if err != nil {
			return err
		}
		return dir.Close()
	}
	dir, err := securejoin.MkdirAllHandle(top, path.Dir(dest), 0o755)
	if err != nil {
		return err
	}
	defer dir.Close()
	fd, err := unix.Openat(int(dir.Fd()), path.Base(dest), unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return &os.PathError{Op: "create", Path: dest, Err: err}
	}
	return unix.Close(fd)
}
