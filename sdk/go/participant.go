package crac

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"
)

// participant is the listening side: it is told what happens, and calls the hooks.
type participant struct {
	mu       sync.Mutex
	listener *net.UnixListener
	hooks    []*Hooks
	environ  map[string]string // as the last request had it
	restored *Restore
	told     *message      // the notification that the hooks are being called for
	stopped  bool          // before-checkpoint came, what ends it did not yet
	errs     []error       // of the hooks, since the last before-checkpoint
	ended    *message      // the last after-resume or after-restore
	changed  chan struct{} // closed and made anew when ended changes
}

// message is a notification.
type message struct {
	Event       string            `json:"event"`
	ID          string            `json:"id"`
	DeadlineMS  float64           `json:"deadline_ms"`
	Generation  string            `json:"generation"`
	Container   string            `json:"container"`
	Hostname    string            `json:"hostname"`
	Env         map[string]string `json:"env"`
	Args        []string          `json:"args"`
	Annotations map[string]string `json:"annotations"`
	FrozenNS    int64             `json:"frozen_ns"`
	Outcome     Result            `json:"outcome"`
	Error       string            `json:"error"`
}

func (p *participant) start() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, err := os.Stat(directory()); p.listener != nil || err != nil {
		return nil
	}
	l, err := listen()
	if err != nil {
		return fmt.Errorf("crac: this process takes no part in checkpoints: %w", err)
	}
	p.listener = l
	p.environ = environ()
	p.changed = make(chan struct{})
	go p.serve(l)
	return nil
}

func (p *participant) startAndLog() {
	if err := p.start(); err != nil {
		slog.Error(err.Error())
	}
}

func (p *participant) stop() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.listener != nil {
		_ = p.listener.Close() // removes the socket, too
		p.listener = nil
	}
}

// listen makes this process's socket. A name that another process listens at gets the
// process id added.
func listen() (*net.UnixListener, error) {
	self := fmt.Sprintf("go-%d", os.Getpid())
	names := []string{self}
	if name := os.Getenv("CRAC_NAME"); name != "" {
		if strings.Contains(name, "/") || strings.HasPrefix(name, ".") || name == "control" {
			return nil, fmt.Errorf("CRAC_NAME=%s: not a name for a socket: leave out slashes, a dot in front, and 'control'", name)
		}
		names = []string{name, fmt.Sprintf("%s-%d", name, os.Getpid())}
	}
	sweep()
	var err error
	for _, name := range names {
		path := filepath.Join(directory(), name+".sock")
		if c, dialErr := net.Dial("unix", path); dialErr == nil {
			_ = c.Close()
			err = fmt.Errorf("%s is another process's", path)
			continue
		}
		_ = os.Remove(path) // left over
		// No other name first and a rename: CRIU restores it by the name it was bound to.
		var l *net.UnixListener
		if l, err = net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"}); err == nil {
			return l, nil
		}
	}
	return nil, err
}

var ourName = regexp.MustCompile(`^go-(\d+)\.sock$`)

// sweep removes what processes left that ended without a chance to.
func sweep() {
	entries, err := os.ReadDir(directory())
	if err != nil {
		return // listening will say why
	}
	for _, e := range entries {
		if pid := ourName.FindStringSubmatch(e.Name()); pid != nil {
			if _, err := os.Stat("/proc/" + pid[1]); errors.Is(err, fs.ErrNotExist) {
				_ = os.Remove(filepath.Join(directory(), e.Name()))
			}
		}
	}
}

func (p *participant) register(h Hooks) (unregister func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hooks = append(p.hooks, &h)
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.hooks = slices.DeleteFunc(slices.Clone(p.hooks), func(other *Hooks) bool { return other == &h })
	}
}

// serve answers one notification after another.
func (p *participant) serve(l *net.UnixListener) {
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			slog.Warn("crac: " + err.Error())
			time.Sleep(100 * time.Millisecond) // such as too many open files
			continue
		}
		p.answer(c)
	}
}

