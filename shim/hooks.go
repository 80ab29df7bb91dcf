package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/runtime"
	"github.com/crac-shim/crac/runtime/hook"
)

const (
	// hooksEnv tells a workload where oci.HooksDir is.
	hooksEnv = "CRAC_DIR"
	// hooksDir is the same place, in the bundle.
	hooksDir = "crac"
)

// HookFailedTopic is the topic of the event that tells of participants that
// failed at a notification. The facts are container_id, event and reason.
const HookFailedTopic = "/crac/hook-failed"

// hooksMount shows a container its own directory of hooks.
func hooksMount(bundle string) specs.Mount {
	return specs.Mount{
		Destination: oci.HooksDir,
		Type:        "bind",
		Source:      filepath.Join(bundle, hooksDir),
		Options:     []string{"bind", "rw", "nosuid", "nodev", "noexec"},
	}
}

// hooks is a container's part in its own checkpoints: who is told of what, and
// what control.sock answers. All methods may be called on nil, which is a
// container that is told nothing.
type hooks struct {
	s        *service
	c        *container
	hostname string
	required bool
	notifier hook.Notifier
	control  *hook.Control

	// telling orders notifications: what comes after a resume is told before
	// what comes before the next checkpoint.
	telling sync.Mutex
	turns   turns

	mu         sync.Mutex
	generation string
	warm       bool
	whole      chan struct{} // unless it starts cold; closed when the restore is over
	image      string
	cold       *coldReason
	attempts   []*attempt    // the last few checkpoints, the newest last
	resumed    *hook.Message // to be told when the client resumes the workload
}

// attempt is one checkpoint, as control.sock tells of it.
type attempt struct {
	id   string
	done chan struct{} // closed when err is set
	err  error
}

// maxAttempts is how many checkpoints a workload can still ask about.
const maxAttempts = 16

// turns is the container's turn to be told something (hook.Turn), as long as anything
// in this shim has it.
type turns struct {
	mu  sync.Mutex
	n   int
	end func()
}

// turnWait is how long cracctl check is waited for: it asks participants, which may
// take long.
const turnWait = 10 * time.Second

// parseAdapters reads the options that name what is told without being a
// participant.
func parseAdapters(o oci.Options) (map[hook.Event]hook.Adapter, error) {
	adapters := make(map[hook.Event]hook.Adapter)
	for event, value := range map[hook.Event]string{
		hook.BeforeCheckpoint: o.HookBeforeCheckpoint,
		hook.AfterRestore:     o.HookAfterRestore,
		hook.AfterResume:      o.HookAfterResume,
	} {
		if value == "" {
			continue
		}
		a, err := hook.ParseAdapter(value)
		if err != nil {
			return nil, fmt.Errorf("option %shook.%s: %w: %w", oci.AnnotationPrefix, event, err, errdefs.ErrInvalidArgument)
		}
		adapters[event] = a
	}
	return adapters, nil
}

