package images

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
)

// CodePrivileges: the dump's processes may do more than the request allows.
const CodePrivileges = "privileges"

// Privileges are what a request allows a workload. CRIU takes a process's
// privileges and its mounts from the dump alone, so that whoever writes an image
// would decide them.
type Privileges struct {
	// Capabilities is the bounding set, bit by bit as in the kernel.
	Capabilities uint64
	// Seccomp: every thread must have a filter. Which one is not compared: it
	// depends on the libseccomp and the kernel that made it.
	Seccomp         bool
	NoNewPrivileges bool
	// ReadonlyRootfs and ReadonlyPaths must be read-only in the dump as well.
	ReadonlyRootfs bool
	ReadonlyPaths  []string
	// Namespaces are those that may not be the host's, by their types in a spec.
	Namespaces []specs.LinuxNamespaceType
	Mounts     []specs.Mount
}

// PrivilegesOf reads the privileges from a request's spec.
func PrivilegesOf(spec *specs.Spec) Privileges {
	p := Privileges{Mounts: spec.Mounts}
	if spec.Process != nil {
		p.NoNewPrivileges = spec.Process.NoNewPrivileges
		if c := spec.Process.Capabilities; c != nil {
			for _, name := range c.Bounding {
				if i := slices.Index(capabilities, strings.ToUpper(name)); i >= 0 {
					p.Capabilities |= 1 << i
				}
			}
		}
	}
	if spec.Root != nil {
		p.ReadonlyRootfs = spec.Root.Readonly
	}
	if spec.Linux != nil {
		p.Seccomp = spec.Linux.Seccomp != nil
		p.ReadonlyPaths = spec.Linux.ReadonlyPaths
		for _, ns := range spec.Linux.Namespaces {
			if ns.Path == "" || !isOwnNamespace(ns.Path) {
				p.Namespaces = append(p.Namespaces, ns.Type)
			}
		}
	}
	return p
}

// isOwnNamespace tells whether a path is one of our own namespaces: a request
// that joins it shares it with the host.
func isOwnNamespace(path string) bool {
	var asked, own unix.Stat_t
	if unix.Stat(path, &asked) != nil {
		return false
	}
	entries, err := os.ReadDir("/proc/self/ns")
	if err != nil {
		return false
	}
	for _, e := range entries {
		if unix.Stat("/proc/self/ns/"+e.Name(), &own) == nil && own.Dev == asked.Dev && own.Ino == asked.Ino {
			return true
		}
	}
	return false
}

func (p Privileges) has(capability int) bool { return p.Capabilities&(1<<capability) != 0 }

// capabilities in the order of their numbers (linux/capability.h).
var capabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID", "CAP_SETUID",
	"CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_IPC_LOCK",
	"CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT", "CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN",
	"CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE", "CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE",
	"CAP_AUDIT_CONTROL", "CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND",
	"CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
}

func capabilityNames(mask uint64) string {
	var names []string
	for i := range 64 {
		switch {
		case mask&(1<<i) == 0:
		case i < len(capabilities):
			names = append(names, capabilities[i])
		default:
			names = append(names, fmt.Sprintf("capability %d", i))
		}
	}
	return strings.Join(names, " ")
}

// Magic numbers and limits of image files. CRIU's largest of the files read here
// are a few kilobytes per process and mount.
const (
	magicCommon      = 0x54564319
	magicCore        = 0x55053847
	magicMountpoints = 0x55563928
	magicIDs         = 0x54432030
	magicInventory   = 0x58313116

	maxImage    = 16 << 20
	maxImages   = 1 << 20
	maxMessages = 1 << 16
)

