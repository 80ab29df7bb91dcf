package runtime

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"unsafe"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func init() { SeccompHelper(os.Args[1:]) }

// forbidding is a profile that lets everything through but some calls.
func forbidding(calls ...string) *specs.LinuxSeccomp {
	return &specs.LinuxSeccomp{
		DefaultAction: specs.ActAllow,
		Syscalls:      []specs.LinuxSyscall{{Names: calls, Action: specs.ActErrno}},
	}
}

func TestCompileSeccomp(t *testing.T) {
	if f, err := CompileSeccomp(reaper(t), nil); f != nil || err != nil {
		t.Errorf("no profile gives %v, %v", f, err)
	}
	f, err := CompileSeccomp(reaper(t), forbidding("sethostname"))
	if err != nil {
		t.Fatal(err)
	}
	again, err := CompileSeccomp(reaper(t), forbidding("sethostname"))
	if err != nil || !bytes.Equal(f.Program, again.Program) || f.Flags != again.Flags {
		t.Errorf("the same profile gives another filter, or %v", err)
	}
	other, err := CompileSeccomp(reaper(t), forbidding("setdomainname"))
	if err != nil || bytes.Equal(f.Program, other.Program) {
		t.Errorf("another profile gives the same filter, or %v", err)
	}

	// It does what the profile says, in a thread of its own.
	errno := func(f *SeccompFilter) (host, domain error) {
		program := make([]unix.SockFilter, len(f.Program)/8)
		for i := range program {
			b := f.Program[8*i:]
			program[i] = unix.SockFilter{Code: binary.NativeEndian.Uint16(b), Jt: b[2], Jf: b[3], K: binary.NativeEndian.Uint32(b[4:])}
		}
		err := onOwnThread(func() error {
			if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
				return err
			}
			fprog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
			if _, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, uintptr(f.Flags), uintptr(unsafe.Pointer(&fprog))); errno != 0 {
				return errno
			}
			// More bytes than a name may have: the call itself fails, too.
			name := make([]byte, 100)
			host, domain = unix.Sethostname(name), unix.Setdomainname(name)
			return nil
		})
		if err != nil {
			t.Fatalf("the kernel does not take it: %v", err)
		}
		return host, domain
	}
	if host, domain := errno(f); !errors.Is(host, unix.EPERM) || !errors.Is(domain, unix.EINVAL) {
		t.Errorf("under the filter: sethostname %v, setdomainname %v", host, domain)
	}
	if host, domain := errno(other); !errors.Is(host, unix.EINVAL) || !errors.Is(domain, unix.EPERM) {
		t.Errorf("under the other: sethostname %v, setdomainname %v", host, domain)
	}
}

// A profile under which nothing at all can be done is compiled like any other.
func TestCompileDeadlySeccomp(t *testing.T) {
	f, err := CompileSeccomp(reaper(t), &specs.LinuxSeccomp{DefaultAction: specs.ActKillProcess, Syscalls: []specs.LinuxSyscall{{Names: []string{"getpid"}, Action: specs.ActAllow}}})
	if err != nil || len(f.Program) == 0 || len(f.Program)%8 != 0 {
		t.Errorf("%v, %v", f, err)
	}
}

func TestCompileSeccompFails(t *testing.T) {
	for name, tt := range map[string]struct {
		profile *specs.LinuxSeccomp
		want    string
	}{
		"unknown action": {&specs.LinuxSeccomp{DefaultAction: "SCMP_ACT_PRAY"}, "SCMP_ACT_PRAY"},
		"unknown flag":   {&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Flags: []specs.LinuxSeccompFlag{"F"}}, "F"},
		"listener":       {&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Syscalls: []specs.LinuxSyscall{{Names: []string{"mount"}, Action: specs.ActNotify}}}, "listener"},
		"listening":      {&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, ListenerPath: "/run/l"}, "listener"},
		// libseccomp refuses a rule that is the default anyway, but libcontainer
		// leaves it out; an action that is none gets as far as the helper.
		"no such architecture": {&specs.LinuxSeccomp{DefaultAction: specs.ActAllow, Architectures: []specs.Arch{"SCMP_ARCH_PDP11"}}, "PDP11"},
	} {
		if f, err := CompileSeccomp(reaper(t), tt.profile); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, %v; want an error with %q", name, f, err, tt.want)
		}
	}
}

// The helper is of no use to anybody else.
func TestSeccompHelperUntraced(t *testing.T) {
	for in, want := range map[string]string{`{"defaultAction":"SCMP_ACT_ALLOW"}`: "nobody has traced", "": "EOF"} {
		cmd := exec.Command("/proc/self/exe", seccompHelper)
		cmd.Stdin = strings.NewReader(in)
		var stderr bytes.Buffer
		cmd.Stderr = &stderr
		wait, err := reaper(t).Start(cmd)
		if err != nil {
			t.Fatal(err)
		}
		if err := wait(); err == nil || !strings.Contains(stderr.String(), want) {
			t.Errorf("%q: %v: %s", in, err, stderr.String())
		}
	}
	SeccompHelper(nil) // returns
	SeccompHelper([]string{"init"})
}
