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
		// than the workload's. CRIU makes both, and libcontainer runs the hooks
		// when they are there.
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

// Restore starts the workload from the dump in dir, after PrepareRestore. mounts
// are those that the dump lacks; the workload finds them there when it first runs.
//
// With an error and no process, nothing of the workload has run, everything is
// undone and the container is Created: Create and Start may start it cold. With
// an error and a process, the workload has run and was killed for the error.
func (c *Container) Restore(dir string, o CRIUOptions, mounts []specs.Mount, io Stdio) (*Process, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.machine.to(Quiesced); err != nil {
		return nil, err
	}
	if c.criu == nil {
		c.setCRIU(c.readyCRIU(io))
	}
	p, err := c.restore(dir, o, mounts, io)
	c.endCRIU()
	if p == nil {
		c.giveUpRestore()
		return nil, errors.Join(err, c.undoRestore())
	}
	if err != nil {
		_ = p.Signal(unix.SIGKILL)
	}
	return p, errors.Join(err, c.machine.to(Running))
}

func (c *Container) restore(dir string, o CRIUOptions, mounts []specs.Mount, io Stdio) (*Process, error) {
	look := c.cfg.Trace.Step("make the view of the dump")
	view, err := c.view(dir, o.Images, o.Parents)
	look()
	if err != nil {
		return nil, err
	}
	defer view.Close()
	// A mount that cannot be made is known before CRIU has done any work.
	more := c.cfg.Trace.Step("make the mounts that the dump lacks")
	trees, err := detachedTrees(tmpfsOwners(c.spec, mounts))
	more()
	defer trees.close()
	if err != nil {
		return nil, err
	}
	defer c.cfg.Reaper.Hold()()
	defer expectBreakpoints()()
	r := &criuRestore{c: c, dir: view.dir, o: o, stdio: io, criu: c.criu, beforeRun: trees.attach}
	pid, err := r.run()
	if err != nil {
		return nil, err
	}
	c.memory.Store(r.pager)
	defer c.cfg.Trace.Step("load the container's state")()
	proc, err := os.FindProcess(pid)
	if err != nil {
		return nil, err
	}
	c.setInit(newProcess(pid, proc.Wait, c.cfg.Reaper))
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
	if err := c.machine.to(Created); err != nil {
		return err
	}
	if c.held == nil {
		// No namespaces of ours: the hooks run again with the cold start, so
		// let their counterparts run now.
		if err := c.destroy(); err != nil {
			return err
		}
		return c.make()
	}
	return c.remake()
}
