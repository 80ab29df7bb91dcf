package pager

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strconv"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// guardianEnv carries a guardianConfig to the program that a guardian becomes.
const guardianEnv = "CRAC_PAGER_GUARDIAN"

// guardianConfig is what a guardian needs when the pager is dead.
type guardianConfig struct {
	Cgroups []string `json:"cgroups"`
	// Control is the number of the file descriptor that reports go to.
	Control int `json:"control"`
}

// guardians keeps one guardian alive.
//
// A guardian is a process that has the same table of file descriptors as the
// pager (clone(2), CLONE_FILES): whatever the pager holds, accepts, receives or
// gets with an event is the guardian's in the same instant, and stays open until
// both are dead. When the pager dies the guardian kills the workload, and only
// then lets go.
//
// A program of its own gets a table of its own. So the guardian is a copy of this
// process that runs no Go code but cloneGuardian, which waits in one system call,
// and executes this program again when it has work to do.
type guardians struct {
	calls   *guardianCalls
	cgroups []string // where it is to be

	mu      sync.Mutex
	pid     int
	stopped bool
	done    chan struct{}
}

// guardianCalls are the arguments of the guardian's system calls. It can neither
// allocate nor call anything that does.
type guardianCalls struct {
	name  *byte
	poll  *unix.PollFd
	path  *byte
	argv  **byte
	envp  **byte
	pause *unix.Timespec
}

// maxFDs bounds the file descriptors of a pager, of which there is one for each
// process of the workload: the guardian goes through all of them.
const maxFDs = 1 << 16

// limitFDs makes it so.
func limitFDs() error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return os.NewSyscallError("getrlimit", err)
	}
	limit.Max = min(limit.Max, maxFDs)
	limit.Cur = limit.Max
	return os.NewSyscallError("setrlimit", unix.Setrlimit(unix.RLIMIT_NOFILE, &limit))
}

// guard starts a guardian of the calling process, and another one whenever it
// dies. If there can be none, failed gets the reason.
func guard(cfg guardianConfig, in []string, failed func(error)) (*guardians, error) {
	calls, err := newGuardianCalls(cfg)
	if err != nil {
		return nil, err
	}
	g := &guardians{calls: calls, cgroups: in, done: make(chan struct{})}
	if err := g.start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(g.done)
		for g.wait() {
			if err := g.start(); err != nil {
				failed(err)
				return
			}
		}
	}()
	return g, nil
}

// newGuardianCalls prepares what a guardian of this process needs.
func newGuardianCalls(cfg guardianConfig) (*guardianCalls, error) {
	config, err := json.Marshal(cfg)
	if err != nil {
		return nil, err
	}
	pidfd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	name, _ := unix.BytePtrFromString(guardianName)
	path, _ := unix.BytePtrFromString("/proc/self/exe")
	argv, err := syscall.SlicePtrFromStrings([]string{guardianName, guardianCommand})
	if err != nil {
		return nil, err
	}
	envp, err := syscall.SlicePtrFromStrings([]string{guardianEnv + "=" + string(config)})
	if err != nil {
		return nil, err
	}
	return &guardianCalls{
		name:  name,
		poll:  &unix.PollFd{Fd: int32(pidfd), Events: unix.POLLIN},
		path:  path,
		argv:  &argv[0],
		envp:  &envp[0],
		pause: &unix.Timespec{Nsec: 10e6},
	}, nil
}

// start starts a guardian, unless there is to be none any more.
func (g *guardians) start() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.stopped {
		return nil
	}
	pid, errno := clone(g.calls)
	goruntime.KeepAlive(g.calls)
	if errno != 0 {
		return fmt.Errorf("start the guardian: %w", os.NewSyscallError("clone", errno))
	}
	g.pid = pid
	for _, dir := range g.cgroups {
		if err := tell(filepath.Join(dir, "cgroup.procs"), strconv.Itoa(pid)); err != nil {
			_ = unix.Kill(pid, unix.SIGKILL)
			_, _ = unix.Wait4(pid, nil, 0, nil)
			return fmt.Errorf("put the guardian into %s: %w", dir, err)
		}
	}
	return nil
}

