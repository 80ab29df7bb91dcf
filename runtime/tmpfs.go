package runtime

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	criurpc "github.com/checkpoint-restore/go-criu/v7/rpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/crac-shim/crac/runtime/tmpfs"
)

// maxTmpfs bounds, in bytes, what all such mounts of a restore hold: until the
// workload writes there it is not the container's memory, but ours.
const maxTmpfs = 1 << 20

// Tmpfs is a tmpfs of a dump that is to be there, with its files, before CRIU is:
// CRIU executes tar for each that it makes itself, and nothing goes on meanwhile.
type Tmpfs struct {
	// Key marks it in the mount table that CRIU reads, as external.
	Key      string
	Source   string
	Options  []string // of the superblock
	ReadOnly bool     // the superblock
	Archive  []byte   // of its files, compressed; hostile
}

// readyTmpfs are such mounts of one container. They are in no namespace, so that
// nothing is left of them when this process ends, and only a restore attaches
// them where CRIU finds them.
type readyTmpfs struct {
	mu     sync.Mutex
	closed bool
	mounts []readyMount

	detached sync.WaitGroup // unmounts that are under way
}

type readyMount struct {
	key string
	fd  int
}

// MakeTmpfs makes some of the mounts for the container's restore, and returns the
// keys of those: the others are left to CRIU, which gets by with less well-formed
// archives, or says what is wrong. It may be called while the container is
// prepared, created or deleted.
func (c *Container) MakeTmpfs(all []Tmpfs) (keys []string) {
	if _, mapped := namespace(c.spec, specs.UserNamespace); mapped {
		return nil // its users must own the mounts
	}
	left := int64(maxTmpfs)
	for _, t := range all {
		fd, size, err := t.make(left)
		if err != nil {
			continue
		}
		if !c.tmpfs.add(readyMount{t.Key, fd}) {
			break
		}
		left -= size
		keys = append(keys, t.Key)
	}
	return keys
}

func (t Tmpfs) make(most int64) (fd int, size int64, err error) {
	fd, err = newMount("tmpfs", t.Source, t.Options)
	if err != nil {
		return -1, 0, err
	}
	defer func() {
		if err != nil {
			unix.Close(fd)
		}
	}()
	if size, err = tmpfs.Unpack(fd, bytes.NewReader(t.Archive), most); err != nil {
		return -1, 0, err
	}
	if t.ReadOnly {
		if err := readOnlySuperblock(fd); err != nil {
			return -1, 0, err
		}
	}
	// Of no use to anyone but the workload: CRIU gives its mount the flags that
	// the dump has.
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC, Propagation: unix.MS_PRIVATE}
	return fd, size, os.NewSyscallError("mount_setattr", unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr))
}

func readOnlySuperblock(mount int) error {
	ctx, err := unix.Fspick(mount, "", unix.FSPICK_EMPTY_PATH|unix.FSPICK_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("fspick", err)
	}
	defer unix.Close(ctx)
	if err := unix.FsconfigSetFlag(ctx, "ro"); err != nil {
		return os.NewSyscallError("fsconfig", err)
	}
	return os.NewSyscallError("fsconfig", unix.FsconfigReconfigure(ctx))
}

// add takes a mount, unless the container does not need any more.
func (r *readyTmpfs) add(m readyMount) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		unix.Close(m.fd)
		return false
	}
	r.mounts = append(r.mounts, m)
	return true
}

// take returns the mounts, once; none are taken afterwards.
func (r *readyTmpfs) take() (mounts []readyMount) {
	r.mu.Lock()
	defer r.mu.Unlock()
	mounts, r.mounts, r.closed = r.mounts, nil, true
	return mounts
}

// release lets the mounts go that no restore has taken, and waits for those that
// one has attached.
func (r *readyTmpfs) release() {
	for _, m := range r.take() {
		unix.Close(m.fd)
	}
	r.detached.Wait()
}

// attach mounts them below dir, which it makes, for CRIU to find. detach must be
// called.
func (r *readyTmpfs) attach(dir string, opts *criurpc.CriuOpts) (detach func(), err error) {
	mounts := r.take()
	if len(mounts) == 0 {
		return func() {}, nil
	}
	detach = func() {
		// A file system that goes waits for others who might look at it, for
		// milliseconds.
		r.detached.Go(func() {
			for i, m := range mounts {
				at := filepath.Join(dir, strconv.Itoa(i))
				_ = unix.Unmount(at, unix.MNT_DETACH)
				unix.Close(m.fd)
				os.Remove(at)
			}
			os.Remove(dir)
		})
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return detach, err
	}
	for i, m := range mounts {
		at := filepath.Join(dir, strconv.Itoa(i))
		if err := os.Mkdir(at, 0o700); err != nil {
			return detach, err
		}
		if err := unix.MoveMount(m.fd, "", unix.AT_FDCWD, at, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return detach, fmt.Errorf("tmpfs %s: %w", m.key, os.NewSyscallError("move_mount", err))
		}
		opts.ExtMnt = append(opts.ExtMnt, &criurpc.ExtMountMap{Key: proto.String(m.key), Val: proto.String(at)})
	}
	return detach, nil
}
