package integration

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/cio"
	ocispec "github.com/containerd/containerd/v2/pkg/oci"
	imagespec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crac-shim/crac/integration/harness"
)

// told is one notification that a participant says it was given.
type told struct {
	name, event string
	message     map[string]any
}

// participant starts the workload that is told of its checkpoints.
func participant(t *harness.T, flags []string, args ...string) *box {
	t.Helper()
	needImage(t, "participant")
	return start(t, how{image: harness.ImageRef("participant"), flags: flags, args: append([]string{"participant"}, args...)})
}

// told lists what the workload was told, in order.
func (b *box) told() (all []told) {
	b.Helper()
	return parseTold(b.TB, b.log())
}

func parseTold(tb testing.TB, text string) (all []told) {
	tb.Helper()
	for line := range strings.Lines(text) {
		words, ok := strings.CutPrefix(line, "told ")
		if !ok {
			continue
		}
		f := strings.SplitN(strings.TrimSpace(words), " ", 3)
		if len(f) != 3 {
			tb.Fatalf("the workload says %q", line)
		}
		m := told{name: f[0], event: f[1]}
		if err := json.Unmarshal([]byte(f[2]), &m.message); err != nil {
			tb.Fatalf("the workload was told %q: %v", f[2], err)
		}
		all = append(all, m)
	}
	return all
}

func ofEvent(all []told, event string) (names []string) {
	for _, m := range all {
		if m.event == event {
			names = append(names, m.name)
		}
	}
	return names
}

func (m told) text(key string) string { s, _ := m.message[key].(string); return s }

// waitTold waits until n participants were told an event, and returns all that was told. What the
// workload writes arrives a moment after it was written.
func (b *box) waitTold(event string, n int) (all []told) {
	b.Helper()
	return b.waitHeard(b.told, event, n)
}

func (b *box) waitHeard(heard func() []told, event string, n int) (all []told) {
	b.Helper()
	b.Eventually(fmt.Sprintf("%d are told %s", n, event), func() bool {
		all = heard()
		return len(ofEvent(all, event)) >= n
	})
	return all
}

// hookCase is one cell of the matrix: how a workload is told, and how it answers.
type hookCase struct {
	via, mode    string
	participants int
	args         []string // of the participant, beyond via and mode
	flags        []string // of ctr run
	ok           bool     // the answer is good
	wantErr      string   // a part of the error, else
	dies         bool     // who answers badly is not there any more
	ends         bool     // and with it the container
}

// ways are the four ways to be told, with how each is asked for.
func ways(event, mode string, required bool) map[string][]string {
	hooks := "optional"
	if required {
		hooks = "required"
	}
	ways := map[string][]string{"socket": {option("hooks", hooks)}}
	for via, value := range map[string]string{
		"http":   "http://127.0.0.1:9000/hook",
		"signal": "signal:SIGUSR2",
		"exec":   "participant hook -event " + event + " -mode " + mode,
	} {
		ways[via] = []string{option("hooks", hooks)}
		for _, e := range []string{"before-checkpoint", "after-resume", "after-restore"} {
			ways[via] = append(ways[via], option("hook."+e, value))
		}
	}
	return ways
}

