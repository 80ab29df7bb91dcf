package runtime

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
)

// CRIU's marks at the start of utsns-*.img (criu/include/magic.h).
const (
	criuCommonMagic = 0x54564319
	criuUTSMagic    = 0x54473203
)

// dumpView is a dump as one restore is to see it: the dump itself is not ours to
// change, for other containers restore from it.
type dumpView struct {
	dir string
	// rename says that the view has the dumped host name, so that the restored
	// container has to be given its own.
	rename bool

	root *os.File
	own  string
}

// Close ends the view. Files that are open in it stay so.
func (v *dumpView) Close() {
	if v.root != nil {
		v.root.Close()
	}
	if v.own != "" {
		os.RemoveAll(v.own)
	}
}

// view shows the dump in dir with what this container has of its own.
func (c *Container) view(dir string) (_ *dumpView, err error) {
	v := &dumpView{dir: dir}
	defer func() {
		if err != nil {
			v.Close()
		}
	}()
	named := private(c.spec, specs.UTSNamespace) && c.spec.Hostname != ""
	switch {
	case private(c.spec, specs.UserNamespace):
		v.rename = named
		// containerd may have given the files of the image to the container,
		// and the dump with them.
		if theirs, err := ownedByRoot(c.spec, dir); err != nil || theirs {
			return v, err
		}
		v.root, err = idmapped(dir, c.spec.Linux.UIDMappings, c.spec.Linux.GIDMappings)
	case named:
		v.own = filepath.Join(c.cfg.Bundle, "criu-uts")
		v.root, err = renameHost(dir, v.own, c.spec.Hostname, c.spec.Domainname)
	default:
		return v, nil
	}
	if err != nil {
		return nil, err
	}
	v.dir = fmt.Sprintf("/proc/self/fd/%d", v.root.Fd())
	return v, nil
}

// ownedByRoot tells whether a directory belongs to the root of the spec's user
// namespace.
func ownedByRoot(spec *specs.Spec, dir string) (bool, error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return false, &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	for _, m := range spec.Linux.UIDMappings {
		if m.ContainerID == 0 {
			return m.Size > 0 && m.HostID == st.Uid, nil
		}
	}
	return false, nil
}

// idmapped shows a directory to the root of a user namespace as its own: a dump
// is readable for root alone, and CRIU reads part of it from inside. It is
// mounted nowhere (mount_setattr(2), MOUNT_ATTR_IDMAP).
func idmapped(dir string, uids, gids []specs.LinuxIDMapping) (*os.File, error) {
	userns, err := mount.GetUsernsFD(idMap(uids), idMap(gids))
	if err != nil {
		return nil, fmt.Errorf("user namespace for the dump: %w", err)
	}
	defer userns.Close()
	fd, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, &os.PathError{Op: "open_tree", Path: dir, Err: err}
	}
	tree := os.NewFile(uintptr(fd), "idmapped:"+dir)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP | unix.MOUNT_ATTR_RDONLY, Userns_fd: uint64(userns.Fd())}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		tree.Close()
		return nil, fmt.Errorf("map the owner of the dump in %s: %w", dir, os.NewSyscallError("mount_setattr", err))
	}
	return tree, nil
}

func idMap(mappings []specs.LinuxIDMapping) string {
	lines := make([]string, len(mappings))
	for i, m := range mappings {
		lines[i] = fmt.Sprintf("%d:%d:%d", m.ContainerID, m.HostID, m.Size)
	}
	return strings.Join(lines, ",")
}

// setHostname names a running container. It is for what renameHost cannot do.
func setHostname(pid int, host, domain string) error {
	return inNamespace(fmt.Sprintf("/proc/%d/ns/uts", pid), unix.CLONE_NEWUTS, func() error {
		if err := unix.Sethostname([]byte(host)); err != nil {
			return os.NewSyscallError("sethostname", err)
		}
		if domain == "" {
			return nil
		}
		return os.NewSyscallError("setdomainname", unix.Setdomainname([]byte(domain)))
	})
}

// renameHost shows the dump in dir with another host name: an overlay with one
// file of its own, in own, which the caller removes after use. It is mounted
// nowhere, and gone with the last file that is open in it. A clone must not run for a moment under the name of the original,
// and the dump itself is not ours to change: others restore from it.
//
// Links in a directory would not do: CRIU opens some images after it has changed
// its root.
func renameHost(dir, own, host, domain string) (*os.File, error) {
	if err := os.Mkdir(own, 0o700); err != nil {
		return nil, err
	}
	images, err := filepath.Glob(filepath.Join(dir, "utsns-*.img"))
	if err != nil {
		return nil, err
	}
	for _, image := range images {
		if err := os.WriteFile(filepath.Join(own, filepath.Base(image)), utsImage(host, domain), 0o600); err != nil {
			return nil, err
		}
	}
	return readOnlyOverlay(own, dir)
}

// readOnlyOverlay merges directories, the first on top.
func readOnlyOverlay(dirs ...string) (*os.File, error) {
	for i, dir := range dirs {
		dirs[i] = strings.NewReplacer(`\`, `\\`, `:`, `\:`).Replace(dir)
	}
	lower := strings.Join(dirs, ":")
	ctx, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("fsopen overlay", err)
	}
	defer unix.Close(ctx)
	if err := unix.FsconfigSetString(ctx, "lowerdir", lower); err != nil {
		return nil, fmt.Errorf("overlay of %s: %w", lower, err)
	}
	if err := unix.FsconfigCreate(ctx); err != nil {
		return nil, fmt.Errorf("overlay of %s: %w", lower, err)
	}
	mnt, err := unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV)
	if err != nil {
		return nil, os.NewSyscallError("fsmount overlay", err)
	}
	return os.NewFile(uintptr(mnt), "overlay:"+lower), nil
}

// utsImage is CRIU's image of a UTS namespace: the marks, the length of the one
// entry, and the entry (images/utsns.proto in CRIU's sources).
func utsImage(host, domain string) []byte {
	if domain == "" {
		domain = "(none)" // the kernel's own default; the field is required
	}
	var entry []byte
	entry = protowire.AppendTag(entry, 1, protowire.BytesType)
	entry = protowire.AppendString(entry, host)
	entry = protowire.AppendTag(entry, 2, protowire.BytesType)
	entry = protowire.AppendString(entry, domain)
	var image []byte
	image = binary.LittleEndian.AppendUint32(image, criuCommonMagic)
	image = binary.LittleEndian.AppendUint32(image, criuUTSMagic)
	image = binary.LittleEndian.AppendUint32(image, uint32(len(entry)))
	return append(image, entry...)
}