// CheckPrivileges tells what a dump would give its processes that the request
// does not allow: capabilities, a missing seccomp filter or no_new_privs, the
// host's namespaces, and mounts. The dump is hostile: an error wraps ErrDamaged,
// and means that it must not be restored.
//
// Not looked at: what a seccomp filter filters, masked paths, which hide only what
// may be read, resource limits, and the write protection of cgroup file systems.
func CheckPrivileges(dir string, allowed Privileges) ([]Reason, error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrDamaged, dir, err)
	}
	d := os.NewFile(uintptr(fd), dir)
	defer d.Close()
	names, err := d.Readdirnames(maxImages)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%w: %s: %w", ErrDamaged, dir, err)
	}
	if len(names) == maxImages {
		return nil, fmt.Errorf("%w: %s holds more than %d files", ErrDamaged, dir, maxImages)
	}
	slices.Sort(names)

	c := checker{fd: fd, allowed: allowed}
	for _, name := range names {
		if err := c.file(name); err != nil {
			return nil, fmt.Errorf("%w: %s: %w; pull the image again, or make a new checkpoint", ErrDamaged, filepath.Join(dir, name), err)
		}
	}
	if c.tasks == 0 {
		return nil, fmt.Errorf("%w: %s holds no process (core-*.img)", ErrDamaged, dir)
	}
	return c.reasons(), nil
}

// checker collects what is wrong with a dump.
type checker struct {
	fd      int
	allowed Privileges
	tasks   int // threads that will run

	capabilities, seccomp, newPrivileges, namespaces, mounts finding

	excess uint64      // of capabilities
	root   *mountEntry // of the first mount namespace
}

// finding is one kind of excess: how often, and where it was seen first.
type finding struct {
	count int
	where string
}

func (f *finding) add(where string) {
	if f.count == 0 {
		f.where = where
	}
	f.count++
}

// and tells how many there are beyond the one that is named.
func (f *finding) and(what string) string {
	if f.count == 1 {
		return ""
	}
	return fmt.Sprintf(" and %d other %s", f.count-1, what)
}

func (c *checker) reasons() (reasons []Reason) {
	add := func(code, format string, a ...any) {
		reasons = append(reasons, Reason{Code: code, Text: fmt.Sprintf(format, a...)})
	}
	if f := c.capabilities; f.count > 0 {
		add(CodePrivileges, "the checkpoint's %s%s may have capabilities that the request does not allow: %s; allow them if you trust the image, or make the checkpoint of a container without them",
			f.where, f.and("threads"), capabilityNames(c.excess))
	}
	if f := c.seccomp; f.count > 0 {
		add(CodePrivileges, "the checkpoint's %s%s runs without a seccomp filter and the request has one; make the checkpoint of a container with one, or ask for none if you trust the image",
			f.where, f.and("threads"))
	}
	if f := c.newPrivileges; f.count > 0 {
		add(CodePrivileges, "the checkpoint's %s%s may gain new privileges and the request forbids it; make the checkpoint of a container with noNewPrivileges, or allow new privileges if you trust the image",
			f.where, f.and("threads"))
	}
	if f := c.namespaces; f.count > 0 {
		add(CodeNamespaces, "the checkpoint's %s%s; the request asks for namespaces of its own; make the checkpoint of a container with the namespaces of the request",
			f.where, f.and("cases"))
	}
	if f := c.mounts; f.count > 0 {
		add(CodeMounts, "the checkpoint mounts what the request does not: %s%s; make the checkpoint of a container with the request's mounts and paths",
			f.where, f.and("mounts"))
	}
	return reasons
}

func (c *checker) file(name string) error {
	switch {
	case !strings.HasSuffix(name, ".img"):
		return nil
	case strings.HasPrefix(name, "core-"):
		return c.core(name)
	case strings.HasPrefix(name, "mountpoints-"):
		return c.mountpoints(name)
	}
	return nil
}

