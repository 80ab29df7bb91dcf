package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// PrepareRestore does at Create what a restore needs: the network namespace that
// clients set up before Start, the hooks that expect to find it, and CRIU. io is what
// Restore will get. It returns a pid that stands for the container until Restore; 0 if nothing can.
func (c *Container) PrepareRestore(ctx context.Context, io Stdio) (pid int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer func() {
		if err == nil {
			c.setCRIU(c.readyCRIU(io))
		}
	}()
	if private(c.spec, specs.UserNamespace) {
		// A network namespace made here would belong to another user namespace
		// than the workload's. CRIU makes both: see BeginRestore.
		return 0, nil
	}
	held, err := holdNetwork(c.spec)
	if err != nil {
		return 0, err
	}
	defer func() {
		if err != nil {
			held.release()
		}
	}()
	if err := c.runHooks(ctx, held.pid(), specs.StateCreating, configs.Prestart, configs.CreateRuntime); err != nil {
		return 0, err
	}
	held.apply(c.spec)
	if err := c.remake(); err != nil {
		return 0, err
	}
	c.held = held
	return held.pid(), nil
}

// remake builds the libcontainer container anew from a spec that has changed,
// without the hooks that have run.
func (c *Container) remake() error {
	if err := c.discard(); err != nil {
		return err
	}
	if err := c.make(); err != nil {
		return err
	}
	for _, done := range []configs.HookName{configs.Prestart, configs.CreateRuntime} {
		delete(c.config.Hooks, done)
	}
	return nil
}

// BeginRestore has CRIU make the first process of a container that Restore will go on
// with, when PrepareRestore had no pid to return: its network namespace belongs to a user
// namespace of its own, and CRIU makes both. It returns the pid, when the namespaces and the
// hooks that expect them are done. The arguments are those of Restore.
//
// After an error everything is undone, as after one of Restore. After a *HookError the
// container is of no use but to be deleted.
func (c *Container) BeginRestore(ctx context.Context, dir string, o CRIUOptions, mounts []specs.Mount, io Stdio) (pid int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.begun, err = c.begin(dir, o, mounts, io); err == nil {
		if err = c.begun.waiting(ctx); err == nil {
			c.held, c.begun.held = c.begun.held, nil
			return c.held.pid(), nil
		}
	}
	c.giveUpRestore()
	var hook *HookError
	if errors.As(err, &hook) {
		return 0, err
	}
	return 0, c.undone(err)
}

// Begins tells whether BeginRestore should come between PrepareRestore and Restore.
func (c *Container) Begins() bool { return c.userNetwork }

// Restore starts the workload from the dump in dir, after PrepareRestore. mounts
// are those that the dump lacks; the workload finds them there when it first runs.
// After BeginRestore its arguments are what counts.
//
// With an error and no process, nothing of the workload has run, everything is
// undone and the container is Created: Create and Start may start it cold, unless the
// error is ErrNotUndone. With an error and a process, the workload has run and was
// killed for the error.
func (c *Container) Restore(dir string, o CRIUOptions, mounts []specs.Mount, io Stdio) (*Process, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.machine.to(Quiesced); err != nil {
		return nil, err
	}
	p, err := c.restore(dir, o, mounts, io)
	c.endCRIU()
	if p == nil {
		c.giveUpRestore()
		return nil, c.undone(err)
	}
	if err != nil {
		_ = p.Signal(unix.SIGKILL)
	}
	return p, errors.Join(err, c.machine.to(Running))
}

func (c *Container) restore(dir string, o CRIUOptions, mounts []specs.Mount, io Stdio) (_ *Process, err error) {
	if c.begun == nil {
		if c.begun, err = c.begin(dir, o, mounts, io); err != nil {
			return nil, err
		}
	}
	b := c.begun
	c.begun = nil
	defer expectBreakpoints()()
	defer c.cfg.Reaper.Hold()()
	if err := b.end(nil); err != nil {
		return nil, err
	}
	c.memory.Store(b.call.pager)
	defer c.cfg.Trace.Step("load the container's state")()
	proc, err := os.FindProcess(b.pid)
	if err != nil {
		return nil, err
	}
	c.setInit(newProcess(b.pid, proc.Wait, c.cfg.Reaper))
	return c.init, c.complete()
}

// endCRIU ends the CRIU of a restore, and of one that never was. c.mu is held.
func (c *Container) endCRIU() {
	c.criu.close()
	c.setCRIU(nil)
}

// giveUpRestore lets go of what waits for a restore that will not be. It may be
// called again. c.mu is held.
func (c *Container) giveUpRestore() {
	if b := c.begun; b != nil {
		_ = b.end(errNotStarted)
		c.begun = nil
	}
	c.endCRIU()
	c.tmpfs.release()
}

// complete is what is left to do for a workload that runs.
func (c *Container) complete() error {
	lc, err := libcontainer.Load(c.cfg.Root, c.cfg.ID)
	if err != nil {
		return fmt.Errorf("load restored container %s: %w", c.cfg.ID, err)
	}
	c.setLC(lc)
	if c.held.ofUser() { // for a cold start alone
		c.held.release()
		c.held = nil
	}
	c.held.retire()
	if !c.config.HasHook(configs.Poststart) {
		return nil
	}
	state, err := lc.OCIState()
	if err != nil {
		return err
	}
	if err := c.config.Hooks.Run(configs.Poststart, state); err != nil {
		return fmt.Errorf("poststart hook of container %s: %w", c.cfg.ID, err)
	}
	return nil
}

// emptyCgroup kills what a CRIU that was killed has left in the container's cgroup. It undoes
// a restore by itself otherwise.
func (c *Container) emptyCgroup() error {
	var pids []int
	kill := func() {
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
	return insist(func() (err error) {
		if pids, err = c.lc.Processes(); err == nil && len(pids) > 0 {
			err = fmt.Errorf("container %s: processes %v of a restore that has failed do not end", c.cfg.ID, pids)
		}
		return err
	}, kill)
}

// undoRestore leaves a container that can be created again. Its hooks have run
// and its namespaces are held, so both stay.
func (c *Container) undoRestore() error {
	if c.init != nil {
		if err := c.lc.Signal(unix.SIGKILL); err == nil {
			<-c.init.Done()
		}
		c.setInit(nil)
	}
	if loaded, err := libcontainer.Load(c.cfg.Root, c.cfg.ID); err == nil {
		c.setLC(loaded) // knows of a process that died half-way
		_ = c.lc.Signal(unix.SIGKILL)
	}
	if err := c.emptyCgroup(); err != nil {
		return err
	}
	if c.held == nil {
		// No namespaces of ours: the hooks run again with the cold start, so
		// let their counterparts run now.
		if err := c.destroy(); err != nil {
			return err
		}
		if err := c.make(); err != nil {
			return err
		}
	} else {
		c.held.apply(c.spec) // those that CRIU has made are new to it
		if err := c.remake(); err != nil {
			return err
		}
	}
	if c.machine.state == Created { // a restore had only begun
		return nil
	}
	return c.machine.to(Created)
}

// undone undoes a restore that has failed for this reason, and returns it.
func (c *Container) undone(why error) error {
	if err := c.undoRestore(); err != nil {
		return errors.Join(why, fmt.Errorf("%w: %w", ErrNotUndone, err))
	}
	return why
}