// hookCases is the matrix of one event. Ten participants are sockets: of adapters there is one
// for each event. A command is a process of its own in any case, and a signal goes to the init.
func hookCases(event string, required bool) (cases []hookCase) {
	for _, mode := range []string{"ack", "veto", "timeout", "crash", "silent", "garbage", "ten", "ten-veto", "ten-timeout", "ten-crash", "child"} {
		answer, ten := strings.CutPrefix(mode, "ten")
		if answer = strings.TrimPrefix(answer, "-"); answer == "" || answer == "child" {
			answer = "ack"
		}
		for via, flags := range ways(event, answer, required) {
			c := hookCase{via: via, mode: mode, participants: 1, flags: flags, ok: answer == "ack"}
			c.args = []string{"-via", via, "-event", event, "-mode", answer}
			c.dies = answer == "crash" && via != "exec"
			c.ends = c.dies && via == "signal"
			switch {
			case ten && via != "socket", mode == "child" && (via == "exec" || via == "signal"):
				continue
			case mode == "ten-crash": // of one, and not of all
				c.args = append(c.args, "-n", "10", "-apart")
			case ten:
				c.args = append(c.args, "-n", "10")
			case mode == "child", c.dies && !c.ends:
				c.args = append(c.args, "-child")
			case via == "exec":
				c.args = []string{"-via", "none"}
			}
			if ten {
				c.participants = 10
			}
			switch {
			case answer == "timeout", answer == "silent" && via == "signal":
				c.flags = append(c.flags, option("hook.timeout", "2s"))
				c.wantErr = "within 2s"
			case answer == "veto":
				c.wantErr = "pool busy"
			case c.ends:
				c.wantErr = "has ended"
			}
			cases = append(cases, c)
		}
	}
	slices.SortFunc(cases, func(a, b hookCase) int { return strings.Compare(a.via+a.mode, b.via+b.mode) })
	return cases
}

// heard lists what a case's workload was told, whichever way.
func (c hookCase) heard(b *box) []told {
	b.Helper()
	if c.via == "exec" {
		return parseTold(b.TB, b.exec("cat", "/told"))
	}
	return b.told()
}

// waitHeard waits until n were told an event, whichever way.
func (c hookCase) waitHeard(b *box, event string, n int) []told {
	b.Helper()
	return b.waitHeard(func() []told { return c.heard(b) }, event, n)
}

// bySocket is one participant that agrees.
var bySocket = hookCase{via: "socket", participants: 1}

// ready waits until the participants listen.
func (c hookCase) ready(b *box) {
	b.Helper()
	b.waitTicks(2)
	for i := range c.participants {
		if c.via != "socket" {
			break
		}
		b.Eventually("a participant listens", func() bool {
			_, err := os.Stat(filepath.Join(b.hooksDir(), fmt.Sprintf("p%02d.sock", i)))
			return err == nil
		})
	}
	if c.via == "http" {
		b.Eventually("the participant's server listens", func() bool {
			_, err := b.tryExec("wget", "-q", "-O", "-", "--post-data", "", "http://127.0.0.1:9000/")
			return err == nil
		})
	}
}

// hooksDir is the container's /run/crac as the host sees it.
func (b *box) hooksDir() string {
	return filepath.Join(b.Dir, "state/io.containerd.runtime.v2.task", b.Namespace, b.id, "crac")
}

// A checkpoint happens if everybody agrees. Whatever else they do, the workload runs on, and
// everybody is told.
func TestHooksBeforeCheckpoint(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	for _, c := range hookCases("before-checkpoint", false) {
		tb.Run(c.via+"-"+c.mode, func(tb *testing.T) {
			tb.Parallel()
			t := setup(tb)
			image := ref(t)
			b := participant(t, append(c.flags, option("checkpoint.image", image)), c.args...)
			c.ready(b)
			if c.ok {
				c.succeeds(b, image)
				return
			}
			failed := watch(t, "/crac/hook-failed")
			for _, flags := range [][]string{nil, {"--exit"}} {
				if c.dies && flags != nil { // it takes another one
					b.remove()
					b = participant(t, append(c.flags, option("checkpoint.image", image)), c.args...)
					c.ready(b)
				}
				_, err := t.Ctr(t.Ctx, append(append([]string{"tasks", "checkpoint"}, flags...), b.id)...)
				if err == nil {
					t.Fatalf("a checkpoint was made (%v)", flags)
				}
				for _, part := range []string{"before-checkpoint", c.wantErr} {
					if !strings.Contains(err.Error(), part) {
						t.Errorf("the error does not say %q: %v", part, err)
					}
				}
				if f := failed.of(b.id); f["event"] != "before-checkpoint" || !strings.Contains(fmt.Sprint(f["reason"]), c.wantErr) {
					t.Errorf("the event says: %v", f)
				}
				if c.ends {
					b.Eventually("the end", func() bool { return b.status() == containerd.Stopped })
					continue
				}
				b.wantStatus(containerd.Running)
				b.waitTicks(3)
				c.wantFailed(b, flags != nil)
			}
			mustHaveImage(t, image, false)
			b.remove()
		})
	}
}

