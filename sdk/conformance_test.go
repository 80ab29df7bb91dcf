package sdk

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// library is an SDK, with a program that uses all of it.
//
// The program registers the hooks "one", "two" and "three", in this order, for each event. Each
// writes a line "EVENT NAME" to standard output when it is called. Then the program writes
// "ready", and does what the lines of its standard input say, one after another, until that ends:
//
//	fail EVENT NAME   make this hook fail from now on, with the text "NAME says no"; write "failing"
//	status            write "status START", or "status error: TEXT"
//	checkpoint        ask for a checkpoint and wait for it; write "checkpoint OUTCOME", or
//	                  "checkpoint error: TEXT"
//	env NAME          write "env VALUE", as the program's own environment has it ("env" if it does not)
//	restore           write "restore GENERATION CONTAINER HOSTNAME FROZEN_NS ARGS...", of the last restore
type library struct {
	name    string
	command func(testing.TB) []string
	env     func(testing.TB) []string
}

var libraries = []library{
	{
		name:    "python",
		command: func(tb testing.TB) []string { return []string{need(tb, "python3"), "testdata/conformance.py"} },
		env:     pythonEnv,
	},
	{
		name:    "node",
		command: func(tb testing.TB) []string { return []string{need(tb, "node"), "testdata/conformance.js"} },
		env:     nodeEnv,
	},
	{
		name:    "go",
		command: goCommand,
		env:     func(testing.TB) []string { return nil },
	},
}

const (
	before  = `{"v":1,"event":"before-checkpoint","id":"c1","deadline_ms":10000}`
	resumed = `{"v":1,"event":"after-resume","id":"c1","deadline_ms":10000,"outcome":"checkpointed"}`
	failed  = `{"v":1,"event":"after-resume","id":"c1","deadline_ms":10000,"outcome":"failed","error":"pool busy"}`
	check   = `{"v":1,"event":"check","id":"k1","deadline_ms":10000}`
	restore = `{"v":1,"event":"after-restore","id":"r1","deadline_ms":10000,"generation":"00ff","container":"clone-1","hostname":"host-1",` +
		`"env":{"CRAC_TEST_DB":"prod2","CRAC_TEST_NEW":"ä"},"args":["a","b c"],"annotations":{"x":"y"},"frozen_ns":5000000000}`
)

// run starts a library's program.
func (l library) run(t *testing.T, env ...string) (*shim, *program) {
	t.Helper()
	s := newShim(t)
	p := s.start(append(l.env(t), env...), l.command(t)...)
	p.want("ready")
	return s, p
}

func order(event string, names ...string) []string {
	lines := make([]string, 0, len(names))
	for _, n := range names {
		lines = append(lines, event+" "+n)
	}
	return lines
}

func TestConformance(t *testing.T) {
	for _, l := range libraries {
		t.Run(l.name, func(t *testing.T) {
			for name, test := range map[string]func(*testing.T, library){
				"hooks": testHooks, "errors": testErrors, "connections": testConnections, "restore": testRestore,
				"drip": testDrip, "status": testStatus, "checkpoint": testCheckpoint, "socket": testSocket, "elsewhere": testElsewhere,
			} {
				t.Run(name, func(t *testing.T) {
					t.Parallel() // they mostly wait
					test(t, l)
				})
			}
		})
	}
}

// Before- hooks run against the order of registration, after- hooks in it.
func testHooks(t *testing.T, l library) {
	s, p := l.run(t)
	if name := s.waitParticipants(1)[0]; name != fmt.Sprintf("%s-%d.sock", l.name, p.cmd.Process.Pid) {
		t.Errorf("the participant's name is %s", name)
	}
	for range 2 { // a second checkpoint of a clone is one like the first
		s.mustTell(check)
		p.want(order("check", "three", "two", "one")...)
		s.mustTell(before)
		p.want(order("before-checkpoint", "three", "two", "one")...)
		s.mustTell(resumed)
		p.want(order("after-resume", "one", "two", "three")...)
		s.mustTell(before)
		p.want(order("before-checkpoint", "three", "two", "one")...)
		s.mustTell(restore)
		p.want(order("after-restore", "one", "two", "three")...)
	}
	s.mustTell(`{"v":1,"event":"before-breakfast","id":"u1","deadline_ms":10000,"more":[1,{}]}`)
	p.quiet()
	p.wait()
}

