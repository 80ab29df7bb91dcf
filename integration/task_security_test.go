package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/contrib/apparmor"
	"github.com/containerd/containerd/v2/contrib/seccomp"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crac-shim/crac/integration/harness"
)

func TestSeccomp(tb *testing.T) {
	t := setup(tb)
	// unshare of a user namespace needs no capability: only the profile forbids it.
	probe := "unshare -U true && echo unshared; grep Seccomp: /proc/self/status | tr -d '\\t'"
	if out := outputOf(t, sh(probe)); out != "unshared\nSeccomp:0\n" {
		t.Errorf("without a profile: %q", out)
	}
	r := runContainer(t, sh(probe, seccomp.WithDefaultProfile()))
	if r.out != "Seccomp:2\n" || !strings.Contains(r.err, "Operation not permitted") {
		t.Errorf("with the default profile: %+v", r)
	}
	// Execs are confined as well.
	n := newContainer(t, sh("sleep 1000", seccomp.WithDefaultProfile())).start()
	if r := n.exec(probe); r.out != "Seccomp:2\n" {
		t.Errorf("exec with the default profile: %+v", r)
	}
	// A rule with its own errno, and one with an argument.
	eperm := uint(syscall.EXDEV)
	rules := withSpec(func(s *oci.Spec) {
		s.Linux.Seccomp = &specs.LinuxSeccomp{
			DefaultAction: specs.ActAllow,
			Architectures: []specs.Arch{specs.ArchX86_64, specs.ArchAARCH64},
			Syscalls:      []specs.LinuxSyscall{{Names: []string{"mkdir", "mkdirat"}, Action: specs.ActErrno, ErrnoRet: &eperm}},
		}
	})
	r = runContainer(t, sh("mkdir /tmp/x; touch /tmp/y && echo touched", rules))
	if r.out != "touched\n" || !strings.Contains(r.err, "ross-device") {
		t.Errorf("with a rule for mkdir: %+v", r)
	}
}

func TestCapabilities(tb *testing.T) {
	t := setup(tb)
	probe := "grep Cap /proc/self/status | tr -d '\\t'"
	if out := outputOf(t, sh(probe, oci.WithCapabilities([]string{"CAP_CHOWN"}))); out != "CapInh:0000000000000000\nCapPrm:0000000000000001\nCapEff:0000000000000001\nCapBnd:0000000000000001\nCapAmb:0000000000000000\n" {
		t.Errorf("CAP_CHOWN only: %s", out)
	}
	r := runContainer(t, sh("chown nobody /tmp", oci.WithCapabilities(nil)))
	if r.code == 0 {
		t.Errorf("chown without any capability works: %+v", r)
	}
	n := newContainer(t, sh("sleep 1000", oci.WithCapabilities([]string{"CAP_CHOWN"}))).start()
	if r := n.exec("grep CapEff /proc/self/status | tr -d '\\t'"); r.out != "CapEff:0000000000000001\n" {
		t.Errorf("exec: %+v", r)
	}
	// Another user has none unless they are ambient.
	out := outputOf(t, sh("id -u; grep -E 'CapEff|CapAmb' /proc/self/status | tr -d '\\t'", oci.WithUIDGID(1000, 1000), oci.WithAmbientCapabilities([]string{"CAP_NET_BIND_SERVICE"})))
	if out != "1000\nCapEff:0000000000000400\nCapAmb:0000000000000400\n" {
		t.Errorf("ambient: %q", out)
	}
}

func TestUser(tb *testing.T) {
	t := setup(tb)
	out := outputOf(t, sh("id -u; id -g; id -G; umask; pwd", oci.WithUIDGID(1234, 2345), oci.WithAppendAdditionalGroups("65534"), oci.WithUmask(0o027), oci.WithProcessCwd("/tmp")))
	if out != "1234\n2345\n2345 65534\n0027\n/tmp\n" {
		t.Errorf("user: %q", out)
	}
}

