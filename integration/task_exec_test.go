package integration

import (
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"

	"github.com/crac-shim/crac/integration/harness"
)

func TestExec(tb *testing.T) {
	t := setup(tb)
	n := newContainer(t, sh("echo init; sleep 1000")).start()
	t.Eventually("init's output", func() bool { return n.out.String() == "init\n" })
	if r := n.exec("echo out; echo err >&2; exit 17"); r != (result{17, "out\n", "err\n"}) {
		t.Errorf("exec: %+v", r)
	}
	if got := n.out.String(); got != "init\n" {
		t.Errorf("the exec's output went to init's stdout: %q", got)
	}
	// It runs in the container's namespaces.
	if r := n.exec("test $(readlink /proc/1/ns/pid) = $(readlink /proc/self/ns/pid) && test $(readlink /proc/1/ns/mnt) = $(readlink /proc/self/ns/mnt) && echo same"); r.out != "same\n" {
		t.Errorf("namespaces of the exec: %+v", r)
	}
	// In its cgroup as well.
	p := n.startExec("cg", "sleep", "1000")
	pids, err := t.CgroupProcs(n.ID())
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(fmt.Sprint(pids), fmt.Sprint(p.Pid())) {
		t.Errorf("exec %d is not among the cgroup's %v", p.Pid(), pids)
	}
	// Its own rules of life.
	if _, err := p.Delete(t.Ctx); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("delete of a running exec: got %v, want FailedPrecondition", err)
	}
	if _, err := n.newExec("cg", nil, false, "true"); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second exec of the same id: got %v, want AlreadyExists", err)
	}
	if err := p.Kill(t.Ctx, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if r := n.end(p); r.code != 137 {
		t.Errorf("code %d", r.code)
	}
	if _, err := p.Delete(t.Ctx); !errdefs.IsNotFound(err) {
		t.Errorf("delete of a deleted exec: got %v, want NotFound", err)
	}
	if r := n.end(n.startExec("cg", "true")); r.code != 0 {
		t.Errorf("the id cannot be used again: %+v", r)
	}
}

func TestExecFails(tb *testing.T) {
	t := setup(tb)
	n := newContainer(t, sh("sleep 1000")).start()
	p, err := n.newExec("bad", nil, false, "no-such-program")
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Start(t.Ctx); err == nil || !strings.Contains(err.Error(), "no-such-program") {
		t.Errorf("exec of what is not there: %v", err)
	}
	if _, err := p.Delete(t.Ctx); err != nil && !errdefs.IsNotFound(err) {
		t.Errorf("delete of the failed exec: %v", err)
	}
	// An exec that was never started can be deleted.
	p, err = n.newExec("idle", nil, false, "true")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Delete(t.Ctx); err != nil {
		t.Errorf("delete of an exec that was not started: %v", err)
	}
	if r := n.exec("echo fine"); r.out != "fine\n" {
		t.Errorf("exec after failures: %+v", r)
	}
}

// TestExecOutlivesInit: when init ends, its execs end, and each reports so.
func TestExecOutlivesInit(tb *testing.T) {
	t := setup(tb)
	n := newContainer(t, sh("sleep 1000")).start()
	p := n.startExec("late", "sleep", "1000")
	n.kill(syscall.SIGKILL)
	if code := n.wait(); code != 137 {
		t.Errorf("init's code %d", code)
	}
	if r := n.end(p); r.code != 137 {
		t.Errorf("the exec's code %d", r.code)
	}
	q, err := n.newExec("after", nil, false, "true")
	if err == nil {
		if err = q.Start(t.Ctx); err == nil {
			t.Error("an exec starts in a container that has ended")
		}
		_, _ = q.Delete(t.Ctx)
	}
	n.deleteTask()
}

func TestExecMany(tb *testing.T) {
	t := setup(tb)
	n := newContainer(t, sh("sleep 1000")).start()
	n.execMany(times(25), "")
	shim, err := t.ShimPID(n.ID())
	if err != nil {
		t.Fatal(err)
	}
	noZombies(t, shim)
	if s := n.status(); s != containerd.Running {
		t.Errorf("the container is %s", s)
	}
}

// execMany has four at once run so many processes each, one after the other. They do first what
// is given, say a number of their own and end with it as their exit code.
func (c *ctn) execMany(each int, first string) {
	c.Helper()
	one := func(id string, want uint32) error {
		p, err := c.newExec(id, nil, false, "sh", "-c", fmt.Sprintf("%s echo %d; exit %d", first, want, want))
		if err == nil {
			err = p.Start(c.Ctx)
		}
		if err != nil {
			return err
		}
		s := <-p.exit
		d, err := p.Delete(c.Ctx)
		if err != nil {
			return fmt.Errorf("delete: %w", err)
		}
		if s.ExitCode() != want || d.ExitCode() != want || p.out.String() != fmt.Sprintf("%d\n", want) {
			return fmt.Errorf("code %d, Delete's %d, output %q, %w; want %d", s.ExitCode(), d.ExitCode(), p.out, s.Error(), want)
		}
		return nil
	}
	var workers sync.WaitGroup
	for w := range 4 {
		workers.Go(func() {
			for i := range each {
				if err := one(fmt.Sprintf("m%d-%d", w, i), uint32((w*each+i)%256)); err != nil {
					c.Errorf("process %d of worker %d: %v", i, w, err)
					return
				}
			}
		})
	}
	workers.Wait()
}

// noZombies checks that a shim reaps its children.
func noZombies(t *harness.T, shim int) {
	t.Helper()
	left := waitEmpty(func() (s []string) {
		for _, z := range zombies(shim) {
			s = append(s, z.String())
		}
		return s
	})
	if len(left) > 0 {
		t.Errorf("zombies are left under the shim: %s", strings.Join(left, "; "))
	}
}
