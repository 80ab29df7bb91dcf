package shim

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/runtime"
	"github.com/crac-shim/crac/runtime/hook"
	"github.com/crac-shim/crac/runtime/trace"
)

// container is one container of this shim, with its processes.
type container struct {
	id      string
	bundle  string
	rootfs  string // where the root file system is mounted; empty if it is not ours
	work    string
	options oci.Options
	criu    criuPaths
	args    []string // what the request asked to run, where adaptJava has changed it

	trace     *trace.Recorder
	tracing   sync.Mutex // writes it
	createdAt time.Time

	rt    *runtime.Container
	init  *process
	hooks *hooks      // nil if the workload is told nothing
	ready *hook.Probe // nil unless it is to be checkpointed when it succeeds

	// warm is the restore that Start is to do; nil once done, or for a cold start.
	warm *restore
	// begun is how that was begun at Create; nil unless it was.
	begun *restorePlan
	// dumped is the manifest of the dump that this container was restored from;
	// nil if it was started cold, or from a dump without one.
	dumped *oci.Manifest

	// oomed says that a kill for want of memory was announced.
	oomed atomic.Bool

	// checkpointing lets one checkpoint at a time in, and dumping no client's pause while
	// the workload is told and dumped: what stands still answers nobody.
	checkpointing sync.Mutex
	dumping       chan struct{} // holds one token while that goes on
	probing       probing

	mu      sync.Mutex
	execs   map[string]*process
	ended   bool // the init has: no exec may start any more
	running sync.WaitGroup
}

// process finds the init (an empty id) or an exec.
func (c *container) process(id string) (*process, error) {
	if id == "" {
		return c.init, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.execs[id]; p != nil {
		return p, nil
	}
	return nil, errNoProcess(c.id, id)
}

func (c *container) addExec(p *process) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return fmt.Errorf("exec in container %s: %w", c.id, classified{runtime.ErrNotRunning, errdefs.ErrFailedPrecondition})
	}
	if _, ok := c.execs[p.id]; ok {
		return fmt.Errorf("process %s of container %s: %w", p.id, c.id, errdefs.ErrAlreadyExists)
	}
	c.execs[p.id] = p
	return nil
}

func (c *container) removeExec(id string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.execs, id)
}

// beginExec counts an exec in, so that the init's end is announced after its.
func (c *container) beginExec() (release func(), err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return nil, fmt.Errorf("exec in container %s: its init has ended: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	c.running.Add(1)
	return sync.OnceFunc(c.running.Done), nil
}

// endExecs lets no exec begin any more, and waits for those that have.
func (c *container) endExecs() {
	c.mu.Lock()
	c.ended = true
	c.mu.Unlock()
	c.running.Wait()
}

func (c *container) execsByPid() map[int]string {
	c.mu.Lock()
	defer c.mu.Unlock()
	pids := make(map[int]string, len(c.execs))
	for id, p := range c.execs {
		if pid := p.getPid(); pid != 0 {
			pids[pid] = id
		}
	}
	return pids
}

// status is the task API's word for the container's state.
func (c *container) status() task.Status {
	if _, ended := c.init.ended(); ended {
		return task.Status_STOPPED
	}
	switch c.rt.State() {
	case runtime.Created:
		return task.Status_CREATED
	case runtime.Running:
		return task.Status_RUNNING
	case runtime.Paused:
		return task.Status_PAUSED
	case runtime.Quiesced:
		return task.Status_PAUSING
	case runtime.Stopped:
		// Its end is about to be announced: until then it is running, or a
		// client would see it stopped without an exit status.
		return task.Status_RUNNING
	}
	return task.Status_UNKNOWN
}

// pause freezes the container, after a dump if there is one under way.
func (c *container) pause(ctx context.Context) error {
	release, err := hold(ctx, c.dumping)
	if err != nil {
		return fmt.Errorf("pause container %s, which is being checkpointed: %w", c.id, err)
	}
	defer release()
	released, err := c.probing.hold(ctx)
	if err != nil {
		return fmt.Errorf("pause container %s: %w", c.id, err)
	}
	defer released()
	return c.rt.Pause()
}

// hold puts the one token into a channel, which others wait for until release is called.
func hold(ctx context.Context, token chan struct{}) (release func(), err error) {
	select {
	case token <- struct{}{}:
		return func() { <-token }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// delete removes all that the container has.
func (c *container) delete(ctx context.Context) error {
	if _, ended := c.init.ended(); !ended && c.rt.State() != runtime.Created {
		return fmt.Errorf("delete container %s: it is %s; kill it first: %w", c.id, c.rt.State(), errdefs.ErrFailedPrecondition)
	}
	// First, because it ends the init of a container that was never started,
	// which holds its streams open.
	err := c.rt.Delete()
	if c.begun != nil {
		c.begun.order.done()
		c.begun = nil
	}
	if c.init.running() == nil {
		c.init.abandon(0)
	} else if io := c.init.stdio(); io != nil {
		io.hangUp() // and its end is told like every other, next
	}
	c.init.closeIO()
	for _, p := range c.takeExecs() {
		p.abandon(0)
		p.closeIO()
	}
	return errors.Join(err, c.removeHooks(), c.unmount(ctx))
}

func (c *container) takeExecs() map[string]*process {
	c.mu.Lock()
	defer c.mu.Unlock()
	execs := c.execs
	c.execs = make(map[string]*process)
	c.ended = true
	return execs
}

func (c *container) unmount(ctx context.Context) error {
	if c.rootfs == "" {
		return nil
	}
	if err := mount.UnmountRecursive(c.rootfs, 0); err != nil {
		log.G(ctx).WithError(err).WithField("id", c.id).Warn("failed to unmount the root file system")
		return fmt.Errorf("unmount the root file system of container %s: %w", c.id, err)
	}
	return nil
}
