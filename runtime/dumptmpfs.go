package runtime

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/crac-shim/crac/oci/criuimage"
	"github.com/crac-shim/crac/runtime/tmpfs"
)

// tmpfsPack are small tmpfs mounts of a container, and their archives. CRIU is told
// that they come from outside, so that it does not execute tar for them while the
// workload stands still; afterwards the dump is made to be as if CRIU had. The
// methods may be called on nil.
type tmpfsPack struct {
	pid    int
	table  []byte // the mount table in which they were found
	mounts []packedTmpfs
}

type packedTmpfs struct {
	tmpfsMount
	tree    int // a descriptor
	archive []byte
}

// packedKey begins the keys of such mounts.
const packedKey = "crac-packed-"

func (m packedTmpfs) key() string { return fmt.Sprint(packedKey, m.device) }

// plainPath has nothing that means something where CRIU keeps paths and keys together,
// as mnt[PATH]:KEY (criu/external.c).
var plainPath = regexp.MustCompile(`^[A-Za-z0-9/._-]+$`)

// errTmpfsChanged is why a dump that leaves mounts out would not be right.
var errTmpfsChanged = errors.New("tmpfs mounts have changed, or cannot be packed here")

// findTmpfs finds those that the container was given when it was created and that
// are small, while it may still run. Whatever stands in the way of one leaves it to
// CRIU. close must be called.
func (c *Container) findTmpfs(pid int) *tmpfsPack {
	p := &tmpfsPack{pid: pid}
	if _, mapped := namespace(c.spec, "user"); mapped || !private(c.spec, "mount") {
		return p
	}
	if p.readTable() != nil {
		return p
	}
	found := ownTmpfs(string(p.table), c.ownTmpfsPlaces(), c.bindPlaces())
	_ = inMountNamespace(pid, func() error {
		for _, m := range found {
			if tree, err := m.clone(); err == nil {
				p.mounts = append(p.mounts, packedTmpfs{tmpfsMount: m, tree: tree})
			}
		}
		return nil
	})
	left := int64(maxTmpfs)
	p.mounts = slices.DeleteFunc(p.mounts, func(m packedTmpfs) bool {
		used, err := usedBytes(m.tree)
		if err == nil {
			_, err = tmpfs.Pack(m.tree, left) // what cannot be packed now will hardly be later
		}
		if err != nil || used > left {
			unix.Close(m.tree)
			return true
		}
		left -= used
		return false
	})
	return p
}

func (p *tmpfsPack) readTable() (err error) {
	p.table, err = os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", p.pid))
	return err
}

// usedBytes is what a tmpfs holds; 0 if it has no bound, and so does not count.
func usedBytes(tree int) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(tree, &st); err != nil {
		return 0, err
	}
	if st.Blocks == 0 {
		return 0, nil
	}
	return int64(st.Blocks-st.Bfree) * st.Bsize, nil
}

// pack packs them, of a container that is frozen now.
func (p *tmpfsPack) pack() error {
	if p == nil || len(p.mounts) == 0 {
		return nil
	}
	before := p.table
	if err := p.readTable(); err != nil || !bytes.Equal(before, p.table) {
		return errTmpfsChanged
	}
	left := int64(maxTmpfs)
	for i := range p.mounts {
		m := &p.mounts[i]
		var err error
		if m.archive, err = tmpfs.Pack(m.tree, left); err != nil {
			return fmt.Errorf("%w: %s: %w", errTmpfsChanged, m.mountpoint, err)
		}
		used, err := usedBytes(m.tree)
		if err != nil {
			return fmt.Errorf("%w: %s: %w", errTmpfsChanged, m.mountpoint, err)
		}
		left -= used
	}
	return nil
}

// close lets the mounts go. It returns at once: the kernel waits for others when a
// mount goes.
func (p *tmpfsPack) close() {
	if p == nil {
		return
	}
	mounts := p.mounts
	p.mounts = nil
	go func() {
		for _, m := range mounts {
			unix.Close(m.tree)
		}
	}()
}

