package shim

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/runtime/hook"
)

func newTestHooks(tb testing.TB) *hooks {
	tb.Helper()
	s, _, _ := newTestService(tb)
	c := newTestContainer(tb, "c")
	c.hooks = &hooks{s: s, c: c, generation: hook.NewID(), notifier: hook.Notifier{Dir: tb.TempDir(), Timeout: time.Second}}
	return c.hooks
}

func TestCheckpointOutcomes(t *testing.T) {
	h := newTestHooks(t)
	ask := func(id string) string {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
		defer cancel()
		outcome, reason := h.Outcome(ctx, id)
		return strings.TrimSpace(outcome + " " + reason)
	}
	if got := ask("a"); got != "" {
		t.Errorf("of an unknown checkpoint: %q", got)
	}
	h.begin("a") // as the answer to a request does
	if got := ask("a"); got != "pending" {
		t.Errorf("of one that is being made: %q", got)
	}
	end := h.begin("a") // as the checkpoint itself does
	if st := h.Status(t.Context()); st.Checkpoint.Last == nil || st.Checkpoint.Last.ID != "a" || st.Checkpoint.Last.Outcome != hook.OutcomePending {
		t.Errorf("the status has %+v", st.Checkpoint.Last)
	}
	waited := make(chan string)
	go func() {
		outcome, _ := h.Outcome(context.Background(), "a")
		waited <- outcome
	}()
	end(nil)
	if got := <-waited; got != hook.OutcomeCheckpointed {
		t.Errorf("who has waited hears %q", got)
	}
	h.begin("b")(errors.New("disk full"))
	if got := ask("b"); got != "failed disk full" {
		t.Errorf("of one that failed: %q", got)
	}
	if got := ask("a"); got != "checkpointed" {
		t.Errorf("of an earlier one: %q", got)
	}
	// The list is bounded, and forgets the oldest.
	own := h.newID()
	h.begin(own)(errors.New("disk full"))
	for i := range maxAttempts {
		h.begin(fmt.Sprint(i))(nil)
	}
	if got := ask("b"); got != "" || len(h.attempts) != maxAttempts {
		t.Errorf("of one long ago: %q, %d attempts", got, len(h.attempts))
	}
	// In a clone the original's checkpoint is what it was restored from.
	whole := h.restoring(&oci.Manifest{Name: "app:warm"})
	originals := hook.NewID()
	if got := ask(originals); got != "pending" {
		t.Errorf("in a clone of which not all runs yet: %q", got)
	}
	whole()
	if got := ask(originals); got != "restored" {
		t.Errorf("in a clone: %q", got)
	}
	for what, id := range map[string]string{"one of its own, long ago": own, "nonsense": "b", "nearly one": strings.ToUpper(originals)} {
		if got := ask(id); got != "" {
			t.Errorf("in a clone, of %s: %q", what, got)
		}
	}
	if st := h.Status(t.Context()); st.Start != "warm" || st.Image != "app:warm" || st.Generation != h.generation {
		t.Errorf("a clone is %+v", st)
	}
	// Unless the restore fails after all.
	h.startedCold(&coldReason{code: "criu", err: errors.New("it gave up")})
	if st := h.Status(t.Context()); st.Start != "cold" || st.Image != "" || st.Code != "criu" || st.Reason != "it gave up" {
		t.Errorf("a cold start is %+v", st)
	}
}

func TestWorkloadMayAsk(t *testing.T) {
	for name, tt := range map[string]struct {
		options oci.Options
		says    string
	}{
		"not allowed": {oci.Options{CheckpointImage: "x"}, "checkpoint.allow=workload"},
		"into what?":  {oci.Options{CheckpointAllow: oci.CheckpointAllowWorkload}, "checkpoint.image"},
		"allowed":     {oci.Options{CheckpointAllow: oci.CheckpointAllowWorkload, CheckpointImage: "x"}, ""},
	} {
		h := newTestHooks(t)
		h.c.options = tt.options
		err := h.refusal()
		if (err == nil) != (tt.says == "") || err != nil && !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v", name, err)
		}
		if allowed := h.Status(t.Context()).Checkpoint.Allowed; allowed != (tt.says == "") {
			t.Errorf("%s: the status says %v", name, allowed)
		}
		if tt.says == "" {
			// One at a time, and a client's comes before the workload's.
			h.c.checkpointing.Lock()
			if _, err := h.Checkpoint(t.Context()); !errors.Is(err, errBusy) {
				t.Errorf("%s: while another is made: %v", name, err)
			}
		}
	}
}

