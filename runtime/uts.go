package runtime

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/crac-shim/crac/oci/criuimage"
)

// dumpView is a dump as one restore is to see it: the dump itself is not ours to
// change, for other containers restore from it.
type dumpView struct {
	dir string

	root *os.File
	own  []string // directories to remove
}

// Close ends the view. Files that are open in it stay so.
func (v *dumpView) Close() {
	if v.root != nil {
		v.root.Close()
	}
	for _, dir := range v.own {
		os.RemoveAll(dir)
	}
}

// view shows the dump in dir with what this container has of its own: an overlay
// with some files in place of the dump's, among them images (by name). It is
// mounted nowhere, and gone with the last file that is open in it.
//
// Links in a directory would not do: CRIU opens some images after it has changed
// its root.
func (c *Container) view(dir string, images map[string][]byte, parents []string) (_ *dumpView, err error) {
	host, domain, err := nodeName(c.spec)
	if err != nil {
		return nil, err
	}
	named := host != ""
	inside := private(c.spec, specs.UserNamespace)
	if !named && !inside && len(images) == 0 && len(parents) == 0 {
		return &dumpView{dir: dir}, nil
	}
	v := new(dumpView)
	defer func() {
		if err != nil {
			v.Close()
		}
	}()
	own, err := v.mkdir(c.cfg.Bundle, len(parents) > 0)
	if err != nil {
		return nil, err
	}
	mode := os.FileMode(0o600)
	if inside {
		mode = 0o644
	}
	for name, data := range images {
		if err := writeImage(filepath.Join(own, name), data, mode); err != nil {
			return nil, err
		}
	}
	if named {
		// A clone must not run for a moment under the name of the original.
		names, err := imagesLike(dir, "utsns-*.img")
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			if err := writeImage(filepath.Join(own, name), utsImage(host, domain), mode); err != nil {
				return nil, err
			}
		}
	}
	if v.root, err = c.overlayView(own, dir); err != nil {
		return nil, err
	}
	if len(parents) > 0 {
		if err := v.addParents(c, parents); err != nil {
			return nil, err
		}
	}
	v.dir = fmt.Sprintf("/proc/self/fd/%d", v.root.Fd())
	return v, nil
}

// mkdir makes a directory for what a view has of its own.
func (v *dumpView) mkdir(bundle string, hasParent bool) (string, error) {
	dir := filepath.Join(bundle, "criu-own")
	if n := len(v.own); n > 0 {
		dir += strconv.Itoa(n)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", err
	}
	v.own = append(v.own, dir)
	if hasParent {
		return dir, os.Mkdir(filepath.Join(dir, parentName), 0o755)
	}
	return dir, nil
}

// overlayView shows a dump under the files in own.
func (c *Container) overlayView(own, dir string) (*os.File, error) {
	if private(c.spec, specs.UserNamespace) {
		return c.viewFromInside(dir, own)
	}
	return readOnlyOverlay(own, dir)
}

// parentName is where CRIU looks for the dump that another one continues.
const parentName = "parent"

// addParents mounts the dumps that the view's continues in it, each in the one
// before: a tree of mounts that is mounted nowhere itself.
func (v *dumpView) addParents(c *Container, parents []string) error {
	// Below all that is shown of it, the way to a mount point.
	at, err := v.mkdir(c.cfg.Bundle, false)
	if err != nil {
		return err
	}
	levels := []*os.File{v.root}
	defer func() {
		for _, l := range levels {
			l.Close()
		}
	}()
	v.root = nil
	for i, dir := range parents {
		own, err := v.mkdir(c.cfg.Bundle, i < len(parents)-1)
		if err != nil {
			return err
		}
		level, err := c.overlayView(own, dir)
		if err != nil {
			return err
		}
		levels = append(levels, level)
	}
	return onOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return os.NewSyscallError("unshare", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return os.NewSyscallError("mount", err)
		}
		place := at
		for _, l := range levels {
			if err := unix.MoveMount(int(l.Fd()), "", unix.AT_FDCWD, place, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
				return &os.PathError{Op: "move_mount", Path: place, Err: err}
			}
			place = filepath.Join(place, parentName)
		}
		fd, err := unix.OpenTree(unix.AT_FDCWD, at, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
		if err != nil {
			return &os.PathError{Op: "open_tree", Path: at, Err: err}
		}
		v.root = os.NewFile(uintptr(fd), "dump:"+at)
		return nil
	})
}

