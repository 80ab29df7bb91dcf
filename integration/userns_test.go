package integration

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"

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
