// Package java tests the Java library of this directory: by itself, and against a runtime that the
// tests play, on every JDK that is there.
package java

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// patience is how long anything may take on a busy machine.
const patience = 30 * time.Second

// built is the library and the test programs, compiled once.
var built struct {
	once               sync.Once
	dir                string
	jar, unit, appPath string
	err                error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if built.dir != "" {
		_ = os.RemoveAll(built.dir)
	}
	os.Exit(code)
}

func buildAll(t *testing.T) {
	t.Helper()
	built.once.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "crac-java-"); built.err != nil {
			return
		}
		built.jar = filepath.Join(built.dir, "crac.jar")
		built.unit = filepath.Join(built.dir, "unit")
		built.appPath = filepath.Join(built.dir, "app")
		run := func(name string, arg ...string) {
			if built.err != nil {
				return
			}
			if out, err := exec.Command(name, arg...).CombinedOutput(); err != nil {
				built.err = fmt.Errorf("%s: %w\n%s", name, err, out)
			}
		}
		find := func(pattern string) []string {
			names, _ := filepath.Glob(pattern)
			return names
		}
		run("./build.sh", built.jar, "test")
		run("javac", append([]string{"--release", "17", "-cp", built.jar, "-d", built.unit}, find("test/unit/io/github/cracshim/*.java")...)...)
		run("javac", append([]string{"--release", "17", "-cp", built.jar, "-d", built.appPath}, append(find("test/orgcrac/org/crac/*.java"), find("test/app/*.java")...)...)...)
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
}

// onEachJDK runs a test with the java on PATH and with the newer one of build/tools.
func onEachJDK(t *testing.T, test func(t *testing.T, java string)) {
	t.Helper()
	if _, err := exec.LookPath("javac"); err != nil {
		need(t, "no javac on PATH: integration/tools/install.sh jdk installs it")
	}
	buildAll(t)
	build := os.Getenv("CRAC_BUILD")
	if build == "" {
		build = filepath.Join("..", "..", "build")
	}
	for name, java := range map[string]string{"host": "java", "jdk25": filepath.Join(build, "tools", "jdk25", "bin", "java")} {
		t.Run(name, func(t *testing.T) {
			out, err := exec.Command(java, "-version").CombinedOutput()
			if errors.Is(err, os.ErrNotExist) {
				need(t, java+" is not there: integration/tools/install.sh jdk25 makes it")
			}
			if err != nil {
				t.Fatalf("%s -version: %v\n%s", java, err, out)
			}
			test(t, java)
		})
	}
}

// need skips a test whose tool is missing, but not where the Makefile has seen to the tools.
func need(t *testing.T, what string) {
	t.Helper()
	if os.Getenv("CRAC_BUILD") != "" {
		t.Fatal(what)
	}
	t.Skip(what)
}

// TestUnit runs the library's own tests, each as one of these.
func TestUnit(t *testing.T) {
	onEachJDK(t, func(t *testing.T, java string) {
		out, err := exec.Command(java, "-Xbootclasspath/a:"+built.jar+":"+built.unit, "io.github.cracshim.UnitTest").CombinedOutput()
		var n int
		for line := range strings.Lines(string(out)) {
			word, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
			if word != "ok" && word != "FAIL" {
				continue
			}
			n++
			name, why, _ := strings.Cut(rest, " ")
			t.Run(name, func(t *testing.T) {
				if word == "FAIL" {
					t.Error(why)
				}
			})
		}
		if err != nil || n == 0 {
			t.Errorf("%d tests, %v:\n%s", n, err, out)
		}
	})
}

// program is a Java program in a container of a runtime that the test plays.
type program struct {
	t     *testing.T
	cmd   *exec.Cmd
	dir   string // $CRAC_DIR
	in    io.WriteCloser
	lines chan string
	errs  output
	ended chan error

	stored atomic.Bool // the image of the program's own checkpoint
}

