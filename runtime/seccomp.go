package runtime

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"unsafe"

	"github.com/opencontainers/runc/libcontainer/seccomp"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// SeccompFilter is a filter as the kernel takes it (seccomp(2)).
type SeccompFilter struct {
	Program []byte // of struct sock_filter, one after the other
	Flags   uint32 // SECCOMP_FILTER_FLAG_*
}

// ErrSeccompListener is returned for a filter that asks another process: only
// who starts a workload can connect the two.
var ErrSeccompListener = errors.New("the request's seccomp filter asks a listener (SCMP_ACT_NOTIFY), which a restored workload cannot have; ask for another filter, or for a cold start with restore=never")

// CompileSeccomp gives the filter that libcontainer would install for a cold
// start, byte by byte. nil asks for none, and gets none.
//
// libcontainer only ever installs filters. So this program is started once more,
// to install it on itself (SeccompHelper), and the kernel is asked what it has
// got (ptrace(2), PTRACE_SECCOMP_GET_FILTER), as CRIU does in a dump. It takes
// some ten milliseconds, and CAP_SYS_ADMIN.
func CompileSeccomp(r *Subreaper, profile *specs.LinuxSeccomp) (*SeccompFilter, error) {
	// Not in the helper, for its errors: an action or a flag may be unknown.
	config, err := specconv.SetupSeccomp(profile)
	if err != nil {
		return nil, fmt.Errorf("seccomp filter: %w", err)
	}
	if config == nil {
		return nil, nil
	}
	if profile.ListenerPath != "" || profile.DefaultAction == specs.ActNotify ||
		slices.ContainsFunc(profile.Syscalls, func(s specs.LinuxSyscall) bool { return s.Action == specs.ActNotify }) {
		return nil, ErrSeccompListener
	}
	data, err := json.Marshal(profile)
	if err != nil {
		return nil, err
	}
	f := &SeccompFilter{}
	for _, flag := range config.Flags {
		switch flag {
		case specs.LinuxSeccompFlagLog:
			f.Flags |= unix.SECCOMP_FILTER_FLAG_LOG
		case specs.LinuxSeccompFlagSpecAllow:
			f.Flags |= unix.SECCOMP_FILTER_FLAG_SPEC_ALLOW
		}
	}
	defer r.Hold()()
	// Only the thread that starts a tracee may trace it.
	err = onOwnThread(func() error {
		f.Program, err = installedFilter(data)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("compile the seccomp filter of the request: %w", err)
	}
	return f, nil
}

// seccompHelper is the helper's name and only argument.
const seccompHelper = "seccomp-helper"

// SeccompHelper does CompileSeccomp's part in the other process, and does not
// return then. It must be called on the program's first thread, where init
// functions run.
func SeccompHelper(args []string) {
	if len(args) != 1 || args[0] != seccompHelper {
		return
	}
	install := func() error {
		var profile specs.LinuxSeccomp
		if err := json.NewDecoder(os.Stdin).Decode(&profile); err != nil {
			return err
		}
		config, err := specconv.SetupSeccomp(&profile)
		if err != nil {
			return err
		}
		_, err = seccomp.InitSeccomp(config)
		return err
	}
	err := install()
	// Whoever traces this has seen enough by now.
	fmt.Fprintln(os.Stderr, errors.Join(err, errors.New("nobody has traced this process")))
	os.Exit(1)
}

// installedFilter starts the helper, follows it from one system call to the next
// until it has a filter, and ends it.
func installedFilter(profile []byte) (program []byte, err error) {
	var stderr bytes.Buffer
	cmd := exec.Command("/proc/self/exe", seccompHelper)
	cmd.Stdin = bytes.NewReader(profile)
	cmd.Stderr = &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Ptrace: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	pid := cmd.Process.Pid
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // an error: it was killed
		if err != nil && stderr.Len() > 0 {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(stderr.String()))
		}
	}()
	var status unix.WaitStatus
	if _, err := wait4(pid, &status); err != nil { // it stops when it is executed
		return nil, err
	}
	if err := unix.PtraceSetOptions(pid, unix.PTRACE_O_EXITKILL|unix.PTRACE_O_TRACESYSGOOD); err != nil {
		return nil, os.NewSyscallError("ptrace", err)
	}
	for signal := 0; ; {
		if err := unix.PtraceSyscall(pid, signal); err != nil {
			return nil, os.NewSyscallError("ptrace", err)
		}
		if _, err := wait4(pid, &status); err != nil {
			return nil, err
		}
		if !status.Stopped() {
			return nil, fmt.Errorf("the helper has ended with %#x", uint32(status))
		}
		if signal = int(status.StopSignal()); signal != int(unix.SIGTRAP)|0x80 {
			continue // hand it on
		}
		signal = 0
		program, err := seccompFilter(pid)
		if err != nil || program != nil {
			return program, err
		}
	}
}

func wait4(pid int, status *unix.WaitStatus) (int, error) {
	for {
		n, err := unix.Wait4(pid, status, unix.WALL, nil)
		if !errors.Is(err, unix.EINTR) {
			return n, os.NewSyscallError("wait4", err)
		}
	}
}

// ptraceGetFilter is PTRACE_SECCOMP_GET_FILTER of linux/ptrace.h.
const ptraceGetFilter = 0x420c

// seccompFilter reads the first filter of a process that is stopped; nil if it
// has none yet.
func seccompFilter(pid int) ([]byte, error) {
	get := func(to unsafe.Pointer) (int, error) {
		n, _, errno := unix.Syscall6(unix.SYS_PTRACE, ptraceGetFilter, uintptr(pid), 0, uintptr(to), 0, 0)
		if errno != 0 {
			return 0, os.NewSyscallError("ptrace PTRACE_SECCOMP_GET_FILTER", errno)
		}
		return int(n), nil
	}
	n, err := get(nil)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil || n == 0 {
		return nil, err
	}
	program := make([]byte, n*int(unsafe.Sizeof(unix.SockFilter{})))
	_, err = get(unsafe.Pointer(&program[0]))
	return program, err
}