func (p *participant) answer(c net.Conn) {
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	line, err := readLine(c)
	if err != nil {
		return // it ended without a line, or is too slow
	}
	_ = c.SetReadDeadline(time.Time{})
	var reply struct {
		OK    bool   `json:"ok"`
		Error string `json:"error,omitempty"`
	}
	m := &message{DeadlineMS: 10000}
	if err := json.Unmarshal(line, m); err != nil || m.Event == "" {
		reply.Error = fmt.Sprintf("not a notification: %.100q", line)
	} else {
		var failed []string
		for _, err := range p.notify(m) {
			failed = append(failed, err.Error())
		}
		reply.Error = strings.ToValidUTF8(fmt.Sprintf("%.4096s", strings.Join(failed, "; ")), "")
	}
	reply.OK = reply.Error == ""
	_ = c.SetWriteDeadline(time.Now().Add(10 * time.Second))
	if err := json.NewEncoder(c).Encode(reply); err != nil {
		slog.Warn("crac: the runtime has not waited for the answer: " + err.Error())
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.told != nil && strings.HasPrefix(p.told.Event, "after-") {
		p.stopped, p.ended = false, p.told
		close(p.changed)
		p.changed = make(chan struct{})
	}
	p.told = nil
}

// notify does what a notification asks for, and returns what went wrong.
func (p *participant) notify(m *message) (errs []error) {
	// A little before the runtime's, which would not know which hook it waits for.
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(0.95*m.DeadlineMS*float64(time.Millisecond)))
	defer cancel()
	p.mu.Lock()
	p.told = m
	if m.Event == "before-checkpoint" {
		p.stopped, p.errs = true, nil
	}
	hooks := p.hooks
	p.mu.Unlock()

	if m.Event == "after-restore" {
		if err := p.adapt(m); err != nil {
			slog.Error("crac: after a restore: " + err.Error())
			errs = append(errs, err)
		}
	}
	if m.Event == "before-checkpoint" || m.Event == "check" {
		hooks = slices.Clone(hooks)
		slices.Reverse(hooks)
	}
	for _, h := range hooks {
		name, f := h.of(m)
		if f == nil {
			continue
		}
		if err := call(ctx, f); err != nil {
			err = fmt.Errorf("%s: %w", name, err)
			slog.Error("crac: a hook failed", "event", m.Event, "error", err)
			errs = append(errs, err)
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.errs = append(p.errs, errs...)
	return errs
}

// adapt makes the process what a clone should be, ahead of its hooks.
func (p *participant) adapt(m *message) error {
	seeded.reseed()
	p.mu.Lock()
	defer p.mu.Unlock()
	p.restored = &Restore{
		Generation: m.Generation, Container: m.Container, Hostname: m.Hostname,
		Env: m.Env, Args: m.Args, Annotations: m.Annotations, Frozen: time.Duration(m.FrozenNS),
	}
	if m.Env == nil {
		return nil
	}
	before := p.environ
	p.environ = m.Env
	return updateEnviron(before, m.Env)
}

// of is the hook for a notification, if there is one, and its name.
func (h *Hooks) of(m *message) (name string, f func(context.Context) error) {
	var hook any
	switch {
	case m.Event == "before-checkpoint" && h.BeforeCheckpoint != nil:
		hook, f = h.BeforeCheckpoint, h.BeforeCheckpoint
	case m.Event == "check" && h.Check != nil:
		hook, f = h.Check, h.Check
	case m.Event == "after-resume" && h.AfterResume != nil:
		hook, f = h.AfterResume, func(ctx context.Context) error { return h.AfterResume(ctx, Outcome{m.Outcome, m.Error}) }
	case m.Event == "after-restore" && h.AfterRestore != nil:
		hook, f = h.AfterRestore, func(ctx context.Context) error { r, _ := LastRestore(); return h.AfterRestore(ctx, r) }
	default:
		return "", nil
	}
	if h.Name != "" {
		return h.Name, f
	}
	return runtime.FuncForPC(reflect.ValueOf(hook).Pointer()).Name(), f
}

// call calls a hook and waits for it until the context ends.
func call(ctx context.Context, f func(context.Context) error) error {
	done := make(chan error, 1)
	go func() { done <- f(ctx) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	// A hook that minds its context returns now, and knows better what it waited for.
	select {
	case err := <-done:
		return err
	case <-time.After(10 * time.Millisecond):
		return errors.New("has not ended in time")
	}
}

func (p *participant) checkpoint(ctx context.Context) (Result, error) {
	p.mu.Lock()
	busy, before, listening := p.told != nil || p.stopped, p.ended, p.listener != nil
	p.mu.Unlock()
	if busy {
		return Failed, &CheckpointError{Reason: "a checkpoint or a restore is under way already"}
	}
	line, err := ask(ctx, map[string]any{"op": "checkpoint"})
	if err != nil {
		return Failed, err
	}
	var begun struct{ ID string }
	if err := json.Unmarshal(line, &begun); err != nil {
		return Failed, fmt.Errorf("checkpoint: %w", err)
	}
	end, err := p.waitEnd(ctx, begun.ID, before, listening)
	if err != nil {
		return Failed, err
	}
	p.mu.Lock()
	errs := p.errs
	p.mu.Unlock()
	switch {
	case end.Event == "after-restore" || end.Outcome == Restored:
		if len(errs) > 0 {
			return Restored, &RestoreError{errs}
		}
		return Restored, nil
	case end.Outcome == Failed && end.Error == "":
		return Failed, &CheckpointError{"the checkpoint failed", errs}
	case end.Outcome == Failed:
		return Failed, &CheckpointError{end.Error, errs}
	}
	return Checkpointed, nil
}

// waitEnd waits until a checkpoint has ended: for our own hooks, and, in the original,
// until the image is there, which takes longer.
func (p *participant) waitEnd(ctx context.Context, id string, before *message, listening bool) (*message, error) {
	resumed := false
	for {
		if listening && !resumed {
			end, err := p.waitTold(ctx, id, before)
			if err != nil {
				return nil, err
			}
			if resumed = end != nil && end.Outcome == Checkpointed; end != nil && !resumed {
				return end, nil
			}
		}
		request := map[string]any{"op": "outcome", "id": id, "wait_ms": 0}
		if resumed || !listening {
			request["wait_ms"] = 5000
		}
		line, err := ask(ctx, request)
		if err != nil {
			return nil, err
		}
		end := &message{}
		if err := json.Unmarshal(line, end); err != nil {
			return nil, fmt.Errorf("outcome: %w", err)
		}
		p.mu.Lock()
		stopped := p.stopped
		p.mu.Unlock()
		// Were we told of its beginning, we shall be told of its end.
		if end.Outcome != "pending" && !stopped {
			return end, nil
		}
	}
}

// waitTold waits a second for the notification that ends a checkpoint.
func (p *participant) waitTold(ctx context.Context, id string, before *message) (*message, error) {
	timer := time.NewTimer(time.Second)
	defer timer.Stop()
	for {
		p.mu.Lock()
		end, changed := p.ended, p.changed
		p.mu.Unlock()
		if end != before && (end.Event == "after-restore" || end.ID == id) {
			return end, nil
		}
		select {
		case <-changed:
		case <-timer.C:
			return nil, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