// output is what a program writes, to be read while it runs.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// startApp starts the test program. opts are further options of the JVM, env variables.
func startApp(t *testing.T, java string, opts, env []string) *program {
	t.Helper()
	// Not t.TempDir: a socket's path has at most 107 bytes.
	dir, err := os.MkdirTemp("", "crac")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	args := append([]string{"-Xbootclasspath/a:" + built.jar, "-Dorg.crac.Core.Compat=io.github.cracshim", "-Xmx256m", "-XX:TieredStopAtLevel=1"}, opts...)
	p := &program{t: t, dir: dir, lines: make(chan string, 1000), ended: make(chan error, 1)}
	p.cmd = exec.Command(java, append(args, "-cp", built.appPath+":test/app", "App")...)
	p.cmd.Env = append(os.Environ(), append([]string{"CRAC_DIR=" + dir}, env...)...)
	p.cmd.Stderr = &p.errs
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			p.lines <- s.Text()
		}
		p.ended <- p.cmd.Wait()
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill()
		for range p.lines { //nolint:revive // until it has ended
		}
		if t.Failed() {
			t.Logf("stderr: %s", p.errs.String())
		}
	})
	return p
}

// send gives the program a command.
func (p *program) send(format string, args ...any) {
	p.t.Helper()
	if _, err := fmt.Fprintf(p.in, format+"\n", args...); err != nil {
		p.t.Fatal(err)
	}
}

// expect reads what the program says next.
func (p *program) expect(want ...string) {
	p.t.Helper()
	for _, w := range want {
		if got := p.line(); got != w {
			p.t.Fatalf("the program said %q, want %q", got, w)
		}
	}
}

func (p *program) line() string {
	p.t.Helper()
	select {
	case got, ok := <-p.lines:
		if !ok {
			p.t.Fatal("the program has ended")
		}
		return got
	case <-time.After(patience):
		p.t.Fatal("the program says nothing")
	}
	return ""
}

// silent checks that the program says nothing for a moment.
func (p *program) silent() {
	p.t.Helper()
	select {
	case got := <-p.lines:
		p.t.Fatalf("the program said %q, want nothing", got)
	case <-time.After(200 * time.Millisecond):
	}
}

// register registers resources, in order.
func (p *program) register(resources ...string) {
	p.t.Helper()
	for _, r := range resources {
		p.send("register %s", r)
		p.expect("registered")
	}
}

// socket waits for the program to be a participant.
func (p *program) socket() string {
	p.t.Helper()
	return p.socketNamed(fmt.Sprintf("java-%d.sock", p.cmd.Process.Pid))
}

func (p *program) socketNamed(name string) string {
	p.t.Helper()
	path := filepath.Join(p.dir, name)
	for end := time.Now().Add(patience); ; time.Sleep(10 * time.Millisecond) {
		c, err := net.Dial("unix", path)
		if err == nil {
			_ = c.Close()
			return path
		}
		if time.Now().After(end) {
			p.t.Fatalf("no participant: %v", err)
		}
	}
}

// raw sends one line and returns the answer; it checks that the program closes the connection.
func (p *program) raw(line string) string {
	p.t.Helper()
	c, err := net.Dial("unix", p.socket())
	if err != nil {
		p.t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_ = c.SetDeadline(time.Now().Add(patience))
	if _, err := io.WriteString(c, line+"\n"); err != nil {
		p.t.Fatal(err)
	}
	all, err := io.ReadAll(c)
	if err != nil {
		p.t.Fatalf("answer to %s: %v, so far %q", line, err, all)
	}
	answer, ok := strings.CutSuffix(string(all), "\n")
	if !ok || strings.Contains(answer, "\n") {
		p.t.Fatalf("the answer to %s is not one line: %q", line, all)
	}
	return answer
}

type message map[string]any

// notify sends an event and returns the error of the answer, "" if all is well.
func (p *program) notify(event string, more message) string {
	p.t.Helper()
	m := message{"v": 1, "event": event, "id": "0123", "deadline_ms": 10000}
	for k, v := range more {
		m[k] = v
	}
	line, err := json.Marshal(m)
	if err != nil {
		p.t.Fatal(err)
	}
	var answer struct {
		OK    bool
		Error string
	}
	if got := p.raw(string(line)); json.Unmarshal([]byte(got), &answer) != nil || answer.OK != (answer.Error == "") {
		p.t.Fatalf("answer %q", got)
	}
	return answer.Error
}

func (p *program) ok(event string, more message) {
	p.t.Helper()
	if err := p.notify(event, more); err != "" {
		p.t.Fatalf("%s: %s", event, err)
	}
}

// control plays control.sock: answer gets each question. It ends with the test.
func (p *program) control(answer func(op string, question message) message) {
	p.t.Helper()
	l, err := net.Listen("unix", filepath.Join(p.dir, "control.sock"))
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_ = c.SetDeadline(time.Now().Add(patience))
			line, err := bufio.NewReader(c).ReadBytes('\n')
			var question message
			if err == nil && json.Unmarshal(line, &question) == nil {
				op, _ := question["op"].(string)
				if a := answer(op, question); a != nil {
					b, _ := json.Marshal(a)
					_, _ = c.Write(append(b, '\n'))
				}
			}
			_ = c.Close()
		}
	}()
}