func (c *checker) core(name string) error {
	pid := strings.TrimSuffix(strings.TrimPrefix(name, "core-"), ".img")
	if _, err := strconv.ParseUint(pid, 10, 32); err != nil {
		return errors.New("is not named after a process")
	}
	data, err := c.one(name, magicCore)
	if err != nil {
		return err
	}
	t, err := parseCore(data)
	if err != nil {
		return err
	}
	if t.leader && t.dead {
		return nil // a zombie has no privileges
	}
	c.tasks++
	who := "process " + pid
	if !t.leader {
		who = "thread " + pid
	}
	if t.comm != "" {
		who += fmt.Sprintf(" (%q)", t.comm)
	}
	if excess := t.capabilities &^ c.allowed.Capabilities; excess != 0 {
		c.excess |= excess
		c.capabilities.add(who)
	}
	if c.allowed.Seccomp && !t.filtered {
		c.seccomp.add(who)
	}
	if c.allowed.NoNewPrivileges && !t.noNewPrivileges {
		c.newPrivileges.add(who)
	}
	if t.leader && len(c.allowed.Namespaces) > 0 {
		return c.ids(pid, who)
	}
	return nil
}

// idsField are the fields of a process's namespaces in task_kobj_ids_entry.
var idsField = map[specs.LinuxNamespaceType]protowire.Number{
	specs.PIDNamespace: 5, specs.NetworkNamespace: 6, specs.IPCNamespace: 7, specs.UTSNamespace: 8,
	specs.MountNamespace: 9, specs.UserNamespace: 10, specs.CgroupNamespace: 11,
}

// ids compares a process's namespaces with the host's where the dump was made:
// CRIU puts a process that had the host's into the host's.
func (c *checker) ids(pid, who string) error {
	name := "ids-" + pid + ".img"
	data, err := c.one(name, magicIDs)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	ids, err := parse(data)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	data, err = c.one("inventory.img", magicInventory)
	if err != nil {
		return fmt.Errorf("inventory.img: %w", err)
	}
	inventory, err := parse(data)
	if err != nil {
		return fmt.Errorf("inventory.img: %w", err)
	}
	host, err := inventory.message(3)
	if err != nil || host == nil {
		return errors.Join(errors.New("inventory.img does not name the host's namespaces"), err)
	}
	for _, ns := range c.allowed.Namespaces {
		field, known := idsField[ns]
		if !known {
			continue
		}
		its, err := ids.number(field)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		hosts, err := host.number(field)
		if err != nil {
			return fmt.Errorf("inventory.img: %w", err)
		}
		// Without a number there is nothing to compare: a kernel without such
		// namespaces.
		if its == hosts && its != 0 || its == 0 && ns != specs.CgroupNamespace {
			c.namespaces.add(fmt.Sprintf("%s runs in the host's %s namespace", who, ns))
		}
	}
	return nil
}

// task is what a core image says about a thread.
type task struct {
	leader          bool
	dead            bool
	comm            string
	capabilities    uint64 // of all sets together
	filtered        bool
	noNewPrivileges bool
	rseq            bool
	lsm             string // the security module's profile or context
}

// TASK_DEAD and TASK_ZOMBIE of CRIU's pid.h, SECCOMP_MODE_FILTER of the kernel's
// seccomp.h.
const (
	taskDead      = 2
	taskZombie    = 6
	seccompFilter = 2
)

