package integration

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/integration/examples"
	"github.com/crac-shim/crac/integration/harness"
)

// TestShellExample has the shell script of docs/hooks.md, which needs nothing but a shell, take part
// in the checkpoint of a busybox container. The document's other programs are tested in sdk.
func TestShellExample(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	t := setup(tb)
	all, err := examples.In("../docs/hooks.md")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "signal.sh"), []byte(all["signal.sh"]), 0o600); err != nil {
		t.Fatal(err)
	}
	image := ref(t)
	needImage(t, "busybox")
	h := how{image: harness.ImageRef("busybox"), args: []string{"sh", "/opt/signal.sh"}, flags: []string{
		"--mount", "type=bind,src=" + dir + ",dst=/opt,options=rbind:ro",
		option("checkpoint.image", image), option("hooks", "required"), option("hook.timeout", "20s"),
	}}
	for _, event := range []string{"before-checkpoint", "after-resume", "after-restore"} {
		h.flags = append(h.flags, option("hook."+event, "signal:SIGUSR2"))
	}
	b := start(t, h)
	heard := func(b *box, what string) {
		t.Helper()
		b.Eventually(what, func() bool { return strings.Contains(b.log(), what) })
	}
	b.Eventually("the trap", func() bool {
		_, mask, _ := strings.Cut(b.exec("grep", "SigCgt", "/proc/1/status"), "\t")
		caught, err := strconv.ParseUint(mask, 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		return caught&(1<<(unix.SIGUSR2-1)) != 0
	})

	b.exec("touch", "/busy")
	if _, err := b.Ctr(t.Ctx, "tasks", "checkpoint", b.id); err == nil || !strings.Contains(err.Error(), "busy") {
		t.Errorf("a checkpoint of a busy container: %v", err)
	}
	heard(b, `"outcome":"failed"`)
	b.exec("rm", "/busy")
	b.checkpoint()
	heard(b, `"outcome":"checkpointed"`)
	b.remove()

	h.image = image
	for range 2 {
		clone := start(t, h)
		heard(clone, `"container":"`+clone.id+`"`)
		clone.remove()
	}
}
