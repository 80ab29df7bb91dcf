package convert

import (
	"errors"
	"fmt"
	"os"
	goruntime "runtime"

	criucore "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/inventory"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/oci/criuimage"
)

// inventory reads what CRIU writes last.
func (d dump) inventory() (*inventory.InventoryEntry, error) {
	data, err := d.read(inventoryName)
	if err != nil {
		return nil, fmt.Errorf("%w: it has no whole dump: %w", ErrSource, err)
	}
	message, err := criuimage.One(data, criuimage.Inventory)
	if err != nil {
		return nil, fmt.Errorf("%w: inventory.img of the dump is damaged: it %w", ErrSource, err)
	}
	i := new(inventory.InventoryEntry)
	if err := proto.Unmarshal(message, i); err != nil {
		return nil, fmt.Errorf("%w: inventory.img of the dump: %w", ErrSource, err)
	}
	return i, nil
}

// selfContained makes the inventory say what needs no options of CRIU's: that no
// connections were closed, if there are none, and that the processes are in the cgroup
// that CRIU itself is in when it restores them, which a container's runtime has seen to.
// It counts the connections.
func (d dump) selfContained() (connections int, err error) {
	parts, err := d.messages("files.img", criuimage.Files)
	if err != nil {
		return 0, err
	}
	files, err := unmarshal[fdinfo.FileEntry]("files.img", parts)
	if err != nil {
		return 0, err
	}
	for _, f := range files {
		s := f.GetIsk()
		if s != nil && s.GetProto() == unix.IPPROTO_TCP && s.GetState() != unix.BPF_TCP_LISTEN && s.GetState() != unix.BPF_TCP_CLOSE {
			connections++
		}
	}
	i, err := d.inventory()
	if err != nil {
		return 0, err
	}
	if connections == 0 {
		i.TcpClose = nil
	}
	if set, err := d.cgroupSet(); err != nil {
		return 0, err
	} else if set != 0 && i.RootCgSet != nil {
		i.RootCgSet = &set
	}
	data, err := proto.Marshal(i)
	if err != nil {
		return 0, err
	}
	return connections, d.write(inventoryName, criuimage.New(criuimage.Inventory, data))
}

// cgroupSet is the number of the cgroups of the first process.
func (d dump) cgroupSet() (uint32, error) {
	const first = "core-1.img"
	parts, err := d.messages(first, criuimage.Core)
	if err != nil {
		return 0, err
	}
	cores, err := unmarshal[criucore.CoreEntry](first, parts)
	if err != nil || len(cores) != 1 {
		return 0, errors.Join(fmt.Errorf("%w: %s of the dump holds %d messages", ErrSource, first, len(cores)), err)
	}
	if set := cores[0].GetThreadCore().GetCgSet(); set != 0 {
		return set, nil
	}
	return cores[0].GetTc().GetCgSet(), nil
}

const inventoryName = "inventory.img"

// architectures are CRIU's names of those that we run on.
var architectures = map[string]criucore.CoreEntryMarch{
	"amd64": criucore.CoreEntry_X86_64, "arm64": criucore.CoreEntry_AARCH64,
}

// checkArchitecture refuses the dump of another kind of machine: an import says that
// a checkpoint fits this one.
func (d dump) checkArchitecture() error {
	names := d.glob("core-*.img")
	if len(names) == 0 {
		return fmt.Errorf("%w: its dump holds no process (core-*.img)", ErrSource)
	}
	parts, err := d.messages(names[0], criuimage.Core)
	if err != nil {
		return err
	}
	if len(parts) != 1 {
		return fmt.Errorf("%w: %s of the dump holds %d messages", ErrSource, names[0], len(parts))
	}
	// The one field, without the rest of the message, which other architectures fill
	// with what is theirs.
	mtype, n := uint64(0), 0
	if num, kind, m := protowire.ConsumeTag(parts[0]); m > 0 && num == 1 && kind == protowire.VarintType {
		mtype, n = protowire.ConsumeVarint(parts[0][m:])
	}
	if n <= 0 {
		return fmt.Errorf("%w: %s of the dump does not begin with its architecture", ErrSource, names[0])
	}
	if want, ok := architectures[goruntime.GOARCH]; !ok || criucore.CoreEntryMarch(mtype) != want {
		return fmt.Errorf("%w: it was made on %s, and this host is %s; import it on a host of its architecture",
			ErrSource, criucore.CoreEntryMarch(mtype), goruntime.GOARCH)
	}
	return nil
}

// established counts the connections that the dump can continue.
func (d dump) established() int { return len(d.glob("tcp-stream-*.img")) }

// criuVersion is the oldest version that writes page maps as the dump's are: all
// that a dump says about it.
func (d dump) criuVersion() (int, error) {
	for _, name := range d.glob("pagemap-*.img") {
		data, err := d.read(name)
		if err != nil {
			return 0, err
		}
		p, err := images.ParsePagemap(data, uint64(os.Getpagesize()))
		if err != nil {
			return 0, fmt.Errorf("%w: %s of the dump: %w", ErrSource, name, err)
		}
		if p.Wide() {
			return 40200, nil
		}
	}
	return images.MinimumCRIU, nil
}

// manifest says what the dump needs, as far as it can be known here. What the source
// does not say of its machine is taken from this one.
func (s *source) manifest(ref string) (oci.Manifest, error) {
	none := oci.Manifest{}
	if err := errors.Join(s.dump.checkArchitecture(), s.dump.checkMaps()); err != nil {
		return none, err
	}
	if s.spec.Process == nil || len(s.spec.Process.Args) == 0 || s.spec.Linux == nil {
		return none, fmt.Errorf("%w: its spec is not that of a Linux container with a process", ErrSource)
	}
	if len(s.spec.Linux.UIDMappings)+len(s.spec.Linux.GIDMappings) > 0 {
		return none, fmt.Errorf("%w: its container has a user namespace, and each engine keeps the owners of files in its own way; make the checkpoint of a container without one", ErrSource)
	}
	if y := s.created.Year(); y < 1970 || y > 9999 { // what JSON can say of them
		return none, fmt.Errorf("%w: it says that it was made in the year %d", ErrSource, y)
	}
	version, err := s.dump.criuVersion()
	if err != nil {
		return none, err
	}
	version = max(version, s.criu)
	m := oci.Manifest{
		Name: ref, Created: s.created.UTC(), Container: oci.ContainerOf(s.spec), Mounts: oci.MountsOf(s.spec),
		TCPEstablished: s.dump.established() > 0,
	}
	images.ThisHost(version).Describe(&m)
	m.Host.Kernel = "unknown"
	if s.kernel != "" {
		m.Host.Kernel = s.kernel
	}
	m.Container.ID = s.id
	if n := s.dump.established(); n > 0 {
		s.report.take("%d established TCP connections: a clone restores only where it has their addresses", n)
	}
	s.report.leave("the CPU that it was made on: the image asks for this host's features; import it where it was made, or on a machine like that")
	return m, nil
}
