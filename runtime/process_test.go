package runtime

import (
	"errors"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/selinux/go-selinux"
	"golang.org/x/sys/unix"
)

func TestCheckProcess(t *testing.T) {
	good := func() *specs.Process { return &specs.Process{Args: []string{"true"}, Cwd: "/"} }
	for name, tt := range map[string]struct {
		process *specs.Process
		says    string
	}{
		"good":         {good(), ""},
		"none":         {nil, "no process"},
		"no directory": {func() *specs.Process { p := good(); p.Cwd = ""; return p }(), "process.cwd is empty"},
		"relative":     {func() *specs.Process { p := good(); p.Cwd = "a"; return p }(), `"a" is not an absolute path`},
		"no arguments": {func() *specs.Process { p := good(); p.Args = nil; return p }(), "process.args"},
	} {
		err := checkProcess(tt.process)
		if tt.says == "" && err != nil || tt.says != "" && (err == nil || !strings.Contains(err.Error(), tt.says)) {
			t.Errorf("%s: error is %v, want one that says %q", name, err, tt.says)
		}
		if _, nerr := processConfig(tt.process, Stdio{}); (nerr == nil) != (err == nil) {
			t.Errorf("%s: newProcess: %v, checkProcess: %v", name, nerr, err)
		}
	}
	p := good()
	p.SelinuxLabel = "a:b:c:d"
	if err := checkProcess(p); (err == nil) != selinux.GetEnabled() {
		t.Errorf("an SELinux label, with SELinux enabled: %v: %v", selinux.GetEnabled(), err)
	}
}

func TestNewProcess(t *testing.T) {
	spec := &specs.Process{
		Args: []string{"a", "b"}, Env: []string{"X=1"}, Cwd: "/w",
		User:            specs.User{UID: 1, GID: 2, AdditionalGids: []uint32{3, 4}},
		Capabilities:    &specs.LinuxCapabilities{Bounding: []string{"B"}, Effective: []string{"E"}, Inheritable: []string{"I"}, Permitted: []string{"P"}, Ambient: []string{"A"}},
		Rlimits:         []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 5, Hard: 6}, {Type: "RLIMIT_CORE"}},
		NoNewPrivileges: true, ApparmorProfile: "profile",
		Scheduler:       &specs.Scheduler{Policy: specs.SchedBatch},
		IOPriority:      &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_BE},
		ConsoleSize:     &specs.Box{Width: 80, Height: 24},
		ExecCPUAffinity: &specs.CPUAffinity{Initial: "0", Final: "0"},
	}
	stdin, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()

	lp, err := processConfig(spec, Stdio{Stdin: stdin})
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(lp.Args, spec.Args) || !reflect.DeepEqual(lp.Env, spec.Env) || lp.Cwd != "/w" {
		t.Errorf("args %v, env %v, cwd %s", lp.Args, lp.Env, lp.Cwd)
	}
	if lp.UID != 1 || lp.GID != 2 || !reflect.DeepEqual(lp.AdditionalGroups, []int{3, 4}) {
		t.Errorf("user %d, groups %d and %v", lp.UID, lp.GID, lp.AdditionalGroups)
	}
	if want := (&configs.Capabilities{Bounding: []string{"B"}, Effective: []string{"E"}, Inheritable: []string{"I"}, Permitted: []string{"P"}, Ambient: []string{"A"}}); !reflect.DeepEqual(lp.Capabilities, want) {
		t.Errorf("capabilities %+v", lp.Capabilities)
	}
	if want := []configs.Rlimit{{Type: unix.RLIMIT_NOFILE, Soft: 5, Hard: 6}, {Type: unix.RLIMIT_CORE}}; !reflect.DeepEqual(lp.Rlimits, want) {
		t.Errorf("limits %+v", lp.Rlimits)
	}
	if lp.NoNewPrivileges == nil || !*lp.NoNewPrivileges || lp.AppArmorProfile != "profile" || lp.Scheduler != spec.Scheduler || lp.IOPriority != spec.IOPriority || lp.CPUAffinity == nil {
		t.Errorf("confinement or scheduling is lost: %+v", lp)
	}
	// A nil *os.File in an interface is not a nil interface, and would be read from.
	if lp.Stdin != stdin || lp.Stdout != nil || lp.Stderr != nil || lp.ConsoleSocket != nil {
		t.Errorf("streams %v, %v, %v, console %v", lp.Stdin, lp.Stdout, lp.Stderr, lp.ConsoleSocket)
	}

	lp, err = processConfig(spec, Stdio{Stdin: stdin, Console: stdin})
	if err != nil {
		t.Fatal(err)
	}
	if lp.ConsoleSocket != stdin || lp.ConsoleWidth != 80 || lp.ConsoleHeight != 24 || lp.Stdin != nil {
		t.Errorf("console %v of %d×%d, stdin %v", lp.ConsoleSocket, lp.ConsoleWidth, lp.ConsoleHeight, lp.Stdin)
	}

	bad := *spec
	bad.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_LUCK"}}
	if _, err := processConfig(&bad, Stdio{}); err == nil || !strings.Contains(err.Error(), "RLIMIT_LUCK") {
		t.Errorf("an unknown limit: %v", err)
	}
	bad = *spec
	bad.ExecCPUAffinity = &specs.CPUAffinity{Initial: "nonsense"}
	if _, err := processConfig(&bad, Stdio{}); err == nil || !strings.Contains(err.Error(), "execCPUAffinity") {
		t.Errorf("an affinity that is none: %v", err)
	}
}

// What is signalled while a dump is made gets the signal after it.
func TestSignalAfterDump(t *testing.T) {
	r := reaper(t)
	cmd := exec.Command("/bin/sleep", "1000")
	release := r.Hold()
	if err := cmd.Start(); err != nil {
		release()
		t.Fatal(err)
	}
	p := newProcess(cmd.Process.Pid, cmd.Process.Wait, r)
	release()
	c := &Container{machine: machine{id: "c"}}
	c.mu.Lock() // as a dump does
	c.machine.set(Quiesced)
	if err := c.SignalProcess(p, unix.SIGTERM); err != nil {
		t.Error(err)
	}
	select {
	case <-p.Done():
		t.Error("the signal came during the dump")
	case <-time.After(50 * time.Millisecond): // enough to see it go wrong
	}
	c.machine.set(Running)
	c.mu.Unlock()
	<-p.Done()
	if got := p.Exit().Status; got != 128+int(unix.SIGTERM) {
		t.Errorf("it ended with %d", got)
	}
}

// Nothing is started beside what is left of a restore that could not be undone.
func TestCreateAfterHalfARestore(t *testing.T) {
	c := &Container{machine: machine{id: "c"}}
	c.machine.set(Quiesced)
	var state *StateError
	if _, err := c.Create(Stdio{}); !errors.As(err, &state) {
		t.Errorf("%v, want an error that names the state", err)
	}
}
