package sdk

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/crac-shim/crac/integration/examples"
)

// participants are the examples of docs/hooks.md that listen: how each is started in a directory
// that holds it.
var participants = map[string]func(t *testing.T, dir string) (args, env []string){
	"participant.sh": func(t *testing.T, dir string) (args, env []string) {
		need(t, "socat")
		return []string{"sh", filepath.Join(dir, "participant.sh")}, nil
	},
	"bare.py": func(t *testing.T, dir string) (args, env []string) {
		return []string{need(t, "python3"), filepath.Join(dir, "bare.py")}, nil
	},
	"program.py": func(t *testing.T, dir string) (args, env []string) {
		return []string{need(t, "python3"), filepath.Join(dir, "program.py")}, pythonEnv(t)
	},
	"program.js": func(t *testing.T, dir string) (args, env []string) {
		return []string{need(t, "node"), filepath.Join(dir, "program.js")}, nodeEnv(t)
	},
	"program.go": func(t *testing.T, dir string) (args, env []string) {
		need(t, "go")
		goMod := "module example\n\ngo 1.22\n\nrequire github.com/crac-shim/crac/sdk/go v0.0.0\n\nreplace github.com/crac-shim/crac/sdk/go => " + here(t, "go") + "\n"
		if err := os.WriteFile(filepath.Join(dir, "go.mod"), []byte(goMod), 0o600); err != nil {
			t.Fatal(err)
		}
		compile(t, dir, "go", "build", "-o", "program", "program.go")
		return []string{filepath.Join(dir, "program")}, nil
	},
	"Program.java": func(t *testing.T, dir string) (args, env []string) {
		need(t, "javac")
		jar := filepath.Join(dir, "crac.jar")
		compile(t, dir, here(t, "java/build.sh"), jar, "test")
		api, err := filepath.Glob(here(t, "java/test/orgcrac/org/crac/*.java"))
		if err != nil {
			t.Fatal(err)
		}
		compile(t, dir, "javac", append([]string{"--release", "17", "-cp", jar, "-d", dir, "Program.java"}, api...)...)
		return []string{need(t, "java"), "-Xbootclasspath/a:" + jar, "-Dorg.crac.Core.Compat=io.github.cracshim", "-Xmx128m", "-cp", dir, "Program"}, nil
	},
}

func compile(t *testing.T, dir, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
}

// example writes an example of docs/hooks.md into a directory of its own.
func example(t *testing.T, name string) (dir string) {
	t.Helper()
	all, err := examples.In("../docs/hooks.md")
	if err != nil {
		t.Fatal(err)
	}
	text, ok := all[name]
	if !ok {
		t.Fatalf("docs/hooks.md has no example %s: there are %v", name, slices.Sorted(maps.Keys(all)))
	}
	dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o700); err != nil { //nolint:gosec // a script
		t.Fatal(err)
	}
	return dir
}

// No example may go untested.
func TestAllExamplesAreTested(t *testing.T) {
	all, err := examples.In("../docs/hooks.md")
	if err != nil {
		t.Fatal(err)
	}
	for name := range participants {
		delete(all, name)
	}
	delete(all, "checkpoint.sh")
	delete(all, "signal.sh")
	if len(all) > 0 {
		t.Errorf("examples of docs/hooks.md that no test runs: %v", slices.Sorted(maps.Keys(all)))
	}
}

// Every participant of the document agrees, objects while there is a file "busy", and is not to be
// put off by what it does not know.
func TestExamples(t *testing.T) {
	for name, how := range participants {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := example(t, name)
			args, env := how(t, dir)
			s := newShim(t)
			p := s.startIn(dir, env, args...)
			who := s.waitParticipants(1)[0]

			busy := filepath.Join(dir, "busy")
			for range 2 {
				s.mustTell(check)
				s.mustTell(`{"v":1,"event":"before-breakfast","id":"u1","deadline_ms":10000,"more":[1,{}]}`)
				for _, text := range []string{"", `{"v":1,"event":"before-check`} {
					c := s.dial(who)
					if _, err := c.Write([]byte(text)); err != nil {
						t.Fatal(err)
					}
					_ = c.Close()
				}
				if err := os.WriteFile(busy, nil, 0o600); err != nil {
					t.Fatal(err)
				}
				if a := s.tell(before); a.OK || !strings.Contains(a.Error, "busy") {
					t.Errorf("a busy program answers %+v", a)
				}
				s.mustTell(failed)
				if err := os.Remove(busy); err != nil {
					t.Fatal(err)
				}
				s.mustTell(before)
				s.mustTell(resumed)
				s.mustTell(before)
				s.mustTell(restore)
			}
			for _, event := range []string{"before-checkpoint", "after-restore"} {
				eventually(t, "a word of "+event, func() bool { return strings.Contains(p.stderr.String(), event) })
			}
		})
	}
}