func TestUserNamespace(tb *testing.T) {
	t := setup(tb)
	img, err := t.ImportImage(t.Ctx, "busybox")
	if err != nil {
		t.Fatal(err)
	}
	maps := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	for name, snapshot := range map[string]func(id string) containerd.NewContainerOpts{
		"remapped snapshot": func(id string) containerd.NewContainerOpts {
			return containerd.WithUserNSRemappedSnapshot(id, img, maps, maps)
		},
		"idmapped mounts": func(id string) containerd.NewContainerOpts {
			return containerd.WithNewSnapshot(id, img, containerd.WithUserNSRemapperLabels(maps, maps))
		},
	} {
		id := newID(t)
		c := sh("cat /proc/self/uid_map | tr -s ' '; touch /root/file && stat -c %u /root/file /bin/busybox; sleep 1000", oci.WithUserNamespace(maps, maps))
		c.id, c.container = id, []containerd.NewContainerOpts{snapshot(id)}
		n := newContainer(t, c).start()
		t.Eventually("output with "+name, func() bool { return strings.Count(n.out.String(), "\n") == 3 || n.err.String() != "" })
		if out := n.out.String(); out != " 0 100000 65536\n0\n0\n" {
			t.Errorf("%s: inside: %q, %q", name, out, n.err)
		}
		var st syscall.Stat_t
		if err := syscall.Stat(fmt.Sprintf("/proc/%d", n.task.Pid()), &st); err != nil || st.Uid != 100000 {
			t.Errorf("%s: on the host the process belongs to %d (%v)", name, st.Uid, err)
		}
		if r := n.exec("id -u; cat /proc/self/uid_map | tr -s ' '"); r.out != "0\n 0 100000 65536\n" {
			t.Errorf("%s: exec: %+v", name, r)
		}
		n.kill(syscall.SIGKILL)
		n.wait()
		n.deleteTask()
	}
}

func TestReadonlyRoot(tb *testing.T) {
	t := setup(tb)
	dir, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	r := runContainer(t, sh("touch /file; touch /mnt/file && touch /tmp/file && echo elsewhere",
		oci.WithRootFSReadonly(), oci.WithMounts([]specs.Mount{
			{Type: "bind", Source: dir, Destination: "/mnt", Options: []string{"rbind", "rw"}},
			{Type: "tmpfs", Source: "tmpfs", Destination: "/tmp"},
		})))
	if r.out != "elsewhere\n" || !strings.Contains(r.err, "Read-only file system") {
		t.Errorf("read-only root: %+v", r)
	}
	if _, err := os.Stat(filepath.Join(dir, "file")); err != nil {
		t.Error(err)
	}
}

