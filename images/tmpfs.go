package images

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
)

// Tmpfs is a tmpfs of a dump that can be made, with its files, before CRIU makes
// the other mounts.
type Tmpfs struct {
	Key      string // by which Mounts.MadeBefore knows it, and CRIU afterwards
	Source   string
	Options  []string // of the superblock
	ReadOnly bool     // the superblock
	Archive  []byte   // of its files, as CRIU has tar make one; hostile
}

// tmpfsKey begins the keys.
const tmpfsKey = "crac-tmpfs-"

// maxTmpfsArchive bounds an archive, in bytes: what unpacks larger ones can be left
// to CRIU, and all of it is held in memory until then.
const maxTmpfsArchive = 256 << 10

// tmpfsOptions are those that mean the same to every kernel. Others are for CRIU
// to pass on.
var tmpfsOptions = []string{"size", "nr_blocks", "nr_inodes", "mode", "uid", "gid", "inode32", "inode64"}

// SmallTmpfs finds them, among them only those about which there is nothing unusual.
func (m *Mounts) SmallTmpfs() []Tmpfs {
	// Where processes have mount namespaces of their own, one tmpfs may be in several.
	if len(m.tables) != 1 {
		return nil
	}
	entries := m.tables[0].entries
	if slices.ContainsFunc(entries, func(e mountEntry) bool { return strings.HasPrefix(e.by, tmpfsKey) }) {
		return nil // says that it is not what it is
	}
	var found []Tmpfs
	devices := map[uint32]bool{}
	for _, e := range entries {
		if e.fstype != fsTmpfs || e.root != "/" || e.by != "" || e.fsname != "" || devices[e.device] ||
			!e.alone() || !e.apart || e.superblock&^unix.MS_RDONLY != 0 {
			continue
		}
		options, err := plainOptions(e.options)
		if err != nil {
			continue
		}
		archive := m.dump.archive(e.device)
		if archive == nil {
			continue
		}
		devices[e.device] = true // CRIU binds the others from it
		found = append(found, Tmpfs{
			Key: fmt.Sprint(tmpfsKey, e.id), Source: e.source, Options: options, ReadOnly: e.superblock != 0, Archive: archive,
		})
	}
	return found
}

// alone tells whether a mount shares nothing with others, and is still where it
// was made.
func (m mountEntry) alone() bool {
	return m.shared == 0 && m.master == 0 && m.plugin == 0 && m.internal == 0 && m.deleted == 0
}

func plainOptions(options string) ([]string, error) {
	if options == "" {
		return nil, nil
	}
	all := strings.Split(options, ",")
	for _, o := range all {
		if key, _, _ := strings.Cut(o, "="); !slices.Contains(tmpfsOptions, key) {
			return nil, fmt.Errorf("has the option %q", o)
		}
	}
	return all, nil
}

// archive reads that of a tmpfs; nil if there is none or it is large.
func (d *Dump) archive(device uint32) []byte {
	// CRIU has called it otherwise, long ago.
	data, err := d.small(fmt.Sprintf("tmpfs-dev-%d.tar.gz.img", device), maxTmpfsArchive)
	if err != nil || len(data) == 0 {
		return nil
	}
	return data
}

// MadeBefore has CRIU take the mounts of these keys from where it is told, and make the
// others.
func (m *Mounts) MadeBefore(keys []string) {
	for _, t := range m.tables {
		for i, e := range t.entries {
			if key := fmt.Sprint(tmpfsKey, e.id); slices.Contains(keys, key) {
				t.messages[i] = protowire.AppendString(protowire.AppendTag(slices.Clone(t.messages[i]), mountKey, protowire.BytesType), key)
				t.changed = true
			}
		}
	}
}
