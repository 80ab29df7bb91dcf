package runtime

import (
	"cmp"
	"context"
	"errors"

	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crac-shim/crac/runtime/trace"
)

// begunRestore is a call of CRIU that has begun. With the first process in its
// namespaces it waits until it is told to go on.
type begunRestore struct {
	call  *criuRestore
	view  *dumpView
	trees mountTrees

	waits chan struct{} // closed when the first process is there
	held  *heldNetwork  // its namespaces, if they are not held already; with waits
	goOn  chan error    // nil, or why it is to be undone instead
	hold  func()        // lets the subreaper go

	done chan struct{} // closed with the call's end
	pid  int           // of the workload's first process, with done
	err  error
}

var errNotStarted = errors.New("the container was not started")

// begin calls CRIU, which waits then. end must be called. c.mu is held.
func (c *Container) begin(dir string, o CRIUOptions, mounts []specs.Mount, io Stdio) (*begunRestore, error) {
	if c.criu == nil {
		c.setCRIU(c.readyCRIU(io))
	}
	b := &begunRestore{waits: make(chan struct{}), goOn: make(chan error, 1), done: make(chan struct{})}
	look := c.cfg.Trace.Step("make the view of the dump")
	view, err := c.view(dir, o.Images, o.Parents)
	look()
	if err != nil {
		return nil, err
	}
	b.view = view
	// A mount that cannot be made is known before CRIU has done any work.
	more := c.cfg.Trace.Step("make the mounts that the dump lacks")
	b.trees, err = detachedTrees(tmpfsOwners(c.spec, mounts))
	more()
	if err != nil {
		b.close()
		return nil, err
	}
	b.call = &criuRestore{c: c, dir: view.dir, o: o, stdio: io, criu: c.criu, created: b.wait, beforeRun: b.trees.attach}
	b.hold = c.cfg.Reaper.Hold()
	go func() {
		defer close(b.done)
		b.pid, b.err = b.call.run()
		b.hold()
	}()
	return b, nil
}

// wait waits, when the first process is there, to be told to go on.
func (b *begunRestore) wait(pid int) error {
	c := b.call.c
	if c.userNetwork {
		var err error
		if b.held, err = holdNetworkOf(pid, c.spec); err != nil {
			return err
		}
	}
	// If they have not run yet: see PrepareRestore.
	if err := c.runHooks(context.Background(), pid, specs.StateCreating, configs.Prestart, configs.CreateRuntime); err != nil {
		return err
	}
	close(b.waits)
	select {
	case err := <-b.goOn:
		return err
	default:
	}
	// It may be long: others' orphans must be reaped meanwhile, and this process not.
	defer c.cfg.Trace.On(trace.Background, "wait for the start")()
	c.cfg.Reaper.Own(pid)
	b.hold()
	err := <-b.goOn
	b.hold = c.cfg.Reaper.Hold()
	c.cfg.Reaper.Disown(pid)
	return err
}

// waiting waits until the call waits. When ctx ends, CRIU does.
func (b *begunRestore) waiting(ctx context.Context) error {
	defer context.AfterFunc(ctx, func() {
		if criu, err := b.call.criu.get(); err == nil {
			_ = criu.cmd.Process.Kill()
		}
	})()
	select {
	case <-b.waits:
		return nil
	case <-b.done:
		return cmp.Or(ctx.Err(), b.err)
	}
}

// end has the restore go on, or undoes it for an error, and waits for what becomes of it.
func (b *begunRestore) end(why error) error {
	b.goOn <- why // there is room for it
	<-b.done
	b.close()
	return b.err
}

func (b *begunRestore) close() {
	b.view.Close()
	b.trees.close()
	b.held.release() // unless somebody has taken it
}
