package integration

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/crac-shim/crac/integration/harness"
)

// secondNode is a containerd with its own root, state and network namespace, which reaches the
// shared one's host over a veth pair at the address that comes with it. Nothing is at its own
// loopback address.
func secondNode(tb testing.TB, first *harness.T) (node *harness.T, address string) {
	tb.Helper()
	network, err := first.Network()
	if err != nil {
		tb.Fatal(err)
	}
	name := newID(tb)
	netns, err := first.NetNS(first.Ctx, name)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := first.DeleteNetNS(context.Background(), name); err != nil {
			tb.Error(err)
		}
	})
	if _, err := network.Attach(first.Ctx, name, netns); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := network.Detach(context.Background(), name, netns); err != nil {
			tb.Error(err)
		}
	})
	// Not `ip netns exec`: it mounts another /sys, without cgroups.
	d := ownDaemon(tb, harness.Options{Wrap: []string{"nsenter", "--net=" + netns}})
	node = d.For(tb, harness.TestLimit)
	if here, there := netnsOf(tb, os.Getpid()), netnsOf(tb, d.PID()); here == there {
		tb.Fatalf("the second node is in the network namespace of the first, %s", here)
	}
	return node, network.Gateway
}

func netnsOf(tb testing.TB, pid int) string {
	tb.Helper()
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		tb.Fatal(err)
	}
	return ns
}

// livesIn checks that a container's shim is the given node's, in its network namespace.
func (b *box) livesIn(node *harness.T) {
	b.Helper()
	shim, err := node.ShimPID(b.id)
	if err != nil {
		b.Fatal(err)
	}
	if got, want := netnsOf(b, shim), netnsOf(b, node.PID()); got != want {
		b.Errorf("the shim of %s is in the network namespace %s, its node in %s", b.id, got, want)
	}
}

// A workload moves to another node and back, through a registry: memory and files go on, and
// nothing but the images connects the nodes.
func TestTwoNodes(tb *testing.T) {
	onlyCrac(tb)
	here := setup(tb)
	needImage(here, "python")
	there, address := secondNode(tb, here)
	registry, err := here.StartRegistryAt(here.Ctx, address)
	if err != nil {
		tb.Fatal(err)
	}
	for _, node := range []*harness.T{here, there} {
		if err := node.PlainHTTP(registry.Host); err != nil {
			tb.Fatal(err)
		}
	}

	image := registry.Host + "/nodes/app:first"
	args := []string{"python3", "-c", remembers}
	asDumped := func(image string, flags ...string) how {
		return how{image: image, args: args, flags: append(flags, option("restore", "require"))}
	}
	original := start(here, how{image: harness.ImageRef("python"), args: args})
	original.waitTicks(3)
	original.exec("sh", "-c", "echo written here >/first")
	here.CracctlOK("checkpoint", "--push", "--exit", original.id, image)
	last := original.lastTick()
	original.remove()

	if _, err := there.Client.GetImage(there.Ctx, image); err == nil {
		tb.Fatal("the second node has the image before it was pulled: the nodes share a content store")
	}
	there.CtrOK("images", "pull", "--plain-http", image)
	// This one pushes by itself later, so its own node's network has to lead to the registry.
	back := registry.Host + "/nodes/app:back"
	clone := start(there, asDumped(image, option("checkpoint.image", back), option("checkpoint.push", "true")))
	clone.livesIn(there)
	clone.goesOnFrom(last)
	if got := clone.exec("cat", "/first"); got != "written here" {
		tb.Errorf("/first holds %q on the second node", got)
	}
	for _, p := range here.OwnProcesses() {
		if strings.Contains(p.Cmdline, clone.id) {
			tb.Errorf("the first node runs %s", p)
		}
	}

	// Two of them there, and each has files of its own.
	second := start(there, asDumped(image))
	second.goesOnFrom(last)
	clone.exec("sh", "-c", "echo written there >/second")
	if out, err := second.tryExec("cat", "/second"); err == nil {
		tb.Errorf("a clone's file is in the other clone: %q", out)
	}

	// And back, with the first node's own image gone.
	clone.checkpoint("--exit")
	last = clone.lastTick()
	here.CtrOK("images", "delete", "--sync", image)
	here.CtrOK("images", "pull", "--plain-http", back)
	returned := start(here, asDumped(back))
	returned.livesIn(here)
	returned.goesOnFrom(last)
	for file, want := range map[string]string{"/first": "written here", "/second": "written there"} {
		if got := returned.exec("cat", file); got != want {
			tb.Errorf("%s holds %q after the way back, want %q", file, got, want)
		}
	}
}