// parseCore reads a core_entry.
func parseCore(data []byte) (t task, err error) {
	core, err := parse(data)
	if err != nil {
		return t, err
	}
	tc, err := core.message(3)
	if err != nil {
		return t, err
	}
	if core.has(4) {
		return t, errors.New("names its namespaces in a way that CRIU has not used for long")
	}
	if tc != nil {
		t.leader = true
		state, err := tc.number(1)
		if err != nil {
			return t, err
		}
		t.dead = state == taskDead || state == taskZombie
		if t.comm, err = tc.text(6); err != nil {
			return t, err
		}
		// An older place for the filter. It would win over the thread's.
		if tc.has(11) || tc.has(12) {
			return t, errors.New("keeps seccomp filters in a way that CRIU has not used for long")
		}
	}
	if t.dead {
		return t, nil
	}
	thread, err := core.message(5)
	if err != nil {
		return t, err
	}
	if thread == nil {
		return t, errors.New("says nothing about its thread")
	}
	mode, err := thread.number(11)
	if err != nil {
		return t, err
	}
	// Without the number of its filter, CRIU installs none, whatever the mode.
	t.filtered = mode == seccompFilter && thread.has(12)
	creds, err := thread.message(10)
	if err != nil {
		return t, err
	}
	if creds == nil {
		return t, errors.New("has no credentials")
	}
	for _, field := range []protowire.Number{9, 10, 11, 12, 19} { // inheritable, permitted, effective, bounding, ambient
		words, err := creds.numbers(field)
		if err != nil {
			return t, err
		}
		if len(words) > 2 {
			return t, errors.New("has more capabilities than there are")
		}
		for i, w := range words {
			t.capabilities |= uint64(w) << (32 * i)
		}
	}
	if t.rseq, err = registeredRseq(thread); err != nil {
		return t, err
	}
	if t.lsm, err = creds.text(15); err != nil {
		return t, err
	}
	n, err := creds.number(18)
	t.noNewPrivileges = n != 0
	return t, err
}

// registeredRseq tells whether a thread has told the kernel of its restartable
// sequences: CRIU also notes of one that has not where they are, at 0.
func registeredRseq(thread fields) (bool, error) {
	entry, err := thread.message(15)
	if err != nil || entry == nil {
		return false, err
	}
	address, err := entry.single(1, protowire.VarintType)
	return address != nil && address.number != 0, err
}

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