// A shell that asks for a checkpoint waits for its outcome, across a dump.
func TestExampleCheckpoint(t *testing.T) {
	t.Parallel()
	need(t, "socat")
	for name, c := range map[string]struct{ first, last, want string }{
		"checkpointed": {`{"ok":true,"id":"c1"}`, `{"ok":true,"outcome":"checkpointed"}`, `{"ok":true,"outcome":"checkpointed"}`},
		"restored":     {`{"ok":true,"id":"c1"}`, `{"ok":true,"outcome":"restored"}`, `{"ok":true,"outcome":"restored"}`},
		"refused":      {`{"ok":false,"error":"no"}`, ``, `{"ok":false,"error":"no"}`},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := example(t, "checkpoint.sh")
			s := newShim(t)
			s.reply(byOp(map[string]string{"checkpoint": c.first, "outcome": `{"ok":true,"outcome":"pending"}`}))
			s.showControl()
			p := s.startIn(dir, nil, "sh", filepath.Join(dir, "checkpoint.sh"))
			if c.last != "" {
				s.waitRequest("outcome", 2)
				s.hideControl()
				p.quiet()
				s.reply(func(map[string]any) any { return nil }, byOp(map[string]string{"outcome": c.last}))
				s.showControl()
			}
			p.want(c.want)
			s.mu.Lock()
			defer s.mu.Unlock()
			if last := s.requests[len(s.requests)-1]; c.last != "" && last["id"] != "c1" {
				t.Errorf("it asks about %v", last["id"])
			}
		})
	}
}

// A shell that is told by a signal.
func TestExampleSignal(t *testing.T) {
	t.Parallel()
	dir := example(t, "signal.sh")
	s := newShim(t)
	p := s.startIn(dir, nil, "sh", filepath.Join(dir, "signal.sh"))
	status := fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid)
	eventually(t, "the trap", func() bool {
		text, err := os.ReadFile(status)
		if err != nil {
			t.Fatal(err)
		}
		_, caught, _ := strings.Cut(string(text), "\nSigCgt:\t")
		mask, err := strconv.ParseUint(strings.TrimSpace(caught[:strings.IndexByte(caught, '\n')]), 16, 64)
		if err != nil {
			t.Fatal(err)
		}
		return mask&(1<<(syscall.SIGUSR2-1)) != 0
	})
	tell := func(event, line string) string {
		t.Helper()
		message, ack := filepath.Join(s.dir, event+".json"), filepath.Join(s.dir, event+".ack")
		if err := os.WriteFile(message, []byte(line+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := p.cmd.Process.Signal(syscall.SIGUSR2); err != nil {
			t.Fatal(err)
		}
		var text []byte
		eventually(t, event, func() (done bool) {
			var err error
			text, err = os.ReadFile(ack)
			return err == nil
		})
		for _, name := range []string{message, ack} {
			if err := os.Remove(name); err != nil {
				t.Fatal(err)
			}
		}
		return strings.TrimSpace(string(text))
	}
	if got := tell("before-checkpoint", before); got != "" {
		t.Errorf("it answers %q", got)
	}
	if err := os.WriteFile(filepath.Join(dir, "busy"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if got := tell("before-checkpoint", before); got != "busy" {
		t.Errorf("when it is busy it answers %q", got)
	}
	if got := tell("after-restore", restore); got != "" {
		t.Errorf("it answers %q", got)
	}
}