// addHooks makes the container's directory of hooks and listens in it. The
// mount goes into the spec. dumped says that the dump to restore has the mount,
// so that the clone must; and that it was told of its checkpoint, so that it waits
// to hear what became of it, whatever the option hooks says.
func (s *service) addHooks(c *container, spec *specs.Spec, dumped bool) error {
	off := c.options.Hooks == oci.HooksOff || sandbox(spec)
	if off && !dumped {
		return nil
	}
	if slices.ContainsFunc(spec.Mounts, func(m specs.Mount) bool { return filepath.Clean("/"+m.Destination) == oci.HooksDir }) {
		log.G(s.ctx).WithField("id", c.id).Warnf("no hooks: the request has a mount of its own at %s", oci.HooksDir)
		return nil
	}
	if !dumped && !placeForHooks(c.rootfs, spec) {
		log.G(s.ctx).WithField("id", c.id).Warnf("no hooks: the root file system is read-only and has no directory %s", oci.HooksDir)
		return nil
	}
	adapters, err := parseAdapters(c.options)
	if err != nil {
		return err
	}
	dir := filepath.Join(c.bundle, hooksDir)
	if err := hook.MakeDir(dir, spec.Linux.MountLabel); err != nil {
		return fmt.Errorf("directory of hooks (the option %shooks=off does without): %w", oci.AnnotationPrefix, err)
	}
	spec.Mounts = append(spec.Mounts, hooksMount(c.bundle))
	if off {
		log.G(s.ctx).WithField("id", c.id).Infof("the option %shooks=off is for cold starts: the dump was told of its checkpoint, and is told that it was restored", oci.AnnotationPrefix)
	}
	if spec.Process != nil {
		spec.Process.Env = withHooksEnv(spec.Process.Env)
	}
	hostname, err := runtime.Hostname(spec)
	if err != nil {
		return err
	}
	h := &hooks{
		s: s, c: c,
		hostname:   hostname,
		required:   c.options.Hooks == oci.HooksRequired,
		generation: hook.NewID(),
		notifier: hook.Notifier{
			Dir:       dir,
			Timeout:   c.options.HookTimeout,
			Adapters:  adapters,
			Container: hookTarget{c},
		},
	}
	if h.control, err = hook.ListenControl(dir, h); err != nil {
		return errors.Join(fmt.Errorf("control.sock: %w", err), hook.RemoveDir(dir))
	}
	c.hooks = h
	return nil
}