// Every hook is called though another fails, and all failures are told.
func testErrors(t *testing.T, l library) {
	s, p := l.run(t)
	lines := map[string]string{"check": check, "before-checkpoint": before, "after-resume": failed, "after-restore": restore}
	for _, event := range []string{"check", "before-checkpoint", "after-resume", "after-restore"} {
		names := []string{"one", "two", "three"}
		if event == "check" || event == "before-checkpoint" {
			slices.Reverse(names)
		}
		for _, n := range []string{"one", "three"} {
			p.say("fail %s %s", event, n)
			p.want("failing")
		}
		a := s.tell(lines[event])
		p.want(order(event, names...)...)
		if a.OK || !strings.Contains(a.Error, "one says no") || !strings.Contains(a.Error, "three says no") || strings.Contains(a.Error, "two") {
			t.Errorf("%s: %+v, want the errors of one and three", event, a)
		}
		if strings.Index(a.Error, "one says") < strings.Index(a.Error, "three says") != (names[0] == "one") {
			t.Errorf("%s: %s: not in the order of the calls", event, a.Error)
		}
	}
	p.wait()
}

// What comes over the socket must not end the participant.
func testConnections(t *testing.T, l library) {
	s, p := l.run(t)
	name := s.waitParticipants(1)[0]
	for _, text := range []string{"", `{"v":1,"event":"before-checkpoint"`, before} { // without a newline
		c := s.dial(name)
		if _, err := io.WriteString(c, text); err != nil {
			t.Fatal(err)
		}
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if rest, err := io.ReadAll(c); err != nil || len(rest) > 0 {
			t.Errorf("after half a line %q: %q, %v", text, rest, err)
		}
		_ = c.Close()
	}
	for _, text := range []string{"garbage", "", "[]", "null", `{"v":1}`, `{"v":1,"event":7}`, `{"v":1,"event":"check","deadline_ms":"x"}`, "\xff\xfe"} {
		if a := s.send(name, text); a.OK && !strings.HasPrefix(text, "{") {
			t.Errorf("%q is answered with ok", text)
		}
	}
	for len(p.lines) > 0 {
		if got := p.line(); !strings.HasPrefix(got, "check ") {
			t.Errorf("garbage called the hook %s", got)
		}
	}
	// The runtime gave up: the hooks run all the same.
	c := s.dial(name)
	if _, err := io.WriteString(c, before+"\n"); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	p.want(order("before-checkpoint", "three", "two", "one")...)

	// In small pieces.
	c = s.dial(name)
	for piece := range slices.Chunk([]byte(failed+"\n"), 7) {
		if _, err := c.Write(piece); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
	}
	if a, err := io.ReadAll(c); err != nil || strings.TrimSpace(string(a)) != `{"ok":true}` && !strings.Contains(string(a), `"ok": true`) {
		t.Errorf("a line in pieces is answered with %q, %v", a, err)
	}
	_ = c.Close()
	p.want(order("after-resume", "one", "two", "three")...)

	// As long as a line may be.
	long := strings.Replace(restore, `"x":"y"`, `"x":"`+strings.Repeat("y", 1<<20-len(restore)-1)+`"`, 1)
	s.mustTell(long)
	p.want(order("after-restore", "one", "two", "three")...)
	p.wait()
}

// Somebody in the container who sends a line that never ends, byte by byte, holds up nobody for
// longer than a participant waits for a line.
func testDrip(t *testing.T, l library) {
	s, p := l.run(t)
	c := s.dial(s.waitParticipants(1)[0])
	defer c.Close()
	ended := make(chan error, 1)
	go func() {
		for {
			if _, err := c.Write([]byte("{")); err != nil {
				ended <- err
				return
			}
			time.Sleep(50 * time.Millisecond)
		}
	}()
	s.mustTell(check)
	p.want(order("check", "three", "two", "one")...)
	if err := <-ended; errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the connection is kept")
	}
	p.wait()
}