func parseMount(data []byte) (m mountEntry, err error) {
	f, err := parse(data)
	if err != nil {
		return m, err
	}
	var superblock uint32
	for _, n := range []struct {
		field protowire.Number
		to    *uint32
	}{{1, &m.fstype}, {2, &m.id}, {3, &m.device}, {4, &m.parent}, {5, &m.flags}, {17, &superblock}} {
		if *n.to, err = f.number(n.field); err != nil {
			return m, err
		}
	}
	m.flags |= superblock & unix.MS_RDONLY
	for _, s := range []struct {
		field protowire.Number
		to    *string
	}{{6, &m.root}, {7, &m.mountpoint}, {8, &m.source}, {9, &m.options}, {14, &m.fsname}, {18, &m.by}} {
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
	messages, err := c.read(name, magicMountpoints)
	if err != nil {
		return err
	}
	all := make([]mountEntry, len(messages))
	byID := make(map[uint32]*mountEntry, len(messages))
	for i, data := range messages {
		if all[i], err = parseMount(data); err != nil {
			return err
		}
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

// one reads an image that holds one message.
func (c *checker) one(name string, magic uint32) ([]byte, error) {
	messages, err := c.read(name, magic)
	if err != nil {
		return nil, err
	}
	if len(messages) != 1 {
		return nil, fmt.Errorf("holds %d messages instead of one", len(messages))
	}
	return messages[0], nil
}

func (c *checker) read(name string, magic uint32) ([][]byte, error) {
	f, err := openBeneath(c.fd, name)
	if err != nil {
		var p *os.PathError
		if errors.As(err, &p) {
			err = p.Err // the name is said once
		}
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxImage+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxImage {
		return nil, fmt.Errorf("has more than %d bytes", maxImage)
	}
	return parseImage(data, magic)
}

// parseImage takes an image file apart: two magic numbers (the inventory, which
// tells the form of the others, has only its own), and messages with their sizes
// before them.
func parseImage(data []byte, magic uint32) (messages [][]byte, err error) {
	magics := []uint32{magicCommon, magic}
	if magic == magicInventory {
		magics = magics[1:]
	}
	for _, want := range magics {
		if len(data) < 4 || binary.LittleEndian.Uint32(data) != want {
			return nil, errors.New("is not what its name says")
		}
		data = data[4:]
	}
	for len(data) > 0 {
		if len(data) < 4 {
			return nil, errors.New("is cut off")
		}
		size := uint64(binary.LittleEndian.Uint32(data))
		data = data[4:]
		if size > uint64(len(data)) {
			return nil, errors.New("is cut off")
		}
		if messages = append(messages, data[:size]); len(messages) > maxMessages {
			return nil, fmt.Errorf("holds more than %d messages", maxMessages)
		}
		data = data[size:]
	}
	return messages, nil
}

// fields are a protobuf message's, by their numbers. Readers differ about a
// field that is there twice, and about numbers that are too large: the accessors
// refuse what CRIU does not write, so that it cannot see anything else than we.
type fields map[protowire.Number][]field

type field struct {
	number uint64 // of a varint
	bytes  []byte // of anything with a length
	kind   protowire.Type
}

func parse(data []byte) (fields, error) {
	f := fields{}
	for len(data) > 0 {
		num, kind, n := protowire.ConsumeTag(data)
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		data = data[n:]
		v := field{kind: kind}
		switch kind {
		case protowire.VarintType:
			v.number, n = protowire.ConsumeVarint(data)
		case protowire.BytesType:
			v.bytes, n = protowire.ConsumeBytes(data)
		case protowire.Fixed32Type, protowire.Fixed64Type:
			n = protowire.ConsumeFieldValue(num, kind, data)
		default:
			return nil, fmt.Errorf("field %d has the wire type %d", num, kind)
		}
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		data = data[n:]
		f[num] = append(f[num], v)
	}
	return f, nil
}

func (f fields) has(num protowire.Number) bool { return len(f[num]) > 0 }

// single returns a field that may be there once; nil if it is not.
func (f fields) single(num protowire.Number, kind protowire.Type) (*field, error) {
	switch v := f[num]; {
	case len(v) == 0:
		return nil, nil
	case len(v) > 1:
		return nil, fmt.Errorf("field %d is there %d times", num, len(v))
	case v[0].kind != kind:
		return nil, fmt.Errorf("field %d has the wire type %d", num, v[0].kind)
	default:
		return &v[0], nil
	}
}

// number returns 0 for a field that is not there.
func (f fields) number(num protowire.Number) (uint32, error) {
	v, err := f.single(num, protowire.VarintType)
	if err != nil || v == nil {
		return 0, err
	}
	return word(num, v.number)
}

func word(num protowire.Number, v uint64) (uint32, error) {
	if v > 1<<32-1 {
		return 0, fmt.Errorf("field %d has the value %d", num, v)
	}
	return uint32(v), nil
}

func (f fields) text(num protowire.Number) (string, error) {
	v, err := f.single(num, protowire.BytesType)
	if err != nil || v == nil {
		return "", err
	}
	if slices.Contains(v.bytes, 0) {
		return "", fmt.Errorf("field %d holds a zero byte", num) // where C's string ends
	}
	return string(v.bytes), nil
}

// message returns nil for a message that is not there.
func (f fields) message(num protowire.Number) (fields, error) {
	v, err := f.single(num, protowire.BytesType)
	if err != nil || v == nil {
		return nil, err
	}
	return parse(v.bytes)
}

// numbers returns a repeated field's, packed or not.
func (f fields) numbers(num protowire.Number) (words []uint32, err error) {
	add := func(v uint64) error {
		w, err := word(num, v)
		words = append(words, w)
		return err
	}
	for _, v := range f[num] {
		switch v.kind {
		case protowire.VarintType:
			if err := add(v.number); err != nil {
				return nil, err
			}
		case protowire.BytesType:
			for data := v.bytes; len(data) > 0; {
				number, n := protowire.ConsumeVarint(data)
				if n < 0 {
					return nil, protowire.ParseError(n)
				}
				data = data[n:]
				if err := add(number); err != nil {
					return nil, err
				}
			}
		default:
			return nil, fmt.Errorf("field %d has the wire type %d", num, v.kind)
		}
	}
	return words, nil
}
