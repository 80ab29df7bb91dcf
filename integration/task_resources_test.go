package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	v1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	v2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/containerd/api/types/runc/options"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crac-shim/crac/integration/harness"
	ours "github.com/crac-shim/crac/oci"
)

const mib = 1 << 20

// withSpec is a SpecOpts for what the oci package has no option for.
func withSpec(f func(s *oci.Spec)) oci.SpecOpts {
	return func(_ context.Context, _ oci.Client, _ *containers.Container, s *oci.Spec) error {
		f(s)
		return nil
	}
}

// cgroupFile reads a file of the container's cgroup; there is one name for each version.
func (c *ctn) cgroupFile(v1controller, v1name, v2name string) string {
	c.Helper()
	p := filepath.Join("/sys/fs/cgroup", v1controller, c.Namespace, c.ID(), v1name)
	if harness.CgroupV2() {
		p = filepath.Join("/sys/fs/cgroup", c.Namespace, c.ID(), v2name)
	}
	b, err := os.ReadFile(p)
	if err != nil {
		c.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

func TestStats(tb *testing.T) {
	t := setup(tb)
	n := newContainer(t, sh("sleep 1000 & i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo busy; wait", oci.WithMemoryLimit(64*mib), oci.WithPidsLimit(50))).start()
	t.Eventually("some work", func() bool { return n.out.String() == "busy\n" })
	m, err := n.task.Metrics(t.Ctx)
	if err != nil {
		t.Fatal(err)
	}
	data, err := typeurl.UnmarshalAny(m.Data)
	if err != nil {
		t.Fatal(err)
	}
	var memory, limit, cpu, pids, pidsLimit uint64
	switch s := data.(type) {
	case *v1.Metrics:
		if harness.CgroupV2() {
			t.Error("metrics of cgroup v1 on a host with v2")
		}
		memory, limit = s.Memory.Usage.Usage, s.Memory.Usage.Limit
		cpu, pids, pidsLimit = s.CPU.Usage.Total, s.Pids.Current, s.Pids.Limit
	case *v2.Metrics:
		if !harness.CgroupV2() {
			t.Error("metrics of cgroup v2 on a host with v1")
		}
		memory, limit = s.Memory.Usage, s.Memory.UsageLimit
		cpu, pids, pidsLimit = s.CPU.UsageUsec, s.Pids.Current, s.Pids.Limit
	default:
		t.Fatalf("metrics of type %T", data)
	}
	if m.ID != n.ID() || memory == 0 || memory > 64*mib || limit != 64*mib || cpu == 0 || pids != 2 || pidsLimit != 50 {
		t.Errorf("metrics of %s: memory %d of %d, cpu %d, %d of %d processes", m.ID, memory, limit, cpu, pids, pidsLimit)
	}
	if age := time.Since(m.Timestamp.AsTime()); age < 0 || age > time.Hour {
		t.Errorf("metrics from %v", m.Timestamp.AsTime())
	}
}

func TestUpdate(tb *testing.T) {
	t := setup(tb)
	n := newContainer(t, sh("sleep 1000", oci.WithMemoryLimit(64*mib), oci.WithCPUShares(512))).start()
	limit := func() string { return n.cgroupFile("memory", "memory.limit_in_bytes", "memory.max") }
	if got := limit(); got != strconv.Itoa(64*mib) {
		t.Errorf("the memory limit is %s", got)
	}
	update := func(r *specs.LinuxResources) {
		t.Helper()
		if err := n.task.Update(t.Ctx, containerd.WithResources(r)); err != nil {
			t.Fatal(err)
		}
	}
	want := int64(128 * mib)
	update(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &want}})
	if got := limit(); got != strconv.FormatInt(want, 10) {
		t.Errorf("the memory limit is %s after the update", got)
	}
	quota, period := int64(50000), uint64(100000)
	update(&specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: &quota, Period: &period}})
	if harness.CgroupV2() {
		if got := n.cgroupFile("", "", "cpu.max"); got != "50000 100000" {
			t.Errorf("cpu.max is %s", got)
		}
	} else if got := n.cgroupFile("cpu", "cpu.cfs_quota_us", ""); got != "50000" {
		t.Errorf("the cpu quota is %s", got)
	}
	// An update of one thing leaves the others.
	if got := limit(); got != strconv.FormatInt(want, 10) {
		t.Errorf("the memory limit is %s after an update of the quota", got)
	}
	low := int64(1)
	if err := n.task.Update(t.Ctx, containerd.WithResources(&specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: &low}})); err == nil {
		t.Error("an impossible quota is accepted")
	}
	if s := n.status(); s != containerd.Running {
		t.Errorf("the container is %s after the updates", s)
	}
}