// A clone learns what it is, and gets the environment of its own start.
func testRestore(t *testing.T, l library) {
	s, p := l.run(t, "CRAC_TEST_DB=prod1", "CRAC_TEST_GONE=1", "CRAC_TEST_SAME=1")
	p.say("env CRAC_TEST_DB")
	p.want("env prod1")
	s.mustTell(before)
	p.want(order("before-checkpoint", "three", "two", "one")...)
	s.mustTell(strings.Replace(restore, `"env":{`, `"env":{"CRAC_TEST_SAME":"1",`, 1))
	p.want(order("after-restore", "one", "two", "three")...)
	for name, value := range map[string]string{"CRAC_TEST_DB": " prod2", "CRAC_TEST_NEW": " ä", "CRAC_TEST_GONE": "", "CRAC_TEST_SAME": " 1"} {
		p.say("env %s", name)
		p.want("env" + value)
	}
	p.say("restore")
	p.want("restore 00ff clone-1 host-1 5000000000 a b c")
	p.wait()
}

func testStatus(t *testing.T, l library) {
	s, p := l.run(t)
	s.reply(say(`{"ok":true,"v":1,"container":"c","start":"warm"}`))
	s.showControl()
	p.say("status")
	p.want("status warm")

	// During a dump control.sock is gone, or the connection is closed.
	s.hideControl()
	p.say("status")
	time.Sleep(100 * time.Millisecond)
	p.quiet()
	s.reply(func(map[string]any) any { return nil }, say(`{"ok":true,"v":1,"start":"cold"}`))
	s.showControl()
	p.want("status cold")

	s.reply(say(`{"ok":false,"error":"not today"}`))
	p.say("status")
	p.want("status error: not today")
	p.wait()
}

// checkpoint blocks until the checkpoint has happened: here until the image is there, and in a clone
// until this program's hooks were called.
func testCheckpoint(t *testing.T, l library) {
	s, p := l.run(t)
	s.showControl()
	ask := func() {
		t.Helper()
		s.mu.Lock()
		s.requests = nil
		s.mu.Unlock()
		s.reply(byOp(map[string]string{
			"checkpoint": `{"ok":true,"id":"c1"}`,
			"outcome":    `{"ok":true,"outcome":"pending"}`,
		}))
		p.say("checkpoint")
		s.waitRequest("checkpoint", 1)
		p.quiet()
		s.mustTell(before)
		p.want(order("before-checkpoint", "three", "two", "one")...)
		s.hideControl()
		p.quiet()
	}
	for range 2 {
		// The original runs on before the image is there.
		for outcome, want := range map[string]string{
			`{"ok":true,"outcome":"checkpointed"}`:               "checkpoint checkpointed",
			`{"ok":true,"outcome":"failed","error":"disk full"}`: "checkpoint error: disk full",
		} {
			ask()
			s.showControl()
			s.mustTell(resumed)
			p.want(order("after-resume", "one", "two", "three")...)
			p.quiet()
			s.reply(byOp(map[string]string{"outcome": outcome}))
			p.want(want)
		}

		ask()
		s.showControl()
		s.mustTell(restore)
		p.want(order("after-restore", "one", "two", "three")...)
		p.want("checkpoint restored")

		ask()
		s.showControl()
		s.mustTell(failed)
		p.want(order("after-resume", "one", "two", "three")...)
		p.want("checkpoint error: pool busy")
	}

	// It failed before anyone was told, or it is over and nobody said so.
	for outcome, want := range map[string]string{
		`{"ok":true,"outcome":"failed","error":"no image"}`: "checkpoint error: no image",
		`{"ok":true,"outcome":"checkpointed"}`:              "checkpoint checkpointed",
	} {
		s.reply(byOp(map[string]string{"checkpoint": `{"ok":true,"id":"c2"}`, "outcome": outcome}))
		p.say("checkpoint")
		p.want(want)
	}

	// The outcome is known, and this process's hooks have not all been called.
	s.reply(byOp(map[string]string{"checkpoint": `{"ok":true,"id":"c1"}`, "outcome": `{"ok":true,"outcome":"checkpointed"}`}))
	s.mu.Lock()
	s.requests = nil
	s.mu.Unlock()
	p.say("checkpoint")
	s.waitRequest("checkpoint", 1)
	s.mustTell(before)
	p.want(order("before-checkpoint", "three", "two", "one")...)
	s.waitRequest("outcome", 2)
	p.quiet()
	s.mustTell(resumed)
	p.want(order("after-resume", "one", "two", "three")...)
	p.want("checkpoint checkpointed")

	// While one is under way, a second is refused without asking.
	s.mustTell(before)
	p.want(order("before-checkpoint", "three", "two", "one")...)
	s.reply()
	p.say("checkpoint")
	if got := p.line(); !strings.HasPrefix(got, "checkpoint error: ") || !strings.Contains(got, "under way") {
		t.Errorf("a recursive checkpoint: %q", got)
	}
	s.mustTell(failed)
	p.want(order("after-resume", "one", "two", "three")...)

	// The runtime refuses.
	s.reply(say(`{"ok":false,"error":"checkpoint.allow is none"}`))
	p.say("checkpoint")
	p.want("checkpoint error: checkpoint.allow is none")

	// A restore whose hooks fail in this process.
	p.say("fail after-restore two")
	p.want("failing")
	ask()
	s.showControl()
	if a := s.tell(restore); a.OK {
		t.Error("a failing after-restore is answered with ok")
	}
	p.want(order("after-restore", "one", "two", "three")...)
	if got := p.line(); !strings.HasPrefix(got, "checkpoint error: ") || !strings.Contains(got, "two says no") {
		t.Errorf("a restore that failed: %q", got)
	}
	p.wait()
}

