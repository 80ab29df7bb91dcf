package integration

import (
	"crypto/md5" //nolint:gosec // see rewrittenLine
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/crac-shim/crac/integration/harness"
)

// rewritten holds 2048 pages of its own. Asked by the file /ask/change it writes the first 256 of them
// anew, of the next generation. Each tick tells the generation and the digest of all of them.
const rewritten = `
function page(generation, p,  s, i) {
	s = sprintf("%08d%08d", generation, p)
	for (i = 0; i < 8; i++) s = s s
	return s
}
BEGIN {
	for (p = 0; p < 2048; p++) memory[p] = page(1, p)
	for (generation = tick = 1; ; tick++) {
		if (system("[ -e /ask/change ]") == 0) {
			generation++
			for (p = 0; p < 256; p++) memory[p] = page(generation, p)
			system("rm /ask/change")
		}
		digest = "md5sum | sed 's/ .*//; s/^/generation " generation " /'"
		for (p = 0; p < 2048; p++) printf "%s", memory[p] | digest
		close(digest)
		system("echo tick " tick "; sleep 0.5")
	}
}`

// rewrittenLine is what the workload has to say, worked out here.
func rewrittenLine(generation int) string {
	all := md5.New() //nolint:gosec // busybox has it, and nobody attacks the test
	for p := range 2048 {
		g := 1
		if p < 256 {
			g = generation
		}
		fmt.Fprint(all, strings.Repeat(fmt.Sprintf("%08d%08d", g, p), 256))
	}
	return fmt.Sprintf("generation %d %x", generation, all.Sum(nil))
}

// changesAtHook is a hook that ends when the workload has changed its memory, which is after a pre-dump
// and before the dump. While there is a file hold it stays there.
const changesAtHook = `["/bin/sh","-c","touch /ask/change; while [ -e /ask/change ]; do sleep 0.1; done; [ ! -e /ask/hold ] || touch /ask/held; while [ -e /ask/hold ]; do sleep 0.1; done"]`

// tracksMemory asks CRIU, and not our own code, whether the kernel can tell what changes.
func tracksMemory(t *harness.T) bool {
	t.Helper()
	cmd := exec.CommandContext(t.Ctx, t.Tools.CRIU, "check", "--feature", "mem_dirty_track")
	out, err := cmd.CombinedOutput()
	t.Logf("criu check --feature mem_dirty_track: %v\n%s", err, out)
	if err != nil && os.Getenv("CRAC_VM") != "" {
		t.Fatal("the guest's kernel has to tell what changes: nobody else tries pre-dumps")
	}
	return err == nil
}