// accepting answers requests for a checkpoint with an id, and that it is pending.
func (p *program) accepting() (asked chan struct{}) {
	p.t.Helper()
	asked = make(chan struct{}, 10)
	p.control(func(op string, _ message) message {
		if op == "checkpoint" {
			asked <- struct{}{}
			return message{"ok": true, "id": "0123"}
		}
		if p.stored.Load() {
			return message{"ok": true, "outcome": "checkpointed"}
		}
		return message{"ok": true, "outcome": "pending"}
	})
	return asked
}

func wait(t *testing.T, c <-chan struct{}) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(patience):
		t.Fatal("nothing came")
	}
}

const (
	listener = "crac-participant"
	mainer   = "main"
)

// TestOrder: backwards before, forwards after, with one whose registration is renewed.
func TestOrder(t *testing.T) {
	onEachJDK(t, func(t *testing.T, java string) {
		for event, more := range map[string]message{
			"after-restore": {"generation": "g"},
			"after-resume":  {"outcome": "checkpointed"},
		} {
			t.Run(event, func(t *testing.T) {
				p := startApp(t, java, nil, nil)
				p.register("a", "b", "c")
				for range 2 { // and again
					p.ok("before-checkpoint", nil)
					p.expect("before c in "+listener, "before b in "+listener, "before a in "+listener)
					p.ok(event, more)
					p.expect("after a in "+listener, "after b in "+listener, "after c in "+listener)
				}
				p.silent()
			})
		}
	})
}

// TestVeto: everyone is told and all errors are gathered, also Errors and interrupts.
func TestVeto(t *testing.T) {
	onEachJDK(t, func(t *testing.T, java string) {
		p := startApp(t, java, nil, nil)
		p.register("a veto", "b interrupts", "c error", "d veto broken")
		for range 2 {
			got := p.notify("before-checkpoint", nil)
			const want = "java.lang.Exception: no d; java.lang.AssertionError: no c; java.lang.InterruptedException: interrupted; java.lang.Exception: no a"
			if got != want {
				t.Errorf("error %q, want %q", got, want)
			}
			p.expect("before d in "+listener, "before c in "+listener, "before b in "+listener, "before a in "+listener)
			if got, want := p.notify("after-resume", message{"outcome": "failed", "error": "it says no"}), "java.lang.Exception: broken d"; got != want {
				t.Errorf("error %q, want %q", got, want)
			}
			p.expect("after a in "+listener, "after b in "+listener, "after c in "+listener, "after d in "+listener)
		}
		if !strings.Contains(p.errs.String(), "no c") || !strings.Contains(p.errs.String(), "App$R.beforeCheckpoint") {
			t.Errorf("no stack trace of the veto on stderr: %s", p.errs.String())
		}
	})
}

// TestReferences: weak outside, strong within.
func TestReferences(t *testing.T) {
	onEachJDK(t, func(t *testing.T, java string) {
		p := startApp(t, java, nil, nil)
		p.register("a", "b", "c dropped")
		p.send("drop b")
		p.expect("dropped")
		p.ok("before-checkpoint", nil) // with a collection
		p.expect("before c in "+listener, "before a in "+listener)
		p.ok("after-restore", nil)
		p.expect("after a in "+listener, "after c in "+listener)
		p.send("drop a")
		p.expect("dropped")
		p.ok("before-checkpoint", nil)
		p.ok("after-resume", message{"outcome": "checkpointed"})
		p.silent()
	})
}

// TestRegistration during a notification.
func TestRegistration(t *testing.T) {
	onEachJDK(t, func(t *testing.T, java string) {
		p := startApp(t, java, nil, nil)
		p.register("a registers")
		p.ok("before-checkpoint", nil)
		p.expect("before a in " + listener)
		p.ok("after-resume", message{"outcome": "checkpointed"})
		p.expect("after a in " + listener)
		p.ok("before-checkpoint", nil)
		p.expect("before a2 in "+listener, "before a in "+listener)

		p = startApp(t, java, nil, nil)
		p.register("a other-thread-registers")
		p.ok("before-checkpoint", nil)
		p.expect("before a in "+listener, "it waits")
		p.ok("after-restore", nil)
		got := []string{p.line(), p.line()}
		if s := strings.Join(got, ","); !strings.Contains(s, "after a in ") || !strings.Contains(s, "registered in the background") {
			t.Errorf("the program said %q", got)
		}
	})
}