// The socket has the name that was asked for, takes the place of one that is left over, is not
// taken from another process, and goes with its own.
func testSocket(t *testing.T, l library) {
	s := newShim(t)
	for _, name := range []string{"app.sock", l.name + "-999999999.sock"} { // no such process
		left, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(s.dir, name)})
		if err != nil {
			t.Fatal(err)
		}
		left.SetUnlinkOnClose(false)
		_ = left.Close()
	}
	env := append(l.env(t), "CRAC_NAME=app")
	p := s.start(env, l.command(t)...)
	p.want("ready")
	if got := s.waitParticipants(1)[0]; got != "app.sock" {
		t.Errorf("the participant's name is %s", got)
	}
	second := s.start(env, l.command(t)...)
	second.want("ready")
	if got := s.waitParticipants(2); !slices.Contains(got, fmt.Sprintf("app-%d.sock", second.cmd.Process.Pid)) {
		t.Errorf("two participants of one name: %v", got)
	}
	second.wait()
	p.wait()
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(entries) > 0 {
		t.Errorf("left behind: %v", entries)
	}

	for _, bad := range []string{"../app", ".app", "control"} {
		p := s.start(append(l.env(t), "CRAC_NAME="+bad), l.command(t)...)
		p.want("ready")
		p.wait()
		if !strings.Contains(p.stderr.String(), "CRAC_NAME") {
			t.Errorf("nothing is said about CRAC_NAME=%s", bad)
		}
	}
}

// Without a runtime of ours the program runs, and is told so when it asks.
func testElsewhere(t *testing.T, l library) {
	s := newShim(t)
	p := s.start(append(l.env(t), "CRAC_DIR="+filepath.Join(s.dir, "none")), l.command(t)...)
	p.want("ready")
	for _, ask := range []string{"status", "checkpoint"} {
		p.say("%s", ask)
		if got := p.line(); !strings.HasPrefix(got, ask+" error: ") || !strings.Contains(got, "io.containerd.crac.v2") {
			t.Errorf("%s elsewhere: %q", ask, got)
		}
	}
	p.wait()
	if text := p.stderr.String(); text != "" {
		t.Errorf("elsewhere it writes %q to stderr", text)
	}
}

// The messages above are what they say they are.
func TestMessages(t *testing.T) {
	for _, m := range []string{before, resumed, failed, check, restore} {
		if !json.Valid([]byte(m)) {
			t.Errorf("not JSON: %s", m)
		}
	}
}
