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

// hookCase is one cell of the matrix: how a workload is told, and how it answers.
type hookCase struct {
	via, mode string
	args      []string // of the participant, beyond via and mode
	flags     []string // of ctr run
	ok        bool     // the answer is good
	wantErr   string   // a part of the error, else
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

// hookCases is the matrix of one event.
func hookCases(event string, required bool) (cases []hookCase) {
	for _, mode := range []string{"ack", "veto", "timeout", "crash", "silent", "garbage", "ten", "child"} {
		answer := mode
		if mode == "ten" || mode == "child" {
			answer = "ack"
		}
		for via, flags := range ways(event, answer, required) {
			c := hookCase{via: via, mode: mode, flags: append(flags, option("hook.timeout", "700ms")), ok: answer == "ack"}
			c.args = []string{"-via", via, "-event", event, "-mode", answer}
			switch {
			case mode == "ten" && via != "socket", // one adapter for each event
				mode == "child" && (via == "exec" || via == "signal"), // a process of its own in any case; init is signalled
				mode == "crash" && via == "signal":                    // would be the container's end
				continue
			case mode == "ten":
				c.args = append(c.args, "-n", "10")
			case mode == "child", mode == "crash" && via != "exec":
				c.args = append(c.args, "-child")
			}
			if via == "exec" {
				c.args = []string{"-via", "none"}
			}
			switch mode {
			case "veto":
				c.wantErr = "pool busy"
			case "timeout":
				c.wantErr = "700ms"
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

// ready waits until the participants listen.
func (c hookCase) ready(b *box) {
	b.Helper()
	b.waitTicks(2)
	want := map[string]string{"socket": "p00.sock", "http": "", "signal": "", "exec": ""}[c.via]
	if c.mode == "ten" {
		want = "p09.sock"
	}
	if want != "" {
		b.Eventually("a participant listens", func() bool {
			_, err := os.Stat(filepath.Join(b.hooksDir(), want))
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
			for _, flags := range [][]string{nil, {"--exit"}} {
				_, err := t.Ctr(t.Ctx, append(append([]string{"tasks", "checkpoint"}, flags...), b.id)...)
				if err == nil {
					t.Fatalf("a checkpoint was made (%v)", flags)
				}
				for _, part := range []string{"before-checkpoint", c.wantErr} {
					if !strings.Contains(err.Error(), part) {
						t.Errorf("the error does not say %q: %v", part, err)
					}
				}
				b.wantStatus(containerd.Running)
				b.waitTicks(3)
				if c.mode == "crash" && c.via != "exec" {
					break // nobody is left to ask
				}
			}
			mustHaveImage(t, image, false)
			if c.mode == "crash" && c.via != "exec" {
				b.remove()
				return
			}
			var failed int
			for _, m := range c.heard(b) {
				if m.event == "after-resume" && m.text("outcome") == "failed" && m.text("error") != "" {
					failed++
				}
			}
			if failed != 2 {
				t.Errorf("the workload was told %d times that a checkpoint failed, want 2: %v", failed, c.heard(b))
			}
			b.remove()
		})
	}
}

// succeeds makes a checkpoint and leaves the workload running, then one that ends it, and starts
// a clone: each time everybody is told.
func (c hookCase) succeeds(b *box, image string) {
	b.Helper()
	participants := 1
	if c.mode == "ten" {
		participants = 10
	}
	b.checkpoint()
	b.wantStatus(containerd.Running)
	b.waitTicks(3)
	heard := c.heard(b)
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
	// The start is reported after the answer: no waiting here.
	heard = c.heard(clone)
	restored := ofEvent(heard, "after-restore")
	if c.via != "exec" && len(restored) != participants || c.via == "exec" && len(restored) != 1 {
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
				clone, err := tryStart(t, how{
					image: image, flags: append(slices.Clone(c.flags), option("restore", "require")),
					args: append([]string{"participant"}, c.args...),
				})
				if !required {
					if err != nil {
						t.Fatal(err)
					}
					clone.waitTicks(3)
					clone.remove()
					return
				}
				if err == nil {
					t.Fatal("the clone was started")
				}
				for _, part := range []string{"after-restore", c.wantErr} {
					if !strings.Contains(err.Error(), part) {
						t.Errorf("the error does not say %q: %v", part, err)
					}
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

// A dump that was made with hooks restores with hooks=off, and one without them where they are on.
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
		if told := clone.told(); len(told) > 0 {
			t.Errorf("%v: the clone was told %v", c, told)
		}
		if c == [2]string{"off", "optional"} {
			if out := clone.exec("participant", "ask", "status"); !strings.Contains(out, `"start":"warm"`) {
				t.Errorf("control.sock says %s", out)
			}
		}
		clone.remove()
	}
}

// A task that a client has paused is told nevertheless, and goes out paused.
func TestHooksOfPausedTask(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	t := setup(tb)
	image := ref(t)
	b := participant(t, []string{option("checkpoint.image", image)})
	hookCase{via: "socket"}.ready(b)
	task := b.task()
	if err := task.Pause(t.Ctx); err != nil {
		t.Fatal(err)
	}
	t.CracctlOK("checkpoint", b.id, image)
	b.wantStatus(containerd.Paused)
	if got := ofEvent(b.told(), "before-checkpoint"); len(got) != 1 {
		t.Errorf("told before: %v", b.told())
	}
	if got := ofEvent(b.told(), "after-resume"); len(got) != 0 {
		t.Errorf("told of a resume that was not: %v", b.told())
	}
	if err := task.Resume(t.Ctx); err != nil {
		t.Fatal(err)
	}
	if got := ofEvent(b.told(), "after-resume"); len(got) != 1 {
		t.Errorf("after the resume: %v", b.told())
	}
	b.waitTicks(2)
	b.remove()
}

// What a container puts into /run/crac cannot hold up its checkpoint, nor lead out of it.
func TestHooksOfHostileContainer(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	t := setup(tb)
	image := ref(t)
	b := participant(t, []string{option("checkpoint.image", image), option("hook.timeout", "1s")})
	hookCase{via: "socket"}.ready(b)
	b.exec("sh", "-c", `cd /run/crac && mkfifo a.sock && ln -s /proc/1/root/etc/passwd b.sock && mkdir c.sock && ln -s / d && rm control.sock && ln -s p00.sock control.sock && echo x >z`)
	b.checkpoint()
	if got := ofEvent(b.told(), "after-resume"); !slices.Equal(got, []string{"p00.sock"}) {
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
	tb.Run("never", func(tb *testing.T) {
		tb.Parallel()
		t := setup(tb)
		image := ref(t)
		b := start(t, how{
			flags: []string{option("checkpoint.when", "ready"), option("checkpoint.probe", "false"), option("checkpoint.image", image)},
			args:  []string{"sleep", "1"},
		})
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

// The directory of hooks works in a container of a user namespace, whose root is nobody outside.
func TestHooksInUserNamespace(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	t := setup(tb)
	image := ref(t)
	mapped := []string{"--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536", option("checkpoint.image", image)}
	b := participant(t, mapped)
	hookCase{via: "socket"}.ready(b)
	b.checkpoint("--exit")
	if got := ofEvent(b.told(), "before-checkpoint"); len(got) != 1 {
		t.Errorf("told: %v", b.told())
	}
	b.remove()
	clone := start(t, how{image: image, flags: append(mapped, option("restore", "require")), args: []string{"participant"}})
	if got := ofEvent(clone.told(), "after-restore"); len(got) != 1 {
		t.Errorf("the clone was told: %v", clone.told())
	}
	clone.waitTicks(2)
	clone.remove()
}

// An image may bring its own way of being told.
func TestHooksOfImage(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	t := setup(tb)
	b := participant(t, []string{"--env", "CRAC_HOOK_BEFORE_CHECKPOINT=participant hook -mode veto", option("checkpoint.image", ref(t))}, "-via", "none")
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
	hookCase{via: "socket"}.ready(b)
	b.checkpoint("--exit")
	b.remove()
	clone := start(t, how{image: image, flags: []string{option("restore", "require")}, args: []string{"participant", "--other", "arguments"}})
	heard := clone.told()
	if len(heard) != 1 || fmt.Sprint(heard[0].message["args"]) != "[participant --other arguments]" {
		t.Errorf("the clone was told %v", heard)
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