// Where the kernel can tell what changes, the memory of a workload that runs is copied ahead of the
// freeze. The image is whole, and every page is what it was at the freeze, also of those that were
// changed between the two. Elsewhere nothing is different, unless it is required.
func TestPreDump(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	can := tracksMemory(t)
	ask, err := t.Path("ask")
	if err != nil {
		t.Fatal(err)
	}
	args, mount := []string{"awk", rewritten}, []string{"--mount", "type=bind,src=" + ask + ",dst=/ask,options=rbind:rw"}
	b := start(t, how{args: args, flags: append(mount, option("hook.before-checkpoint", changesAtHook), option("hook.timeout", "5m"))})
	b.waitTicks(1)
	made := watch(t, "/crac/checkpoint-image")
	image, generation := ref(t), 1
	const (
		held    = 2048 * 4096
		changed = 256 * 4096
	)
	// checkpoint tells how much memory was copied during the freeze and ahead of it.
	checkpoint := func(name, mode string) (dumped, preDumped int) {
		t.Helper()
		out := t.CracctlOK("checkpoint", "--pre-dump", mode, b.id, name)
		generation++
		fact := made.of(b.id)
		during, _ := fact["dumped"].(float64)
		ahead, _ := fact["pre_dumped"].(float64)
		t.Logf("pre-dump=%s: %d pages were copied during the freeze of %v ms, %d ahead of it", mode, int(during)/4096, fact["frozen_ms"], int(ahead)/4096)
		if dumped, preDumped = int(during), int(ahead); dumped+preDumped < held {
			t.Errorf("pre-dump=%s: the event says %v, and the workload has %d bytes", mode, fact, held)
		}
		if said := strings.Contains(out, "Pre-dumped"); said != (preDumped > 0) {
			t.Errorf("%d bytes were copied ahead, and cracctl says:\n%s", preDumped, out)
		}
		return dumped, preDumped
	}
	lines := map[int]string{}
	line := func(generation int) string {
		if lines[generation] == "" {
			lines[generation] = rewrittenLine(generation)
		}
		return lines[generation]
	}
	// says waits for the digest of the memory as it has to be now.
	says := func(b *box) {
		t.Helper()
		want := line(generation)
		// The first may have been begun before.
		b.Eventually(fmt.Sprintf("%s says: %s", b.id, want), func() bool { return strings.Count(b.log(), want) > 1 })
		for _, said := range regexp.MustCompile(`(?m)^generation.*$`).FindAllString(b.log(), -1) {
			var g int
			if _, err := fmt.Sscanf(said, "generation %d", &g); err != nil || said != line(g) {
				t.Errorf("%s says %q: its memory is not what it was", b.id, said)
			}
		}
		b.inOrder()
	}

	var dumped, ahead int
	if !can {
		mark := len(t.Daemon.Log())
		if out, err := t.Cracctl(t.Ctx, "checkpoint", "--pre-dump", "require", b.id, image); err == nil || !strings.Contains(err.Error(), "CONFIG_MEM_SOFT_DIRTY") {
			t.Errorf("a pre-dump is required, which this kernel has none of: %v\n%s", err, out)
		}
		if _, ahead := checkpoint(image, "auto"); ahead != 0 {
			t.Errorf("%d bytes were copied ahead on a kernel that cannot tell what changes", ahead)
		}
		if log := t.Daemon.Log()[mark:]; strings.Contains(log, "no pre-dump") {
			t.Errorf("the log has a word about what nobody asked for:\n%s", log)
		}
	} else {
		if dumped, ahead = checkpoint(image, "require"); dumped < changed || ahead < held/2 {
			t.Errorf("the freeze copied %d bytes of memory, of which %d had changed; %d were copied ahead", dumped, changed, ahead)
		}
	}
	says(b)
	if v := fromJSON[verified](t, "verify", image); !v.OK {
		t.Errorf("cracctl verify: %+v", v)
	}
	clone := start(t, how{image: image, args: args, flags: append(mount, option("restore", "require"), option("memory", "lazy"))})
	says(clone)
	clone.remove()

	if can {
		// What was made ahead is no good any more: the dump is a whole one, and says so.
		hold := filepath.Join(ask, "hold")
		if err := os.WriteFile(hold, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		broken := make(chan error, 1)
		go func() { broken <- breakPreDump(b, hold, filepath.Join(ask, "held")) }()
		if whole, ahead := checkpoint(ref(t), "require"); ahead != 0 || whole < dumped+held/2 {
			t.Errorf("without a pre-dump the freeze copied %d bytes, and %d came from elsewhere; with one it was %d", whole, ahead, dumped)
		}
		if err := <-broken; err != nil {
			t.Error(err)
		}
		if !strings.Contains(t.Daemon.Log(), "and not only what has changed since the pre-dump") {
			t.Error("the log does not tell that the pre-dump was of no use")
		}
		says(b)
	}
	if left := preDumps(b); len(left) > 0 {
		t.Errorf("a checkpoint has left %v", left)
	}
}

// preDumps are the directories of pre-dumps that there are.
func preDumps(b *box) []string {
	found, err := filepath.Glob(filepath.Join(b.Dir, "root/io.containerd.runtime.v2.task", b.Namespace, b.id, "pre-dump-*"))
	if err != nil {
		b.Error(err)
	}
	return found
}

// breakPreDump takes the inventory out of a container's pre-dump while its hook waits for the file
// hold to go, and says so by the file held.
func breakPreDump(b *box, hold, held string) error {
	for b.Ctx.Err() == nil {
		if _, err := os.Stat(held); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	var err error
	if found := preDumps(b); len(found) != 1 {
		err = fmt.Errorf("pre-dumps: %v, want one", found)
	} else {
		err = os.Remove(filepath.Join(found[0], "inventory.img"))
	}
	return errors.Join(err, os.Remove(hold))
}
