package images

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/crac-shim/crac/oci/criuimage"
)

// CodePrivileges: the dump's processes may do more than the request allows.
const CodePrivileges = "privileges"

// Privileges are what a request allows a workload. CRIU takes a process's
// privileges and its mounts from the dump alone, so that whoever writes an image
// would decide them.
type Privileges struct {
	// Capabilities is the bounding set, bit by bit as in the kernel.
	Capabilities uint64
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

// CheckPrivileges tells what the dump would give its processes that the request
// does not allow: capabilities, the host's namespaces, and mounts. An error wraps ErrDamaged,
// and means that it must not be restored.
//
// Not looked at: what Confinement cares for, masked paths, which hide only what may
// be read, and the write protection of cgroup file systems.
func (d *Dump) CheckPrivileges(allowed Privileges) ([]Reason, error) {
	c := checker{Dump: d, allowed: allowed}
	for _, name := range d.names {
		if err := c.look(name); err != nil {
			return nil, damaged(name, err)
		}
	}
	if c.tasks == 0 {
		return nil, fmt.Errorf("%w: %s holds no process (core-*.img)", ErrDamaged, d.path)
	}
	return c.reasons(), nil
}

// checker collects what is wrong with a dump.
type checker struct {
	*Dump
	allowed Privileges
	tasks   int // threads that will run

	capabilities, namespaces, mounts finding

	excess uint64      // of capabilities
	root   *mountEntry // of the first mount namespace
	host   fields      // the host's namespaces where the dump was made
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

func (c *checker) look(name string) error {
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
	t, err := c.Dump.core(name)
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
	data, err := c.one(name, criuimage.IDs)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	ids, err := parse(data)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if c.host == nil {
		if c.host, err = c.hostIDs(); err != nil {
			return err
		}
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
		hosts, err := c.host.number(field)
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

// hostIDs reads the inventory's word on the host's namespaces.
func (c *checker) hostIDs() (fields, error) {
	data, err := c.one("inventory.img", criuimage.Inventory)
	if err != nil {
		return nil, fmt.Errorf("inventory.img: %w", err)
	}
	inventory, err := parse(data)
	if err != nil {
		return nil, fmt.Errorf("inventory.img: %w", err)
	}
	host, err := inventory.message(3)
	if err != nil || host == nil {
		return nil, errors.Join(errors.New("inventory.img does not name the host's namespaces"), err)
	}
	return host, nil
}
