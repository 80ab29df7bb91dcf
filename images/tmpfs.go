package images

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/crac-shim/crac/oci/criuimage"
)

// Tmpfs is a tmpfs of a dump that can be made, with its files, before CRIU makes
// the other mounts.
type Tmpfs struct {
	Key      string // by which MadeBefore knows it, and CRIU afterwards
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

// Fields of mnt_entry that are read here only.
const (
	mountShared, mountPlugin, mountInternal, mountDeleted = 10, 12, 15, 16

	mountSuperblock, mountKey = 17, 18
)

// SmallTmpfs finds them in the dump in dir, among them only those about which
// there is nothing unusual. tables are mount tables that take the place of the
// dump's, from MountsHere.
func SmallTmpfs(dir string, tables map[string][]byte) ([]Tmpfs, error) {
	d, err := openMountTables(dir)
	if err != nil {
		return nil, err
	}
	defer d.close()
	// Where processes have mount namespaces of their own, one tmpfs may be in several.
	if len(d.names) != 1 {
		return nil, nil
	}
	messages, err := d.table(d.names[0], tables)
	if err != nil {
		return nil, err
	}
	var found []Tmpfs
	devices := map[uint32]bool{}
	for _, data := range messages {
		m, err := parseMount(data)
		if err != nil {
			return nil, d.damaged(d.names[0], err)
		}
		if strings.HasPrefix(m.by, tmpfsKey) {
			return nil, nil // says that it is not what it is
		}
		if m.fstype != fsTmpfs || m.root != "/" || m.by != "" || m.fsname != "" || devices[m.device] || !alone(data) {
			continue
		}
		t := Tmpfs{Key: fmt.Sprint(tmpfsKey, m.id), Source: m.source}
		if t.Options, err = plainOptions(m.options); err != nil {
			continue
		}
		superblock, err := superblockFlags(data)
		if err != nil || superblock&^unix.MS_RDONLY != 0 {
			continue
		}
		t.ReadOnly = superblock != 0
		if t.Archive = d.archive(m); t.Archive == nil {
			continue
		}
		devices[m.device] = true // CRIU binds the others from it
		found = append(found, t)
	}
	return found, nil
}

// alone tells whether a mount shares nothing with others, and is still where it
// was made.
func alone(data []byte) bool {
	f, err := parse(data)
	if err != nil {
		return false
	}
	for _, field := range []protowire.Number{mountShared, masterID, mountPlugin, mountInternal, mountDeleted} {
		if n, err := f.number(field); err != nil || n != 0 {
			return false
		}
	}
	return true
}

// superblockFlags are in a field of their own since CRIU 2.
func superblockFlags(data []byte) (uint32, error) {
	f, err := parse(data)
	if err != nil {
		return 0, err
	}
	if !f.has(mountSuperblock) {
		return 0, errors.New("does not tell the superblock's flags from the mount's")
	}
	return f.number(mountSuperblock)
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

// archive reads that of a mount; nil if there is none or it is large.
func (d *mountTables) archive(m mountEntry) []byte {
	f, err := openBeneath(int(d.dir.Fd()), fmt.Sprintf("tmpfs-dev-%d.tar.gz.img", m.device))
	if err != nil {
		return nil // CRIU has called it otherwise, long ago
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxTmpfsArchive+1))
	if err != nil || len(data) == 0 || len(data) > maxTmpfsArchive {
		return nil
	}
	return data
}

// MadeBefore changes images, which a restore reads instead of those in dir, so that
// CRIU takes the mounts of these keys from where it is told, and makes the others.
func MadeBefore(dir string, images map[string][]byte, keys []string) error {
	if len(keys) == 0 {
		return nil
	}
	d, err := openMountTables(dir)
	if err != nil {
		return err
	}
	defer d.close()
	for _, name := range d.names {
		messages, err := d.table(name, images)
		if err != nil {
			return err
		}
		for i, data := range messages {
			m, err := parseMount(data)
			if err != nil {
				return d.damaged(name, err)
			}
			if key := fmt.Sprint(tmpfsKey, m.id); slices.Contains(keys, key) {
				messages[i] = protowire.AppendString(protowire.AppendTag(slices.Clone(data), mountKey, protowire.BytesType), key)
			}
		}
		images[name] = criuimage.New(criuimage.Mountpoints, messages...)
	}
	return nil
}

// mountTables are those of a dump.
type mountTables struct {
	dumpDir
	names []string
}

func openMountTables(dir string) (*mountTables, error) {
	d, all, err := listDump(dir)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	tables := slices.DeleteFunc(all, func(name string) bool { return !strings.HasPrefix(name, "mountpoints-") || !isImage(name) })
	return &mountTables{d, tables}, nil
}

// table reads one of the tables, or what takes its place.
func (d *mountTables) table(name string, instead map[string][]byte) (messages [][]byte, err error) {
	if data, ok := instead[name]; ok {
		return criuimage.Split(data, criuimage.Mountpoints, maxMessages)
	}
	if messages, err = d.read(name, criuimage.Mountpoints); err != nil {
		return nil, d.damaged(name, err)
	}
	return messages, nil
}

func (d *mountTables) damaged(table string, err error) error {
	return fmt.Errorf("%w: %s/%s: %w", ErrDamaged, d.dir.Name(), table, err)
}