// viewFromInside shows a dump, which is readable for root alone, to the root of
// the container's user namespace: CRIU reads part of it from inside.
//
// It reads the clocks before the namespace has its map, when it is nobody at all
// there: they have to be readable for everybody.
func (c *Container) viewFromInside(dir, own string) (*os.File, error) {
	clocks, err := imagesLike(dir, "timens-*.img")
	if err != nil {
		return nil, err
	}
	for _, name := range clocks {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return nil, err
		}
		if err := writeImage(filepath.Join(own, name), data, 0o644); err != nil {
			return nil, err
		}
	}
	if err := os.Chmod(own, 0o755); err != nil {
		return nil, err
	}
	// containerd may have given the files of the image to the container, and
	// the dump with them.
	if theirs, err := ownedByRoot(c.spec, dir); err != nil {
		return nil, err
	} else if theirs {
		return readOnlyOverlay(own, dir)
	}
	tree, err := idmapped(dir, c.spec.Linux.UIDMappings, c.spec.Linux.GIDMappings)
	if err != nil {
		return nil, err
	}
	defer tree.Close()
	// An overlay takes its layers by name, so the mapped directory needs one for
	// as long as it takes to make the overlay: its own, in a mount namespace
	// that nobody else sees.
	var view *os.File
	err = onOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return os.NewSyscallError("unshare", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return os.NewSyscallError("mount", err)
		}
		if err := unix.MoveMount(int(tree.Fd()), "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return &os.PathError{Op: "move_mount", Path: dir, Err: err}
		}
		var err error
		view, err = readOnlyOverlay(own, dir)
		return err
	})
	return view, err
}

// imagesLike are the names of a dump's files of one kind.
func imagesLike(dir, pattern string) (names []string, err error) {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if ok, _ := filepath.Match(pattern, e.Name()); ok { // the patterns are right
			names = append(names, e.Name())
		}
	}
	return names, err
}

// writeImage gives the file this mode whatever the umask is.
func writeImage(path string, data []byte, mode os.FileMode) error {
	if err := os.WriteFile(path, data, mode); err != nil {
		return err
	}
	return os.Chmod(path, mode)
}

// tmpfsOwners gives each new tmpfs to whom it would belong if it were mounted
// from inside of the spec's user namespace, as it is in a cold start. Of one that
// belongs to the host's root the workload sees nobody as the owner, and CRIU
// cannot dump it.
func tmpfsOwners(spec *specs.Spec, mounts []specs.Mount) []specs.Mount {
	if !private(spec, specs.UserNamespace) {
		return mounts
	}
	owned := slices.Clone(mounts)
	for i, m := range owned {
		if m.Type != "tmpfs" {
			continue
		}
		for key, maps := range map[string][]specs.LinuxIDMapping{"uid=": spec.Linux.UIDMappings, "gid=": spec.Linux.GIDMappings} {
			id := uint64(0)
			options := slices.DeleteFunc(slices.Clone(m.Options), func(o string) bool {
				value, ok := strings.CutPrefix(o, key)
				if !ok {
					return false
				}
				n, err := strconv.ParseUint(value, 10, 32)
				if err == nil {
					id = n
				}
				return err == nil // the mount itself says what is wrong with it
			})
			if host, ok := hostID(maps, uint32(id)); ok {
				m.Options = append(options, fmt.Sprintf("%s%d", key, host))
			}
		}
		owned[i] = m
	}
	return owned
}

