package runtime

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/selinux/go-selinux"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/oci"
)

// Stdio is what a process gets as its standard streams: three open files, or
// one end of a socket on which the other end receives the master of a terminal.
// The files stay the caller's, who closes them after the start.
type Stdio struct {
	Stdin, Stdout, Stderr *os.File
	Console               *os.File
}

// Exit is how a process ended.
type Exit struct {
	Status int // as a shell has it: 128 + n for signal n
	At     time.Time
}

// ErrNotStarted is returned for a process that has no pid yet.
var ErrNotStarted = errors.New("process was not started")

// Process is one process that was started in a container: its init, or an exec.
type Process struct {
	pid  int
	wait func() (*os.ProcessState, error) // reaps it

	done chan struct{}
	exit Exit

	signalMu sync.Mutex
	reaped   bool
}

// Pid is the process's id in this process's pid namespace.
func (p *Process) Pid() int { return p.pid }

// Done is closed when the process has ended and was reaped.
func (p *Process) Done() <-chan struct{} { return p.done }

// Exit is how the process ended. It may be called after Done is closed.
func (p *Process) Exit() Exit { return p.exit }

// Signal sends a signal to this one process. It never reaches a process that
// got the same pid later.
func (p *Process) Signal(sig unix.Signal) error {
	p.signalMu.Lock()
	defer p.signalMu.Unlock()
	if p.reaped {
		return os.ErrProcessDone
	}
	if err := unix.Kill(p.pid, sig); err != nil {
		if errors.Is(err, unix.ESRCH) {
			return os.ErrProcessDone
		}
		return fmt.Errorf("send %s to process %d: %w", unix.SignalName(sig), p.pid, err)
	}
	return nil
}

// newProcess is a process that was started, and is waited for in the background
// from now on. The caller holds the subreaper, so that the process is owned
// before anybody else could reap it.
func newProcess(pid int, wait func() (*os.ProcessState, error), r *Subreaper) *Process {
	p := &Process{pid: pid, wait: wait, done: make(chan struct{})}
	r.Own(pid)
	go func() {
		// Wait without reaping first: a signal must not meet a pid that is
		// free to be used again (see Signal).
		var info unix.Siginfo
		for {
			err := unix.Waitid(unix.P_PID, p.pid, &info, unix.WEXITED|unix.WNOWAIT, nil)
			if !errors.Is(err, unix.EINTR) {
				break
			}
		}
		p.exit.At = time.Now()
		p.signalMu.Lock()
		state, err := p.wait()
		p.reaped = true
		p.signalMu.Unlock()
		p.exit.Status = exitStatus(state, err)
		r.Disown(p.pid)
		close(p.done)
	}()
	return p
}

// exitStatus is the status a shell would show. A process whose status is lost
// counts as killed: nothing else is safe to assume.
func exitStatus(state *os.ProcessState, err error) int {
	if state == nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			return 128 + int(unix.SIGKILL)
		}
		state = exit.ProcessState
	}
	ws, ok := state.Sys().(syscall.WaitStatus)
	if ok && ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return state.ExitCode()
}

// names are what the streams are called in /proc/PID/fd. A dump names those that
// a restore is to give to the processes again.
func (s Stdio) names() ([]string, error) {
	names := make([]string, 3)
	for i, f := range []*os.File{s.Stdin, s.Stdout, s.Stderr} {
		names[i] = os.DevNull
		if f == nil {
			continue
		}
		name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
		if err != nil {
			return nil, err
		}
		names[i] = name
	}
	return names, nil
}

// checkProcess finds what libcontainer would fail on later and less clearly.
func checkProcess(p *specs.Process) error {
	switch {
	case p == nil:
		return errors.New("the OCI spec has no process")
	case p.Cwd == "":
		return errors.New("process.cwd is empty: it must be an absolute path")
	case !filepath.IsAbs(p.Cwd):
		return fmt.Errorf("process.cwd %q is not an absolute path", p.Cwd)
	case len(p.Args) == 0:
		return errors.New("process.args is empty: there is nothing to run")
	case p.SelinuxLabel != "" && !selinux.GetEnabled():
		return fmt.Errorf("process.selinuxLabel is %q, but SELinux is not enabled on this host", p.SelinuxLabel)
	}
	return nil
}

// processConfig turns what the OCI spec says of a process into what libcontainer
// wants to know.
func processConfig(p *specs.Process, io Stdio) (*libcontainer.Process, error) {
	if err := checkProcess(p); err != nil {
		return nil, err
	}
	lp := &libcontainer.Process{
		Args:            p.Args,
		Env:             p.Env,
		UID:             int(p.User.UID),
		GID:             int(p.User.GID),
		Cwd:             p.Cwd,
		Label:           p.SelinuxLabel,
		NoNewPrivileges: &p.NoNewPrivileges,
		AppArmorProfile: p.ApparmorProfile,
		Scheduler:       p.Scheduler,
		IOPriority:      p.IOPriority,
		LogLevel:        "4", // logrus.InfoLevel: what init writes ends in errors
	}
	if io.Console != nil {
		lp.ConsoleSocket = io.Console
		if size := p.ConsoleSize; size != nil {
			lp.ConsoleWidth, lp.ConsoleHeight = uint16(size.Width), uint16(size.Height)
		}
	} else {
		// A nil *os.File in an io.Reader would not be a nil io.Reader.
		if io.Stdin != nil {
			lp.Stdin = io.Stdin
		}
		if io.Stdout != nil {
			lp.Stdout = io.Stdout
		}
		if io.Stderr != nil {
			lp.Stderr = io.Stderr
		}
	}
	if c := p.Capabilities; c != nil {
		lp.Capabilities = &configs.Capabilities{
			Bounding:    c.Bounding,
			Effective:   c.Effective,
			Inheritable: c.Inheritable,
			Permitted:   c.Permitted,
			Ambient:     c.Ambient,
		}
	}
	for _, gid := range p.User.AdditionalGids {
		lp.AdditionalGroups = append(lp.AdditionalGroups, int(gid))
	}
	for _, l := range p.Rlimits {
		resource, ok := oci.Rlimits[l.Type]
		if !ok {
			return nil, fmt.Errorf("process.rlimits: unknown limit %q", l.Type)
		}
		lp.Rlimits = append(lp.Rlimits, configs.Rlimit{Type: resource, Hard: l.Hard, Soft: l.Soft})
	}
	affinity, err := configs.ConvertCPUAffinity(p.ExecCPUAffinity)
	if err != nil {
		return nil, fmt.Errorf("process.execCPUAffinity: %w", err)
	}
	lp.CPUAffinity = affinity
	return lp, nil
}
