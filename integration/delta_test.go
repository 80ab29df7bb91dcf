package integration

import (
	"strings"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"

	"github.com/crac-shim/crac/integration/harness"
	"github.com/crac-shim/crac/oci"
)

// remembers keeps 16 MiB that no compression makes smaller, changes a page of it at every tick,
// and looks whether the rest is what it was.
const remembers = `
import hashlib, os, sys, time
size, page = 16 << 20, 4096
memory = bytearray(os.urandom(size))
want = hashlib.sha256(memory).digest()
i = 0
while True:
    i += 1
    if hashlib.sha256(memory).digest() != want:
        print("the memory is not what it was", flush=True)
        sys.exit(1)
    at = (i * 7919 * page) % size
    memory[at:at + 8] = i.to_bytes(8, "little")
    want = hashlib.sha256(memory).digest()
    print("tick", i, flush=True)
    time.sleep(0.1)
`

// A checkpoint that continues another one stores what changed; stock CRIU restores the chain.
func TestDeltaCheckpoint(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	needImage(t, "python")
	host, err := registryHost()
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"python3", "-c", remembers}
	b := start(t, how{image: harness.ImageRef("python"), args: args})
	b.waitTicks(3)

	names := []string{host + "/delta/app:0", host + "/delta/app:1", host + "/delta/app:2"}
	type dump struct{ DumpSize, CheckpointSize int64 }
	type differs struct {
		Memory struct{ Equal, Changed, Added int64 }
	}
	t.CracctlOK("checkpoint", b.id, names[0])
	whole := fromJSON[dump](t, "inspect", names[0])
	if whole.CheckpointSize < 16<<20 {
		t.Fatalf("a whole checkpoint has %d bytes", whole.CheckpointSize)
	}
	t.CracctlOK("push", names[0])
	for i := 1; i < len(names); i++ {
		b.waitTicks(3)
		out := t.CracctlOK("checkpoint", "--push", "--parent", names[i-1], b.id, names[i])
		if !strings.Contains(out, "From parent ") || strings.Contains(out, "warning") {
			t.Errorf("it does not say what the parent spared:\n%s", out)
		}
		delta := fromJSON[dump](t, "inspect", names[i])
		d := fromJSON[differs](t, "diff", names[i-1], names[i])
		changed := d.Memory.Changed + d.Memory.Added
		if d.Memory.Equal < 15<<20 || changed < 3*4096 {
			t.Errorf("of %s: %+v", names[i], d)
		}
		// What is not memory takes less than a megabyte.
		if delta.DumpSize < changed || delta.DumpSize > changed+1<<20 {
			t.Errorf("%s stores %d bytes for %d that changed", names[i], delta.DumpSize, changed)
		}
		tb.Logf("checkpoint %d: %d bytes changed of %d; stored %d, compressed %d; a whole one %d, compressed %d\n%s",
			i, changed, changed+d.Memory.Equal, delta.DumpSize, delta.CheckpointSize, whole.DumpSize, whole.CheckpointSize, out[strings.Index(out, "Pushed"):])
		if v := fromJSON[verified](t, "verify", names[i]); !v.OK {
			t.Errorf("%+v", v)
		}
	}
	last := b.lastTick()
	b.remove()

	// A node that never saw the earlier ones pulls all it needs by the last one's name.
	last0 := names[len(names)-1]
	for _, n := range names {
		t.CtrOK("images", "delete", "--sync", n)
	}
	t.CtrOK("images", "pull", "--plain-http", last0)
	var clone *box
	for _, memory := range []string{"lazy", "eager"} {
		clone = start(t, how{image: last0, args: args, flags: []string{option("restore", "require"), option("memory", memory)}})
		clone.waitTicks(5)
		clone.inOrder()
		if first := clone.ticks()[0]; first < 4 || first > last+1 {
			t.Errorf("the clone (%s) counts on from %d, the original was at %d", memory, first, last)
		}
		clone.seesNoDump()
	}

	// Flattened it is one layer, and starts as well.
	flat := ref(t)
	t.CracctlOK("flatten", last0, flat)
	isCheckpointOf(t, flat, harness.ImageRef("python"), 1)
	if f := fromJSON[dump](t, "inspect", flat); f.DumpSize < 16<<20 {
		t.Errorf("a flattened checkpoint has %d bytes", f.DumpSize)
	}
	if d := fromJSON[differs](t, "diff", last0, flat); d.Memory.Changed+d.Memory.Added > 0 {
		t.Errorf("flattening changed the memory: %+v", d)
	}
	whole1 := start(t, how{image: flat, args: args, flags: []string{option("restore", "require")}})
	whole1.waitTicks(3)
	whole1.inOrder()
	whole1.remove()

	// A checkpoint of the clone replaces all of them, unless it continues them.
	chain := func(image string) (n int) {
		for _, l := range manifestOf(t, image).Layers {
			if l.Annotations[oci.LayerAnnotation] == oci.LayerCheckpoint {
				n++
			}
		}
		return n
	}
	again, further := ref(t), host+"/delta/app:3"
	t.CracctlOK("checkpoint", clone.id, again)
	if n := chain(again); n != 1 {
		t.Errorf("a whole checkpoint of the clone has %d checkpoint layers", n)
	}
	clone.waitTicks(3)
	t.CracctlOK("checkpoint", "--push", "--parent", last0, clone.id, further)
	if n, before := chain(further), chain(last0); n != before+1 {
		t.Errorf("a delta of the clone has %d checkpoint layers, the image that it was started from %d", n, before)
	}
	d := fromJSON[differs](t, "diff", last0, further)
	changed := d.Memory.Changed + d.Memory.Added
	if stored := fromJSON[dump](t, "inspect", further).DumpSize; d.Memory.Equal < 15<<20 || stored < changed || stored > changed+1<<20 {
		t.Errorf("a delta of the clone stores %d bytes: %+v", stored, d)
	}
	clone.wantStatus(containerd.Running)
	last = clone.lastTick()
	for _, image := range []string{further, last0} {
		t.CtrOK("images", "delete", "--sync", image)
	}
	t.CtrOK("images", "pull", "--plain-http", further)
	next := start(t, how{image: further, args: args, flags: []string{option("restore", "require")}})
	next.waitTicks(5)
	next.inOrder()
	if first := next.ticks()[0]; first < 4 || first > last+1 {
		t.Errorf("the clone of the clone counts on from %d, the clone was at %d", first, last)
	}
	next.remove()

	if _, err := t.Cracctl(t.Ctx, "checkpoint", "--parent", harness.ImageRef("python"), clone.id, ref(t)); err == nil || !strings.Contains(err.Error(), "no checkpoint") {
		t.Errorf("a plain image as the parent: %v", err)
	}
}