func TestHooksNeedSomebody(t *testing.T) {
	h := newTestHooks(t)
	if err := h.before(t.Context(), "x"); err != nil {
		t.Errorf("optional: %v", err)
	}
	h.required = true
	if err := h.before(t.Context(), "x"); err == nil || !strings.Contains(err.Error(), "hooks=required") {
		t.Errorf("required: %v", err)
	}
	if h.anybody() {
		t.Error("somebody is there")
	}
}

// participant listens in the container's directory of hooks, notes what it hears, and answers.
func (h *hooks) participant(t *testing.T, answer string) (heard func() []string) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(h.notifier.Dir, "p.sock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	var mu sync.Mutex
	var lines []string
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			line, err := bufio.NewReader(c).ReadString('\n')
			if err == nil {
				mu.Lock()
				lines = append(lines, line)
				mu.Unlock()
				_, _ = io.WriteString(c, answer+"\n")
			}
			c.Close()
		}
	}()
	return func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(lines)
	}
}

// A clone is told though whoever started it has gone: it runs, with its original's random numbers.
func TestCloneIsToldInAnyCase(t *testing.T) {
	for _, tt := range []struct {
		answer string
		agreed int
	}{
		{`{"ok":true}`, 1},
		// It may have taken the new arguments or not: that is no reason to believe that it has.
		{`{"ok":false,"error":"no"}`, 0},
	} {
		h := newTestHooks(t)
		heard := h.participant(t, tt.answer)
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		m := h.restoredMessage(&oci.Manifest{}, &specs.Spec{Process: &specs.Process{Args: []string{"app", "-q"}, Env: []string{"DB=prod2"}}})
		agreed, err := h.tellRestored(gone, m)
		if err != nil || agreed != tt.agreed {
			t.Errorf("%s: %d have taken it, %v", tt.answer, agreed, err)
		}
		if got := heard(); len(got) != 1 || !strings.Contains(got[0], `"env":{"DB":"prod2"},"args":["app","-q"]`) {
			t.Errorf("%s: the clone hears %q", tt.answer, got)
		}
	}
}

// What waits for the client's resume says what has become of the checkpoint until then.
func TestHeldResume(t *testing.T) {
	for name, tt := range map[string]struct {
		failed string // the checkpoint that fails after its dump
		want   string
	}{
		"made":          {"", `"outcome":"checkpointed"`},
		"no image":      {"a", `"outcome":"failed","error":"disk full"`},
		"a later fails": {"b", `"outcome":"checkpointed"`},
	} {
		h := newTestHooks(t)
		heard := h.participant(t, `{"ok":true}`)
		h.onResume(resumedMessage("a", nil))
		if tt.failed != "" {
			h.begin(tt.failed)(errors.New("disk full"))
		}
		h.clientResumed(t.Context())
		if got := heard(); len(got) != 1 || !strings.Contains(got[0], tt.want) {
			t.Errorf("%s: the workload hears %q", name, got)
		}
	}
}

// cracctl check and a checkpoint do not tell a container two things at once.
func TestTurns(t *testing.T) {
	h := newTestHooks(t)
	end, err := hook.Turn(t.Context(), h.c.bundle)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := h.turn(ctx); !errors.Is(err, errdefs.ErrUnavailable) || !strings.Contains(err.Error(), "cracctl check") {
		t.Errorf("while cracctl check asks: %v", err)
	}
	end()
	// A checkpoint's turn has those of its notifications in it.
	var ends []func()
	for range 2 {
		end, err := h.turn(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		ends = append(ends, end)
	}
	taken := func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		end, err := hook.Turn(ctx, h.c.bundle)
		if err == nil {
			end()
		}
		return err != nil
	}
	ends[0]()
	if !taken() {
		t.Error("it is over before the checkpoint is")
	}
	ends[1]()
	if taken() {
		t.Error("it is never over")
	}
}

// A container without hooks is told nothing, everywhere.
func TestNoHooks(t *testing.T) {
	var h *hooks
	h.begin("x")(nil)
	h.startedCold(nil)
	h.restoring(nil)()
	h.onResume(resumedMessage("x", nil))
	h.clientResumed(t.Context())
	h.afterResume(t.Context(), resumedMessage("x", errors.New("no")))
	h.suspend()()
	end, err := h.turn(t.Context())
	end()
	agreed, restoreErr := h.afterRestore(t.Context(), nil)
	if err = errors.Join(h.before(t.Context(), "x"), restoreErr, err); err != nil || agreed > 0 || h.anybody() {
		t.Errorf("%v, somebody is there: %v", err, h.anybody())
	}
}