// ownTmpfsPlaces are where the container got a tmpfs when it was created.
func (c *Container) ownTmpfsPlaces() []string {
	places := slices.Clone(c.config.MaskPaths)
	for _, m := range c.config.Mounts {
		if m.Device == "tmpfs" {
			places = append(places, path.Clean(m.Destination))
		}
	}
	return places
}

// bindPlaces are where it got something from outside.
func (c *Container) bindPlaces() (places []string) {
	for _, m := range c.config.Mounts {
		if m.Device == "bind" {
			places = append(places, path.Clean(m.Destination))
		}
	}
	return places
}

// tmpfsMount is a line of a mount table (proc(5), /proc/pid/mountinfo).
type tmpfsMount struct {
	id, device uint64
	mountpoint string
}

// ownTmpfs finds whole, unshared tmpfs mounts at some places, one for each
// superblock, that are nowhere bound from outside.
func ownTmpfs(table string, places, binds []string) (found []tmpfsMount) {
	at := map[string]int{}
	outside := map[uint64]bool{}
	for line := range strings.Lines(table) {
		// id, parent, device, root, mount point, options, optional fields, -, type
		f := strings.Fields(line)
		if len(f) < 9 {
			return nil
		}
		at[f[4]]++
		var major, minor uint64
		if _, err := fmt.Sscanf(f[2], "%d:%d", &major, &minor); err != nil {
			return nil
		}
		m := tmpfsMount{device: major<<20 | minor, mountpoint: f[4]}
		if slices.Contains(binds, m.mountpoint) {
			outside[m.device] = true
		}
		var err error
		if m.id, err = strconv.ParseUint(f[0], 10, 64); err != nil {
			return nil
		}
		if f[6] == "-" && f[7] == "tmpfs" && f[3] == "/" && slices.Contains(places, m.mountpoint) && plainPath.MatchString(m.mountpoint) {
			found = append(found, m)
		}
	}
	seen := map[uint64]bool{}
	return slices.DeleteFunc(found, func(m tmpfsMount) bool {
		other := outside[m.device] || at[m.mountpoint] > 1 || seen[m.device]
		seen[m.device] = true
		return other
	})
}

// clone copies the mount alone, without those on it, in its mount namespace.
func (m tmpfsMount) clone() (int, error) {
	fd, err := unix.Open(m.mountpoint, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, err
	}
	defer unix.Close(fd)
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); err != nil {
		return -1, err
	}
	if st.Mask&unix.STATX_MNT_ID == 0 || st.Mnt_id != m.id {
		return -1, errors.New("is another mount") // or hidden by one
	}
	return unix.OpenTree(fd, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
}

// addTo puts the archives into the dump in dir, and takes the mounts' keys out of it.
func (p *tmpfsPack) addTo(dir string) error {
	if p == nil || len(p.mounts) == 0 {
		return nil
	}
	for _, m := range p.mounts {
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("tmpfs-dev-%d.tar.gz.img", m.device)), m.archive, 0o644); err != nil {
			return err
		}
	}
	tables, err := filepath.Glob(filepath.Join(dir, "mountpoints-*.img"))
	if err != nil {
		return err
	}
	for _, name := range tables {
		data, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if data, err = withoutKeys(data); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if err := os.WriteFile(name, data, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// mountKey is the field of mnt_entry that says where an external mount comes from.
const mountKey = 18

// withoutKeys takes our keys out of a mount table.
func withoutKeys(table []byte) (out []byte, err error) {
	out = criuimage.New(criuimage.Mountpoints)
	for message, err := range criuimage.Messages(table, criuimage.Mountpoints) {
		if err != nil {
			return nil, err
		}
		kept, err := criuimage.Edit(message, func(num protowire.Number, kind protowire.Type, value []byte) ([]byte, error) {
			if num == mountKey && kind == protowire.BytesType {
				if key, _ := protowire.ConsumeBytes(value); strings.HasPrefix(string(key), packedKey) {
					return nil, nil
				}
			}
			return value, nil
		})
		if err != nil {
			return nil, err
		}
		out = criuimage.Append(out, kept)
	}
	return out, nil
}
