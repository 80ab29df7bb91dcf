package runtime

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/crac-shim/crac/oci/criuimage"
	"github.com/crac-shim/crac/runtime/thread"
)

// A dump has only the place of a network namespace that a clone brings its own of.
// CRIU looks through it all the same, and asks the kernel for all of its tracked
// connections, twice: the kernel walks through a table of the whole host for each,
// some 10 ms on one of 24 GiB, while the workload stands still (criu/net.c,
// dump_net_ns). It does not look at a namespace that it is in itself. So it is
// started there, and afterwards the dump is made to be as if it had not been: the
// namespace gets the file that says that it is external, and CRIU's own another
// number, so that the two are not the same.

// errNetworks is why a dump by a CRIU that is in the workload's network namespace
// would not work: it takes no others then.
var errNetworks = errors.New("the workload has processes in several network namespaces")

// dumperNetwork is the number that CRIU's own network namespace gets. It numbers
// namespaces from 1.
const dumperNetwork = 1 << 30

// insideNetwork runs fn on a thread in the network namespace of a process, or where it
// is if there is to be no difference.
func (d *criuDump) insideNetwork(fn func() error) error {
	if !d.inside {
		return fn()
	}
	return thread.InNetwork(int(d.opts.GetPid()), fn)
}

// sameNetwork tells whether all of these processes have the network namespace of the
// first.
func sameNetwork(pids []int) error {
	var first unix.Stat_t
	for i, pid := range pids {
		var st unix.Stat_t
		path := fmt.Sprintf("/proc/%d/ns/net", pid)
		if err := unix.Stat(path, &st); err != nil {
			return &os.PathError{Op: "stat", Path: path, Err: err}
		}
		if i == 0 {
			first = st
		} else if st.Ino != first.Ino || st.Dev != first.Dev {
			return errNetworks
		}
	}
	return nil
}

// Fields of CRIU's messages (images/inventory.proto, images/core.proto,
// images/netdev.proto).
const (
	inventoryRootIDs = 3
	idsNetwork       = 6
	netnsKey         = 8
)

// markNetworkExternal makes the dump in dir one whose network namespace is external,
// under this key.
func markNetworkExternal(dir, key string) error {
	path := filepath.Join(dir, "inventory.img")
	file, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	file, network, err := moveDumper(file)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	message := protowire.AppendString(protowire.AppendTag(nil, netnsKey, protowire.BytesType), key)
	netns := filepath.Join(dir, fmt.Sprintf("netns-%d.img", network))
	if err := os.WriteFile(netns, criuimage.New(criuimage.Netns, message), 0o644); err != nil {
		return err
	}
	// The file by which a dump is known to be whole: at once.
	if err := os.WriteFile(path+".new", file, 0o644); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// moveDumper gives the network namespace of who has dumped another number in an
// inventory. was is the one that it had.
func moveDumper(inventory []byte) (file []byte, was uint64, err error) {
	entry, err := criuimage.One(inventory, criuimage.Inventory)
	if err != nil {
		return nil, 0, err
	}
	entry, err = editField(entry, inventoryRootIDs, protowire.BytesType, func(value []byte) ([]byte, error) {
		ids, n := protowire.ConsumeBytes(value)
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		ids, err := editField(ids, idsNetwork, protowire.VarintType, func(value []byte) ([]byte, error) {
			var n int
			if was, n = protowire.ConsumeVarint(value); n < 0 {
				return nil, protowire.ParseError(n)
			}
			return protowire.AppendVarint(nil, dumperNetwork), nil
		})
		return protowire.AppendBytes(nil, ids), err
	})
	if err == nil && was == 0 {
		err = errors.New("does not number network namespaces")
	}
	return criuimage.New(criuimage.Inventory, entry), was, err
}

// editField replaces the values of a field of a message.
func editField(message []byte, field protowire.Number, kind protowire.Type, edit func(value []byte) ([]byte, error)) ([]byte, error) {
	return criuimage.Edit(message, func(num protowire.Number, its protowire.Type, value []byte) ([]byte, error) {
		if num == field && its == kind {
			return edit(value)
		}
		return value, nil
	})
}