// wait returns when the guardian is dead, and tells whether there is to be
// another one.
func (g *guardians) wait() bool {
	g.mu.Lock()
	pid := g.pid
	g.mu.Unlock()
	for unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	_, _ = unix.Wait4(pid, nil, 0, nil)
	return !g.stopped
}

// stop ends the guardian.
func (g *guardians) stop() {
	g.mu.Lock()
	g.stopped = true
	_ = unix.Kill(g.pid, unix.SIGKILL) // not reaped without the lock: it is still that one
	g.mu.Unlock()
	<-g.done
}

// clone starts the guardian with every signal blocked: the handlers are Go's, and
// there is no Go to run them.
func clone(calls *guardianCalls) (pid int, errno syscall.Errno) {
	goruntime.LockOSThread()
	defer goruntime.UnlockOSThread()
	var all, before unix.Sigset_t
	for i := range all.Val {
		all.Val[i] = ^all.Val[i]
	}
	if err := unix.PthreadSigmask(unix.SIG_SETMASK, &all, &before); err != nil {
		return 0, syscall.EINVAL
	}
	defer func() { _ = unix.PthreadSigmask(unix.SIG_SETMASK, &before, nil) }()
	return cloneGuardian(calls)
}

// cloneGuardian returns in the pager alone. Like the standard library's
// forkAndExecInChild it must not grow the stack, for in the child the locks of
// Go's runtime are as some other thread left them.
//
//go:norace
//go:nosplit
func cloneGuardian(calls *guardianCalls) (pid int, errno syscall.Errno) {
	r, _, errno := syscall.RawSyscall6(syscall.SYS_CLONE, unix.CLONE_FILES|uintptr(syscall.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 || r != 0 {
		return int(r), errno
	}
	// The guardian.
	_, _, _ = syscall.RawSyscall6(syscall.SYS_PRCTL, unix.PR_SET_NAME, uintptr(unsafe.Pointer(calls.name)), 0, 0, 0, 0)
	for {
		n, _, _ := syscall.RawSyscall6(unix.SYS_PPOLL, uintptr(unsafe.Pointer(calls.poll)), 1, 0, 0, 0, 0)
		if n == 1 {
			break
		}
	}
	// The pager is dead, and nobody else changes the table now. What holds the
	// workload's memory must outlive the exec.
	for fd := uintptr(0); fd < maxFDs; fd++ {
		_, _, _ = syscall.RawSyscall(unix.SYS_FCNTL, fd, unix.F_SETFD, 0)
	}
	for {
		_, _, _ = syscall.RawSyscall(syscall.SYS_EXECVE, uintptr(unsafe.Pointer(calls.path)), uintptr(unsafe.Pointer(calls.argv)), uintptr(unsafe.Pointer(calls.envp)))
		// Out of memory, probably. To wait is safe: the workload stands still
		// where its memory is missing.
		_, _, _ = syscall.RawSyscall(syscall.SYS_NANOSLEEP, uintptr(unsafe.Pointer(calls.pause)), 0, 0)
	}
}

// avenge is what a guardian becomes when the pager is dead.
func avenge() error {
	_ = setName(guardianName)
	var cfg guardianConfig
	if err := json.Unmarshal([]byte(os.Getenv(guardianEnv)), &cfg); err != nil {
		return fmt.Errorf("%s: %w", guardianEnv, err)
	}
	cgroups(cfg.Cgroups).kill()
	report := newReporter(os.NewFile(uintptr(cfg.Control), "control"))
	return report.send(message{Event: eventFailed, Error: errPagerDied.Error()})
}

func setName(name string) error {
	p, err := unix.BytePtrFromString(name)
	if err != nil {
		return err
	}
	return unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(p)), 0, 0, 0)
}