func TestHookOptions(t *testing.T) {
	adapters, err := parseAdapters(oci.Options{HookBeforeCheckpoint: `["a","b"]`, HookAfterResume: "signal:USR1"})
	if err != nil || len(adapters) != 2 || adapters[hook.AfterRestore] != nil {
		t.Errorf("%v, %v", adapters, err)
	}
	if _, err := parseAdapters(oci.Options{HookAfterRestore: "http://elsewhere.example/"}); err == nil || !strings.Contains(err.Error(), "io.containerd.crac.hook.after-restore") {
		t.Errorf("a bad hook: %v", err)
	}
	c := newTestContainer(t, "c")
	c.options = oci.Options{CheckpointWhen: oci.CheckpointWhenReady, CheckpointProbe: "signal:USR1"}
	if _, err := c.readyProbe(); err == nil || !strings.Contains(err.Error(), "checkpoint.probe") {
		t.Errorf("a bad probe: %v", err)
	}
}

func TestHooksEnvironment(t *testing.T) {
	given := []string{"A=1", "CRAC_DIR=/elsewhere", "CRAC_DIRECTORY=x"}
	if got := withHooksEnv(given); !slices.Equal(got, []string{"A=1", "CRAC_DIRECTORY=x", "CRAC_DIR=/run/crac"}) || given[1] != "CRAC_DIR=/elsewhere" {
		t.Errorf("got %q of %q", got, given)
	}
}

// Where there can be no directory of hooks, there is none, and the container is started.
func TestNoDirectoryOfHooks(t *testing.T) {
	s, _, _ := newTestService(t)
	for name, change := range map[string]func(*container, *specs.Spec){
		"off": func(c *container, _ *specs.Spec) { c.options.Hooks = oci.HooksOff },
		"sandbox": func(_ *container, s *specs.Spec) {
			s.Annotations = map[string]string{"io.kubernetes.cri.container-type": "sandbox"}
		},
		"own mount":   func(_ *container, s *specs.Spec) { s.Mounts = []specs.Mount{{Destination: "/run/crac/"}} },
		"own, rooted": func(_ *container, s *specs.Spec) { s.Mounts = []specs.Mount{{Destination: "run/crac"}} },
	} {
		c := newTestContainer(t, "c")
		spec := &specs.Spec{Process: &specs.Process{}, Linux: &specs.Linux{}}
		change(c, spec)
		mounts := len(spec.Mounts)
		if err := s.addHooks(c, spec, false); err != nil || c.hooks != nil || len(spec.Mounts) != mounts || len(spec.Process.Env) > 0 {
			t.Errorf("%s: %v, hooks %v, %d mounts, environment %q", name, err, c.hooks, len(spec.Mounts), spec.Process.Env)
		}
		if err := c.removeHooks(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// hooks=off is about cold starts: a dump that was told of its checkpoint waits to hear more.
func TestHooksOffOfADumpThatWasTold(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root may mount the directory of hooks")
	}
	s, _, _ := newTestService(t)
	c := newTestContainer(t, "c")
	c.options.Hooks = oci.HooksOff
	spec := &specs.Spec{Process: &specs.Process{}, Linux: &specs.Linux{}}
	if err := s.addHooks(c, spec, true); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.removeHooks(); err != nil {
			t.Error(err)
		}
	}()
	if c.hooks == nil || c.hooks.required || len(spec.Mounts) != 1 {
		t.Errorf("hooks %+v, mounts %+v", c.hooks, spec.Mounts)
	}
}

// Arguments that the dump was not started with are nothing to pass over in silence.
func TestUntoldArguments(t *testing.T) {
	m := &oci.Manifest{Container: oci.Container{Args: []string{"app", "-v"}}, Base: oci.Base{Args: []string{"app"}}}
	for _, args := range [][]string{{"app", "-v"}, {"app"}} {
		if err := untold(m, &specs.Spec{Process: &specs.Process{Args: args}}); err != nil {
			t.Errorf("%q: %v", args, err)
		}
	}
	other := &specs.Spec{Process: &specs.Process{Args: []string{"app", "-q"}}}
	if err := untold(m, other); !errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), `"-q"`) {
		t.Errorf("other arguments: %v", err)
	}
	// A dump of another runtime does not say what it runs.
	if err := untold(nil, other); err != nil {
		t.Errorf("without a manifest: %v", err)
	}
}