// wantFailed checks that everybody who is left was told that there is no checkpoint, also those
// that agreed.
func (c hookCase) wantFailed(b *box, again bool) {
	b.Helper()
	left, times := c.participants, 1
	if c.dies {
		left-- // and the container is another one
	} else if again {
		times = 2
	}
	if left == 0 {
		return // nobody
	}
	var failed []string
	for _, m := range c.waitHeard(b, "after-resume", left*times) {
		if m.event == "after-resume" {
			failed = append(failed, m.name)
			if m.text("outcome") != "failed" || m.text("error") == "" {
				b.Errorf("%s was told %v", m.name, m.message)
			}
		}
	}
	if len(failed) != left*times {
		b.Errorf("told that a checkpoint failed: %v, want %d participants %d times", failed, left, times)
	}
	for part := range slices.Chunk(failed, left) {
		if !slices.IsSorted(part) || len(slices.Compact(part)) != left {
			b.Errorf("told that a checkpoint failed: %v, want each of %d once and in ascending order", part, left)
		}
	}
}

// succeeds makes a checkpoint and leaves the workload running, then one that ends it, and starts
// a clone: each time everybody is told.
func (c hookCase) succeeds(b *box, image string) {
	b.Helper()
	participants := c.participants
	b.checkpoint()
	b.wantStatus(containerd.Running)
	b.waitTicks(3)
	heard := c.waitHeard(b, "after-resume", participants)
	before, after := ofEvent(heard, "before-checkpoint"), ofEvent(heard, "after-resume")
	if len(before) != participants || len(after) != participants {
		b.Fatalf("told before: %v, after: %v, want %d of each", before, after, participants)
	}
	if !slices.IsSortedFunc(before, func(a, b string) int { return strings.Compare(b, a) }) || !slices.IsSorted(after) {
		b.Errorf("told before: %v, after: %v, want descending and ascending order", before, after)
	}
	ids := map[string]bool{}
	for _, m := range heard {
		ids[m.text("id")] = true
		if m.event == "after-resume" && m.text("outcome") != "checkpointed" {
			b.Errorf("the outcome is %q, want checkpointed", m.text("outcome"))
		}
	}
	if len(ids) != 1 || ids[""] {
		b.Errorf("one checkpoint has the ids %v", ids)
	}

	// Not by ctr: it gives an image of its own the time in seconds as its name.
	b.CracctlOK("checkpoint", "--exit", b.id, image)
	b.wantStatus(containerd.Stopped)
	b.remove()

	clone := start(b.T, how{
		image: image,
		flags: append(slices.Clone(c.flags), option("restore", "require"), "--hostname", "clone", "--env", "DB=prod2", "--annotation", "example.org/colour=green"),
		args:  append([]string{"participant"}, c.args...),
	})
	heard = c.waitHeard(clone, "after-restore", participants)
	if restored := ofEvent(heard, "after-restore"); len(restored) != participants {
		b.Fatalf("the clone was told %v", heard)
	}
	m := heard[len(heard)-1]
	env, _ := m.message["env"].(map[string]any)
	annotations, _ := m.message["annotations"].(map[string]any)
	if m.text("container") != clone.id || m.text("hostname") != "clone" || len(m.text("generation")) < 16 ||
		env["DB"] != "prod2" || annotations["example.org/colour"] != "green" || m.message["args"] == nil {
		b.Errorf("the clone was told %v", m.message)
	}
	if ns, _ := m.message["frozen_ns"].(float64); ns <= 0 || time.Duration(ns) > 5*time.Minute {
		b.Errorf("frozen for %v", time.Duration(ns))
	}
	clone.waitTicks(3)
	clone.remove()
}

