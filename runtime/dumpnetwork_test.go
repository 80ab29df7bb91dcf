package runtime

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/crac-shim/crac/oci/criuimage"
)

// inventoryOf makes one as CRIU does, with these numbers for the namespaces of who
// dumps.
func inventoryOf(network, mounts uint64) []byte {
	field := func(to []byte, num protowire.Number, value uint64) []byte {
		return protowire.AppendVarint(protowire.AppendTag(to, num, protowire.VarintType), value)
	}
	ids := field(nil, 1, 1)
	if network != 0 {
		ids = field(ids, idsNetwork, network)
	}
	ids = field(ids, 9, mounts)
	entry := field(nil, 1, 2) // img_version
	entry = protowire.AppendBytes(protowire.AppendTag(entry, inventoryRootIDs, protowire.BytesType), ids)
	entry = field(entry, 8, 77) // dump_uptime
	return criuimage.New(criuimage.Inventory, entry)
}

func TestMarkNetworkExternal(t *testing.T) {
	dir := t.TempDir()
	inventory := filepath.Join(dir, "inventory.img")
	if err := os.WriteFile(inventory, inventoryOf(2, 6), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := markNetworkExternal(dir, "extRootNetNS"); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(inventory); err != nil || !bytes.Equal(got, inventoryOf(dumperNetwork, 6)) {
		t.Errorf("inventory % x, %v; want % x", got, err, inventoryOf(dumperNetwork, 6))
	}
	want := append([]byte{0x19, 0x43, 0x56, 0x54, 0x52, 0x37, 0x93, 0x55, 14, 0, 0, 0, 8<<3 | 2, 12}, "extRootNetNS"...)
	if got, err := os.ReadFile(filepath.Join(dir, "netns-2.img")); err != nil || !bytes.Equal(got, want) {
		t.Errorf("network namespace % x, %v; want % x", got, err, want)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 2 {
		t.Errorf("%v, %v", left, err)
	}

	// A dump that is not as it was thought to be stays as it is.
	for name, file := range map[string][]byte{
		"no number":    inventoryOf(0, 6),
		"two messages": append(inventoryOf(2, 6), inventoryOf(2, 6)[4:]...),
		"cut off":      inventoryOf(2, 6)[:17],
		"another file": criuimage.New(criuimage.Pstree),
	} {
		if err := os.WriteFile(inventory, file, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := markNetworkExternal(dir, "k"); err == nil {
			t.Errorf("%s: no error", name)
		}
		if got, err := os.ReadFile(inventory); err != nil || !bytes.Equal(got, file) {
			t.Errorf("%s: the file was changed", name)
		}
	}
}

func FuzzMoveDumper(f *testing.F) {
	f.Add(inventoryOf(2, 6))
	f.Add(inventoryOf(0, 6))
	f.Add(inventoryOf(2, 6)[:17])
	f.Fuzz(func(t *testing.T, file []byte) {
		moved, was, err := moveDumper(file)
		if err != nil {
			return
		}
		if was == 0 {
			t.Error("no number, and no error")
		}
		if again, now, err := moveDumper(moved); err != nil || now != dumperNetwork || !bytes.Equal(again, moved) {
			t.Errorf("once more: %d, %v", now, err)
		}
	})
}

func TestSameNetwork(t *testing.T) {
	if err := sameNetwork([]int{os.Getpid(), os.Getppid()}); err != nil {
		t.Errorf("of one namespace: %v", err)
	}
	if err := sameNetwork([]int{1 << 30}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a process that is not there: %v", err)
	}
	other := exec.Command("unshare", "--user", "--net", "sleep", "60")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = other.Process.Kill()
		_ = other.Wait()
	})
	waitFor(t, "two network namespaces", func() bool {
		return errors.Is(sameNetwork([]int{os.Getpid(), other.Process.Pid}), errNetworks)
	})
}
