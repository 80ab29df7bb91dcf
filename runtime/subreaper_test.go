package runtime

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// theReaper is this process's: there can be only one.
var theReaper = sync.OnceValues(NewSubreaper)

func reaper(tb testing.TB) *Subreaper {
	tb.Helper()
	r, err := theReaper()
	if err != nil {
		tb.Fatal(err)
	}
	return r
}

// waitFor waits until cond holds. It bounds a test that fails, no more.
func waitFor(tb testing.TB, what string, cond func() bool) {
	tb.Helper()
	for deadline := time.Now().Add(30 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			tb.Fatalf("waited in vain for: %s", what)
		}
	}
}

func gone(pid int) bool { return errors.Is(unix.Kill(pid, 0), unix.ESRCH) }

// awaitZombie waits for the end of a child without reaping it.
func awaitZombie(tb testing.TB, pid int) {
	tb.Helper()
	for {
		err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			tb.Fatalf("wait for child %d: %v", pid, err)
		}
		return
	}
}

// orphan makes a process whose parent has ended, and lets it end when release is
// called.
func orphan(tb testing.TB, r *Subreaper) (pid int, release func()) {
	tb.Helper()
	in, w, err := os.Pipe()
	if err != nil {
		tb.Fatal(err)
	}
	defer in.Close()
	var out bytes.Buffer
	// A shell gives /dev/null to what it runs in the background, but for fd 3.
	cmd := exec.Command("/bin/sh", "-c", "cat <&3 >/dev/null 2>&1 & echo $!")
	cmd.Stdout, cmd.ExtraFiles = &out, []*os.File{in}
	wait, err := r.Start(cmd)
	if err != nil {
		tb.Fatal(err)
	}
	if err := wait(); err != nil {
		tb.Fatal(err)
	}
	pid, err = strconv.Atoi(strings.TrimSpace(out.String()))
	if err != nil {
		tb.Fatal(err)
	}
	return pid, sync.OnceFunc(func() { w.Close() })
}

func TestSubreaperReapsOrphans(t *testing.T) {
	r := reaper(t)
	var pids []int
	var releases []func()
	for range 5 {
		pid, release := orphan(t, r)
		defer release()
		pids, releases = append(pids, pid), append(releases, release)
	}
	for _, pid := range pids {
		if gone(pid) {
			t.Fatalf("orphan %d is gone before it ended", pid)
		}
	}
	for _, release := range releases {
		release()
	}
	for _, pid := range pids {
		waitFor(t, fmt.Sprintf("orphan %d to be reaped", pid), func() bool { return gone(pid) })
	}
}

