package images

import (
	"os"
	"path"
	"strings"

	"github.com/crac-shim/crac/oci/criuimage"
)

// Mounts are the mount tables of a dump as a restore is to read them.
type Mounts struct {
	dump   *Dump
	tables []*ownTable
}

// ownTable is one of them.
type ownTable struct {
	mountTable
	changed bool // it is not the dump's
}

// MountsHere reads the mount tables without the mounts at files of /proc and /sys that
// this host's kernel does not have. A runtime hides some such files from a container
// and makes others read-only, those that are there (/proc/sysrq-trigger, /proc/kcore);
// CRIU gives up where one is not, though there is nothing to hide. And where the host
// shares no mounts, what came from outside receives none: CRIU gives up there, too.
func (d *Dump) MountsHere() (*Mounts, error) {
	shared, err := sharesMounts()
	if err != nil {
		return nil, err
	}
	return d.mountsHere(exists, shared)
}

// mountsHere is MountsHere for a host of which has tells what files it has, and shared
// whether it shares mounts.
func (d *Dump) mountsHere(has func(path string) bool, shared bool) (*Mounts, error) {
	m := &Mounts{dump: d}
	for _, name := range d.names {
		if !isMountTable(name) {
			continue
		}
		t, err := d.mounts(name)
		if err != nil {
			return nil, damaged(name, err)
		}
		here, err := t.here(has, shared)
		if err != nil {
			return nil, damaged(name, err)
		}
		m.tables = append(m.tables, here)
	}
	return m, nil
}

func isMountTable(name string) bool { return strings.HasPrefix(name, "mountpoints-") && isImage(name) }

// Images are the tables that are to be read instead of the dump's, by the names of
// their files.
func (m *Mounts) Images() map[string][]byte {
	changed := make(map[string][]byte)
	for _, t := range m.tables {
		if t.changed {
			changed[t.name] = criuimage.New(criuimage.Mountpoints, t.messages...)
		}
	}
	return changed
}

func (t *mountTable) here(has func(string) bool, shared bool) (*ownTable, error) {
	byID := make(map[uint32]*mountEntry, len(t.entries))
	parents := make(map[uint32]bool, len(t.entries))
	for i := range t.entries {
		m := &t.entries[i]
		byID[m.id] = m
		parents[m.parent] = true
	}
	own := &ownTable{mountTable: mountTable{name: t.name}}
	for i, m := range t.entries {
		if at := ofKernel(m, byID[m.parent]); at != "" && !parents[m.id] && !has(at) {
			own.changed = true
			continue
		}
		message := t.messages[i]
		if m.external && !shared && m.master != 0 {
			var err error
			if message, err = without(message, mountMaster); err != nil {
				return nil, err
			}
			m.master, own.changed = 0, true
		}
		own.messages, own.entries = append(own.messages, message), append(own.entries, m)
	}
	return own, nil
}

// sharesMounts tells whether this host shares its mounts, as systemd has it: all are
// then made from a shared root. Elsewhere what comes from the host has nobody to
// receive mounts from.
func sharesMounts() (bool, error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return false, err
	}
	for line := range strings.Lines(string(data)) {
		// id, parent, device, root, mount point, options, optional fields
		if f := strings.Fields(line); len(f) > 6 && f[4] == "/" {
			return strings.HasPrefix(f[6], "shared:"), nil
		}
	}
	return true, nil // in a chroot it does not show; what the dump says stays
}

// ofKernel is where a host has the file of /proc or /sys that a mount is at; empty for
// all other mounts, and for what /proc has of a process.
func ofKernel(m mountEntry, on *mountEntry) string {
	if on == nil || on.root != "/" || m.mountpoint == on.mountpoint || !below(m.mountpoint, on.mountpoint) {
		return ""
	}
	file := strings.TrimPrefix(strings.TrimPrefix(m.mountpoint, on.mountpoint), "/")
	switch first, _, _ := strings.Cut(file, "/"); {
	case on.fstype == fsSysfs:
		return path.Join("/sys", file)
	case on.fstype == fsProc && first != "self" && first != "thread-self" && strings.Trim(first, "0123456789") != "":
		return path.Join("/proc", file)
	}
	return ""
}
