package runtime

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
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
		namespaces []specs.LinuxNamespace
		want       bool
	}{
		"the host's":            {nil, false},
		"a new one":             {[]specs.LinuxNamespace{{Type: specs.NetworkNamespace}}, true},
		"somebody's":            {[]specs.LinuxNamespace{{Type: specs.NetworkNamespace, Path: "/run/netns/x"}}, false},
		"of a user namespace":   {[]specs.LinuxNamespace{{Type: specs.UserNamespace}, {Type: specs.NetworkNamespace}}, false},
		"beside a foreign user": {[]specs.LinuxNamespace{{Type: specs.UserNamespace, Path: "/proc/1/ns/user"}, {Type: specs.NetworkNamespace}}, true},
	} {
		if got := OwnNetwork(specOf(tt.namespaces...)); got != tt.want {
			t.Errorf("%s: %v, want %v", name, got, tt.want)
		}
	}
}

func TestCRIUOptions(t *testing.T) {
	user := filepath.Join(t.TempDir(), "user.conf")
	if err := os.WriteFile(user, []byte("log-level 2\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/net", &st); err != nil {
		t.Fatal(err)
	}
	external := fmt.Sprintf("external net[%d]:extRootNetNS\n", st.Ino)
	const ghost = "ghost-limit 1073741824\n"
	for name, tt := range map[string]struct {
		namespaces []specs.LinuxNamespace
		pid        int
		options    CRIUOptions
		config     string
		mode       string
		work       string // beside the dump, unless empty
	}{
		"nothing asked":   {nil, 0, CRIUOptions{}, ghost + "tcp-close\n", "ignore", ""},
		"own connections": {nil, 0, CRIUOptions{TCP: TCPEstablished}, ghost, "ignore", ""},
		"no connections":  {nil, 0, CRIUOptions{TCP: TCPError, WorkDir: "/w"}, ghost, "ignore", "/w"},
		"a dump of a network namespace": {
			[]specs.LinuxNamespace{{Type: specs.NetworkNamespace}}, os.Getpid(), CRIUOptions{TCP: TCPError, CanSkipNetworkLock: true}, ghost + "network-lock skip\n" + external, "ignore", "",
		},
		"an older CRIU": {
			[]specs.LinuxNamespace{{Type: specs.NetworkNamespace}}, os.Getpid(), CRIUOptions{TCP: TCPError}, ghost + external, "ignore", "",
		},
		"a dump with connections": {
			[]specs.LinuxNamespace{{Type: specs.NetworkNamespace}}, os.Getpid(), CRIUOptions{TCP: TCPEstablished, CanSkipNetworkLock: true}, ghost + external, "ignore", "",
		},
		"a restore of one":   {[]specs.LinuxNamespace{{Type: specs.NetworkNamespace}}, 0, CRIUOptions{TCP: TCPError}, ghost, "ignore", ""},
		"a cgroup namespace": {[]specs.LinuxNamespace{{Type: specs.CgroupNamespace}}, 0, CRIUOptions{TCP: TCPError}, ghost, "soft", ""},
		// Last, because the later line wins.
		"the user's file": {nil, 0, CRIUOptions{ConfigFile: user}, ghost + "tcp-close\nlog-level 2\n", "ignore", ""},
	} {
		t.Run(name, func(t *testing.T) {
			c := &Container{cfg: Config{ID: "c", Bundle: t.TempDir()}, spec: specOf(tt.namespaces...)}
			got, err := c.criuOptions("/dump", tt.options, tt.pid)
			if err != nil {
				t.Fatal(err)
			}
			config, err := os.ReadFile(c.cfg.criuConfig())
			if err != nil || string(config) != tt.config {
				t.Errorf("configuration file: %q, %v; want %q", config, err, tt.config)
			}
			work := tt.work
			if work == "" {
				work = "/dump"
			}
			if got.ImagesDirectory != "/dump" || got.WorkDirectory != work {
				t.Errorf("directories %s and %s, want /dump and %s", got.ImagesDirectory, got.WorkDirectory, work)
			}
			if got.ManageCgroupsMode != tt.mode {
				t.Errorf("cgroup mode %s, want %s", got.ManageCgroupsMode, tt.mode)
			}
			if want := tt.options.TCP == TCPEstablished; got.TcpEstablished != want {
				t.Errorf("tcp-established %v, want %v", got.TcpEstablished, want)
			}
		})
	}
	c := &Container{cfg: Config{ID: "c", Bundle: t.TempDir()}, spec: specOf()}
	if _, err := c.criuOptions("/dump", CRIUOptions{ConfigFile: user + "x"}, 0); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), user+"x") {
		t.Errorf("a configuration file that is not there: %v", err)
	}
}