// TestCheckpointRestore is the request of a program for its own checkpoint.
func TestCheckpointRestore(t *testing.T) {
	for _, c := range []struct {
		name     string
		resource string
		before   string // of the answer
		event    string
		more     message
		after    string
		result   string
	}{
		{"restored", "a", "", "after-restore", nil, "", "returned"},
		{"resumed", "a", "", "after-resume", message{"outcome": "checkpointed"}, "", "returned"},
		{"veto", "a veto broken", "java.lang.Exception: no a", "after-resume", message{"outcome": "failed", "error": "java: no a"}, "java.lang.Exception: broken a", "CheckpointException | Exception: no a | Exception: broken a"},
		{"other-veto", "a", "", "after-resume", message{"outcome": "failed", "error": "python: busy"}, "", "CheckpointException | IOException: python: busy"},
		{"broken-restore", "a broken", "", "after-restore", nil, "java.lang.Exception: broken a", "RestoreException | Exception: broken a"},
		{"broken-resume", "a broken", "", "after-resume", message{"outcome": "checkpointed"}, "java.lang.Exception: broken a", "CheckpointException | Exception: broken a"},
		{"recursive", "a recursive", "org.crac.CheckpointException", "after-resume", message{"outcome": "failed", "error": "java: no"}, "", "CheckpointException | CheckpointException: null"},
	} {
		t.Run(c.name, func(t *testing.T) {
			onEachJDK(t, func(t *testing.T, java string) {
				p := startApp(t, java, nil, nil)
				asked := p.accepting()
				p.register(c.resource)
				for range 2 { // nothing is left of the first
					p.send("checkpoint")
					wait(t, asked)
					if got := p.notify("before-checkpoint", nil); got != c.before {
						t.Errorf("before-checkpoint: %q, want %q", got, c.before)
					}
					p.expect("before a in " + mainer)
					// The runtime may need any time now, and nobody asks it.
					p.silent()
					if got := p.notify(c.event, c.more); got != c.after {
						t.Errorf("%s: %q, want %q", c.event, got, c.after)
					}
					p.expect("after a in " + mainer)
					if c.name == "resumed" {
						// The image is made while the program runs, and is what it asked for.
						p.silent()
						p.stored.Store(true)
					}
					p.expect("checkpoint: " + c.result)
					p.stored.Store(false)
				}
			})
		})
	}
}

// TestCheckpointRefused: by the runtime, and where there is none.
func TestCheckpointRefused(t *testing.T) {
	onEachJDK(t, func(t *testing.T, java string) {
		p := startApp(t, java, nil, nil)
		p.control(func(string, message) message { return message{"ok": false, "error": "it is not allowed"} })
		p.register("a")
		p.send("checkpoint")
		p.expect("checkpoint: CheckpointException | IllegalStateException: it is not allowed")

		p = startApp(t, java, nil, []string{"CRAC_DIR="})
		p.register("a")
		p.send("checkpoint")
		p.expect("checkpoint: CheckpointException | UnsupportedOperationException: CRAC_DIR is not set: this is no container of the crac runtime, or its hooks are off")
	})
}

// TestCheckpointEndsUntold: a request ends when the runtime says that its checkpoint is over, though
// nobody has told this process.
func TestCheckpointEndsUntold(t *testing.T) {
	for outcome, want := range map[string]string{
		"failed":       "CheckpointException | IllegalStateException: no space",
		"checkpointed": "returned",
		"restored":     "returned",
	} {
		t.Run(outcome, func(t *testing.T) {
			onEachJDK(t, func(t *testing.T, java string) {
				p := startApp(t, java, nil, nil)
				n := 0
				p.control(func(op string, question message) message {
					if op == "checkpoint" {
						return message{"ok": true, "id": "77"}
					}
					if n++; n < 3 || question["id"] != "77" {
						return message{"ok": true, "outcome": "pending"}
					}
					return message{"ok": true, "outcome": outcome, "error": "no space"}
				})
				p.send("checkpoint")
				p.expect("checkpoint: " + want)
			})
		})
	}
}

