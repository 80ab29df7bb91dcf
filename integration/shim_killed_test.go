package integration

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"

	"github.com/crac-shim/crac/integration/harness"
)

// killShim kills a container's shim, and waits until containerd has cleaned up behind it.
func killShim(t *harness.T, id string) {
	t.Helper()
	pid, err := t.ShimPID(id)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	t.Eventually("the task to be gone", func() bool {
		c, err := t.Client.LoadContainer(t.Ctx, id)
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.Task(t.Ctx, nil)
		return errdefs.IsNotFound(err)
	})
}

// TestShimKilledBeforeRestore: a shim that dies with a clone that waits for its start leaves nothing:
// its cgroup is there already, and CRIU in it.
func TestShimKilledBeforeRestore(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	script := sh("sleep 1000")
	original := newContainer(t, script).start()
	dir, err := t.Path(original.ID())
	if err != nil {
		t.Fatal(err)
	}
	t.CtrOK("tasks", "checkpoint", "--image-path", dir, original.ID())
	script.task = []containerd.NewTaskOpts{containerd.WithRestoreImagePath(dir)}
	n := newContainer(t, script).create()
	t.Eventually("CRIU waits in the cgroup", func() bool {
		procs, err := t.CgroupProcs(n.ID())
		return err == nil && len(procs) > 0
	})
	killShim(t, n.ID())
	if left := t.Leftovers(n.ID()); len(left) > 0 {
		t.Errorf("left behind: %s", strings.Join(left, "; "))
	}
	n.start() // the id can be used again
}

// TestShimKilledDuringRestore: while CRIU restores, a clone's root file system is mounted a second
// time, where the shim has its state. Whoever cleans up must not take its files for that.
func TestShimKilledDuringRestore(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image := ref(t)
	original := start(t, ticker(append([]string{option("checkpoint.image", image)}, ownMaps...)...))
	original.exec("touch", "/kept")
	original.checkpoint("--exit")
	original.remove()

	// With a user namespace CRIU begins at Create, and waits for the start.
	n := newContainer(t, usernsClone(t, image)).create()
	id := n.ID()
	killShim(t, id)
	if left := t.Leftovers(id); len(left) > 0 {
		t.Errorf("left behind: %s", strings.Join(left, "; "))
	}
	view := newContainer(t, config{
		args:      []string{"sh", "-c", "ls /kept /bin/busybox /bin/sh"},
		container: []containerd.NewContainerOpts{containerd.WithSnapshot(id)},
	}).start()
	if code := view.wait(); code != 0 {
		t.Errorf("the clone's files are not what they were: %s%s", view.out, view.err)
	}
}

// slowDump is a container whose dump takes some tenths of a second: for the layer of its changes it
// stands still.
func slowDump(t *harness.T, script string, flags ...string) *box {
	t.Helper()
	b := start(t, how{args: []string{"sh", "-c", script}, flags: flags})
	b.exec("dd", "if=/dev/urandom", "of=/big", "bs=1M", "count=64")
	return b
}

// whilePausing calls f when the container stands still for its dump, and returns what became of the
// checkpoint.
func whilePausing(b *box, f func(), flags ...string) error {
	b.Helper()
	done := make(chan error, 1)
	go func() {
		_, err := b.Ctr(b.Ctx, append(append([]string{"tasks", "checkpoint"}, flags...), b.id)...)
		done <- err
	}()
	b.Eventually("the dump", func() bool {
		select {
		case err := <-done:
			b.Fatalf("the checkpoint was over before it was seen: %v", err)
		default:
		}
		return b.status() == containerd.Pausing
	})
	f()
	return <-done
}

// TestKillDuringCheckpoint: a container can be looked at and killed while it is checkpointed, which
// fails then.
func TestKillDuringCheckpoint(tb *testing.T) {
	onlyCrac(tb)
	for name, flags := range map[string][]string{"leave running": nil, "exit": {"--exit"}} {
		tb.Run(name, func(tb *testing.T) {
			t := setup(tb)
			image := ref(t)
			b := slowDump(t, tick, option("checkpoint.image", image))
			task := b.task()
			exited, err := task.Wait(t.Ctx)
			if err != nil {
				t.Fatal(err)
			}
			err = whilePausing(b, func() {
				if pids, err := task.Pids(t.Ctx); err != nil || len(pids) == 0 {
					t.Errorf("processes during the dump: %v, %v", pids, err)
				}
				if _, err := task.Metrics(t.Ctx); err != nil {
					t.Errorf("statistics during the dump: %v", err)
				}
				if err := task.Kill(t.Ctx, syscall.SIGKILL); err != nil {
					t.Errorf("kill: %v", err)
				}
			}, flags...)
			if err == nil || !strings.Contains(err.Error(), "killed") {
				t.Errorf("the checkpoint of what was killed: %v", err)
			}
			if code := exitCode(t, exited); code != 137 {
				t.Errorf("it ended with %d, want 137", code)
			}
			mustHaveImage(t, image, false)
		})
	}
}

