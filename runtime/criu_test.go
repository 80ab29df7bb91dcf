package runtime

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	criurpc "github.com/checkpoint-restore/go-criu/v7/rpc"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/runtime/inspect"
)

func writeLog(tb testing.TB, text string) string {
	tb.Helper()
	path := filepath.Join(tb.TempDir(), "restore.log")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		tb.Fatal(err)
	}
	return path
}

func TestLastErrors(t *testing.T) {
	for name, tt := range map[string]struct {
		log  string
		want []string
	}{
		"empty":        {"", nil},
		"no errors":    {"(00.001) Warn  (criu/a.c:1): careful\n(00.002) all right\n", nil},
		"one":          {"(00.000001) begin\n(00.012345)   1234: Error (criu/file.c:12): what went wrong\n", []string{"Error (criu/file.c:12): what went wrong"}},
		"unterminated": {"(00.1) Error (a.c:1): x", []string{"Error (a.c:1): x"}},
		"the last four": {
			"Error (a.c:1): 1\nError (a.c:2): 2\nError (a.c:3): 3\nfiller\nError (a.c:4): 4\nError (a.c:5): 5\nError (a.c:6): 6\n",
			[]string{"Error (a.c:3): 3", "Error (a.c:4): 4", "Error (a.c:5): 5", "Error (a.c:6): 6"},
		},
		"a harmless one": {"Error (criu/rlimit.c:1): Can't setup RLIMIT_NOFILE for self\nError (b.c:2): real\n", []string{"Error (b.c:2): real"}},
		"harmless ones push nothing out": {
			"Error (b.c:2): real\n" + strings.Repeat("Error (criu/rlimit.c:1): Can't setup RLIMIT_NOFILE for self\n", 9), []string{"Error (b.c:2): real"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if got := lastErrors(writeLog(t, tt.log)); !slices.Equal(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
	if got := lastErrors(filepath.Join(t.TempDir(), "none")); got != nil {
		t.Errorf("of a log that does not exist: %q", got)
	}
}

// The log is written by a program that works on foreign images.
func FuzzLastErrors(f *testing.F) {
	f.Add("(00.012345)   1234: Error (criu/file.c:12): what went wrong\n")
	f.Add("Error (Error (\x00\n\r\nError (")
	f.Add(strings.Repeat("Error (a): b\n", 100))
	f.Fuzz(func(t *testing.T, log string) {
		last := lastErrors(writeLog(t, log))
		if len(last) > maxLogErrors {
			t.Errorf("%d lines, at most %d are wanted", len(last), maxLogErrors)
		}
		for _, l := range last {
			if !strings.HasPrefix(l, "Error (") || strings.ContainsRune(l, '\n') || !strings.Contains(log, l) {
				t.Errorf("%q is no error line of the log", l)
			}
		}
	})
}

func TestCRIUError(t *testing.T) {
	cause := errors.New("criu failed: exit status 1")
	log := writeLog(t, "Error (criu/mount.c:7): no such mount\nError (criu/cr-restore.c:8): restoring failed\n")
	err := error(newCRIUError("restore", log, cause))
	want := "criu restore failed: Error (criu/mount.c:7): no such mount; Error (criu/cr-restore.c:8): restoring failed (log: " + log + ")"
	if err.Error() != want {
		t.Errorf("got  %s\nwant %s", err, want)
	}
	if !errors.Is(err, cause) {
		t.Error("the cause is lost")
	}
	// What CRIU repeats is said once, and with what can be done about it.
	full := "Error (criu/bfd.c:131): bfd: Error flushing image: No space left on device\n"
	says := newCRIUError("dump", writeLog(t, full+full), cause).Error()
	if strings.Count(says, "bfd.c") != 1 || !strings.Contains(says, "as much room") {
		t.Error(says)
	}
	// Without a log, the cause is all there is to say.
	err = newCRIUError("dump", "/nonexistent/dump.log", cause)
	if want := "criu dump failed: criu failed: exit status 1 (log: /nonexistent/dump.log)"; err.Error() != want {
		t.Errorf("got  %s\nwant %s", err, want)
	}
}

func TestEmptyNamespaces(t *testing.T) {
	for _, tt := range []struct {
		names []string
		mask  uint32
		bad   string
	}{
		{nil, 0, ""},
		{[]string{"network"}, unix.CLONE_NEWNET, ""},
		{[]string{"network", "network"}, unix.CLONE_NEWNET, ""},
		{[]string{"network", "pid"}, 0, `"pid"`},
		{[]string{""}, 0, `""`},
	} {
		mask, err := emptyNamespaces(tt.names)
		if tt.bad != "" {
			if err == nil || !strings.Contains(err.Error(), tt.bad) {
				t.Errorf("%q: error is %v, want one that names %s", tt.names, err, tt.bad)
			}
		} else if err != nil || mask != tt.mask {
			t.Errorf("%q: got %#x, %v; want %#x", tt.names, mask, err, tt.mask)
		}
	}
}

func specOf(namespaces ...specs.LinuxNamespace) *specs.Spec {
	return &specs.Spec{
		Root:    &specs.Root{Path: "rootfs"},
		Process: &specs.Process{Args: []string{"true"}, Cwd: "/"},
		Linux:   &specs.Linux{Namespaces: namespaces},
	}
}

func TestOwnNetwork(t *testing.T) {
	for name, tt := range map[string]struct {
		namespaces    []specs.LinuxNamespace
		own, external bool
	}{
		"the host's":            {nil, false, false},
		"a new one":             {[]specs.LinuxNamespace{{Type: specs.NetworkNamespace}}, true, true},
		"somebody's":            {[]specs.LinuxNamespace{{Type: specs.NetworkNamespace, Path: "/run/netns/x"}}, false, false},
		"of a user namespace":   {[]specs.LinuxNamespace{{Type: specs.UserNamespace}, {Type: specs.NetworkNamespace}}, true, false},
		"beside a foreign user": {[]specs.LinuxNamespace{{Type: specs.UserNamespace, Path: "/proc/1/ns/user"}, {Type: specs.NetworkNamespace}}, true, false},
	} {
		spec := specOf(tt.namespaces...)
		if got := OwnNetwork(spec); got != tt.own {
			t.Errorf("%s: its own: %v, want %v", name, got, tt.own)
		}
		if got := (&Container{spec: spec}).externalNetwork(); got != tt.external {
			t.Errorf("%s: external: %v, want %v", name, got, tt.external)
		}
	}
}

func TestCRIUOptions(t *testing.T) {
	user := filepath.Join(t.TempDir(), "user.conf")
	if err := os.WriteFile(user, []byte("log-level 2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cgroupNamespace := []specs.LinuxNamespace{{Type: specs.CgroupNamespace}}
	for name, tt := range map[string]struct {
		namespaces         []specs.LinuxNamespace
		options            CRIUOptions
		close, established bool
		mode               criurpc.CriuCgMode
		config             string
	}{
		"nothing asked":      {close: true},
		"own connections":    {options: CRIUOptions{TCP: TCPEstablished}, established: true},
		"no connections":     {options: CRIUOptions{TCP: TCPError}},
		"a cgroup namespace": {namespaces: cgroupNamespace, close: true, mode: criurpc.CriuCgMode_SOFT},
		"the user's file":    {options: CRIUOptions{ConfigFile: user}, close: true, config: user},
	} {
		t.Run(name, func(t *testing.T) {
			c := &Container{spec: specOf(tt.namespaces...)}
			got, err := c.criuOptions(tt.options, "x.log")
			if err != nil {
				t.Fatal(err)
			}
			if got.GetTcpClose() != tt.close || got.GetTcpEstablished() != tt.established || got.GetManageCgroupsMode() != tt.mode || got.GetConfigFile() != tt.config {
				t.Errorf("%v", got)
			}
			if got.GetLogFile() != "x.log" || got.GetGhostLimit() != inspect.GhostLimit {
				t.Errorf("%v", got)
			}
		})
	}
	c := &Container{spec: specOf()}
	if _, err := c.criuOptions(CRIUOptions{ConfigFile: user + "x"}, "x.log"); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), user+"x") {
		t.Errorf("a configuration file that is not there: %v", err)
	}
}

func TestDumpNamespaces(t *testing.T) {
	inode := func(kind string) uint64 {
		var st unix.Stat_t
		if err := unix.Stat("/proc/self/ns/"+kind, &st); err != nil {
			t.Fatal(err)
		}
		return st.Ino
	}
	network := fmt.Sprintf("net[%d]:extRootNetNS", inode("net"))
	pids := fmt.Sprintf("pid[%d]:extRootPidNS", inode("pid"))
	for name, tt := range map[string]struct {
		namespaces []specs.LinuxNamespace
		want       []string
	}{
		"the host's":             {},
		"a new network":          {[]specs.LinuxNamespace{{Type: specs.NetworkNamespace}}, []string{network}},
		"somebody's network":     {[]specs.LinuxNamespace{{Type: specs.NetworkNamespace, Path: "/proc/self/ns/net"}}, []string{network}},
		"of a user namespace":    {[]specs.LinuxNamespace{{Type: specs.UserNamespace}, {Type: specs.NetworkNamespace}}, nil},
		"new processes":          {[]specs.LinuxNamespace{{Type: specs.PIDNamespace}}, nil},
		"somebody's processes":   {[]specs.LinuxNamespace{{Type: specs.PIDNamespace, Path: "/proc/self/ns/pid"}}, []string{pids}},
		"somebody's host name":   {[]specs.LinuxNamespace{{Type: specs.UTSNamespace, Path: "/proc/self/ns/uts"}}, nil},
		"a pod's and new others": {[]specs.LinuxNamespace{{Type: specs.NetworkNamespace, Path: "/proc/self/ns/net"}, {Type: specs.PIDNamespace}}, []string{network}},
	} {
		t.Run(name, func(t *testing.T) {
			spec := specOf(tt.namespaces...)
			config := &configs.Config{}
			for _, ns := range tt.namespaces {
				config.Namespaces.Add(map[specs.LinuxNamespaceType]configs.NamespaceType{
					specs.NetworkNamespace: configs.NEWNET, specs.PIDNamespace: configs.NEWPID,
					specs.UTSNamespace: configs.NEWUTS, specs.UserNamespace: configs.NEWUSER,
				}[ns.Type], ns.Path)
			}
			d := &criuDump{c: &Container{spec: spec, config: config}, opts: &criurpc.CriuOpts{}}
			if err := d.namespaces(os.Getpid()); err != nil || !slices.Equal(d.opts.External, tt.want) {
				t.Errorf("%q, %v; want %q", d.opts.External, err, tt.want)
			}
		})
	}
	gone := &criuDump{
		c:    &Container{spec: specOf(), config: &configs.Config{Namespaces: configs.Namespaces{{Type: configs.NEWNET, Path: "/nonexistent/net"}}}},
		opts: &criurpc.CriuOpts{},
	}
	if err := gone.namespaces(1); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "/nonexistent/net") {
		t.Errorf("a namespace that is gone: %v", err)
	}
}