// TestCheckpointWhileDumping: while there is a dump nobody listens, or connections end without a
// word. A notification of a checkpoint that is not the program's is none of its request.
func TestCheckpointWhileDumping(t *testing.T) {
	onEachJDK(t, func(t *testing.T, java string) {
		p := startApp(t, java, nil, nil)
		p.register("a")
		p.send("checkpoint")
		time.Sleep(300 * time.Millisecond)
		p.ok("before-checkpoint", message{"id": "ff"})
		p.expect("before a in " + listener)
		p.ok("after-resume", message{"id": "ff", "outcome": "checkpointed"})
		p.expect("after a in " + listener)
		asked, n := make(chan struct{}, 10), 0
		p.control(func(string, message) message {
			if n++; n == 1 {
				return nil
			}
			asked <- struct{}{}
			return message{"ok": true, "id": "0123"}
		})
		wait(t, asked)
		p.ok("before-checkpoint", nil)
		p.expect("before a in " + mainer)
		p.ok("after-restore", message{"id": "another"})
		p.expect("after a in "+mainer, "checkpoint: returned")
	})
}

// TestCheckpointInterrupted: the thread's interrupt neither ends the request nor is lost.
func TestCheckpointInterrupted(t *testing.T) {
	onEachJDK(t, func(t *testing.T, java string) {
		p := startApp(t, java, nil, nil)
		asked := p.accepting()
		p.register("a")
		p.send("interrupt")
		p.send("checkpoint")
		wait(t, asked)
		p.ok("before-checkpoint", nil)
		p.ok("after-restore", nil)
		p.expect("before a in "+mainer, "after a in "+mainer, "checkpoint: returned (interrupted)")
	})
}

// TestForeignWords: nothing that comes in ends the participant.
func TestForeignWords(t *testing.T) {
	onEachJDK(t, func(t *testing.T, java string) {
		p := startApp(t, java, nil, nil)
		p.register("a")
		for line, want := range map[string]string{
			`{"v":1,"event":"check","id":"1","deadline_ms":1}`: `{"ok":true}`,
			`{"v":1,"event":"something-new"}`:                  `{"ok":true}`,
			`{}`:                                               `{"ok":true}`,
			``:                                                 `"error":"no JSON`,
			`hello`:                                            `"error":"no JSON`,
			`{"event":["` + strings.Repeat("x", 100_000) + `"]}`: `{"ok":true}`,
		} {
			if got := p.raw(line); !strings.Contains(got, want) {
				t.Errorf("answer to %.50q: %q, want %q", line, got, want)
			}
		}
		for _, begun := range []string{"", `{"event":`, strings.Repeat("x", 2<<20)} {
			c, err := net.Dial("unix", p.socket())
			if err != nil {
				t.Fatal(err)
			}
			_ = c.SetDeadline(time.Now().Add(patience))
			_, _ = io.WriteString(c, begun)
			_ = c.Close()
		}
		p.silent()
		p.ok("before-checkpoint", nil)
		p.expect("before a in " + listener)
	})
}

// TestLateAnswer: a runtime that has lost patience goes on to the next event; it is told of in order.
func TestLateAnswer(t *testing.T) {
	onEachJDK(t, func(t *testing.T, java string) {
		p := startApp(t, java, nil, nil)
		p.register("a slow")
		c, err := net.Dial("unix", p.socket())
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(c, `{"v":1,"event":"before-checkpoint","id":"1","deadline_ms":1}`+"\n")
		p.expect("before a in " + listener)
		_ = c.Close()
		p.ok("after-resume", message{"id": "1", "outcome": "failed", "error": "time-out"})
		p.expect("after a in " + listener)
	})
}

// TestKeepAlive: a JVM whose last own thread ends before a checkpoint, as that of a server that is
// stopped, lives on until it has been told what came of it.
func TestKeepAlive(t *testing.T) {
	onEachJDK(t, func(t *testing.T, java string) {
		p := startApp(t, java, nil, nil)
		p.register("a")
		socket := p.socket()
		p.ok("before-checkpoint", nil)
		p.expect("before a in " + listener)
		p.send("end")
		p.expect("main ends")
		p.silent()
		p.ok("after-restore", nil)
		p.expect("after a in " + listener)
		select {
		case err := <-p.ended:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(patience):
			t.Fatal("the program does not end any more")
		}
		if _, err := os.Lstat(socket); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket outlived the process: %v", err)
		}
	})
}

