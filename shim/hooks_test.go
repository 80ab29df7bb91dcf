package shim

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
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
	c.hooks = &hooks{s: s, c: c, generation: "g", notifier: hook.Notifier{Dir: tb.TempDir(), Timeout: time.Second}}
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
	for i := range maxAttempts {
		h.begin(fmt.Sprint(i))(nil)
	}
	if got := ask("b"); got != "" || len(h.attempts) != maxAttempts {
		t.Errorf("of one long ago: %q, %d attempts", got, len(h.attempts))
	}
	// In a clone the original's checkpoint is what it was restored from.
	whole := h.restoring(&oci.Manifest{Name: "app:warm"})
	if got := ask("b"); got != "pending" {
		t.Errorf("in a clone of which not all runs yet: %q", got)
	}
	whole()
	if got := ask("b"); got != "restored" {
		t.Errorf("in a clone: %q", got)
	}
	if st := h.Status(t.Context()); st.Start != "warm" || st.Image != "app:warm" || st.Generation != "g" {
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
	told, err := h.afterRestore(t.Context(), nil)
	if err = errors.Join(h.before(t.Context(), "x"), err); err != nil || told > 0 || h.anybody() {
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
