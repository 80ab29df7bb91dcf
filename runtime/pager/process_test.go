package pager

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// start starts a pager process for a dump.
func (w *workload) start(images string) *Process {
	w.t.Helper()
	p, err := Start(w.t.Context(), ProcessConfig{Config: w.config(images), Stderr: os.Stderr})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		_ = p.Stop(context.Background())
		<-p.Done()
	})
	return p
}

// guardianOf gives the pid of a pager's guardian.
func guardianOf(t testing.TB, pager int) int {
	t.Helper()
	for start := time.Now(); time.Since(start) < 10*time.Second; time.Sleep(time.Millisecond) {
		if g := findGuardian(pager); g != 0 {
			return g
		}
	}
	t.Fatalf("pager %d has no guardian", pager)
	return 0
}

func findGuardian(pager int) int {
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pager))
	for _, file := range files {
		children, _ := os.ReadFile(file)
		for _, field := range strings.Fields(string(children)) {
			if pid, err := strconv.Atoi(field); err == nil && comm(pid) == guardianName && state(pid) != "Z" {
				return pid
			}
		}
	}
	return 0
}

// waitForAnother returns when a pager has another guardian, or has ended.
func waitForAnother(t testing.TB, p *Process, guardian int) {
	t.Helper()
	for {
		select {
		case <-p.Done():
			return
		default:
		}
		if comm(p.Pid()) == "" || state(p.Pid()) == "Z" {
			return
		}
		if g := findGuardian(p.Pid()); g != 0 && g != guardian {
			return
		}
		time.Sleep(100 * time.Microsecond)
	}
}

func state(pid int) string {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(stat), ") ")
	return rest[:min(1, len(rest))]
}

func comm(pid int) string {
	name, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	return strings.TrimSpace(string(name))
}

func TestProcess(t *testing.T) {
	w := newWorkload(t, "map 1 8192", "fill 1 0 8192")
	images := w.dump("dump")
	p := w.start(images)
	if name := comm(p.Pid()); name != pagerName {
		t.Errorf("the pager calls itself %s", name)
	}
	g := guardianOf(t, p.Pid())
	w.criuRestore(images, "--lazy-pages")
	w.run("check 1 0 8192")
	if err := p.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", g)); err == nil {
		t.Error("the guardian is still there")
	}
	if s := p.Stats(); s.Tasks != 1 || s.FaultBytes+s.DrainBytes < s.Total {
		t.Errorf("%+v", s)
	}
	w.run("check 1 0 8192")
}

// What cannot be served is an error before CRIU is started.
func TestStartFails(t *testing.T) {
	w := newWorkload(t, "map 1 64", "fill 1 0 64")
	images := w.dump("dump")
	copied := filepath.Join(w.dir, "damaged")
	if err := os.CopyFS(copied, os.DirFS(images)); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(copied, "pages-1.img"), int64(pageSize)); err != nil {
		t.Fatal(err)
	}
	damaged, err := os.Open(copied)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*ProcessConfig)
		want   string
	}{
		"damaged":            {func(c *ProcessConfig) { c.Images = damaged }, "pages-1.img has 4096 bytes"},
		"no cgroup":          {func(c *ProcessConfig) { c.Cgroups = nil }, "no cgroup is named"},
		"all of the cgroups": {func(c *ProcessConfig) { c.Cgroups = []string{filepath.Dir(w.group)} }, "not a cgroup below the root"},
		"no cgroup for the guardian": {
			func(c *ProcessConfig) { c.GuardianCgroups = []string{w.dir} }, "put the guardian into",
		},
	} {
		cfg := ProcessConfig{Config: w.config(images)}
		c.change(&cfg)
		if _, err := Start(t.Context(), cfg); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error %v instead of one with %q", name, err, c.want)
		}
	}
}

// A pager that is not needed after all ends, and what is in the cgroup with it.
func TestStop(t *testing.T) {
	w := newWorkload(t, "map 1 64", "fill 1 0 64")
	images := w.dump("dump")
	p := w.start(images)
	guardian := guardianOf(t, p.Pid())
	if err := p.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := p.Wait(); err == nil || err.Error() != errStopped.Error() {
		t.Errorf("error %v", err)
	}
	if comm(guardian) != "" {
		t.Error("the guardian is still there")
	}
}

