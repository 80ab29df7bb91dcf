package images

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/oci/criuimage"
)

const (
	// lsmtype of inventory.proto, types of fdinfo.proto.
	lsmSELinux  = 1
	lsmAppArmor = 2
	inetSocket  = 4
)

// Needs reads from a dump what a host must have to restore it, and how its
// processes were confined: what goes into a manifest's Requires and Container.LSM.
// Both are sorted.
func Needs(dir string) (requires []string, lsm *oci.LSM, err error) {
	d, err := openDump(dir)
	if err != nil {
		return nil, nil, fmt.Errorf("read the dump: %w", err)
	}
	defer d.Close()
	n := needs{Dump: d, requires: map[string]bool{}, profiles: map[string]bool{}}
	for _, name := range d.names {
		if err := n.look(name); err != nil {
			return nil, nil, fmt.Errorf("%w: %s: %w", ErrNotDump, filepath.Join(dir, name), err)
		}
	}
	for name := range n.requires {
		requires = append(requires, name)
	}
	slices.Sort(requires)
	if len(n.profiles) > 0 && n.lsm != "" {
		lsm = &oci.LSM{Name: n.lsm}
		for p := range n.profiles {
			lsm.Profiles = append(lsm.Profiles, p)
		}
		slices.Sort(lsm.Profiles)
	}
	return requires, lsm, nil
}

type needs struct {
	*Dump
	requires, profiles map[string]bool
	lsm                string
}

func (n *needs) look(name string) error {
	base, ok := strings.CutSuffix(name, ".img")
	if !ok {
		return nil
	}
	kind, _, _ := strings.Cut(base, "-")
	switch kind {
	case "core":
		return n.core(name)
	case "files":
		return n.files(name)
	case "inventory":
		return n.inventory(name)
	case "timens":
		n.requires[oci.RequireTimeNamespace] = true
	case "userns":
		n.requires[oci.RequireUserNamespace] = true
	}
	return nil
}

func (n *needs) core(name string) error {
	t, err := n.Dump.core(name)
	if err != nil || t.dead {
		return err
	}
	if t.filtered {
		n.requires[oci.RequireSeccomp] = true
	}
	if t.rseq {
		n.requires[oci.RequireRseq] = true
	}
	if t.lsm != "" {
		n.profiles[t.lsm] = true
	}
	return nil
}

func (n *needs) inventory(name string) error {
	data, err := n.one(name, criuimage.Inventory)
	if err != nil {
		return err
	}
	f, err := parse(data)
	if err != nil {
		return err
	}
	kind, err := f.number(6)
	switch kind {
	case lsmSELinux:
		n.lsm = "selinux"
	case lsmAppArmor:
		n.lsm = "apparmor"
	}
	return err
}

func (n *needs) files(name string) error {
	entries, err := n.read(name, criuimage.Files)
	if err != nil {
		return err
	}
	for _, e := range entries {
		f, err := parse(e)
		if err != nil {
			return err
		}
		kind, err := f.number(1)
		if err != nil {
			return err
		}
		if kind != inetSocket {
			continue
		}
		socket, err := f.message(4)
		if err != nil || socket == nil {
			return errors.Join(errors.New("holds a socket without its description"), err)
		}
		family, err := socket.number(3)
		if err != nil {
			return err
		}
		if family == unix.AF_INET6 {
			n.requires[oci.RequireIPv6] = true
		}
	}
	return nil
}
