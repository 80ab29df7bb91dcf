package images

import (
	"bytes"
	"os"
	"path"
	"slices"
	"strings"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/crac-shim/crac/oci/criuimage"
)

// MountsHere makes the mount tables of a dump, by the names of their files, without
// the mounts at files of /proc and /sys that this host's kernel does not have. A
// runtime hides some such files from a container and makes others read-only, those
// that are there (/proc/sysrq-trigger, /proc/kcore); CRIU gives up where one is not,
// though there is nothing to hide. And where the host shares no mounts, what came from
// outside receives none: CRIU gives up there, too. Tables that stay as they are, are not in the
// result.
func MountsHere(dir string) (map[string][]byte, error) {
	shared, err := sharesMounts()
	if err != nil {
		return nil, err
	}
	return mountsHere(dir, exists, shared)
}

// mountsHere is MountsHere for a host of which has tells what files it has, and shared
// whether it shares mounts.
func mountsHere(dir string, has func(path string) bool, shared bool) (map[string][]byte, error) {
	d, err := openMountTables(dir)
	if err != nil {
		return nil, err
	}
	defer d.close()
	changed := make(map[string][]byte)
	for _, name := range d.names {
		messages, err := d.table(name, nil)
		if err != nil {
			return nil, err
		}
		kept, err := tableHere(slices.Clone(messages), has, shared)
		if err != nil {
			return nil, d.damaged(name, err)
		}
		if !slices.EqualFunc(kept, messages, bytes.Equal) {
			changed[name] = criuimage.New(criuimage.Mountpoints, kept...)
		}
	}
	return changed, nil
}

func tableHere(messages [][]byte, has func(string) bool, shared bool) (kept [][]byte, err error) {
	all := make([]mountEntry, len(messages))
	byID := make(map[uint32]mountEntry, len(messages))
	parents := make(map[uint32]bool, len(messages))
	for i, data := range messages {
		if all[i], err = parseMount(data); err != nil {
			return nil, err
		}
		byID[all[i].id] = all[i]
		parents[all[i].parent] = true
	}
	for i, m := range all {
		if at := ofKernel(m, byID[m.parent]); at != "" && !parents[m.id] && !has(at) {
			continue
		}
		if m.external && !shared {
			if messages[i], err = withoutMaster(messages[i]); err != nil {
				return nil, err
			}
		}
		kept = append(kept, messages[i])
	}
	return kept, nil
}

// masterID is a field of mnt_entry: whose mounts a mount receives.
const masterID = 11

// withoutMaster lets a mount receive no mounts of another.
func withoutMaster(data []byte) (out []byte, err error) {
	for len(data) > 0 {
		num, _, n := protowire.ConsumeField(data)
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		if num != masterID {
			out = append(out, data[:n]...)
		}
		data = data[n:]
	}
	return out, nil
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
func ofKernel(m, on mountEntry) string {
	if on.root != "/" || m.mountpoint == on.mountpoint || !below(m.mountpoint, on.mountpoint) {
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
