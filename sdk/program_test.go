package sdk

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// program is a process of the workload.
type program struct {
	testing.TB
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	lines  chan string
	stderr lockedBuffer
	done   chan struct{}
	err    error // how it ended; to be read after done
}

type lockedBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// start runs a command of a container. The test's end ends it.
func (s *shim) start(env []string, args ...string) *program {
	s.Helper()
	return s.startIn("", env, args...)
}

// startIn is start in a working directory.
func (s *shim) startIn(dir string, env []string, args ...string) *program {
	s.Helper()
	p := &program{TB: s.TB, lines: make(chan string, 1000), done: make(chan struct{})}
	ctx, cancel := context.WithCancel(context.Background())
	p.cmd = exec.CommandContext(ctx, args[0], args[1:]...)
	p.cmd.Dir = dir
	// Its children, too, are to end with it.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	p.cmd.Cancel = func() error { return syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL) }
	p.cmd.WaitDelay = time.Second
	p.cmd.Env = append(append(os.Environ(), "CRAC_DIR="+s.dir), env...)
	p.cmd.Stderr = &p.stderr
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		s.Fatal(err)
	}
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		s.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		s.Fatal(err)
	}
	go func() {
		lines := bufio.NewScanner(stdout)
		for lines.Scan() {
			p.lines <- lines.Text()
		}
		close(p.lines)
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	s.Cleanup(func() {
		cancel()
		<-p.done
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		if s.Failed() {
			s.Logf("stderr of %s:\n%s", args[0], p.stderr.String())
		}
	})
	return p
}

// say writes a line to the program's input.
func (p *program) say(format string, args ...any) {
	p.Helper()
	if _, err := fmt.Fprintf(p.stdin, format+"\n", args...); err != nil {
		p.Fatal(err)
	}
}

// line is the next line of the program's output.
func (p *program) line() string {
	p.Helper()
	select {
	case l, ok := <-p.lines:
		if !ok {
			p.Fatal("the program has ended")
		}
		return l
	case <-time.After(patience):
		p.Fatalf("no line from the program within %v", patience)
	}
	return ""
}

// want checks the next lines of the program's output.
func (p *program) want(lines ...string) {
	p.Helper()
	for i, want := range lines {
		if got := p.line(); got != want {
			p.Fatalf("line %d of the program is %q, want %q", i+1, got, want)
		}
	}
}

// quiet checks that the program has written nothing more.
func (p *program) quiet() {
	p.Helper()
	select {
	case l := <-p.lines:
		p.Fatalf("the program writes %q", l)
	case <-time.After(50 * time.Millisecond):
	}
}

// wait closes the program's input and waits until it has ended, with status 0.
func (p *program) wait() {
	p.Helper()
	_ = p.stdin.Close()
	select {
	case <-p.done:
		if p.err != nil {
			p.Fatal(p.err)
		}
	case <-time.After(patience):
		p.Fatalf("the program has not ended within %v", patience)
	}
}

// need finds an interpreter or compiler on PATH.
func need(tb testing.TB, name string) string {
	tb.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		if os.Getenv("CRAC_TEST_ALL") != "" {
			tb.Fatalf("%s is not installed, and CRAC_TEST_ALL is set", name)
		}
		tb.Skipf("%s is not installed", name)
	}
	return path
}

// here makes a path absolute that is relative to this directory.
func here(tb testing.TB, path string) string {
	tb.Helper()
	abs, err := filepath.Abs(path)
	if err != nil {
		tb.Fatal(err)
	}
	return abs
}
