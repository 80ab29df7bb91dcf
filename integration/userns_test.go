package integration

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crac-shim/crac/integration/harness"
)

var ownMaps = []string{"--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536"}

// containerd gives files to the root of a user namespace in two ways: in a copy of the image's
// snapshot that has other owners, which is what ctr does by itself, and by mounting the image's
// own layers with a map.
func TestCheckpointInUserNamespace(tb *testing.T) {
	onlyCrac(tb)
	for name, flags := range map[string][]string{
		"copied": ownMaps,
		"mapped": append([]string{"--remap-labels"}, ownMaps...),
	} {
		tb.Run(name, func(tb *testing.T) {
			t := setup(tb)
			sameCgroups(t, func(onlyOf func(...*box)) { generations(t, flags, onlyOf) })
		})
	}
}

// generations makes a checkpoint of a container, one of its clone, and one of that clone's clone.
func generations(t *harness.T, flags []string, onlyOf func(...*box)) {
	t.Helper()
	image := ref(t)
	first := image
	b := start(t, ticker(append(slices.Clip(flags), option("checkpoint.image", image))...))
	b.waitTicks(3)
	// What a layer can hold: files, directories, links, pipes, and the lack of a file.
	b.exec("sh", "-c", "mkdir -p /own/dir && echo kept >/own/f && ln -s f /own/l && mkfifo /own/p && ln /own/f /own/h && chown -h 7:8 /own/* && chmod 4750 /own/f && rm /bin/vi")
	const owners = `stat -c "%n %u:%g %a" /own /own/f /own/h /own/dir /own/l /own/p; ls /bin/vi 2>/dev/null | wc -l; cat /own/f; stat -c %u:%g /bin /etc/passwd`
	files := b.exec("sh", "-c", owners)
	if !strings.Contains(files, "/own/l 7:8") || !strings.Contains(files, "/own/h 7:8 4750") {
		t.Fatalf("the original's files: %q", files)
	}

	const last = 3
	for generation := 1; generation <= last; generation++ {
		b.checkpoint("--exit")
		b.wantStatus(containerd.Stopped)
		tick := b.lastTick()
		b.remove()

		host := fmt.Sprintf("clone-%d", generation)
		from := image
		image = ref(t)
		b = start(t, warm(from, append(slices.Clip(flags), "--hostname", host, option("checkpoint.image", image))...))
		b.goesOnFrom(tick)
		onlyOf(b)
		if got := strings.Fields(b.exec("cat", "/proc/1/uid_map")); strings.Join(got, ":") != "0:100000:65536" {
			t.Errorf("the map of generation %d is %v", generation, got)
		}
		if got := b.exec("hostname"); got != host {
			t.Errorf("generation %d is called %q, want %q", generation, got, host)
		}
		if got := b.exec("sh", "-c", owners); got != files {
			t.Errorf("the files of generation %d:\n%s\nwant\n%s", generation, got, files)
		}
		b.exec("sh", "-c", fmt.Sprintf("echo %d >/generation-%d; cat /generation-* | wc -l | grep -qx %d", generation, generation, generation))
		b.exec("ping", "-c", "1", "-W", "5", "127.0.0.1")
		if got := b.exec("sh", "-c", "ls -A /.crac 2>/dev/null | wc -l"); got != "0" {
			t.Errorf("generation %d sees its dump", generation)
		}
	}
	b.remove()

	// The image is as good without a user namespace, and has the same owners there.
	cold := start(t, how{image: first, runtime: runcRuntime, args: []string{"sleep", "1000"}})
	if got := cold.exec("stat", "-c", "%n %u:%g %a", "/own/h"); got != "/own/h 7:8 4750" {
		t.Errorf("without a user namespace: %s, want owner 7:8 and mode 4750", got)
	}
}

// TestUserNamespaceNetwork: a container with a user namespace and a network of its own starts warm with
// the clone's own addresses, again and again.
func TestUserNamespaceNetwork(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image, again := ref(t), ref(t)
	original := start(t, usernsTicker("", option("checkpoint.image", image)))
	first := original.waitTicks(3)
	theirs := original.address()
	original.checkpoint()
	last := original.lastTick() // it runs on

	a := start(t, usernsTicker(image, option("restore", "require"), option("checkpoint.image", again)))
	b := start(t, usernsTicker(image, option("restore", "require")))
	for _, clone := range []*box{a, b} {
		clone.goesOnBetween(first, last)
		if got := clone.address(); got == theirs {
			t.Errorf("a clone has the original's address %s", got)
		}
		// Through its own interface.
		clone.exec("ping", "-c", "1", "-W", "5", original.address())
	}
	if a.address() == b.address() {
		t.Errorf("both clones have the address %s", a.address())
	}
	b.remove()

	a.checkpoint("--exit")
	last = a.lastTick()
	a.remove()
	c := start(t, usernsTicker(again, option("restore", "require")))
	c.goesOnFrom(last)
	c.exec("ping", "-c", "1", "-W", "5", original.address())
}