func TestOOM(tb *testing.T) {
	t := setup(tb)
	n, killed := tooLarge(t, "exec dd if=/dev/zero of=/dev/null bs=256M count=1")
	if code := n.wait(); code != 137 {
		t.Errorf("code %d, want 137", code)
	}
	killed()
	n.deleteTask()
}

// TestOOMOfChild: the container lives on when only a child was killed, and the event comes all the same.
func TestOOMOfChild(tb *testing.T) {
	t := setup(tb)
	n, killed := tooLarge(t, "dd if=/dev/zero of=/dev/null bs=256M count=1; echo child $?; sleep 1000")
	killed()
	t.Eventually("the child's end", func() bool { return n.out.String() == "child 137\n" })
	if s := n.status(); s != containerd.Running {
		t.Errorf("the container is %s", s)
	}
}

// tooLarge starts a script that needs more memory than there is. killed waits for the event.
func tooLarge(t *harness.T, script string) (n *ctn, killed func()) {
	t.Helper()
	c := sh("sleep 0.3; "+script, oci.WithMemoryLimit(16*mib), oci.WithMemorySwap(16*mib))
	c.id = newID(t)
	ch, errs := t.Client.EventService().Subscribe(t.Ctx, fmt.Sprintf(`topic=="/tasks/oom",event.container_id==%q`, c.id))
	return newContainer(t, c).start(), func() {
		t.Helper()
		select {
		case <-ch:
		case err := <-errs:
			t.Fatal(err)
		case <-time.After(harness.WaitLimit):
			t.Error("no OOM event")
		}
	}
}

func TestDevices(tb *testing.T) {
	t := setup(tb)
	out := outputOf(t, sh("head -c 4 /dev/zero | wc -c; head -c 4 /dev/my/zero | wc -c; stat -c %t:%T /dev/my/zero", oci.WithDevices("/dev/zero", "/dev/my/zero", "rwm")))
	if out != "4\n4\n1:5\n" {
		t.Errorf("devices: %q", out)
	}
	// Everyone may make a node of any device; to open it needs a rule. The kernel itself wants
	// CAP_SYSLOG for this one.
	probe := "mknod /dev/kmsg c 1 11 && exec 3< /dev/kmsg && echo open"
	caps := oci.WithAddedCapabilities([]string{"CAP_SYSLOG"})
	if r := runContainer(t, sh(probe, caps)); r.code == 0 || !strings.Contains(r.err, "not permitted") {
		t.Errorf("a device that is not allowed: %+v", r)
	}
	if out := outputOf(t, sh(probe, caps, oci.WithAllDevicesAllowed)); out != "open\n" {
		t.Errorf("all devices allowed: %q", out)
	}
	if out := outputOf(t, sh("exec 3< /dev/kmsg && echo open", caps, oci.WithDevices("/dev/kmsg", "/dev/kmsg", "r"))); out != "open\n" {
		t.Errorf("a device that is allowed: %q", out)
	}
	if r := runContainer(t, sh("exec 3> /dev/kmsg", caps, oci.WithDevices("/dev/kmsg", "/dev/kmsg", "r"))); r.code == 0 {
		t.Errorf("writing to a device that is allowed for reading: %+v", r)
	}
}

// cgroupOf returns the path of a process's cgroup, which is the same in all hierarchies here.
func cgroupOf(tb testing.TB, pid int) string {
	tb.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		tb.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) == 3 && (f[1] == "memory" || f[0] == "0" && harness.CgroupV2()) {
			return f[2]
		}
	}
	tb.Fatalf("process %d is in no cgroup: %s", pid, b)
	return ""
}

func TestCgroupPath(tb *testing.T) {
	t := setup(tb)
	id := newID(t)
	parent := "/" + t.Namespace + "/pods-" + id
	for name, path := range map[string]string{"nested": parent + "/" + id, "default": "/" + t.Namespace + "/" + id} {
		c := sh("sleep 1000", oci.WithCgroup(path))
		c.id = id
		n := newContainer(t, c).start()
		if got := cgroupOf(t, int(n.task.Pid())); got != path {
			t.Errorf("%s: the cgroup is %s, want %s", name, got, path)
		}
		n.kill(syscall.SIGKILL)
		n.wait()
		n.deleteTask()
		left, err := harness.Cgroups(func(p string) bool { return strings.HasSuffix(p, path) })
		if err != nil || len(left) > 0 {
			t.Errorf("%s: cgroups are left: %v (%v)", name, left, err)
		}
		// The parent is not the runtime's to remove.
		parents, err := harness.Cgroups(func(p string) bool { return strings.HasSuffix(p, parent) })
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range parents {
			if err := os.Remove(p); err != nil {
				t.Error(err)
			}
		}
		n.remove()
	}
}

