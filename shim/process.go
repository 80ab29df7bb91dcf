package shim

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/runtime"
)

// process is a container's init or one of its execs, as clients see it.
type process struct {
	id     string // of the exec; empty for the init
	config stdioConfig
	spec   *specs.Process // of the exec; nil for the init

	// announce is held while a start is being announced, so that the exit of a
	// short process is not announced before it.
	announce sync.Mutex

	mu     sync.Mutex
	io     *processIO
	proc   *runtime.Process
	pid    int // also of what stands for a process that is to be restored
	exit   runtime.Exit
	exited bool

	done chan struct{} // closed when exited is set
}

func newProcess(id string, config stdioConfig, spec *specs.Process) *process {
	return &process{id: id, config: config, spec: spec, done: make(chan struct{})}
}

// started notes the process that was started for this one.
func (p *process) started(proc *runtime.Process) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.proc, p.pid = proc, proc.Pid()
}

func (p *process) running() *runtime.Process {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.proc
}

func (p *process) getPid() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pid
}

func (p *process) stdio() *processIO {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.io
}

// setExited notes the end of the process, once.
func (p *process) setExited(e runtime.Exit) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.exited {
		return
	}
	p.exited, p.exit = true, e
	if p.io != nil {
		p.io.hangUp()
	}
	close(p.done)
}

// ended returns how the process ended; ok is false while it has not.
func (p *process) ended() (e runtime.Exit, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.exit, p.exited
}

// wait waits for the end of the process.
func (p *process) wait(ctx context.Context) (runtime.Exit, error) {
	select {
	case <-p.done:
		e, _ := p.ended()
		return e, nil
	case <-ctx.Done():
		return runtime.Exit{}, ctx.Err()
	}
}

// execStatus is the task API's word for the state of an exec.
func (p *process) execStatus() task.Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.exited:
		return task.Status_STOPPED
	case p.proc != nil:
		return task.Status_RUNNING
	}
	return task.Status_CREATED
}

// signal sends a signal to an exec of the container.
func (p *process) signal(rt *runtime.Container, sig unix.Signal) error {
	proc := p.running()
	if proc == nil {
		return fmt.Errorf("process %s: %w", p.id, runtime.ErrNotStarted)
	}
	return rt.SignalProcess(proc, sig)
}

// closeIO drains and closes the process's streams after its end.
func (p *process) closeIO() {
	io := p.stdio()
	if io == nil {
		return
	}
	io.afterStart()
	io.wait()
	io.close()
}

// abandon ends a process that never started, for Delete and failed starts.
func (p *process) abandon(status int) {
	p.setExited(runtime.Exit{Status: status, At: time.Now()})
}

func errNoProcess(container, id string) error {
	return fmt.Errorf("container %s has no process %q: %w", container, id, errdefs.ErrNotFound)
}
