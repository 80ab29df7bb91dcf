package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/runtime"
	"github.com/crac-shim/crac/runtime/hook"
	"github.com/crac-shim/crac/runtime/inspect"
)

// hookTarget is a container as hooks that are no participants reach into it: by
// a process, a connection or a signal.
type hookTarget struct{ c *container }

var _ hook.Container = hookTarget{}

const (
	// maxHookOutput bounds what is kept of a hook's output, in bytes.
	maxHookOutput = 64 << 10
	// hookOutputDelay is what a hook's output gets to arrive after its end:
	// what it left running may hold the other end for ever.
	hookOutputDelay = 100 * time.Millisecond
)

// Dial implements hook.Container.
func (t hookTarget) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	return t.c.rt.Dial(ctx, network, address)
}

// Signal implements hook.Container.
func (t hookTarget) Signal(sig unix.Signal) error { return t.c.rt.Signal(sig, false) }

// User implements hook.Container.
func (t hookTarget) User() (uid, gid int, err error) {
	proc := t.c.init.running()
	if proc == nil {
		return 0, 0, runtime.ErrNotRunning
	}
	uid, gid, err = inspect.User(proc.Pid())
	select {
	case <-proc.Done(): // its pid may be another's
		return 0, 0, runtime.ErrNotRunning
	default:
		return uid, gid, err
	}
}

// Done implements hook.Container. It is not init.done, which is closed only after a
// start was announced.
func (t hookTarget) Done() <-chan struct{} {
	if proc := t.c.init.running(); proc != nil {
		return proc.Done()
	}
	return nil
}

// execEnd is what a process gets to end when it is killed because its time is over.
const execEnd = time.Second

// execEnded is what became of an Exec.
type execEnded struct {
	stderr []byte
	status int
	err    error
}

// Exec implements hook.Container: it runs a process as the container's init was
// started, and waits for it. When ctx ends the process is killed.
func (t hookTarget) Exec(ctx context.Context, args, env []string, stdin []byte) (stderr []byte, status int, err error) {
	spec := t.c.rt.Spec().Process
	if spec == nil {
		return nil, 0, errors.New("the container's spec has no process")
	}
	p := *spec
	p.Args, p.Terminal, p.ConsoleSize = args, false, nil
	p.Env = append(slices.Clone(spec.Env), env...)
	release, err := t.c.beginExec()
	if err != nil {
		return nil, 0, err
	}
	ended := make(chan execEnded, 1)
	go func() {
		defer release()
		var e execEnded
		e.stderr, e.status, e.err = t.run(ctx, &p, stdin)
		ended <- e
	}()
	select {
	case e := <-ended:
		return e.stderr, e.status, e.err
	case <-ctx.Done():
	}
	select {
	case e := <-ended:
		return e.stderr, e.status, e.err
	case <-time.After(execEnd):
		// Others in the container can stop a process before it is one that can be
		// killed. It ends with the container.
		return nil, 0, ctx.Err()
	}
}

// run is Exec, but for a process that does not get as far as to be one.
func (t hookTarget) run(ctx context.Context, p *specs.Process, stdin []byte) (stderr []byte, status int, err error) {
	in, err := memoryFile(stdin)
	if err != nil {
		return nil, 0, err
	}
	defer in.Close()
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return nil, 0, err
	}
	defer null.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return nil, 0, err
	}
	defer r.Close()
	proc, err := t.c.rt.Exec(p, runtime.Stdio{Stdin: in, Stdout: null, Stderr: w})
	w.Close()
	if err != nil {
		return nil, 0, err
	}
	output := make(chan []byte, 1)
	go func() {
		kept, _ := io.ReadAll(io.LimitReader(r, maxHookOutput))
		_, _ = io.Copy(io.Discard, r) // or it could block in its writes
		output <- kept
	}()
	select {
	case <-proc.Done():
	case <-ctx.Done():
		_ = proc.Signal(unix.SIGKILL)
		<-proc.Done()
		err = ctx.Err()
	}
	_ = r.SetReadDeadline(time.Now().Add(hookOutputDelay))
	return <-output, proc.Exit().Status, err
}

// memoryFile is a file in memory with this content, to be read from its start.
func memoryFile(content []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate("crac-hook", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "crac-hook")
	if _, err := f.Write(content); err != nil {
		f.Close()
		return nil, fmt.Errorf("memory file: %w", err)
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
