package hook

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// MakeDir makes the directory that a container sees as /run/crac: a tmpfs of its
// own, which everyone may write, bounded in bytes and in names. The path must not
// be there yet. label is the SELinux context of the container's mounts, if it has
// one. It needs CAP_SYS_ADMIN.
func MakeDir(path, label string) error {
	if err := os.Mkdir(path, 0o700); err != nil {
		return err
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	data := "mode=1777,size=1m,nr_inodes=1024"
	if label != "" {
		data += fmt.Sprintf(",context=%q", label)
	}
	if err := unix.Mount("crac", path, "tmpfs", flags, data); err != nil {
		return errors.Join(fmt.Errorf("mount a tmpfs on %s: %w", path, err), os.Remove(path))
	}
	return nil
}

// RemoveDir unmounts and removes what MakeDir made. What is not there, or not
// mounted, is fine; what holds something without being mounted is left and an
// error.
func RemoveDir(path string) error {
	// The workload may still hold it; and EINVAL is a directory that is no mount.
	err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
