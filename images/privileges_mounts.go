package images

import (
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
)

// CRIU's numbers of file systems (fstype in mnt.proto) and their names.
const (
	fsProc    = 1
	fsSysfs   = 2
	fsTmpfs   = 5
	fsDevpts  = 6
	fsCgroup  = 12
	fsMqueue  = 14
	fsOverlay = 17
	fsCgroup2 = 23
)

var fsNames = map[uint32]string{
	fsProc: "proc", fsSysfs: "sysfs", 3: "devtmpfs", 4: "binfmt_misc", fsTmpfs: "tmpfs", fsDevpts: "devpts", 7: "simfs",
	8: "pstore", 9: "securityfs", 10: "fusectl", 11: "debugfs", fsCgroup: "cgroup", 13: "aufs", fsMqueue: "mqueue", 15: "fuse",
	fsOverlay: "overlay", 18: "autofs", 19: "tracefs", fsCgroup2: "cgroup2",
}

// fsOfKernel are file systems that a workload with CAP_SYS_ADMIN mounts without
// a source, and that CRIU therefore mounts as well.
var fsOfKernel = []uint32{3, 4, 8, 9, 10, 11, 19}

// fsMagic are the kernel's numbers of the file systems that a request's binds may
// bring along.
var fsMagic = map[uint32]int64{
	fsProc: unix.PROC_SUPER_MAGIC, fsSysfs: unix.SYSFS_MAGIC, fsCgroup: unix.CGROUP_SUPER_MAGIC, fsCgroup2: unix.CGROUP2_SUPER_MAGIC,
}

// mountEntry is a mnt_entry, as far as it says what is mounted.
type mountEntry struct {
	fstype, id, parent, device, flags    uint32
	root, mountpoint, source, fsname, by string
	options                              string
	external                             bool

	superblock, shared, master, plugin, internal, deleted uint32
	// apart: the superblock's flags are told apart from the mount's, as since CRIU 2.
	apart bool
}

// partOf tells whether CRIU makes m by binding a part of b, and not anew.
func (m mountEntry) partOf(b mountEntry) bool {
	return m.device == b.device && m.fstype == b.fstype && m.source == b.source && m.options == b.options && below(m.root, b.root)
}

func (m mountEntry) readonly() bool { return m.flags&unix.MS_RDONLY != 0 }

func (m mountEntry) String() string {
	name := fsNames[m.fstype]
	if m.fsname != "" {
		name = m.fsname
	}
	if name == "" {
		name = "a file system of its own"
	}
	return fmt.Sprintf("%s (%q) at %q", name, m.source, m.mountpoint)
}

// Fields of mnt_entry that are written as well.
const (
	mountMaster     = 11 // whose mounts a mount receives
	mountSuperblock = 17
	mountKey        = 18
)

func parseMount(data []byte) (m mountEntry, err error) {
	f, err := parse(data)
	if err != nil {
		return m, err
	}
	for _, n := range []struct {
		field protowire.Number
		to    *uint32
	}{
		{1, &m.fstype},
		{2, &m.id},
		{3, &m.device},
		{4, &m.parent},
		{5, &m.flags},
		{10, &m.shared},
		{mountMaster, &m.master},
		{12, &m.plugin},
		{15, &m.internal},
		{16, &m.deleted},
		{mountSuperblock, &m.superblock},
	} {
		if *n.to, err = f.number(n.field); err != nil {
			return m, err
		}
	}
	m.apart = f.has(mountSuperblock)
	m.flags |= m.superblock & unix.MS_RDONLY
	for _, s := range []struct {
		field protowire.Number
		to    *string
	}{{6, &m.root}, {7, &m.mountpoint}, {8, &m.source}, {9, &m.options}, {14, &m.fsname}, {mountKey, &m.by}} {
		if *s.to, err = f.text(s.field); err != nil {
			return m, err
		}
	}
	legacy, err := f.number(13)
	if err != nil {
		return m, err
	}
	if legacy != 0 && m.by == "" {
		m.by = m.root
	}
	// Keys of this form let CRIU find the source by itself.
	m.external = m.by != "" && !strings.HasPrefix(m.by, "CRIU:")
	return m, nil
}

func (c *checker) mountpoints(name string) error {
	t, err := c.Dump.mounts(name)
	if err != nil {
		return err
	}
	all := t.entries
	byID := make(map[uint32]*mountEntry, len(all))
	for i := range all {
		// Paths that lead elsewhere than they seem to. The root of a cgroup mount
		// may honestly begin with "..".
		m := &all[i]
		if !path.IsAbs(m.mountpoint) || path.Clean(m.mountpoint) != m.mountpoint {
			return fmt.Errorf("has the mount point %q", m.mountpoint)
		}
		if m.fstype != fsCgroup && m.fstype != fsCgroup2 && slices.Contains(strings.Split(m.root, "/"), "..") {
			return fmt.Errorf("has the root %q of a mount", m.root)
		}
		if byID[m.id] != nil {
			return fmt.Errorf("has two mounts %d", m.id)
		}
		byID[m.id] = m
	}
	var root *mountEntry
	for i, m := range all {
		if m.mountpoint == "/" && (byID[m.parent] == nil || m.parent == m.id) {
			if root != nil {
				return errors.New("has two root mounts")
			}
			root = &all[i]
		}
	}
	if root == nil {
		return errors.New("has no root mount")
	}
	// CRIU binds one root, the container's, and mounts others as the dump says.
	if c.root == nil {
		c.root = root
	} else if !root.partOf(*c.root) || !c.root.partOf(*root) {
		c.mounts.add("another root file system")
	}
	if c.allowed.ReadonlyRootfs && !root.readonly() {
		c.mounts.add("a writable root file system")
	}
	shared := []mountEntry{*root} // what others may be a part of
	for _, m := range all {
		if m.external {
			shared = append(shared, m)
		}
	}
	whole := map[string]int{} // how many proc and sysfs are at a place
	for i, m := range all {
		if &all[i] == root {
			continue
		}
		if m.fstype == fsProc || m.fstype == fsSysfs {
			if m.root == "/" && !m.external {
				whole[m.mountpoint]++
			}
		}
		// A second one would hide what protects the first.
		if !c.mayMount(m, shared) || whole[m.mountpoint] > 1 && !c.allowed.has(unix.CAP_SYS_ADMIN) {
			c.mounts.add(m.String())
		}
	}
	c.readonlyPaths(all, byID)
	return nil
}