// The guardian is where it is told to be.
func TestGuardianCgroup(t *testing.T) {
	w := newWorkload(t, "map 1 64", "fill 1 0 64")
	images := w.dump("dump")
	group := newCgroup(t)
	p, err := Start(t.Context(), ProcessConfig{Config: w.config(images), GuardianCgroups: []string{group}})
	if err != nil {
		t.Fatal(err)
	}
	guardian := guardianOf(t, p.Pid())
	if got := processes(group); len(got) != 1 || got[0] != guardian {
		t.Errorf("%v is in its cgroup instead of %d", got, guardian)
	}
	w.criuRestore(images, "--lazy-pages")
	if err := p.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	w.run("check 1 0 64")
}

// When the parent is gone, the memory comes all the same.
func TestParentDies(t *testing.T) {
	w := newWorkload(t, "map 1 8192", "fill 1 0 8192")
	images := w.dump("dump")
	p := w.start(images)
	w.criuRestore(images, "--lazy-pages")
	if err := p.control.file.Close(); err != nil {
		t.Fatal(err)
	}
	w.run("check 1 0 8192")
	_ = p.Wait() // there is nobody to tell the end
	if state := p.cmd.ProcessState; !state.Success() {
		t.Errorf("the pager ends with %s", state)
	}
	w.run("check 1 0 8192")
}

// Whoever is killed, and when: the workload has the right memory or is dead.
func TestKill(t *testing.T) {
	rounds := 10
	if os.Getenv("CRAC_PAGER_TEST") == "require" {
		rounds = 60 // make test-e2e
	}
	if n, err := strconv.Atoi(os.Getenv("CRAC_ROUNDS")); err == nil {
		rounds = n // make soak
	}
	w := newWorkload(t, "map 1 16384", "fill 1 0 16384")
	images := w.dump("dump")
	for _, victim := range []string{"pager", "guardian", "criu", "guardian, then pager", "pager and guardian"} {
		t.Run(victim, func(t *testing.T) {
			w.t = t
			dead, right := 0, 0
			for range rounds {
				if killRound(t, w, images, victim) {
					dead++
				} else {
					right++
				}
			}
			t.Logf("%d dead, %d right", dead, right)
			if victim == "guardian" && dead > 0 {
				t.Errorf("the workload died %d times with the guardian alone", dead)
			}
		})
	}
}

func killRound(t *testing.T, w *workload, images, victim string) (died bool) {
	t.Helper()
	p, err := Start(t.Context(), ProcessConfig{Config: w.config(images)})
	if err != nil {
		t.Fatal(err)
	}
	guardian := guardianOf(t, p.Pid())
	pidfile := filepath.Join(w.dir, "pid")
	_ = os.Remove(pidfile)
	cmd := w.criuCommand("restore", "--lazy-pages", "-d", "-D", images, "--pidfile", pidfile)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// At any moment from before CRIU connects to after the last page, whose time
	// depends on what else the machine does.
	time.Sleep(time.Duration(rand.ExpFloat64() * float64(100*time.Millisecond)))
	switch victim {
	case "pager":
		_ = unix.Kill(p.Pid(), unix.SIGKILL)
	case "guardian":
		_ = unix.Kill(guardian, unix.SIGKILL)
	case "criu":
		_ = unix.Kill(cmd.Process.Pid, unix.SIGKILL)
	case "guardian, then pager":
		// Two deaths, but not at once: there is another guardian by then.
		_ = unix.Kill(guardian, unix.SIGKILL)
		waitForAnother(t, p, guardian)
		_ = unix.Kill(p.Pid(), unix.SIGKILL)
	case "pager and guardian":
		// At once. It may read zeroes until it dies, and must not go on.
		_ = unix.Kill(p.Pid(), unix.SIGSTOP)
		_ = unix.Kill(guardian, unix.SIGKILL)
		_ = unix.Kill(p.Pid(), unix.SIGKILL)
		<-p.Done()
	}
	restoreErr := cmd.Wait()
	defer w.kill()
	if restoreErr != nil {
		if err := p.Stop(context.Background()); err != nil {
			t.Fatal(err)
		}
		return true
	}
	w.readPid(pidfile)
	answer, err := w.ask("w", "check 1 0 16384")
	switch {
	case errors.Is(err, errWorkloadDead):
		if p.Wait() == nil {
			t.Error("the workload is dead, for no reason")
		}
		return true
	case err != nil || answer != "ok":
		t.Fatalf("the workload reads what is not there: %s %v", answer, err)
	}
	<-p.Done()
	// It must stay so.
	if w.alive() {
		if answer, err := w.ask("w", "check 1 0 16384"); err != nil || answer != "ok" {
			t.Fatalf("%s %v", answer, err)
		}
		return false
	}
	return true
}