func hostID(maps []specs.LinuxIDMapping, id uint32) (uint32, bool) {
	for _, m := range maps {
		if id >= m.ContainerID && id-m.ContainerID < m.Size {
			return m.HostID + id - m.ContainerID, true
		}
	}
	return 0, false
}

// ownedByRoot tells whether a directory belongs to the root of the spec's user
// namespace.
func ownedByRoot(spec *specs.Spec, dir string) (bool, error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return false, &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	root, ok := hostID(spec.Linux.UIDMappings, 0)
	return ok && root == st.Uid, nil
}

// idmapped shows a directory of root's to the root of a user namespace as its
// own. It is mounted nowhere (mount_setattr(2), MOUNT_ATTR_IDMAP).
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

// readOnlyOverlay merges directories, the first on top.
func readOnlyOverlay(dirs ...string) (*os.File, error) {
	// fsconfig(2) takes no more than 255 bytes, and ':' has a meaning there: say
	// it by file descriptors.
	fds := make([]string, len(dirs))
	for i, dir := range dirs {
		fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, &os.PathError{Op: "open", Path: dir, Err: err}
		}
		defer unix.Close(fd)
		fds[i] = fmt.Sprintf("/proc/self/fd/%d", fd)
	}
	lower := strings.Join(fds, ":")
	ctx, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("fsopen overlay", err)
	}
	defer unix.Close(ctx)
	if err := unix.FsconfigSetString(ctx, "lowerdir", lower); err != nil {
		return nil, fmt.Errorf("overlay of %s: %w", strings.Join(dirs, " and "), err)
	}
	if err := unix.FsconfigCreate(ctx); err != nil {
		return nil, fmt.Errorf("overlay of %s: %w", strings.Join(dirs, " and "), err)
	}
	mnt, err := unix.Fsmount(ctx, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV)
	if err != nil {
		return nil, os.NewSyscallError("fsmount overlay", err)
	}
	return os.NewFile(uintptr(mnt), "overlay:"+dirs[0]), nil
}

// Hostname is the name that a container of this spec sees: the one it asks for,
// or that of the UTS namespace that it joins, as a pod's containers do. It is empty
// where neither says one.
func Hostname(spec *specs.Spec) (string, error) {
	host, _, err := nodeName(spec)
	return host, err
}

// nodeName is Hostname, and the NIS domain (uname(2)). CRIU gives a namespace that
// it joins the name that is in the dump: all of a pod would be called as the
// original's.
func nodeName(spec *specs.Spec) (host, domain string, err error) {
	ns, ok := namespace(spec, specs.UTSNamespace)
	switch {
	case !ok:
		return "", "", nil
	case ns.Path == "":
		return spec.Hostname, spec.Domainname, nil
	}
	f, err := os.Open(ns.Path)
	if err != nil {
		return "", "", fmt.Errorf("UTS namespace of the request: %w", err)
	}
	defer f.Close()
	err = onOwnThread(func() error {
		if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWUTS); err != nil {
			return fmt.Errorf("UTS namespace of the request, %s: %w", ns.Path, os.NewSyscallError("setns", err))
		}
		var name unix.Utsname
		if err := unix.Uname(&name); err != nil {
			return os.NewSyscallError("uname", err)
		}
		host, domain = unix.ByteSliceToString(name.Nodename[:]), unix.ByteSliceToString(name.Domainname[:])
		return nil
	})
	return host, domain, err
}

// utsImage is CRIU's image of a UTS namespace (images/utsns.proto in CRIU's sources).
func utsImage(host, domain string) []byte {
	if domain == "" {
		domain = "(none)" // the kernel's own default; the field is required
	}
	var entry []byte
	entry = protowire.AppendTag(entry, 1, protowire.BytesType)
	entry = protowire.AppendString(entry, host)
	entry = protowire.AppendTag(entry, 2, protowire.BytesType)
	entry = protowire.AppendString(entry, domain)
	return criuimage.New(criuimage.UTSNS, entry)
}