// readonlyPaths looks for the read-only mounts of the request's paths.
func (c *checker) readonlyPaths(all []mountEntry, byID map[uint32]*mountEntry) {
	if c.allowed.has(unix.CAP_SYS_ADMIN) {
		return // it can write there anyway
	}
	for _, p := range c.allowed.ReadonlyPaths {
		p = path.Clean(p)
		var above string // the place of the mount that p is in
		there, writable := false, false
		for _, m := range all {
			if m.mountpoint == p {
				there = true
			} else if below(p, m.mountpoint) && len(m.mountpoint) > len(above) {
				above = m.mountpoint
			}
		}
		for _, m := range all {
			if m.mountpoint != p {
				continue
			}
			parent := byID[m.parent]
			if !m.readonly() || parent == nil || (parent.mountpoint != above && parent.mountpoint != p) {
				writable = true // or hidden by what it should be in
			}
		}
		// What this kernel does not have needs no protection.
		if writable || !there && exists(p) {
			c.mounts.add("a writable " + p)
		}
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

// mayMount tells whether CRIU may make a mount that is not the root. shared are
// the mounts that bring their file systems from outside of the dump.
func (c *checker) mayMount(m mountEntry, shared []mountEntry) bool {
	anything := func(specs.Mount) bool { return true }
	if m.external {
		// The request's own mount or device; CRIU refuses other keys. But whether
		// it may be written is up to the dump.
		asked := c.asked(m.by, anything)
		return asked == nil || !readonlyMount(asked) || m.readonly()
	}
	if m.by != "" || (m.fsname != "" && m.fsname != fsNames[m.fstype]) {
		return false
	}
	bound := false
	for _, s := range shared {
		if !m.partOf(s) {
			continue
		}
		bound = true
		protected := c.allowed.ReadonlyRootfs
		if s.external {
			asked := c.asked(s.by, anything)
			protected = asked != nil && readonlyMount(asked)
		}
		if protected && !m.readonly() {
			return false
		}
	}
	privileged := c.allowed.has(unix.CAP_SYS_ADMIN)
	ofType := func(a specs.Mount) bool { return a.Type == fsNames[m.fstype] }
	switch m.fstype {
	case fsTmpfs, fsDevpts, fsMqueue:
		return true // new and empty, or filled by the dump
	case fsProc, fsSysfs:
		if privileged || c.bindBrings(m) || (m.root != "/" && m.readonly()) {
			return true
		}
		// The whole, or a part where it is anyway.
		asked := c.asked(strings.TrimSuffix(m.mountpoint, strings.TrimSuffix(m.root, "/")), ofType)
		return asked != nil && (!readonlyMount(asked) || m.readonly()) &&
			(m.readonly() || !slices.ContainsFunc(c.allowed.ReadonlyPaths, func(p string) bool { return below(m.mountpoint, p) }))
	case fsCgroup, fsCgroup2:
		return privileged || c.bindBrings(m) || slices.ContainsFunc(c.allowed.Mounts, func(a specs.Mount) bool {
			return strings.HasPrefix(a.Type, "cgroup") && below(m.mountpoint, a.Destination)
		})
	}
	if slices.Contains(fsOfKernel, m.fstype) && (privileged || c.asked(m.mountpoint, ofType) != nil) {
		return true
	}
	return bound
}

// asked finds the last of the request's mounts at a place.
func (c *checker) asked(destination string, fits func(specs.Mount) bool) *specs.Mount {
	for i := len(c.allowed.Mounts) - 1; i >= 0; i-- {
		if m := &c.allowed.Mounts[i]; path.Clean(m.Destination) == destination && fits(*m) {
			return m
		}
	}
	return nil
}

// bindBrings tells whether one of the request's binds has such a file system at
// the same place: with / come /proc and /sys of the host.
func (c *checker) bindBrings(m mountEntry) bool {
	return slices.ContainsFunc(c.allowed.Mounts, func(a specs.Mount) bool {
		if !filepath.IsAbs(a.Source) || !below(m.mountpoint, a.Destination) {
			return false
		}
		var st unix.Statfs_t
		err := unix.Statfs(filepath.Join(a.Source, strings.TrimPrefix(m.mountpoint, path.Clean(a.Destination))), &st)
		return err == nil && int64(st.Type) == fsMagic[m.fstype] //nolint:unconvert // not an int64 everywhere
	})
}

func below(p, dir string) bool {
	dir = strings.TrimSuffix(path.Clean(dir), "/")
	return p == dir || strings.HasPrefix(p, dir+"/")
}

func readonlyMount(m *specs.Mount) (ro bool) {
	for _, o := range m.Options {
		switch o {
		case "ro", "rro":
			ro = true
		case "rw":
			ro = false
		}
	}
	return ro
}
