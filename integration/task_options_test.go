package integration

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go/features"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/crac-shim/crac/integration/harness"
)

// withOptions is a container with runtime options.
func withOptions(o any, c config) config {
	c.runtimeOptions = o
	return c
}

func TestOptionRoot(tb *testing.T) {
	t := setup(tb)
	root, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	n := newContainer(t, withOptions(&options.Options{Root: root}, sh("sleep 1000"))).start()
	find := func() (found []string) {
		if err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
			if err == nil && e.Name() == n.ID() {
				found = append(found, p)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		return found
	}
	if found := find(); len(found) == 0 {
		t.Errorf("no state of %s lies below %s", n.ID(), root)
	}
	if r := n.exec("echo ok"); r.out != "ok\n" {
		t.Errorf("exec: %+v", r)
	}
	n.remove()
	if found := find(); len(found) > 0 {
		t.Errorf("left behind: %v", found)
	}
}

func TestOptionIoOwner(tb *testing.T) {
	t := setup(tb)
	// libcontainer gives the streams to the process's own user, and leaves the group.
	out := outputOf(t, withOptions(&options.Options{IoUid: 1234, IoGid: 2345}, sh("stat -L -c %g /proc/self/fd/1 /proc/self/fd/2")))
	if out != "2345\n2345\n" {
		t.Errorf("the groups of stdout and stderr are %q", out)
	}
	// That is what lets a workload that is not root open them again.
	out = outputOf(t, withOptions(&options.Options{IoUid: 1234, IoGid: 2345}, sh("echo again > /dev/stdout", oci.WithUIDGID(1234, 2345))))
	if out != "again\n" {
		t.Errorf("/dev/stdout, opened again: %q", out)
	}
}

func TestOptionShimCgroup(tb *testing.T) {
	t := setup(tb)
	id := newID(t)
	path := "/" + t.Namespace + "/shims"
	roots, err := harness.CgroupRoots()
	if err != nil {
		t.Fatal(err)
	}
	remove := func() (left []string) {
		for _, r := range roots {
			if p := filepath.Join(r, path); os.Remove(p) != nil {
				if _, err := os.Stat(p); err == nil {
					left = append(left, p)
				}
			}
		}
		return left
	}
	t.Cleanup(func() { remove() })
	for _, r := range roots {
		if err := os.MkdirAll(filepath.Join(r, path), 0o755); err != nil {
			t.Fatal(err)
		}
		// A new cpuset of cgroup v1 is empty, and nothing may enter it.
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
			for _, p := range []string{filepath.Join(r, t.Namespace, f), filepath.Join(r, path, f)} {
				b, err := os.ReadFile(filepath.Join(r, f))
				if err != nil || harness.CgroupV2() {
					continue
				}
				if err := os.WriteFile(p, b, 0o644); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	c := withOptions(&options.Options{ShimCgroup: path}, sh("sleep 1000"))
	c.id = id
	n := newContainer(t, c).start()
	pid, err := t.ShimPID(id)
	if err != nil {
		t.Fatal(err)
	}
	if got := cgroupOf(t, pid); got != path {
		t.Errorf("the shim is in cgroup %s, want %s", got, path)
	}
	if got := cgroupOf(t, int(n.task.Pid())); got == path {
		t.Error("the workload is in the shim's cgroup")
	}
	n.kill(syscall.SIGKILL)
	n.wait()
	n.deleteTask()
	left := waitEmpty(remove)
	if len(left) > 0 {
		t.Errorf("something is still in %v", left)
	}
}

// TestOptionNoPivotRoot: without pivot_root the host's files stay in the container's mount namespace,
// below its own root, and are what is found there once that is taken off.
func TestOptionNoPivotRoot(tb *testing.T) {
	t := setup(tb)
	for _, none := range []bool{false, true} {
		n := newContainer(t, withOptions(&options.Options{NoPivotRoot: none}, sh("sleep 1000", oci.WithAddedCapabilities([]string{"CAP_SYS_ADMIN"})))).start()
		if r := n.exec("echo in && umount -l /"); r != (result{0, "in\n", ""}) {
			t.Errorf("NoPivotRoot=%v: %+v", none, r)
		}
		host := filepath.Join(t.Dir, "containerd.toml")
		_, err := harness.Run(t.Ctx, t.Command(t.Ctx, "nsenter", fmt.Sprintf("--mount=/proc/%d/ns/mnt", n.task.Pid()), "/bin/sh", "-c", "test -e "+host))
		if below := err == nil; below != none {
			t.Errorf("NoPivotRoot=%v: the host's files are below the container's: %v (%v)", none, below, err)
		}
		n.remove()
	}
}

func TestOptionNoNewKeyring(tb *testing.T) {
	t := setup(tb)
	if _, err := os.Stat("/proc/keys"); err != nil {
		t.Skipf("this kernel has no keyrings: %v", err)
	}
	for _, none := range []bool{false, true} {
		c := withOptions(&options.Options{NoNewKeyring: none}, sh("cat /proc/keys", oci.WithMaskedPaths(nil)))
		c.id = newID(t)
		out := outputOf(t, c)
		if has := strings.Contains(out, "_ses."+c.id); has == none {
			t.Errorf("NoNewKeyring=%v: the container has these keys:\n%s", none, out)
		}
	}
}

// TestOptionCriuPaths: CRIU's logs go where the client says, and the dump comes from there.
func TestOptionCriuPaths(tb *testing.T) {
	t := setup(tb)
	onlyCrac(t)
	dir, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	dump, work, again := filepath.Join(dir, "dump"), filepath.Join(dir, "work"), filepath.Join(dir, "again")
	logged := func(file string) {
		t.Helper()
		if _, err := os.Stat(file); err != nil {
			t.Error(err)
		}
	}
	original := newContainer(t, withOptions(&options.Options{CriuWorkPath: work}, sh(tickNoFile))).start()
	t.Eventually("the workload ticks", func() bool { return strings.Contains(original.out.String(), "tick 3\n") })
	t.CtrOK("tasks", "checkpoint", "--image-path", dump, original.ID())
	logged(filepath.Join(work, "dump.log"))

	clone := newContainer(t, withOptions(&options.Options{CriuImagePath: dump, CriuWorkPath: again}, sh(tickNoFile))).start()
	t.Eventually("the clone ticks", func() bool { return strings.Count(clone.out.String(), "\n") > 2 })
	if strings.Contains(clone.out.String(), "tick 1\n") {
		t.Errorf("the clone started cold:\n%s", clone.out)
	}
	logged(filepath.Join(again, "restore.log"))

	// A client that names a dump wants that, and not a cold start.
	none := newContainer(t, withOptions(&options.Options{CriuImagePath: filepath.Join(dir, "none")}, sh("true")))
	if err := none.tryCreate(); err == nil || !strings.Contains(err.Error(), filepath.Join(dir, "none")) {
		t.Errorf("a dump that is not there: %v", err)
	}
	none.remove()
	clone.remove()
	original.remove()
}

func TestOptionsRefused(tb *testing.T) {
	t := setup(tb)
	onlyCrac(t)
	for _, c := range []struct {
		name string
		opts any
		want string
	}{
		{"BinaryName", &options.Options{BinaryName: "crun"}, "BinaryName"},
		{"unknown type", wrapperspb.String("surprise"), "StringValue"},
		{"BinaryName in TOML", &runtimeoptions.Options{TypeUrl: "x", ConfigBody: []byte(`BinaryName = "crun"`)}, "BinaryName"},
		{"no TOML", &runtimeoptions.Options{ConfigBody: []byte(`{"not": "toml"`)}, "runtime options"},
		{"a file that is not there", &runtimeoptions.Options{ConfigPath: "/no/such/file"}, "/no/such/file"},
	} {
		n := newContainer(t, withOptions(c.opts, sh("true")))
		if err := n.tryCreate(); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: the error does not name %q: %v", c.name, c.want, err)
		}
		n.remove()
	}
}

func TestRuntimeOptions(tb *testing.T) {
	t := setup(tb)
	onlyCrac(t)
	dir, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "options.toml")
	if err := os.WriteFile(file, []byte("IoGid = 99\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		opts *runtimeoptions.Options
		want string
	}{
		"empty": {&runtimeoptions.Options{}, "0\n"},
		"body":  {&runtimeoptions.Options{TypeUrl: "runtimeoptions.v1.Options", ConfigBody: []byte("IoGid = 77\n")}, "77\n"},
		"path":  {&runtimeoptions.Options{ConfigPath: file}, "99\n"},
	} {
		if out := outputOf(t, withOptions(c.opts, sh("stat -L -c %g /proc/self/fd/1"))); out != c.want {
			t.Errorf("%s: the group of stdout is %q, want %q", name, out, c.want)
		}
	}
	// As a user gives them.
	id := newID(t)
	out := t.CtrOK("run", "--rm", "--runtime", testRuntime, "--runtime-config-path", file, harness.ImageRef("busybox"), id, "stat", "-L", "-c", "%g", "/proc/self/fd/1")
	if out != "99\n" {
		t.Errorf("ctr run --runtime-config-path: the group of stdout is %q", out)
	}
	t.NoLeftovers(id)
}

func TestRuntimeInfo(tb *testing.T) {
	t := setup(tb)
	info, err := t.Client.RuntimeInfo(t.Ctx, testRuntime, nil)
	if err != nil {
		t.Fatal(err)
	}
	if info.Name != testRuntime || info.Version.Version == "" {
		t.Errorf("the runtime is %q, version %q", info.Name, info.Version.Version)
	}
	f, ok := info.Features.(*features.Features)
	if !ok {
		t.Fatalf("features of type %T", info.Features)
	}
	for _, want := range []string{"rro", "ro", "rbind"} {
		if !slices.Contains(f.MountOptions, want) {
			t.Errorf("%q is not among the mount options %v", want, f.MountOptions)
		}
	}
	if !slices.Contains(f.Hooks, "createRuntime") {
		t.Errorf("hooks: %v", f.Hooks)
	}
	if f.Linux == nil || !slices.Contains(f.Linux.Namespaces, "user") || !slices.Contains(f.Linux.Capabilities, "CAP_CHOWN") ||
		f.Linux.Seccomp == nil || f.Linux.Seccomp.Enabled == nil || !*f.Linux.Seccomp.Enabled || f.Linux.Cgroup == nil || f.Linux.Cgroup.V2 == nil || !*f.Linux.Cgroup.V2 {
		t.Errorf("linux: %+v", f.Linux)
	}
	// What they promise: a recursively read-only mount.
	dir, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	r := runContainer(t, sh("touch /mnt/x", func(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
		m := s.Mounts[0]
		m.Type, m.Source, m.Destination, m.Options = "bind", dir, "/mnt", []string{"rbind", "rro"}
		s.Mounts = append(s.Mounts, m)
		return nil
	}))
	if r.code == 0 || !strings.Contains(r.err, "Read-only") {
		t.Errorf("an rro mount: %+v", r)
	}
}

// TestOOMScoreWithoutCapability: to lower the score needs CAP_SYS_RESOURCE, which a daemon that
// itself runs in a container may lack. The container starts all the same, with a warning.
func TestOOMScoreWithoutCapability(tb *testing.T) {
	onlyCrac(tb)
	d := ownDaemon(tb, harness.Options{
		Need: []harness.Tool{harness.Shim}, Wrap: []string{"setpriv", "--bounding-set", "-sys_resource"},
	})
	t := d.For(tb, harness.TestLimit)
	out := outputOf(t, sh("cat /proc/self/oom_score_adj", withSpec(func(s *oci.Spec) {
		score := -500
		s.Process.OOMScoreAdj = &score
		s.Process.Rlimits = nil // to raise a hard limit needs the capability as well
	})))
	if out == "-500\n" {
		t.Error("the score was lowered without the capability: the test does not test")
	}
	if log := d.Log(); !strings.Contains(log, "oom_score_adj") {
		t.Errorf("no warning about the score %s:\n%s", fmt.Sprint(-500), last(log, 2000))
	}
}
