package convert

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	criucore "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/mnt"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/crac-shim/crac/images/compress"
	"github.com/crac-shim/crac/images/inspect"
	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/oci/criuimage"
)

// dump is the directory of an unpacked dump, ours to change: what it says of mounts
// and namespaces is made to be what the next one to restore it expects.
type dump struct{ dir string }

// maxImage bounds an image file that is read into memory.
const maxImage = 64 << 20

func (d dump) read(name string) ([]byte, error) {
	f, err := openRegular(filepath.Join(d.dir, name))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readAll(f, name+" of the dump", maxImage)
}

// messages reads an image file.
func (d dump) messages(name string, kind criuimage.Kind) ([][]byte, error) {
	data, err := d.read(name)
	if err != nil {
		return nil, err
	}
	all, err := inspect.Messages(data, kind)
	if err != nil {
		return nil, fmt.Errorf("%w: %s of the dump %w", ErrSource, name, err)
	}
	return all, nil
}

// unmarshal makes messages of an image file's parts.
func unmarshal[M any, P interface {
	*M
	proto.Message
}](name string, parts [][]byte) ([]P, error) {
	all, err := inspect.Unmarshal[M, P](parts)
	if err != nil {
		return nil, fmt.Errorf("%w: %s of the dump: %w", ErrSource, name, err)
	}
	return all, nil
}