func usernsTicker(image string, flags ...string) how {
	return how{image: image, cni: true, flags: append(flags, ownMaps...), args: ticker().args}
}

// TestUserNamespaceStartsCold: what CRIU has made for a restore that then fails, and the client has given
// a network, is what the cold start gets.
func TestUserNamespaceStartsCold(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image := ref(t)
	original := start(t, ticker(append([]string{option("checkpoint.image", image)}, ownMaps...)...))
	original.checkpoint("--exit")
	original.remove()

	n := newContainer(t, usernsClone(t, image)).create()
	pid := n.task.Pid()
	if pid == 0 {
		t.Fatal("the clone has no pid before its start: nobody can set up its network")
	}
	netns := fmt.Sprintf("/proc/%d/ns/net", pid)
	before, err := os.Readlink(netns)
	if err != nil {
		t.Fatal(err)
	}
	killCRIU(n)
	if err := n.task.Start(t.Ctx); err != nil {
		t.Fatal(err)
	}
	task, err := n.Task(t.Ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	if after, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", task.Pid())); err != nil || after != before {
		t.Errorf("the cold start has the network namespace %s, %v; want %s, which the client has seen", after, err, before)
	}
	n.task = task
	if r := n.exec("cat /proc/self/uid_map; ip link show lo | grep -c UP"); strings.Join(strings.Fields(r.out), " ") != "0 100000 65536 1" {
		t.Errorf("the map and lo after the cold start: %+v", r)
	}
	reason := coldReason(t, n.ID())
	if !strings.Contains(reason, "criu ended without an answer: signal: killed") {
		t.Errorf("the reason is %q, want CRIU's end", reason)
	}
	keptLog(t, reason)
}

// killCRIU kills the CRIU that waits for the start of a clone with a user namespace, and leaves what it
// has made of the clone.
func killCRIU(n *ctn) {
	n.Helper()
	procs, err := n.CgroupProcs(n.ID())
	if err != nil {
		n.Fatal(err)
	}
	for _, p := range procs {
		if p != int(n.task.Pid()) {
			if err := syscall.Kill(p, syscall.SIGKILL); err != nil {
				n.Fatal(err)
			}
		}
	}
}

// TestUserNamespaceDeleted: a clone that is never started goes, with all that was made for it.
func TestUserNamespaceDeleted(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image := ref(t)
	original := start(t, ticker(append([]string{option("checkpoint.image", image)}, ownMaps...)...))
	original.checkpoint("--exit")
	original.remove()
	for _, before := range []func(*ctn){func(*ctn) {}, killCRIU} {
		n := newContainer(t, usernsClone(t, image)).create()
		before(n)
		if _, err := n.task.Delete(t.Ctx, containerd.WithProcessKill); err != nil {
			t.Error(err)
		}
		n.remove() // sees what is left
	}
}

// TestUserNamespaceOfPod: what joins the user namespace of others starts cold, and says why.
func TestUserNamespaceOfPod(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image := ref(t)
	original := start(t, ticker(append([]string{option("checkpoint.image", image)}, ownMaps...)...))
	original.checkpoint()

	join := oci.WithLinuxNamespace(specs.LinuxNamespace{Type: specs.UserNamespace, Path: fmt.Sprintf("/proc/%d/ns/user", original.task().Pid())})
	n := newContainer(t, usernsClone(t, image, join)).start()
	if r := n.exec("cat /proc/self/uid_map"); strings.Join(strings.Fields(r.out), " ") != "0 100000 65536" {
		t.Errorf("the map: %+v", r)
	}
	if reason := coldReason(t, n.ID()); !strings.Contains(reason, "code=namespaces") || !strings.Contains(reason, "joins a user namespace") {
		t.Errorf("the reason: %s", reason)
	}
}

// coldReason is the line of containerd's log that tells why a container was started cold.
func coldReason(t *harness.T, id string) (reason string) {
	t.Helper()
	t.Eventually("the reason of the cold start", func() bool {
		for line := range strings.SplitSeq(t.Daemon.Log(), "\n") {
			if strings.Contains(line, "starting cold instead of restoring the checkpoint") && strings.Contains(line, id) {
				reason = line
			}
		}
		return reason != ""
	})
	return reason
}

// usernsClone is a clone that a client of its own creates, in a user namespace.
func usernsClone(t *harness.T, image string, spec ...oci.SpecOpts) config {
	t.Helper()
	img, err := t.Client.GetImage(t.Ctx, image)
	if err != nil {
		t.Fatal(err)
	}
	if err := img.Unpack(t.Ctx, ""); err != nil {
		t.Fatal(err)
	}
	id := newID(t)
	ids := []specs.LinuxIDMapping{{HostID: 100000, Size: 65536}}
	return config{
		id:        id,
		container: []containerd.NewContainerOpts{containerd.WithNewSnapshot(id, img, containerd.WithUserNSRemapperLabels(ids, ids))},
		spec:      append([]oci.SpecOpts{oci.WithImageConfig(img), oci.WithProcessArgs(ticker().args...), oci.WithUserNamespace(ids, ids)}, spec...),
	}
}
