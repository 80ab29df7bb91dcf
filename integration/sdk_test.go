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

// TestExamplesTakePart has those programs of docs/hooks.md that use no library take part in the
// checkpoints of containers. The document's other programs are tested in sdk, the libraries with
// containers by TestRandomness.
func TestExamplesTakePart(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	var bySignal []string
	for _, event := range []string{"before-checkpoint", "after-resume", "after-restore"} {
		bySignal = append(bySignal, option("hook."+event, "signal:SIGUSR2"))
	}
	listens := func(name string) func(*box) {
		return func(b *box) {
			b.Helper()
			b.Eventually(name, func() bool { _, err := os.Stat(filepath.Join(b.hooksDir(), name)); return err == nil })
		}
	}
	for name, tt := range map[string]struct {
		image string
		args  []string
		flags []string
		ready func(*box)
	}{
		"signal.sh": {"busybox", []string{"sh", "/opt/signal.sh"}, bySignal, (*box).trapsSignal},
		// Beside a first process that knows nothing of it.
		"participant.sh": {"python", []string{"sh", "-c", "sh /opt/participant.sh & while :; do sleep 1; done"}, nil, listens("shell.sock")},
		"bare.py":        {"python", []string{"python3", "/opt/bare.py"}, nil, listens("bare-1.sock")},
	} {
		tb.Run(name, func(tb *testing.T) {
			tb.Parallel()
			t := setup(tb)
			needImage(t, tt.image)
			all, err := examples.In("../docs/hooks.md")
			if err != nil {
				t.Fatal(err)
			}
			dir, err := t.Path(newID(t))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, name), []byte(all[name]), 0o600); err != nil {
				t.Fatal(err)
			}
			image := ref(t)
			h := how{image: harness.ImageRef(tt.image), args: tt.args, flags: append([]string{
				"--mount", "type=bind,src=" + dir + ",dst=/opt,options=rbind:ro",
				option("checkpoint.image", image), option("hooks", "required"), option("hook.timeout", "20s"),
			}, tt.flags...)}
			b := start(t, h)
			heard := func(b *box, what string) {
				t.Helper()
				b.Eventually(what, func() bool { return strings.Contains(b.log(), what) })
			}
			tt.ready(b)

			b.exec("touch", "busy")
			if _, err := b.Ctr(t.Ctx, "tasks", "checkpoint", b.id); err == nil || !strings.Contains(err.Error(), "busy") {
				t.Errorf("a checkpoint of a busy container: %v", err)
			}
			heard(b, `"outcome":"failed"`)
			b.exec("rm", "busy")
			b.checkpoint()
			heard(b, `"outcome":"checkpointed"`)
			b.remove()

			h.image = image
			for range 2 {
				clone := start(t, h)
				heard(clone, `"container":"`+clone.id+`"`)
				clone.remove()
			}
		})
	}
}

// trapsSignal waits until the container's init catches SIGUSR2.
func (b *box) trapsSignal() {
	b.Helper()
	b.Eventually("the trap", func() bool {
		_, mask, _ := strings.Cut(b.exec("grep", "SigCgt", "/proc/1/status"), "\t")
		caught, err := strconv.ParseUint(mask, 16, 64)
		if err != nil {
			b.Fatal(err)
		}
		return caught&(1<<(unix.SIGUSR2-1)) != 0
	})
}
