package runtime

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// mountTrees are mounts that a dump does not have, made and in no namespace yet,
// in the order of the spec.
type mountTrees []mountTree

type mountTree struct {
	destination string
	fd          int
}

// detachedTrees makes all of the mounts, or fails with some of them made.
func detachedTrees(mounts []specs.Mount) (trees mountTrees, err error) {
	for _, m := range mounts {
		fd, err := detachedTree(m)
		if err != nil {
			return trees, fmt.Errorf("mount %s: %w", m.Destination, err)
		}
		trees = append(trees, mountTree{m.Destination, fd})
	}
	return trees, nil
}

func (t mountTrees) close() {
	for _, tree := range t {
		unix.Close(tree.fd)
	}
}

// attach puts the mounts into the mount namespace of a process. Their mount points
// are there: see makeMountPoints.
func (t mountTrees) attach(pid int) error {
	if len(t) == 0 {
		return nil
	}
	return inMountNamespace(pid, func() error {
		root, err := os.OpenFile("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer root.Close()
		for _, tree := range t {
			if err := tree.attach(root); err != nil {
				return fmt.Errorf("attach mount %s: %w", tree.destination, err)
			}
		}
		return nil
	})
}

func (t mountTree) attach(root *os.File) error {
	target, err := openInRoot(root, t.destination)
	if errors.Is(err, unix.ENOENT) {
		// It lies in a file system that came with the dump.
		var st unix.Stat_t
		if err := unix.Fstat(t.fd, &st); err != nil {
			return os.NewSyscallError("fstat", err)
		}
		if err := makeMountPoint("/", t.destination, st.Mode&unix.S_IFMT != unix.S_IFDIR); err != nil {
			return err
		}
		target, err = openInRoot(root, t.destination)
	}
	if err != nil {
		return err
	}
	defer unix.Close(target)
	// As libcontainer, which made sure of it for a cold start: what a process
	// writes to /proc to be confined must reach the kernel.
	var fs unix.Statfs_t
	if err := unix.Fstatfs(target, &fs); err != nil {
		return os.NewSyscallError("fstatfs", err)
	}
	if fs.Type == unix.PROC_SUPER_MAGIC {
		return errors.New("it is inside /proc")
	}
	err = unix.MoveMount(t.fd, "", target, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
	return os.NewSyscallError("move_mount", err)
}

// openInRoot opens a path as the container would. Its links are hostile: wherever
// they lead, it stays below the root.
func openInRoot(root *os.File, name string) (int, error) {
	fd, err := unix.Openat2(int(root.Fd()), name, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	return fd, os.NewSyscallError("openat2", err)
}

// mountAttributes are the mount options that mount_setattr(2) knows.
var mountAttributes = map[string]uint64{
	"ro":     unix.MOUNT_ATTR_RDONLY,
	"nosuid": unix.MOUNT_ATTR_NOSUID,
	"nodev":  unix.MOUNT_ATTR_NODEV,
	"noexec": unix.MOUNT_ATTR_NOEXEC,

	"noatime":     unix.MOUNT_ATTR_NOATIME,
	"strictatime": unix.MOUNT_ATTR_STRICTATIME,
	"nodiratime":  unix.MOUNT_ATTR_NODIRATIME,
	"nosymfollow": unix.MOUNT_ATTR_NOSYMFOLLOW,
	// The recursive forms: recursive binds are changed as a whole.
	"rro":     unix.MOUNT_ATTR_RDONLY,
	"rnosuid": unix.MOUNT_ATTR_NOSUID,
	"rnodev":  unix.MOUNT_ATTR_NODEV,
	"rnoexec": unix.MOUNT_ATTR_NOEXEC,
}

// mountDefaults are options that ask for what a new mount is anyway.
var mountDefaults = []string{
	"bind", "rbind", "rw", "suid", "dev", "exec", "relatime", "private", "rprivate", "defaults",
	// What the host mounts later below a source of its own does not show up in
	// a restored container.
	"slave", "rslave",
	// The directory that would be copied up is the container's, and has what
	// the dump's workload left in it.
	"tmpcopyup",
}

// detachedTree makes the mount m in no namespace at all, as a file descriptor.
func detachedTree(m specs.Mount) (int, error) {
	var attr unix.MountAttr
	var data []string
	for _, o := range m.Options {
		if a, ok := mountAttributes[o]; ok {
			attr.Attr_set |= a
			if a&unix.MOUNT_ATTR__ATIME != 0 {
				attr.Attr_clr |= unix.MOUNT_ATTR__ATIME // only as a whole can it be changed
			}
		} else if !slices.Contains(mountDefaults, o) {
			data = append(data, o)
		}
	}
	recursive := slices.Contains(m.Options, "rbind")
	var fd int
	var err error
	if recursive || m.Type == "bind" || slices.Contains(m.Options, "bind") {
		if len(data) > 0 {
			return -1, fmt.Errorf("a restored container cannot be given a bind mount with option %q", data[0])
		}
		flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC)
		if recursive {
			flags |= unix.AT_RECURSIVE
		}
		if fd, err = unix.OpenTree(unix.AT_FDCWD, m.Source, flags); err != nil {
			return -1, &os.PathError{Op: "open_tree", Path: m.Source, Err: err}
		}
	} else if fd, err = newMount(m.Type, m.Source, data); err != nil {
		return -1, err
	}
	// A mount from the host must not carry the container's own mounts back.
	attr.Propagation = unix.MS_PRIVATE
	flags := uint(unix.AT_EMPTY_PATH)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	if err := unix.MountSetattr(fd, "", flags, &attr); err != nil {
		unix.Close(fd)
		return -1, os.NewSyscallError("mount_setattr", err)
	}
	return fd, nil
}

// newMount mounts a new file system (fsopen(2), fsconfig(2), fsmount(2)).
func newMount(fstype, source string, data []string) (int, error) {
	ctx, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("fsopen %s: %w", fstype, err)
	}
	defer unix.Close(ctx)
	if source != "" {
		if err := unix.FsconfigSetString(ctx, "source", source); err != nil {
			return -1, fmt.Errorf("%s: source %q: %w", fstype, source, err)
		}
	}
	for _, o := range data {
		key, value, hasValue := strings.Cut(o, "=")
		if hasValue {
			err = unix.FsconfigSetString(ctx, key, value)
		} else {
			err = unix.FsconfigSetFlag(ctx, key)
		}
		if err != nil {
			return -1, fmt.Errorf("%s: option %q: %w", fstype, o, err)
		}
	}
	if err := unix.FsconfigCreate(ctx); err != nil {
		return -1, fmt.Errorf("create %s: %w", fstype, err)
	}
	fd, err := unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return -1, os.NewSyscallError("fsmount", err)
	}
	return fd, nil
}

// inMountNamespace runs fn in the mount namespace of a process, with that
// namespace's root.
func inMountNamespace(pid int, fn func() error) error {
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	if err != nil {
		return err
	}
	defer ns.Close()
	return onOwnThread(func() error {
		// setns(2): a thread that shares its root with others cannot move to
		// another mount namespace.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return os.NewSyscallError("unshare", err)
		}
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNS); err != nil {
			return os.NewSyscallError("setns", err)
		}
		return fn()
	})
}
