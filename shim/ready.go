package shim

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/crac-shim/crac/oci"
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
	log.G(s.ctx).WithError(err).WithField("id", c.id).Warn("no checkpoint was made")
	s.events.sendFacts(CheckpointFailedTopic, fmt.Sprintf("container %s was not checkpointed: %s", c.id, err),
		map[string]any{"container_id": c.id, "reason": err.Error()})
}

func (s *service) whenReady(ctx context.Context, c *container) error {
	began := time.Now()
	once := func() error {
		// What asks must not be there when somebody's dump is made.
		release, err := hold(ctx, c.probing)
		if err != nil {
			return err
		}
		defer release()
		ctx, cancel := context.WithTimeout(ctx, c.options.HookTimeout)
		defer cancel()
		return c.ready.Ask(ctx, hookTarget{c})
	}
	for deadline := began.Add(readyTimeout); ; {
		err := once()
		if err == nil {
			break
		}
		if ctx.Err() != nil || time.Now().After(deadline) {
			return fmt.Errorf("the workload is not ready after %s: %w", time.Since(began).Round(time.Second), err)
		}
		select {
		case <-time.After(probeInterval):
		case <-ctx.Done():
		}
	}
	log.G(s.ctx).WithFields(log.Fields{"id": c.id, "ms": time.Since(began).Milliseconds(), "warmup": c.options.CheckpointWarmup}).Info("ready for its checkpoint")
	for i := range c.options.CheckpointWarmup {
		if err := once(); err != nil {
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