// placeForHooks tells whether there is, or can be made, a mount point. A read-only
// container is no obstacle, but a root file system that cannot be written at all is.
func placeForHooks(rootfs string, spec *specs.Spec) bool {
	if rootfs == "" && spec.Root != nil {
		rootfs = spec.Root.Path
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(rootfs, &fs); err != nil || fs.Flags&unix.ST_RDONLY == 0 {
		return true
	}
	above := path.Dir(oci.HooksDir)
	if slices.ContainsFunc(spec.Mounts, func(m specs.Mount) bool { return m.Type == "tmpfs" && path.Join("/", m.Destination) == above }) {
		return true
	}
	st, err := os.Lstat(filepath.Join(rootfs, oci.HooksDir))
	return err == nil && st.IsDir()
}

// withHooksEnv tells a process where the directory of hooks is.
func withHooksEnv(env []string) []string {
	env = slices.DeleteFunc(slices.Clone(env), func(e string) bool { return strings.HasPrefix(e, hooksEnv+"=") })
	return append(env, hooksEnv+"="+oci.HooksDir)
}

// sandbox tells whether the container is a pod's pause container, which has
// nothing to say and is never checkpointed.
func sandbox(spec *specs.Spec) bool {
	return spec.Annotations["io.kubernetes.cri.container-type"] == "sandbox"
}

// removeHooks ends what addHooks began.
func (c *container) removeHooks() error {
	var err error
	if c.hooks != nil {
		err = c.hooks.control.Close()
	}
	return errors.Join(err, hook.RemoveDir(filepath.Join(c.bundle, hooksDir)))
}

// startedCold notes that the workload was not restored, and why if there is a
// checkpoint.
func (h *hooks) startedCold(why *coldReason) {
	if h == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.warm, h.image, h.cold = false, "", why
}

// restoring notes that the workload is about to be restored: it may ask before
// it is told. restored must be called when the restore is over, whatever came of it.
func (h *hooks) restoring(m *oci.Manifest) (restored func()) {
	if h == nil {
		return func() {}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	whole := make(chan struct{})
	h.warm, h.whole = true, whole
	if m != nil {
		h.image = m.Name
	}
	return func() { close(whole) }
}

// anybody tells whether there is somebody to tell: a paused workload without
// need not be thawed.
func (h *hooks) anybody() bool {
	if h == nil {
		return false
	}
	names, err := hook.Participants(h.notifier.Dir)
	return err != nil || len(names) > 0 || len(h.notifier.Adapters) > 0
}

// turn waits until nobody else tells the container anything.
func (h *hooks) turn(ctx context.Context) (end func(), err error) {
	if h == nil {
		return func() {}, nil
	}
	h.turns.mu.Lock()
	defer h.turns.mu.Unlock()
	if h.turns.n == 0 {
		ctx, cancel := context.WithTimeout(ctx, turnWait)
		defer cancel()
		if h.turns.end, err = hook.Turn(ctx, h.c.bundle); err != nil {
			if errors.Is(err, context.DeadlineExceeded) {
				err = fmt.Errorf("somebody asks the participants by cracctl check; try again: %w", classified{err, errdefs.ErrUnavailable})
			}
			return nil, err
		}
	}
	h.turns.n++
	return func() {
		h.turns.mu.Lock()
		defer h.turns.mu.Unlock()
		if h.turns.n--; h.turns.n == 0 {
			h.turns.end()
		}
	}, nil
}

// notify tells everybody something that has happened: nobody can stop it any more,
// and whoever asked for it may have gone.
func (h *hooks) notify(ctx context.Context, m hook.Message) hook.Report {
	ctx = context.WithoutCancel(ctx)
	if end, err := h.turn(ctx); err != nil {
		log.G(h.s.ctx).WithError(err).WithField("id", h.c.id).Warn("two things are told at once")
	} else {
		defer end()
	}
	h.telling.Lock()
	defer h.telling.Unlock()
	return h.notifier.Notify(ctx, m)
}

// before tells of a checkpoint to come. An error is a veto.
func (h *hooks) before(ctx context.Context, id string) error {
	if h == nil {
		return nil
	}
	h.telling.Lock()
	defer h.telling.Unlock()
	report := h.notifier.Notify(ctx, hook.Message{V: 1, Event: hook.BeforeCheckpoint, ID: id})
	if err := report.Err(); err != nil {
		h.failed(hook.BeforeCheckpoint, err)
		return fmt.Errorf("before-checkpoint: %w", classified{err, errdefs.ErrFailedPrecondition})
	}
	return h.needed(report)
}

// needed is an error if somebody had to be told and nobody was.
func (h *hooks) needed(r hook.Report) error {
	if !h.required || r.Told() > 0 {
		return nil
	}
	return fmt.Errorf("the option %shooks=required asks for a participant, and none listens in %s: %w", oci.AnnotationPrefix, oci.HooksDir, errdefs.ErrFailedPrecondition)
}

// afterResume tells the workload, which runs, what became of the checkpoint.
func (h *hooks) afterResume(ctx context.Context, m *hook.Message) {
	if h == nil || m == nil {
		return
	}
	if err := h.notify(ctx, *m).Err(); err != nil {
		h.failed(hook.AfterResume, err)
	}
}

func resumedMessage(id string, err error) *hook.Message {
	m := &hook.Message{V: 1, Event: hook.AfterResume, ID: id, Outcome: hook.OutcomeCheckpointed}
	if err != nil {
		m.Outcome, m.Error = hook.OutcomeFailed, err.Error()
	}
	return m
}

// onResume keeps a message for the client's resume.
func (h *hooks) onResume(m *hook.Message) {
	if h == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.resumed = m
}

// clientResumed tells what waited for the client's resume.
func (h *hooks) clientResumed(ctx context.Context) {
	if h == nil {
		return
	}
	h.mu.Lock()
	m := h.resumed
	h.resumed = nil
	h.mu.Unlock()
	h.afterResume(ctx, m)
}

// afterRestore tells a clone what it is, and returns how many have taken it when
// everybody has answered.
func (h *hooks) afterRestore(ctx context.Context, m *oci.Manifest) (agreed int, err error) {
	if h == nil {
		return 0, nil
	}
	return h.tellRestored(ctx, h.restoredMessage(m, h.c.rt.Spec()))
}

// restoredMessage is what a clone is told that was restored from a dump for this
// request.
func (h *hooks) restoredMessage(m *oci.Manifest, request *specs.Spec) hook.Message {
	message := hook.Message{
		V: 1, Event: hook.AfterRestore, ID: hook.NewID(),
		Generation:  h.generation,
		Container:   h.c.id,
		Hostname:    h.hostname,
		Annotations: request.Annotations,
	}
	if m != nil {
		message.FrozenNS = max(0, time.Since(m.Created).Nanoseconds())
	}
	if p := request.Process; p != nil {
		message.Args = p.Args
		message.Env = make(map[string]string, len(p.Env))
		for _, e := range p.Env {
			k, v, _ := strings.Cut(e, "=")
			message.Env[k] = v
		}
	}
	return message
}

func (h *hooks) tellRestored(ctx context.Context, m hook.Message) (agreed int, err error) {
	report := h.notify(ctx, m)
	if err := report.Err(); err != nil {
		h.failed(hook.AfterRestore, err)
		if h.required {
			return report.Agreed(), fmt.Errorf("after-restore: %w", classified{err, errdefs.ErrFailedPrecondition})
		}
		return report.Agreed(), nil
	}
	return report.Agreed(), h.needed(report)
}

// untold is an error if the request has arguments that the workload was not started
// with, of which it would have to be told.
func untold(m *oci.Manifest, spec *specs.Spec) error {
	if m == nil || spec.Process == nil {
		return nil
	}
	other, differ := images.OtherArgs(m, spec.Process.Args)
	if !differ {
		return nil
	}
	return classified{fmt.Errorf("%s (restore=require would tell the workload instead, but nothing that listens in %s has taken it)", other.Text, oci.HooksDir), errdefs.ErrFailedPrecondition}
}

// failed makes a failure known that is no error to anybody's call, or to one
// who may not show it.
func (h *hooks) failed(event hook.Event, err error) {
	log.G(h.s.ctx).WithError(err).WithFields(log.Fields{"id": h.c.id, "event": string(event)}).Warn("a participant failed")
	h.s.events.sendFacts(HookFailedTopic, fmt.Sprintf("container %s: %s: %s", h.c.id, event, err),
		map[string]any{"container_id": h.c.id, "event": string(event), "reason": err.Error()})
}

// suspend takes control.sock away for a dump: CRIU cannot dump one half of a
// connection. The returned function brings it back.
func (h *hooks) suspend() (resume func()) {
	if h == nil {
		return func() {}
	}
	h.control.Suspend()
	return func() {
		if err := h.control.Resume(); err != nil {
			log.G(h.s.ctx).WithError(err).WithField("id", h.c.id).Warn("control.sock is gone")
		}
	}
}

// begin notes a checkpoint that is being made; end tells what became of it.
func (h *hooks) begin(id string) (end func(error)) {
	if h == nil {
		return func(error) {}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	at := slices.IndexFunc(h.attempts, func(a *attempt) bool { return a.id == id })
	if at < 0 {
		if at = len(h.attempts); at == maxAttempts {
			h.attempts, at = h.attempts[1:], at-1
		}
		h.attempts = append(h.attempts, &attempt{id: id, done: make(chan struct{})})
	}
	a := h.attempts[at]
	return func(err error) {
		a.err = err
		close(a.done)
		if err == nil {
			return
		}
		// What waits for the client's resume was true when the dump was made.
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.resumed != nil && h.resumed.ID == id {
			h.resumed = resumedMessage(id, err)
		}
	}
}

// ownDigits is how many digits of the generation begin the identifiers of a start's
// checkpoints.
const ownDigits = 16

// newID makes the identifier of a checkpoint. It shows which start has made it: a
// clone is asked about its own, and about those that it has in its memory.
func (h *hooks) newID() string {
	if h == nil {
		return hook.NewID()
	}
	return h.generation[:ownDigits] + hook.NewID()[ownDigits:]
}

// fromDump tells whether an identifier can be one that a clone has in its memory.
func (h *hooks) fromDump(id string) bool {
	return len(id) == len(h.generation) && strings.Trim(id, "0123456789abcdef") == "" && !strings.HasPrefix(id, h.generation[:ownDigits])
}

func (a *attempt) outcome() (outcome, reason string) {
	select {
	case <-a.done:
	default:
		return hook.OutcomePending, ""
	}
	if a.err != nil {
		return hook.OutcomeFailed, a.err.Error()
	}
	return hook.OutcomeCheckpointed, ""
}

// Status implements hook.Handler.
func (h *hooks) Status(context.Context) hook.Status {
	h.mu.Lock()
	defer h.mu.Unlock()
	st := hook.Status{
		Container:  h.c.id,
		Hostname:   h.hostname,
		Start:      "cold",
		Image:      h.image,
		Generation: h.generation,
	}
	if h.warm {
		st.Start = "warm"
	}
	if h.cold != nil {
		st.Reason, st.Code = h.cold.Error(), h.cold.code
	}
	st.Checkpoint.Allowed = h.refusal() == nil
	if n := len(h.attempts); n > 0 {
		last := &hook.LastCheckpoint{ID: h.attempts[n-1].id}
		last.Outcome, last.Error = h.attempts[n-1].outcome()
		st.Checkpoint.Last = last
	}
	return st
}

// refusal is why the workload may not ask for its own checkpoint.
func (h *hooks) refusal() error {
	if h.c.options.CheckpointAllow != oci.CheckpointAllowWorkload {
		return fmt.Errorf("the workload may not ask for its checkpoint: whoever starts the container allows it with the annotation %scheckpoint.allow=workload", oci.AnnotationPrefix)
	}
	if h.c.options.CheckpointImage == "" {
		return fmt.Errorf("there is no image to checkpoint into: whoever starts the container names it with the annotation %scheckpoint.image", oci.AnnotationPrefix)
	}
	return nil
}

// Checkpoint implements hook.Handler: the workload asks for its own checkpoint.
func (h *hooks) Checkpoint(context.Context) (string, error) {
	if err := h.refusal(); err != nil {
		return "", err
	}
	if !h.c.checkpointing.TryLock() {
		return "", errBusy
	}
	r := h.c.ownCheckpoint()
	h.begin(r.id) // the workload may ask about it as soon as it has the id
	go func() {
		defer h.c.checkpointing.Unlock()
		if err := h.s.makeCheckpoint(h.s.ctx, h.c, r); err != nil {
			h.s.notCheckpointed(h.c, err)
		}
	}()
	return r.id, nil
}

// Outcome implements hook.Handler.
func (h *hooks) Outcome(ctx context.Context, id string) (outcome hook.Outcome, reason string) {
	h.mu.Lock()
	at := slices.IndexFunc(h.attempts, func(a *attempt) bool { return a.id == id })
	warm, whole := h.warm, h.whole
	var a *attempt
	if at >= 0 {
		a = h.attempts[at]
	}
	h.mu.Unlock()
	switch {
	case a != nil:
		select {
		case <-a.done:
		case <-ctx.Done():
		}
		return a.outcome()
	case warm && h.fromDump(id):
		// The original asked, and the answer went into the dump with it. Threads of
		// the clone run one after the other; if one ends the process before the last
		// does, CRIU finds something to be missing and gives up.
		select {
		case <-whole:
		case <-ctx.Done():
		}
		select {
		case <-whole:
			return hook.OutcomeRestored, ""
		default:
			return hook.OutcomePending, ""
		}
	}
	return "", ""
}

var _ hook.Handler = (*hooks)(nil)

var errBusy = fmt.Errorf("another checkpoint is being made: %w", errdefs.ErrUnavailable)