// write replaces an image file. What is there may be somebody else's under another
// name, so it is not written into.
func (d dump) write(name string, data []byte) error {
	path := filepath.Join(d.dir, name)
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

func (d dump) remove(name string) error {
	err := os.Remove(filepath.Join(d.dir, name))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// maxMaps bounds what a dump says of its processes' memory, all together. What reads it
// later keeps it in memory.
const maxMaps = 256 << 20

// checkMaps refuses more than that.
func (d dump) checkMaps() error {
	left := int64(maxMaps)
	for _, name := range append(d.glob("pagemap-*.img"), d.glob("mm-*.img")...) {
		st, err := os.Lstat(filepath.Join(d.dir, name))
		if err != nil {
			return err
		}
		if left -= st.Size(); left < 0 {
			return fmt.Errorf("%w: its dump has more than %d bytes of page maps and mappings (pagemap-*.img, mm-*.img)", ErrSource, maxMaps)
		}
	}
	return nil
}

// glob lists the dump's files of a kind, sorted.
func (d dump) glob(pattern string) []string {
	found, _ := filepath.Glob(filepath.Join(d.dir, pattern)) // the patterns are right
	for i := range found {
		found[i] = filepath.Base(found[i])
	}
	return found
}

// mounts are those of one mount namespace.
type mounts struct {
	d       dump
	name    string // of the image file
	entries []*mnt.MntEntry
	held    map[uint32]bool // mounts that something is open in
}

// readMounts reads the mounts of the dump's only mount namespace.
func (d dump) readMounts() (*mounts, error) {
	names := d.glob("mountpoints-*.img")
	if len(names) != 1 {
		return nil, fmt.Errorf("%w: it has %d mount namespaces; a container that makes more than its own cannot be converted", ErrSource, len(names))
	}
	m := &mounts{d: d, name: names[0], held: make(map[uint32]bool)}
	parts, err := d.messages(m.name, criuimage.Mountpoints)
	if err != nil {
		return nil, err
	}
	if m.entries, err = unmarshal[mnt.MntEntry](m.name, parts); err != nil {
		return nil, err
	}
	return m, m.findHeld()
}

// findHeld notes the mounts that files, sockets and watches of the processes lie in.
func (m *mounts) findHeld() error {
	parts, err := m.d.messages("files.img", criuimage.Files)
	if err != nil {
		return fmt.Errorf("%w: older dumps than CRIU 3.13's are not read: %w", ErrSource, err)
	}
	files, err := unmarshal[fdinfo.FileEntry]("files.img", parts)
	if err != nil {
		return err
	}
	for _, f := range files {
		for _, id := range []int32{f.GetReg().GetMntId(), f.GetUsk().GetMntId()} {
			if id > 0 {
				m.held[uint32(id)] = true
			}
		}
		for _, w := range f.GetIfy().GetWd() {
			m.held[w.GetFHandle().GetMntId()] = true
		}
		for _, mark := range f.GetFfy().GetMark() {
			m.held[mark.GetMe().GetMntId()] = true
		}
	}
	return nil
}

// inUse tells whether something is open in a mount, or mounted in it.
func (m *mounts) inUse(e *mnt.MntEntry) bool {
	return m.held[e.GetMntId()] || slices.ContainsFunc(m.entries, func(o *mnt.MntEntry) bool {
		return o != e && o.GetParentMntId() == e.GetMntId()
	})
}

// drop takes a mount out of the dump, with the files that CRIU keeps of it.
func (m *mounts) drop(e *mnt.MntEntry) error {
	m.entries = slices.DeleteFunc(m.entries, func(o *mnt.MntEntry) bool { return o == e })
	if slices.ContainsFunc(m.entries, func(o *mnt.MntEntry) bool { return o.GetRootDev() == e.GetRootDev() }) {
		return nil
	}
	return m.d.remove(tmpfsImage(e))
}

// own makes a file system in memory that comes from outside one of the dump's own,
// with what tarball holds, which may be nil.
func (m *mounts) own(e *mnt.MntEntry, tarball io.Reader) (err error) {
	// What is there may be somebody else's under another name.
	if err := m.d.remove(tmpfsImage(e)); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(m.d.dir, tmpfsImage(e)), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	format, err := compress.Of(oci.CompressionGzip)
	if err != nil {
		return err
	}
	z, err := format.NewWriter(f)
	if err != nil {
		return err
	}
	if tarball == nil {
		err = tar.NewWriter(z).Close()
	} else {
		_, err = io.Copy(z, tarball)
	}
	if err := errors.Join(err, z.Close()); err != nil {
		return err
	}
	e.ExtKey, e.ExtMount = nil, nil
	return nil
}

// tmpfsImage is where CRIU keeps the files of a tmpfs.
func tmpfsImage(e *mnt.MntEntry) string {
	return fmt.Sprintf("tmpfs-dev-%d.tar.gz.img", e.GetRootDev())
}

func (m *mounts) save() error {
	parts := make([][]byte, len(m.entries))
	for i, e := range m.entries {
		data, err := proto.Marshal(e)
		if err != nil {
			return err
		}
		parts[i] = data
	}
	return m.d.write(m.name, criuimage.New(criuimage.Mountpoints, parts...))
}

// external tells whether a mount's source comes from whoever restores it. Masked
// files are /dev/null, which everybody offers, and keys of CRIU's own are its own.
func external(e *mnt.MntEntry) bool {
	key := e.GetExtKey()
	if key == "" && e.GetExtMount() {
		return true
	}
	return key != "" && key != os.DevNull && !strings.HasPrefix(key, "CRIU:")
}

// externalNetwork is the name by which runc, crun and our shim inherit the network
// namespace that a container is to have.
const externalNetwork = "extRootNetNS"

// network rewrites what the dump says of its network namespace: that it comes from
// outside, or that CRIU makes an empty one. It says whether the dump held one with
// interfaces and addresses. A dump with the host's is left alone.
func (d dump) network(external bool) (full bool, err error) {
	id, own, err := d.networkID()
	if err != nil || !own {
		return false, err
	}
	for _, kind := range []string{"netdev", "ifaddr", "route", "route6", "rule", "iptables", "ip6tables", "nftables", "netns-ct", "netns-exp"} {
		for _, name := range d.glob(kind + "-*.img") {
			full = true
			if err := d.remove(name); err != nil {
				return full, err
			}
		}
	}
	for _, name := range d.glob("netns-*.img") {
		if err := d.remove(name); err != nil {
			return full, err
		}
	}
	if !external {
		return full, nil
	}
	entry := protowire.AppendTag(nil, netnsExternal, protowire.BytesType)
	entry = protowire.AppendString(entry, externalNetwork)
	return full, d.write(fmt.Sprintf("netns-%d.img", id), criuimage.New(criuimage.Netns, entry))
}

// netnsExternal is the field ext_key of netns_entry.
const netnsExternal = 8

// networkID is the number of the processes' network namespace, and whether that is
// another than the host's.
func (d dump) networkID() (id uint32, own bool, err error) {
	names := d.glob("ids-*.img")
	if len(names) == 0 {
		return 0, false, fmt.Errorf("%w: its dump says nothing of namespaces (ids-*.img)", ErrSource)
	}
	for _, name := range names {
		parts, err := d.messages(name, criuimage.IDs)
		if err != nil {
			return 0, false, err
		}
		ids, err := unmarshal[criucore.TaskKobjIdsEntry](name, parts)
		if err != nil {
			return 0, false, err
		}
		if len(ids) != 1 {
			return 0, false, fmt.Errorf("%w: %s of the dump holds %d messages", ErrSource, name, len(ids))
		}
		if id != 0 && ids[0].GetNetNsId() != id {
			return 0, false, fmt.Errorf("%w: its processes have several network namespaces", ErrSource)
		}
		id = ids[0].GetNetNsId()
	}
	host, err := d.inventory()
	if err != nil {
		return 0, false, err
	}
	return id, id != 0 && host.GetRootIds().GetNetNsId() != id, nil
}

// forgetRootMode takes out of the dump which permissions the root directory had, for
// processes that have it open, as most have: CRIU refuses others, and each engine gives
// it its own.
func (d dump) forgetRootMode() error {
	parts, err := d.messages("files.img", criuimage.Files)
	if err != nil {
		return err
	}
	files, err := unmarshal[fdinfo.FileEntry]("files.img", parts)
	if err != nil {
		return err
	}
	changed := false
	for i, f := range files {
		if reg := f.GetReg(); reg != nil && reg.Mode != nil && reg.GetName() == "/" {
			reg.Mode = nil
			if parts[i], err = proto.Marshal(f); err != nil {
				return err
			}
			changed = true
		}
	}
	if !changed {
		return nil
	}
	return d.write("files.img", criuimage.New(criuimage.Files, parts...))
}