// After a restore a participant that fails is a warning, or with hooks=required the end.
func TestHooksAfterRestore(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	for _, required := range []bool{false, true} {
		for _, c := range hookCases("after-restore", required) {
			if c.ok {
				continue // TestHooksBeforeCheckpoint has these
			}
			name := c.via + "-" + c.mode
			if required {
				name += "-required"
			}
			tb.Run(name, func(tb *testing.T) {
				tb.Parallel()
				t := setup(tb)
				image := ref(t)
				b := participant(t, append(c.flags, option("checkpoint.image", image)), c.args...)
				c.ready(b)
				b.checkpoint("--exit")
				b.remove()
				failed := watch(t, "/crac/hook-failed")
				clone, err := tryStart(t, how{
					image: image, flags: append(slices.Clone(c.flags), option("restore", "require")),
					args: append([]string{"participant"}, c.args...),
				})
				if f := failed.of(clone.id); f["event"] != "after-restore" || !strings.Contains(fmt.Sprint(f["reason"]), c.wantErr) {
					t.Errorf("the event says: %v", f)
				}
				if required {
					if err == nil {
						t.Fatal("the clone was started")
					}
					for _, part := range []string{"after-restore", c.wantErr} {
						if !strings.Contains(err.Error(), part) {
							t.Errorf("the error does not say %q: %v", part, err)
						}
					}
					clone.Eventually("the clone is ended", func() bool { return clone.status() == containerd.Stopped })
					if _, err := os.Stat(fmt.Sprintf("/proc/%d", clone.task().Pid())); err == nil {
						t.Error("the clone's process is there")
					}
					clone.remove()
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				if got := ofEvent(c.waitHeard(clone, "after-restore", c.participants), "after-restore"); len(got) != c.participants {
					t.Errorf("the clone was told: %v", got)
				}
				if c.ends {
					clone.Eventually("the end", func() bool { return clone.status() == containerd.Stopped })
				} else {
					clone.waitTicks(3)
				}
				clone.remove()
			})
		}
	}
}

// Nobody listening is fine, unless somebody has to.
func TestHooksRequired(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	t := setup(tb)
	image := ref(t)
	for _, mode := range []string{"optional", "required", "off"} {
		b := participant(t, []string{option("hooks", mode), option("checkpoint.image", image)}, "-via", "none")
		b.waitTicks(2)
		if seen := strings.Contains(b.exec("sh", "-c", "ls -d /run/crac; echo dir=$CRAC_DIR; true"), "dir=/run/crac"); seen != (mode != "off") {
			t.Errorf("hooks=%s: the container sees its directory: %v", mode, seen)
		}
		_, err := t.Ctr(t.Ctx, "tasks", "checkpoint", b.id)
		if mode == "required" {
			if err == nil || !strings.Contains(err.Error(), "hooks=required") {
				t.Errorf("a checkpoint without a participant that is required: %v", err)
			}
		} else if err != nil {
			t.Errorf("hooks=%s: %v", mode, err)
		}
		b.wantStatus(containerd.Running)
		b.waitTicks(2)
		b.remove()
	}
}

// A dump that was made with hooks restores with hooks=off, and is told: it waits for that. One
// without them restores where they are on.
func TestHooksOnAndOff(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	t := setup(tb)
	for _, c := range [][2]string{{"optional", "off"}, {"off", "optional"}, {"off", "off"}} {
		image := ref(t)
		b := participant(t, []string{option("hooks", c[0]), option("checkpoint.image", image)}, "-via", map[string]string{"optional": "socket", "off": "none"}[c[0]])
		b.waitTicks(2)
		b.checkpoint("--exit")
		b.remove()
		clone := start(t, how{image: image, flags: []string{option("hooks", c[1]), option("restore", "require")}})
		clone.waitTicks(3)
		want := 0
		if c[0] == "optional" {
			want = 1
		}
		if got := ofEvent(clone.waitTold("after-restore", want), "after-restore"); len(got) != want {
			t.Errorf("%v: the clone was told %v", c, got)
		}
		if c == [2]string{"off", "optional"} {
			if out := clone.exec("participant", "ask", "status"); !strings.Contains(out, `"start":"warm"`) {
				t.Errorf("control.sock says %s", out)
			}
		}
		clone.remove()
	}
}

// A task that a client has paused is told nevertheless, and goes out paused. What it does for its
// checkpoint is in the image, in memory as in files.
func TestHooksOfPausedTask(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	t := setup(tb)
	image := ref(t)
	args := []string{"-state", "/state"}
	b := participant(t, []string{option("checkpoint.image", image)}, args...)
	bySocket.ready(b)
	task := b.task()
	if err := task.Pause(t.Ctx); err != nil {
		t.Fatal(err)
	}
	t.CracctlOK("checkpoint", b.id, image)
	b.wantStatus(containerd.Paused)
	told := b.waitTold("before-checkpoint", 1)
	if len(told) != 1 {
		t.Errorf("told before: %v", told)
	}
	if got := ofEvent(b.told(), "after-resume"); len(got) != 0 {
		t.Errorf("told of a resume that was not: %v", b.told())
	}
	if err := task.Resume(t.Ctx); err != nil {
		t.Fatal(err)
	}
	if got := ofEvent(b.waitTold("after-resume", 1), "after-resume"); len(got) != 1 {
		t.Errorf("after the resume: %v", b.told())
	}
	b.waitTicks(2)
	b.remove()

	clone := start(t, how{image: image, flags: []string{option("restore", "require")}, args: append([]string{"participant"}, args...)})
	clone.says("state " + told[0].text("id") + " " + told[0].text("id"))
	clone.remove()
}

// Nobody is told two things at once: cracctl check waits for a checkpoint, and that for it.
func TestHooksTakeTurns(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	t := setup(tb)
	image := ref(t)
	b := participant(t, nil)
	bySocket.ready(b)
	checked := make(chan error, 1)
	stop := make(chan struct{})
	go func() {
		for {
			_, err := t.Cracctl(t.Ctx, "check", b.id)
			if err != nil && !strings.Contains(err.Error(), "a checkpoint of this container is being made") {
				checked <- err
				return
			}
			select {
			case <-stop:
				checked <- nil
				return
			default:
			}
		}
	}()
	b.waitTold("check", 1)
	rounds := times(10)
	for range rounds { // not by ctr: it names its images by the second
		t.CracctlOK("checkpoint", b.id, image)
	}
	close(stop)
	if err := <-checked; err != nil {
		t.Error(err)
	}
	told := b.waitTold("after-resume", rounds)
	for i, m := range told {
		if m.event == "before-checkpoint" && (i+1 == len(told) || told[i+1].event != "after-resume") {
			t.Errorf("between before-checkpoint and after-resume: %v", told[i:min(i+2, len(told))])
		}
	}
	b.remove()
}

// A participant is anybody in the container.
func TestHooksOfAnotherUser(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	t := setup(tb)
	image := ref(t)
	b := participant(t, []string{option("checkpoint.image", image)}, "-child", "-uid", "1000", "-mode", "veto")
	bySocket.ready(b)
	if out := b.exec("stat", "-c", "%u", "/run/crac/p00.sock"); out != "1000" {
		t.Errorf("the participant's user is %s", out)
	}
	if _, err := t.Ctr(t.Ctx, "tasks", "checkpoint", b.id); err == nil || !strings.Contains(err.Error(), "participant p00.sock: pool busy") {
		t.Errorf("the checkpoint gives %v", err)
	}
	if told := b.waitTold("after-resume", 1); told[len(told)-1].text("outcome") != "failed" {
		t.Errorf("told: %v", told)
	}
	b.wantStatus(containerd.Running)
	mustHaveImage(t, image, false)
	b.remove()
}

// What a container puts into /run/crac cannot hold up its checkpoint, nor lead out of it.
func TestHooksOfHostileContainer(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	t := setup(tb)
	image := ref(t)
	b := participant(t, []string{option("checkpoint.image", image), option("hook.timeout", "1s")})
	bySocket.ready(b)
	b.exec("sh", "-c", `cd /run/crac && mkfifo a.sock && ln -s /proc/1/root/etc/passwd b.sock && mkdir c.sock && ln -s / d && rm control.sock && ln -s p00.sock control.sock && echo x >z`)
	b.checkpoint()
	if got := ofEvent(b.waitTold("after-resume", 1), "after-resume"); !slices.Equal(got, []string{"p00.sock"}) {
		t.Errorf("told: %v", b.told())
	}
	if out := b.exec("participant", "ask", "status"); !strings.Contains(out, b.id) {
		t.Errorf("control.sock is not back: %s", out)
	}
	b.remove()
}

// The workload asks for its own checkpoint, and finds out in the original and in the clone what
// has become of it.
func TestOwnCheckpoint(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	t := setup(tb)
	needImage(t, "participant")
	image := ref(t)
	args := []string{"sh", "-c", "participant self; sleep 1000"}
	allowed := []string{option("checkpoint.image", image), option("checkpoint.allow", "workload")}

	b := start(t, how{image: harness.ImageRef("participant"), flags: allowed[:1], args: args})
	b.Eventually("the refusal", func() bool { return strings.Contains(b.log(), "checkpoint.allow=workload") })
	b.remove()

	b = start(t, how{image: harness.ImageRef("participant"), flags: allowed, args: args})
	b.Eventually("the outcome", func() bool { return strings.Contains(b.log(), "outcome checkpointed") })
	mustHaveImage(t, image, true)
	var status struct {
		Start, Container, Generation string
		Checkpoint                   struct {
			Allowed bool
			Last    struct{ Outcome string }
		}
	}
	ask := func(b *box) {
		t.Helper()
		out := b.exec("participant", "ask", "status")
		if err := json.Unmarshal([]byte(out), &status); err != nil {
			t.Fatalf("%s: %v", out, err)
		}
	}
	ask(b)
	if status.Start != "cold" || status.Container != b.id || !status.Checkpoint.Allowed || status.Checkpoint.Last.Outcome != "checkpointed" {
		t.Errorf("the original is %+v", status)
	}
	original := status.Generation
	b.remove()

	for range 2 {
		clone := start(t, how{image: image, flags: append(allowed, option("restore", "require")), args: args})
		clone.Eventually("the outcome", func() bool { return strings.Contains(clone.log(), "outcome restored") })
		ask(clone)
		if status.Start != "warm" || status.Container != clone.id || status.Generation == original || status.Generation == "" {
			t.Errorf("the clone is %+v, the original was %s", status, original)
		}
		if out := clone.exec("participant", "ask", "status"); !strings.Contains(out, image) {
			t.Errorf("the clone does not know the image %s: %s", image, out)
		}
		original = status.Generation
		clone.remove()
	}

	// Cold, though there is a checkpoint: why?
	cold := start(t, how{image: image, flags: append(allowed, option("restore", "never")), args: []string{"sleep", "1000"}})
	if out := cold.exec("participant", "ask", "status"); !strings.Contains(out, `"restore-never"`) || !strings.Contains(out, `"start":"cold"`) {
		t.Errorf("the cold start says %s", out)
	}
	cold.remove()
}

// One ctr run: start, warm up, checkpoint, publish.
func TestCheckpointWhenReady(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	for name, probe := range map[string]string{
		"http": "http://127.0.0.1:8080/count",
		"exec": "wget -q -O /dev/null http://127.0.0.1:8080/count",
	} {
		tb.Run(name, func(tb *testing.T) {
			tb.Parallel()
			t := setup(tb)
			needImage(t, "goserver")
			host, err := registryHost()
			if err != nil {
				t.Fatal(err)
			}
			image := host + "/ready/" + name + ":warm"
			ready := []string{option("checkpoint.when", "ready"), option("checkpoint.probe", probe), option("checkpoint.warmup", "5"), option("checkpoint.image", image), option("checkpoint.push", "true")}
			made := watch(t, "/crac/checkpoint-image")
			b := start(t, how{image: harness.ImageRef("goserver"), flags: ready})
			if f := made.of(b.id); f["pushed"] != true {
				t.Errorf("the event says: %v", f)
			}
			b.wantStatus(containerd.Running)
			b.remove()
			t.CtrOK("images", "rm", "--sync", image)
			t.CtrOK("images", "pull", "--plain-http", image)
			// The clone is ready, and not checkpointed again.
			clone := start(t, how{image: image, flags: append(ready, option("restore", "require"))})
			if out := clone.exec("wget", "-q", "-O", "-", "http://127.0.0.1:8080/count"); number(clone, out, "count") != 7 {
				t.Errorf("after a probe and 5 warm-up requests the clone says %s", out)
			}
			clone.remove()
		})
	}
	tb.Run("paused meanwhile", func(tb *testing.T) {
		tb.Parallel()
		t := setup(tb)
		image := ref(t)
		made := watch(t, "/crac/checkpoint-image")
		b := start(t, how{
			flags: []string{
				option("checkpoint.when", "ready"), option("checkpoint.image", image), option("hook.timeout", "10m"),
				option("checkpoint.probe", `["sh", "-c", "[ -e /go ] || { touch /asked; exec sleep 1000; }"]`),
			},
			args: []string{"sh", "-c", "while :; do sleep 0.1; done"},
		})
		asks := func() bool { return slices.Contains(b.commands(), "sleep 1000") }
		t.Eventually("a question that nobody answers", asks)
		t.CtrOK("tasks", "pause", b.id)
		if asks() {
			t.Errorf("what asks stands still with the workload: %q", b.commands())
		}
		if err := os.WriteFile(fmt.Sprintf("/proc/%d/root/go", b.task().Pid()), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		t.CtrOK("tasks", "resume", b.id)
		if f := made.of(b.id); f["image"] != image {
			t.Errorf("the event says: %v", f)
		}
		b.remove()
	})
	tb.Run("never", func(tb *testing.T) {
		tb.Parallel()
		t := setup(tb)
		image := ref(t)
		failed := watch(t, "/crac/checkpoint-failed")
		b := start(t, how{
			flags: []string{option("checkpoint.when", "ready"), option("checkpoint.probe", "false"), option("checkpoint.image", image)},
			args:  []string{"sleep", "1"},
		})
		if f := failed.of(b.id); !strings.Contains(fmt.Sprint(f["reason"]), "the workload ended before its checkpoint") {
			t.Errorf("the event says: %v", f)
		}
		b.Eventually("the end", func() bool { return b.status() == containerd.Stopped })
		mustHaveImage(t, image, false)
		b.remove()
		for key, value := range map[string]string{"checkpoint.probe": "http://elsewhere.example/", "hook.before-checkpoint": "signal:SIGNONSENSE"} {
			c, err := tryStart(t, how{flags: []string{option("checkpoint.when", "ready"), option("checkpoint.image", image), option("checkpoint.probe", "true"), option(key, value)}, args: []string{"sleep", "1"}})
			if err == nil || !strings.Contains(err.Error(), key) {
				t.Errorf("%s=%s: %v", key, value, err)
			}
			c.remove()
		}
	})
}

// The directory of hooks works in a container of a user namespace, whose root is nobody outside,
// and so does the message of a signal, which is for that root alone.
func TestHooksInUserNamespace(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	for _, via := range []string{"socket", "signal"} {
		tb.Run(via, func(tb *testing.T) { // not at the same time: both make ctr remap the image
			t := setup(tb)
			image := ref(t)
			args := []string{"-via", via}
			mapped := append(ways("", "", true)[via], "--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536", option("checkpoint.image", image))
			b := participant(t, mapped, args...)
			hookCase{via: via, participants: 1}.ready(b)
			b.checkpoint("--exit")
			if got := ofEvent(b.waitTold("before-checkpoint", 1), "before-checkpoint"); len(got) != 1 {
				t.Errorf("told: %v", b.told())
			}
			b.remove()
			clone := start(t, how{image: image, flags: append(mapped, option("restore", "require")), args: append([]string{"participant"}, args...)})
			if got := ofEvent(clone.waitTold("after-restore", 1), "after-restore"); len(got) != 1 {
				t.Errorf("the clone was told: %v", clone.told())
			}
			clone.waitTicks(2)
			clone.remove()
		})
	}
}

// An image may bring its own way of being told.
func TestHooksOfImage(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	t := setup(tb)
	needImage(t, "participant")
	image := ref(t)
	configured(t, "participant", image, func(c *imagespec.ImageConfig) {
		c.Env = append(c.Env, "CRAC_HOOK_BEFORE_CHECKPOINT=participant hook -mode veto")
	})
	b := start(t, how{image: image, flags: []string{option("checkpoint.image", ref(t))}, args: []string{"participant", "-via", "none"}})
	b.waitTicks(2)
	if _, err := t.Ctr(t.Ctx, "tasks", "checkpoint", b.id); err == nil || !strings.Contains(err.Error(), "pool busy") {
		t.Errorf("the checkpoint gives %v", err)
	}
	b.waitTicks(2)
	b.remove()
}

// Arguments of a start that insists on the restore reach the workload.
func TestHooksArguments(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	t := setup(tb)
	image := ref(t)
	b := participant(t, []string{option("checkpoint.image", image)})
	bySocket.ready(b)
	b.checkpoint("--exit")
	b.remove()
	clone := start(t, how{image: image, flags: []string{option("restore", "require")}, args: []string{"participant", "--other", "arguments"}})
	heard := clone.waitTold("after-restore", 1)
	if len(heard) != 1 || fmt.Sprint(heard[0].message["args"]) != "[participant --other arguments]" {
		t.Errorf("the clone was told %v", heard)
	}
	clone.remove()
}

// One that does not take them is no reason to run with the old ones as if nothing were the matter.
func TestHooksArgumentsNotTaken(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	t := setup(tb)
	image := ref(t)
	b := participant(t, []string{option("checkpoint.image", image)}, "-event", "after-restore", "-mode", "veto")
	bySocket.ready(b)
	b.checkpoint("--exit")
	b.remove()
	clone, err := tryStart(t, how{image: image, flags: []string{option("restore", "require")}, args: []string{"participant", "--other"}})
	if err == nil || !strings.Contains(err.Error(), "nothing that listens in /run/crac has taken it") {
		t.Errorf("a start with other arguments gives %v", err)
	}
	clone.remove()
}

// A root file system that nobody can write, and that has no place for the directory of hooks,
// starts without it.
func TestHooksWithoutPlace(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	t := setup(tb)
	needImage(t, "busybox")
	id := newID(t)
	img, err := t.Client.GetImage(t.Ctx, harness.ImageRef("busybox"))
	if err != nil {
		t.Fatal(err)
	}
	c, err := t.Client.NewContainer(t.Ctx, id,
		containerd.WithRuntime(cracRuntime, nil), containerd.WithImage(img), containerd.WithNewSnapshotView(id, img),
		containerd.WithNewSpec(ocispec.WithImageConfig(img), ocispec.WithProcessArgs("sleep", "1000"), withoutMount("/run")))
	if err != nil {
		t.Fatal(err)
	}
	b := newBox(t, id)
	task, err := c.NewTask(t.Ctx, cio.NullIO)
	if err != nil {
		t.Fatal(err)
	}
	if err := task.Start(t.Ctx); err != nil {
		t.Fatal(err)
	}
	if out := b.exec("sh", "-c", "ls /run; echo dir=$CRAC_DIR"); out != "dir=" {
		t.Errorf("the container says %q", out)
	}
	b.remove()
}

func withoutMount(destination string) ocispec.SpecOpts {
	return func(_ context.Context, _ ocispec.Client, _ *containers.Container, s *ocispec.Spec) error {
		s.Mounts = slices.DeleteFunc(s.Mounts, func(m specs.Mount) bool { return m.Destination == destination })
		return nil
	}
}