// TestName: $CRAC_NAME, unless another process has it; what a dead one left is no obstacle.
func TestName(t *testing.T) {
	onEachJDK(t, func(t *testing.T, java string) {
		p := startApp(t, java, nil, []string{"CRAC_NAME=10-app"})
		l, err := net.Listen("unix", filepath.Join(p.dir, "10-app.sock"))
		if err != nil {
			t.Fatal(err)
		}
		l.(*net.UnixListener).SetUnlinkOnClose(false)
		_ = l.Close() // the socket stays and answers nobody
		p.register("a")
		p.socketNamed("10-app.sock")

		second := startApp(t, java, nil, []string{"CRAC_NAME=10-app", "CRAC_DIR=" + p.dir})
		second.dir = p.dir
		second.register("a")
		second.socket()

		for _, bad := range []string{"control", ".hidden", "a/b"} {
			p := startApp(t, java, nil, []string{"CRAC_NAME=" + bad})
			p.register("a")
			p.socket()
		}
	})
}

// TestStarter: a program that never asks for the library takes part from its first resource bundle
// or time zone on, and finds what it would find without it.
func TestStarter(t *testing.T) {
	onEachJDK(t, func(t *testing.T, java string) {
		for command, want := range map[string]string{
			"bundle": "found: key=value, no bundle missing",
			"zone":   "found: +01:00, no zone Europe/Nowhere",
		} {
			t.Run(command, func(t *testing.T) {
				p := startApp(t, java, nil, nil)
				p.send("%s", command)
				p.expect(want)
				p.ok("before-checkpoint", nil)
				p.ok("after-restore", message{"generation": "00ff"})
				p.send("%s", command)
				p.expect(want)

				p = startApp(t, java, nil, []string{"CRAC_DIR="})
				p.send("%s", command)
				p.expect(want)
			})
		}
	})
}

// TestStart: what a clone learns of its own start.
func TestStart(t *testing.T) {
	onEachJDK(t, func(t *testing.T, java string) {
		p := startApp(t, java, []string{"-Dfrom.args=1"}, []string{"DB=prod1", "JAVA_TOOL_OPTIONS=-Dsame=env -Dchanged=1"})
		p.register("a")
		p.send("start")
		if got := p.line(); !regexp.MustCompile(`^false    prod1 \[\S*java, .*, App\] \{\} PT0S$`).MatchString(got) {
			t.Errorf("start: %q", got)
		}
		p.send("set same program")
		p.expect("set")
		p.ok("before-checkpoint", nil)
		p.expect("before a in " + listener)
		p.ok("after-restore", message{
			"generation": "00ff", "container": "c2", "hostname": "h2", "frozen_ns": 1500000000,
			"env":         message{"DB": "prod2", "JAVA_TOOL_OPTIONS": "-Dsame=env -Dchanged='2 3'", "JDK_JAVA_OPTIONS": "-Dnew=4"},
			"args":        []string{"java", "App"},
			"annotations": message{"k": "v"},
		})
		p.expect("after a in " + listener)
		p.send("start")
		p.expect("true 00ff c2 h2 prod2 [java, App] {k=v} PT1.5S")
		for property, want := range map[string]string{"same": "program", "changed": "2 3", "new": "4", "from.args": "1"} {
			p.send("property %s", property)
			p.expect(property + "=" + want)
		}
	})
}

// TestMemory: the heap is given back before a dump, and may grow again.
func TestMemory(t *testing.T) {
	onEachJDK(t, func(t *testing.T, java string) {
		for _, gc := range []string{"-XX:+UseG1GC", "-XX:+UseSerialGC"} {
			t.Run(gc, func(t *testing.T) {
				p := startApp(t, java, []string{gc, "-Xms8m"}, nil)
				p.register("a")
				var before, after int
				p.send("heap")
				if _, err := fmt.Sscanf(p.line(), "heap %d", &before); err != nil {
					t.Fatal(err)
				}
				p.ok("before-checkpoint", nil)
				p.expect("before a in " + listener)
				p.send("committed")
				if _, err := fmt.Sscanf(p.line(), "heap %d", &after); err != nil {
					t.Fatal(err)
				}
				t.Logf("heap: %d MiB before, %d MiB after", before, after)
				if before < 40 || after > 16 {
					t.Errorf("heap: %d MiB before, %d MiB after", before, after)
				}
				p.ok("after-restore", nil)
			})
		}
	})
}