// The exit status of an owned process waits for its owner, however long.
func TestSubreaperLeavesOwned(t *testing.T) {
	r := reaper(t)
	cmd := exec.Command("/bin/sh", "-c", "exit 7")
	wait, err := r.Start(cmd)
	if err != nil {
		t.Fatal(err)
	}
	awaitZombie(t, cmd.Process.Pid)
	// An orphan that is reaped later tells that the reaper has looked since.
	pid, release := orphan(t, r)
	release()
	waitFor(t, "the orphan to be reaped", func() bool { return gone(pid) })

	var exit *exec.ExitError
	if err := wait(); !errors.As(err, &exit) || exit.ExitCode() != 7 {
		t.Errorf("wait: %v, want exit status 7", err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, still := r.owned[cmd.Process.Pid]; still {
		t.Errorf("process %d is still owned after the wait", cmd.Process.Pid)
	}
}

// While somebody holds, nothing is reaped, and others may hold as well.
func TestSubreaperHold(t *testing.T) {
	r := reaper(t)
	release := r.Hold()
	released := sync.OnceFunc(release)
	defer released()
	// Nobody owns it yet, as between a fork and Own.
	cmd := exec.Command("/bin/sh", "-c", "exit 9")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	awaitZombie(t, cmd.Process.Pid)
	pid, end := orphan(t, r) // holds, too
	end()
	waitFor(t, "the orphan's end", func() bool { return isZombie(pid) })
	looked := make(chan bool, 1)
	go func() { looked <- r.reap() }()
	// A hold while the reaper waits for its turn must not wait with it.
	second := make(chan struct{})
	go func() {
		r.Hold()()
		close(second)
	}()
	select {
	case <-second:
	case <-time.After(30 * time.Second):
		t.Fatal("Hold waits for the reaper, which waits for another holder")
	}
	if <-looked {
		t.Error("the reaper looked while somebody held")
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 9 {
		t.Errorf("wait: %v, want exit status 9", err)
	}
	if !isZombie(pid) {
		t.Error("the orphan was reaped while somebody held")
	}
	released()
	waitFor(t, "the orphan to be reaped", func() bool { return gone(pid) })
}

func TestSubreaperStartFails(t *testing.T) {
	r := reaper(t)
	if _, err := r.Start(exec.Command("/nonexistent/program")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v, want ErrNotExist", err)
	}
	// It must not hold any more.
	pid, release := orphan(t, r)
	release()
	waitFor(t, "an orphan to be reaped", func() bool { return gone(pid) })
}

func TestZombieChildren(t *testing.T) {
	r := reaper(t)
	// The name stands in /proc/PID/stat between parentheses, with whatever it holds.
	tricky := filepath.Join(t.TempDir(), ") Z (R)")
	cat, err := exec.LookPath("cat")
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(cat)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(tricky, data, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(tricky)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	wait, err := r.Start(cmd)
	if err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	if _, err := io.WriteString(in, "ready\n"); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("the child said %q: %v", line, err)
	}
	if isZombie(pid) || slices.Contains(zombieChildren(), pid) {
		t.Error("a running child is taken for a zombie")
	}
	in.Close()
	awaitZombie(t, pid)
	if !isZombie(pid) || !slices.Contains(zombieChildren(), pid) {
		t.Error("a zombie is not seen")
	}
	if err := wait(); err != nil {
		t.Error(err)
	}
	if isZombie(pid) {
		t.Error("a reaped child is taken for a zombie")
	}
}

func TestExitStatus(t *testing.T) {
	r := reaper(t)
	for script, want := range map[string]int{
		"exit 0":        0,
		"exit 3":        3,
		"exit 255":      255,
		"kill -TERM $$": 128 + int(unix.SIGTERM),
		"kill -KILL $$": 128 + int(unix.SIGKILL),
	} {
		cmd := exec.Command("/bin/sh", "-c", script)
		wait, err := r.Start(cmd)
		if err != nil {
			t.Fatal(err)
		}
		err = wait()
		if got := exitStatus(cmd.ProcessState, err); got != want {
			t.Errorf("%s: %d, want %d", script, got, want)
		}
		// libcontainer gives the state only in the error when it is not zero.
		if want != 0 {
			if got := exitStatus(nil, fmt.Errorf("wait: %w", err)); got != want {
				t.Errorf("%s, by its error: %d, want %d", script, got, want)
			}
		}
	}
	for _, err := range []error{nil, syscall.ECHILD} {
		if got := exitStatus(nil, err); got != 128+int(unix.SIGKILL) {
			t.Errorf("a lost status (%v) counts as %d, want as killed", err, got)
		}
	}
}

// A signal reaches the process while there is one, and nobody afterwards.
func TestProcessSignal(t *testing.T) {
	r := reaper(t)
	cmd := exec.Command("cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	wait, err := r.Start(cmd)
	if err != nil {
		t.Fatal(err)
	}
	p := &Process{pid: cmd.Process.Pid, done: make(chan struct{})}
	if err := p.Signal(unix.SIGTERM); err != nil {
		t.Errorf("signal to a running process: %v", err)
	}
	var exit *exec.ExitError
	if err := wait(); !errors.As(err, &exit) || exitStatus(exit.ProcessState, err) != 128+int(unix.SIGTERM) {
		t.Errorf("wait: %v, want the end by SIGTERM", err)
	}
	if err := p.Signal(unix.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("signal to an ended process: %v, want ErrProcessDone", err)
	}
	// The pid may belong to anybody once the process is reaped: here, to us.
	p = &Process{pid: os.Getpid(), reaped: true, done: make(chan struct{})}
	if err := p.Signal(0); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("signal to a pid that is used again: %v, want ErrProcessDone", err)
	}
}