// TestKillWhileCRIUIsInside: CRIU traces everybody then, and would wait for the init, which waits for
// the others, who wait for CRIU.
func TestKillWhileCRIUIsInside(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	dir, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	for range times(8) {
		b := start(t, how{args: []string{"sh", "-c", "for i in 1 2 3 4 5 6 7 8; do sleep 1000 & done; echo ready; wait"}})
		t.Eventually("it is ready", func() bool { return strings.Contains(b.log(), "ready") })
		pid := int(b.task().Pid())
		exited, err := b.task().Wait(t.Ctx)
		if err != nil {
			t.Fatal(err)
		}
		images := filepath.Join(dir, b.id)
		checkpoint := make(chan error, 1)
		go func() {
			_, err := b.Ctr(b.Ctx, "tasks", "checkpoint", "--image-path", images, b.id)
			checkpoint <- err
		}()
		// What CRIU writes before it puts its code into the init, which takes some milliseconds.
		for deadline := time.Now().Add(harness.WaitLimit); ; {
			if _, err := os.Stat(filepath.Join(images, "core-1.img")); err == nil {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("there is no dump")
			}
		}
		// As the kernel does for want of memory; a client's kill takes some milliseconds.
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if err := <-checkpoint; err == nil {
			t.Log("the kill came too late")
		} else if !strings.Contains(err.Error(), "ended while it was dumped") {
			t.Errorf("the checkpoint of what was killed: %v", err)
		}
		if code := exitCode(t, exited); code != 137 {
			t.Errorf("it ended with %d, want 137", code)
		}
		b.remove()
	}
}

// TestSignalDuringDump: a signal that comes while a dump is made reaches the container, and no clone.
func TestSignalDuringDump(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image := ref(t)
	const script = `trap 'echo got' USR1; trap 'echo last' USR2; echo ready; while :; do sleep 0.05; done`
	b := slowDump(t, script, option("checkpoint.image", image))
	t.Eventually("it runs", func() bool { return strings.Contains(b.log(), "ready") })
	task := b.task()
	err := whilePausing(b, func() {
		if err := task.Kill(t.Ctx, syscall.SIGUSR1); err != nil {
			t.Errorf("kill: %v", err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Eventually("the signal arrives", func() bool { return strings.Contains(b.log(), "got") })
	clone := start(t, how{image: image, flags: []string{option("restore", "require")}, args: []string{"sh", "-c", script}})
	// The one that the dump had would come before this one (signal(7)).
	if err := clone.task().Kill(t.Ctx, syscall.SIGUSR2); err != nil {
		t.Fatal(err)
	}
	t.Eventually("the clone's own signal arrives", func() bool { return strings.Contains(clone.log(), "last") })
	if strings.Contains(clone.log(), "got") {
		t.Error("the clone got the original's signal")
	}
}

// TestExecStoppedHalfway: a process can be stopped on its way into a container, by those inside. Then
// a hook that is one is out of time, and the container can still be looked at, killed and deleted.
func TestExecStoppedHalfway(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	const stopper = `while :; do
		for c in /proc/[0-9]*/comm; do
			read name <$c && case $name in *INIT*) p=${c#/proc/}; kill -STOP ${p%/comm} && echo stopped;; esac
		done
	done 2>/dev/null`
	b := start(t, how{args: []string{"sh", "-c", stopper}, flags: []string{option("hook.timeout", "1s"), option("hook.before-checkpoint", "true")}})
	dir, err := t.Path(b.id)
	if err != nil {
		t.Fatal(err)
	}
	t.Eventually("a hook is stopped", func() bool { // most are quicker
		_, err = t.Ctr(t.Ctx, "tasks", "checkpoint", "--image-path", dir, b.id)
		return err != nil
	})
	if !strings.Contains(err.Error(), "before-checkpoint") || !strings.Contains(err.Error(), "within 1s") {
		t.Errorf("the checkpoint: %v", err)
	}
	if !strings.Contains(b.log(), "stopped") {
		t.Error("nothing was stopped")
	}
	task := b.task()
	if pids, err := task.Pids(t.Ctx); err != nil || len(pids) == 0 {
		t.Errorf("processes: %v, %v", pids, err)
	}
	exited, err := task.Wait(t.Ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := task.Kill(t.Ctx, syscall.SIGKILL); err != nil {
		t.Errorf("kill: %v", err)
	}
	if code := exitCode(t, exited); code != 137 {
		t.Errorf("it ended with %d, want 137", code)
	}
	b.remove()
}