func TestSystemdCgroup(tb *testing.T) {
	t := setup(tb)
	needSystemd(t)
	id := newID(t)
	c := sh("sleep 1000", oci.WithCgroup("system.slice:crac-e2e:"+id), oci.WithMemoryLimit(64*mib))
	c.id, c.runtimeOptions = id, &options.Options{SystemdCgroup: true}
	n := newContainer(t, c).start()
	if got := cgroupOf(t, int(n.task.Pid())); got != "/system.slice/crac-e2e-"+id+".scope" {
		t.Errorf("the cgroup is %s", got)
	}
	m, err := n.task.Metrics(t.Ctx)
	if err != nil || m.Data == nil {
		t.Errorf("metrics: %v", err)
	}
	if r := n.exec("echo in"); r.out != "in\n" {
		t.Errorf("exec: %+v", r)
	}
	want := int64(96 * mib)
	if err := n.task.Update(t.Ctx, containerd.WithResources(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &want}})); err != nil {
		t.Errorf("update: %v", err)
	}
	n.kill(syscall.SIGKILL)
	if code := n.wait(); code != 137 {
		t.Errorf("code %d", code)
	}
	n.deleteTask()
}

// A clone has a scope of its own, and all that goes with it.
func TestSystemdCgroupOfAClone(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	needSystemd(t)
	image := ref(t)
	systemd := func(id string, more ...oci.SpecOpts) config {
		c := sh(tickNoFile, append(more, oci.WithCgroup("system.slice:crac-e2e:"+id), oci.WithMemoryLimit(64*mib))...)
		c.id, c.runtimeOptions = id, &options.Options{SystemdCgroup: true}
		return c
	}
	original := newContainer(t, systemd(newID(t), oci.WithAnnotations(map[string]string{ours.AnnotationPrefix + "checkpoint.image": image}))).start()
	t.Eventually("the workload ticks", func() bool { return strings.Contains(original.out.String(), "tick 3") })
	t.CtrOK("tasks", "checkpoint", original.ID())
	if got := cgroupOf(t, int(original.task.Pid())); got != "/system.slice/crac-e2e-"+original.ID()+".scope" {
		t.Errorf("after its checkpoint the original's cgroup is %s", got)
	}

	dump, err := t.Client.GetImage(t.Ctx, image)
	if err == nil {
		err = dump.Unpack(t.Ctx, "")
	}
	if err != nil {
		t.Fatal(err)
	}
	id := newID(t)
	c := systemd(id, oci.WithAnnotations(map[string]string{ours.AnnotationPrefix + "restore": "require"}))
	c.container = []containerd.NewContainerOpts{containerd.WithImage(dump), containerd.WithNewSnapshot(id, dump)}
	clone := newContainer(t, c).start()
	t.Eventually("the clone goes on", func() bool { return strings.Contains(clone.out.String(), "tick 9") })
	if strings.Contains(clone.out.String(), "tick 1\n") {
		t.Errorf("the clone started cold:\n%s", clone.out.String())
	}
	if got := cgroupOf(t, int(clone.task.Pid())); got != "/system.slice/crac-e2e-"+id+".scope" {
		t.Errorf("the clone's cgroup is %s", got)
	}
	if m, err := clone.task.Metrics(t.Ctx); err != nil || m.Data == nil {
		t.Errorf("metrics of the clone: %v", err)
	}
	if r := clone.exec("echo in"); r.out != "in\n" {
		t.Errorf("exec in the clone: %+v", r)
	}
	clone.kill(syscall.SIGKILL)
	clone.wait()
	clone.deleteTask()
	original.kill(syscall.SIGKILL)
	original.wait()
	original.deleteTask()
}

func needSystemd(t *harness.T) {
	t.Helper()
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		hostLacks(t, "systemd does not run on this host")
	}
}

// TestNoCgroup: `ctr run --cgroup ""` asks for none of its own.
func TestNoCgroup(tb *testing.T) {
	t := setup(tb)
	if out := outputOf(t, sh("echo fine", oci.WithCgroup(""), withSpec(func(s *oci.Spec) { s.Linux.Resources = nil }))); out != "fine\n" {
		t.Errorf("without a cgroup path: %q", out)
	}
}