func TestMounts(tb *testing.T) {
	t := setup(tb)
	dir, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("content\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	r := runContainer(t, sh(`cat /ro/file /one-file
		touch /ro/new || echo read-only
		grep ' /t ' /proc/mounts | grep -o size=4096k
		touch /t/x && echo written
		df -k /dev/shm | grep -c shm
		cat /proc/kcore | wc -c
		echo 1 > /proc/sys/kernel/panic || echo masked`,
		oci.WithMounts([]specs.Mount{
			{Type: "bind", Source: dir, Destination: "/ro", Options: []string{"rbind", "ro"}},
			{Type: "bind", Source: filepath.Join(dir, "file"), Destination: "/one-file", Options: []string{"bind"}},
			{Type: "tmpfs", Source: "tmpfs", Destination: "/t", Options: []string{"size=4m", "nosuid"}},
		})))
	if r.out != "content\ncontent\nread-only\nsize=4096k\nwritten\n1\n0\nmasked\n" {
		t.Errorf("mounts: %+v", r)
	}
}

func TestRootfsPropagation(tb *testing.T) {
	t := setup(tb)
	for value, want := range map[string]string{"private": "none", "slave": "none", "shared": "shared"} {
		out := outputOf(t, sh("grep ' / / ' /proc/self/mountinfo | grep -o 'shared' || echo none",
			withSpec(func(s *oci.Spec) { s.Linux.RootfsPropagation = value })))
		if strings.TrimSpace(out) != want {
			t.Errorf("rootfs propagation %s: %q, want %q", value, out, want)
		}
	}
}

// TestHooks: each kind runs once, at its time, and learns of the container by its state.
func TestHooks(tb *testing.T) {
	t := setup(tb)
	dir, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(dir, "log")
	hook := func(name string) []specs.Hook {
		return []specs.Hook{{
			Path: "/bin/sh",
			Args: []string{"sh", "-c", `s=$(cat); status=$(echo "$s" | grep -o '"status": *"[a-z]*"' | head -1 | sed 's/.*"\([a-z]*\)"$/\1/'); case $s in *'"id":"'"$ID"'"'*) id=ok;; *) id=$s;; esac; echo ` + name + ` $status $id >> ` + log},
			Env:  []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "ID=" + "hooks"},
		}}
	}
	id := newID(t)
	c := sh("sleep 1000", withSpec(func(s *oci.Spec) {
		s.Hooks = &specs.Hooks{CreateRuntime: hook("createRuntime"), Poststart: hook("poststart"), Poststop: hook("poststop")}
		for _, hooks := range [][]specs.Hook{s.Hooks.CreateRuntime, s.Hooks.Poststart, s.Hooks.Poststop} {
			hooks[0].Env[1] = "ID=" + id
		}
	}))
	c.id = id
	read := func() string {
		b, err := os.ReadFile(log)
		if err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		return string(b)
	}
	n := newContainer(t, c)
	if got := read(); got != "" {
		t.Errorf("before Create: %q", got)
	}
	n.create()
	// The specification wants poststart after the start; runc runs it at the end of its create.
	const first = "createRuntime creating ok\n"
	if got := read(); !strings.HasPrefix(got, first) {
		t.Errorf("after Create: %q", got)
	}
	if err := n.task.Start(t.Ctx); err != nil {
		t.Fatal(err)
	}
	started := func() bool {
		rest, ok := strings.CutPrefix(read(), first)
		return ok && (rest == "poststart created ok\n" || rest == "poststart running ok\n")
	}
	t.Eventually("poststart; there is "+read(), started)
	before := read()
	n.kill(syscall.SIGKILL)
	n.wait()
	n.deleteTask()
	if got := strings.TrimPrefix(read(), before); got != "poststop stopped ok\n" {
		t.Errorf("after Delete: %q", got)
	}
	// A hook that fails, fails the Create.
	c = sh("sleep 1000", withSpec(func(s *oci.Spec) {
		s.Hooks = &specs.Hooks{CreateRuntime: []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", "echo no-such-luck >&2; exit 1"}}}}
	}))
	if err := newContainer(t, c).tryCreate(); err == nil || !strings.Contains(err.Error(), "no-such-luck") {
		t.Errorf("a failing hook: %v", err)
	}
}

func TestProcessLimits(tb *testing.T) {
	t := setup(tb)
	out := outputOf(t, sh(`ulimit -Sn; ulimit -Hn; ulimit -Sc; cat /proc/self/oom_score_adj; grep NoNewPrivs /proc/self/status | tr -d '\t'; hostname; cat /proc/sys/kernel/domainname; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; echo $FOO`,
		oci.WithRlimit(&specs.POSIXRlimit{Type: "RLIMIT_NOFILE", Soft: 333, Hard: 444}),
		oci.WithRlimit(&specs.POSIXRlimit{Type: "RLIMIT_CORE", Soft: 0, Hard: 0}),
		oci.WithHostname("some-host"), oci.WithDomainname("some.domain"), oci.WithEnv([]string{"FOO=bar"}),
		withSpec(func(s *oci.Spec) {
			score := 321
			s.Process.OOMScoreAdj = &score
			s.Process.Rlimits = append(s.Process.Rlimits, specs.POSIXRlimit{Type: "RLIMIT_NOFILE", Soft: 333, Hard: 444})
			seen := map[string]specs.POSIXRlimit{}
			for _, l := range s.Process.Rlimits {
				seen[l.Type] = l
			}
			s.Process.Rlimits = nil
			for _, l := range seen {
				s.Process.Rlimits = append(s.Process.Rlimits, l)
			}
			s.Linux.Sysctl = map[string]string{"net.ipv4.ip_unprivileged_port_start": "77"}
		})))
	if out != "333\n444\n0\n321\nNoNewPrivs:1\nsome-host\nsome.domain\n77\nbar\n" {
		t.Errorf("limits: %q", out)
	}
	if out := outputOf(t, sh("grep NoNewPrivs /proc/self/status | tr -d '\\t'", oci.WithNewPrivileges)); out != "NoNewPrivs:0\n" {
		t.Errorf("new privileges allowed: %q", out)
	}
}

func TestAppArmor(tb *testing.T) {
	t := setup(tb)
	profile := apparmorProfile(t)
	out := outputOf(t, sh("cat /proc/self/attr/current", oci.WithApparmorProfile(profile)))
	if strings.TrimSpace(out) != profile+" (enforce)" {
		t.Errorf("the profile inside is %q", out)
	}
}

// apparmorProfile loads containerd's profile under a name of its own, until the end of the test.
func apparmorProfile(t *harness.T) string {
	t.Helper()
	if b, err := os.ReadFile("/sys/module/apparmor/parameters/enabled"); err != nil || strings.TrimSpace(string(b)) != "Y" {
		hostLacks(t, "this host's kernel does not have AppArmor enabled")
	}
	if _, err := exec.LookPath("apparmor_parser"); err != nil {
		hostLacks(t, "AppArmor is there, but not its parser: %v", err)
	}
	profile := "crac-e2e-" + newID(t)
	if err := apparmor.LoadDefaultProfile(profile); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile("/sys/kernel/security/apparmor/.remove", []byte(profile), 0); err != nil {
			t.Errorf("remove profile %s: %v", profile, err)
		}
	})
	return profile
}
