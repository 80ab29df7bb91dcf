package shim

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/runtime"
	"github.com/crac-shim/crac/runtime/hook"
)

const (
	// readyTimeout bounds the wait for a workload to become ready.
	readyTimeout = 15 * time.Minute
	// probeInterval is the time between two probes.
	probeInterval = 200 * time.Millisecond
)

// CheckpointFailedTopic is the topic of the event that tells why a checkpoint
// failed that no client's call asked for. The facts are container_id and reason.
const CheckpointFailedTopic = "/crac/checkpoint-failed"

// readyProbe is the container's probe, nil if its options ask for no checkpoint
// when it is ready.
func (c *container) readyProbe() (*hook.Probe, error) {
	if c.options.CheckpointWhen != oci.CheckpointWhenReady {
		return nil, nil
	}
	ready, err := hook.ParseProbe(c.options.CheckpointProbe)
	if err != nil {
		return nil, fmt.Errorf("option %scheckpoint.probe: %w: %w", oci.AnnotationPrefix, err, errdefs.ErrInvalidArgument)
	}
	return ready, nil
}

// checkpointWhenReady waits until a workload that was started cold is ready,
// warms it up, and checkpoints it.
func (s *service) checkpointWhenReady(c *container) {
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	go func() {
		select {
		case <-c.init.done:
			cancel()
		case <-ctx.Done():
		}
	}()
	err := s.whenReady(ctx, c)
	if err == nil {
		return
	}
	if _, ended := c.init.ended(); ended {
		err = errors.New("the workload ended before its checkpoint")
	}
	s.notCheckpointed(c, err)
}

// notCheckpointed tells why there is no checkpoint that no client's call asked for.
func (s *service) notCheckpointed(c *container, err error) {
	log.G(s.ctx).WithError(err).WithField("id", c.id).Warn("no checkpoint was made")
	s.events.sendFacts(CheckpointFailedTopic, fmt.Sprintf("container %s was not checkpointed: %s", c.id, err),
		map[string]any{"container_id": c.id, "reason": err.Error()})
}

// errNotAsked says that the workload could not be asked just now.
var errNotAsked = errors.New("the workload was paused or checkpointed meanwhile")

// probing keeps questions to a workload apart from what makes it stand still: what is frozen
// answers nobody, and what asks must not be there when a dump is made.
type probing struct {
	token chan struct{} // held by a question, or by who keeps them away
	stop  chan struct{} // taken by a question that is under way, which then ends
}

func newProbing() probing { return probing{make(chan struct{}, 1), make(chan struct{})} }

// hold keeps questions away until release, and ends one that is under way.
func (p probing) hold(ctx context.Context) (release func(), err error) {
	for {
		select {
		case p.token <- struct{}{}:
			return func() { <-p.token }, nil
		case p.stop <- struct{}{}:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// ask asks, unless the workload stands still. If somebody ends it, that is errNotAsked.
func (p probing) ask(ctx context.Context, stands func() bool, question func(context.Context) error) error {
	release, err := hold(ctx, p.token)
	if err != nil {
		return err
	}
	defer release()
	if stands() {
		return errNotAsked
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-p.stop:
			cancel(errNotAsked)
		case <-ctx.Done():
		}
	}()
	err = question(ctx)
	if err != nil && errors.Is(context.Cause(ctx), errNotAsked) {
		return errNotAsked
	}
	return err
}

func (s *service) whenReady(ctx context.Context, c *container) error {
	began := time.Now()
	stands := func() bool { return c.rt.State() != runtime.Running }
	once := func() error {
		return c.probing.ask(ctx, stands, func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, c.options.HookTimeout)
			defer cancel()
			return c.ready.Ask(ctx, hookTarget{c})
		})
	}
	later := func() {
		select {
		case <-time.After(probeInterval):
		case <-ctx.Done():
		}
	}
	for deadline := began.Add(readyTimeout); ; {
		err := once()
		if err == nil {
			break
		}
		if ctx.Err() != nil || time.Now().After(deadline) {
			return fmt.Errorf("the workload is not ready after %s: %w", time.Since(began).Round(time.Second), err)
		}
		later()
	}
	log.G(s.ctx).WithFields(log.Fields{"id": c.id, "ms": time.Since(began).Milliseconds(), "warmup": c.options.CheckpointWarmup}).Info("ready for its checkpoint")
	for i := 0; i < c.options.CheckpointWarmup; {
		switch err := once(); {
		case err == nil:
			i++
		case errors.Is(err, errNotAsked) && ctx.Err() == nil:
			later()
		default:
			return fmt.Errorf("warm-up request %d of %d: %w", i+1, c.options.CheckpointWarmup, err)
		}
	}
	c.checkpointing.Lock()
	defer c.checkpointing.Unlock()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return s.makeCheckpoint(ctx, c, c.ownCheckpoint())
}
