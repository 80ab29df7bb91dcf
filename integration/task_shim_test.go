package integration

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/api/events"
	task "github.com/containerd/containerd/api/runtime/task/v3"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crac-shim/crac/integration/harness"
)

// eventString is an event in one line; empty for those that the tests do not look at.
func eventString(ev any) string {
	switch e := ev.(type) {
	case *events.TaskCreate:
		return fmt.Sprintf("TaskCreate pid=%d", e.Pid)
	case *events.TaskStart:
		return fmt.Sprintf("TaskStart pid=%d", e.Pid)
	case *events.TaskExecAdded:
		return "TaskExecAdded exec=" + e.ExecID
	case *events.TaskExecStarted:
		return fmt.Sprintf("TaskExecStarted exec=%s pid=%d", e.ExecID, e.Pid)
	case *events.TaskExit:
		return fmt.Sprintf("TaskExit id=%s pid=%d code=%d", e.ID, e.Pid, e.ExitStatus)
	case *events.TaskPaused:
		return "TaskPaused"
	case *events.TaskResumed:
		return "TaskResumed"
	case *events.TaskOOM:
		return "TaskOOM"
	case *events.TaskDelete:
		return fmt.Sprintf("TaskDelete pid=%d code=%d", e.Pid, e.ExitStatus)
	}
	return ""
}

// shimClient talks to the container's shim as containerd does.
func (c *ctn) shimClient() task.TTRPCTaskService {
	c.Helper()
	b, err := os.ReadFile(filepath.Join(c.bundle(), "bootstrap.json"))
	if err != nil {
		c.Fatal(err)
	}
	var params struct {
		Version           int
		Address, Protocol string
	}
	if err := json.Unmarshal(b, &params); err != nil {
		c.Fatal(err)
	}
	if params.Version != 3 || params.Protocol != "ttrpc" {
		c.Fatalf("bootstrap parameters %s: want version 3 over ttrpc", b)
	}
	return dialShim(c.T, params.Address)
}

func dialShim(t *harness.T, address string) task.TTRPCTaskService {
	t.Helper()
	conn, err := net.Dial("unix", strings.TrimPrefix(address, "unix://"))
	if err != nil {
		t.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	t.Cleanup(func() { _ = client.Close() })
	return task.NewTTRPCTaskClient(client)
}

func TestConnectAndShutdown(tb *testing.T) {
	t := setup(tb)
	n := newContainer(t, sh("sleep 1000")).start()
	shim := n.shimClient()
	res, err := shim.Connect(t.Ctx, &task.ConnectRequest{ID: n.ID()})
	if err != nil {
		t.Fatal(err)
	}
	pid, err := t.ShimPID(n.ID())
	if err != nil {
		t.Fatal(err)
	}
	if int(res.ShimPid) != pid || res.TaskPid != n.task.Pid() {
		t.Errorf("Connect says shim %d and task %d; they are %d and %d", res.ShimPid, res.TaskPid, pid, n.task.Pid())
	}
	// A shim that has a container does not go.
	if _, err := shim.Shutdown(t.Ctx, &task.ShutdownRequest{ID: n.ID()}); err != nil {
		t.Errorf("Shutdown with a container: %v", err)
	}
	if r := n.exec("echo alive"); r.out != "alive\n" {
		t.Errorf("after Shutdown with a container: %+v", r)
	}
	n.kill(syscall.SIGKILL)
	n.wait()
	n.deleteTask()
	t.Eventually("the shim's end", func() bool {
		p, err := harness.ReadProcess(pid)
		return err != nil || p.State == "Z"
	})
}

func TestContainerdRestart(tb *testing.T) {
	t := setup(tb)
	for _, crash := range []bool{false, true} {
		dir, err := t.Path(newID(t))
		if err != nil {
			t.Fatal(err)
		}
		log := filepath.Join(dir, "log")
		n := newContainer(t, config{args: []string{"sh", "-c", "trap 'exit 7' TERM; i=0; while :; do i=$((i+1)); echo line $i; sleep 0.02; done"}, io: cio.LogFile(log)}).start()
		last, end := untilTold(t)
		pid := n.task.Pid()
		if err := t.RestartAfter(t.Ctx, crash, func() error { end(); return nil }); err != nil {
			t.Fatal(err)
		}
		reload := func(c *ctn) {
			t.Helper()
			fresh, err := t.Client.LoadContainer(t.Ctx, c.ID())
			if err != nil {
				t.Fatal(err)
			}
			c.Container = fresh
			if c.task, err = c.Task(t.Ctx, nil); err != nil {
				t.Fatalf("crash=%v: the task is not there after the restart: %v", crash, err)
			}
			if c.exit, err = c.task.Wait(t.Ctx); err != nil {
				t.Fatal(err)
			}
		}
		reload(n)
		if n.task.Pid() != pid || n.status() != containerd.Running {
			t.Errorf("crash=%v: pid %d, %s after the restart; pid was %d", crash, n.task.Pid(), n.status(), pid)
		}
		if r := n.exec("echo back"); r.out != "back\n" {
			t.Errorf("crash=%v: exec after the restart: %+v", crash, r)
		}
		read := func() string {
			b, err := os.ReadFile(log)
			if err != nil {
				t.Fatal(err)
			}
			return string(b)
		}
		before := read()
		t.Eventually("the log to go on", func() bool { return len(read()) > len(before) })
		n.kill(syscall.SIGTERM)
		if code := exitCode(t, n.exit); code != 7 {
			t.Errorf("crash=%v: code %d after the restart, want 7", crash, code)
		}
		n.deleteTask()
		lines := strings.Split(strings.TrimSpace(read()), "\n")
		for i, l := range lines {
			if l != fmt.Sprintf("line %d", i+1) {
				t.Errorf("crash=%v: line %d of the log is %q", crash, i+1, l)
				break
			}
		}
		// containerd deletes a task that it finds without processes when it starts. A task that it
		// keeps has to know its code.
		if _, err := last.Task(t.Ctx, nil); !errdefs.IsNotFound(err) {
			reload(last)
			if code := exitCode(t, last.exit); code != 8 {
				t.Errorf("crash=%v: code %d of the one that ended meanwhile, want 8", crash, code)
			}
			last.deleteTask()
		}
	}
}

// untilTold is a container that ends with code 8 when end is called, which waits for it.
func untilTold(t *harness.T, spec ...oci.SpecOpts) (n *ctn, end func()) {
	t.Helper()
	dir, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	spec = append(spec, oci.WithMounts([]specs.Mount{{Type: "bind", Source: dir, Destination: "/told", Options: []string{"rbind", "ro"}}}))
	n = newContainer(t, sh("while [ ! -e /told/end ]; do sleep 0.02; done; exit 8", spec...)).start()
	return n, func() {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, "end"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		t.Eventually("the container's end", func() bool {
			_, err := os.Stat(fmt.Sprintf("/proc/%d", n.task.Pid()))
			return err != nil
		})
	}
}

// TestExitWhileContainerdIsAway: the event of an exit that nobody was there for comes when containerd is
// back, once. It comes from a shim that lives on, a pod's: containerd ends one without processes
// when it finds it.
func TestExitWhileContainerdIsAway(tb *testing.T) {
	onlyCrac(tb) // runc's shim leaves its socket
	d := ownDaemon(tb, harness.Options{Need: []harness.Tool{harness.Shim}})
	t := d.For(tb, harness.TestLimit)
	group := oci.WithAnnotations(map[string]string{"io.containerd.runc.v2.group": newID(t)})
	newContainer(t, sh("sleep 1000", group)).start()
	n, end := untilTold(t, group)

	// The new containerd listens elsewhere until somebody listens to it: what the shim cannot deliver
	// it tries again.
	config, socket := filepath.Join(t.Dir, "containerd.toml"), t.Address+".ttrpc"
	if err := t.RestartAfter(t.Ctx, true, func() error {
		end()
		text, err := os.ReadFile(config)
		if err != nil {
			return err
		}
		return os.WriteFile(config, []byte(strings.Replace(string(text), strconv.Quote(socket), strconv.Quote(socket+".new"), 1)), 0o600)
	}); err != nil {
		t.Fatal(err)
	}
	ch, errs := t.Client.EventService().Subscribe(t.Ctx, fmt.Sprintf(`topic=="/tasks/exit",event.container_id==%q`, n.ID()))
	if err := os.Remove(socket); err != nil { // of the containerd that was killed
		t.Fatal(err)
	}
	if err := os.Symlink(socket+".new", socket); err != nil {
		t.Fatal(err)
	}
	var got []string
	// Once there, more time than passes between a second and a third attempt of the shim.
	for timeout := time.After(harness.WaitLimit); timeout != nil; {
		select {
		case env := <-ch:
			ev, err := typeurl.UnmarshalAny(env.Event)
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, eventString(ev))
			timeout = time.After(4 * time.Second)
		case err := <-errs:
			t.Fatal(err)
		case <-timeout:
			timeout = nil
		}
	}
	if want := []string{fmt.Sprintf("TaskExit id=%s pid=%d code=8", n.ID(), n.task.Pid())}; !slices.Equal(got, want) {
		t.Errorf("events of the exit:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestShimKilled(tb *testing.T) {
	t := setup(tb)
	id := newID(t)
	ch, errs := t.Client.EventService().Subscribe(t.Ctx, fmt.Sprintf(`topic=="/tasks/exit",event.container_id==%q`, id))
	c := sh("sleep 1000 & wait")
	c.id = id
	n := newContainer(t, c).start()
	pid, err := t.ShimPID(id)
	if err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for found := false; !found; {
		select {
		case env := <-ch:
			ev, err := typeurl.UnmarshalAny(env.Event)
			if err != nil {
				t.Fatal(err)
			}
			if e, ok := ev.(*events.TaskExit); ok && e.ContainerID == id {
				found = true
				if e.ExitStatus != 137 || e.Pid != n.task.Pid() {
					t.Errorf("the exit event says code %d of pid %d; want 137 of %d", e.ExitStatus, e.Pid, n.task.Pid())
				}
			}
		case err := <-errs:
			t.Fatal(err)
		case <-t.Ctx.Done():
			t.Fatal("no exit event after the shim was killed")
		}
	}
	t.Eventually("the task to be gone", func() bool {
		_, err := n.Task(t.Ctx, nil)
		return errdefs.IsNotFound(err)
	})
	if err := syscall.Kill(int(n.task.Pid()), 0); err == nil {
		if p, _ := harness.ReadProcess(int(n.task.Pid())); p.State != "Z" {
			t.Errorf("the workload outlives its shim: %v", p)
		}
	}
	if left := t.Leftovers(id); len(left) > 0 {
		t.Errorf("left behind: %s", strings.Join(left, "; "))
	}
	n.start() // the id can be used again
	if r := n.exec("echo again"); r.out != "again\n" {
		t.Errorf("after the id was used again: %+v", r)
	}
}

// TestPod: containers with the same sandbox id share one shim, which ends with the last of them.
func TestPod(tb *testing.T) {
	t := setup(tb)
	pod := newID(t) + "-pod"
	group := func(id, role string) config {
		c := sh("sleep 1000", oci.WithAnnotations(map[string]string{
			"io.kubernetes.cri.sandbox-id":     pod,
			"io.kubernetes.cri.container-type": role,
		}))
		c.id = id
		return c
	}
	sandbox := newContainer(t, group(pod, "sandbox")).start()
	member := group(newID(t)+"-ctr", "container")
	join := fmt.Sprintf("/proc/%d/ns/", sandbox.task.Pid())
	member.spec = append(member.spec,
		oci.WithLinuxNamespace(specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: join + "net"}),
		oci.WithLinuxNamespace(specs.LinuxNamespace{Type: specs.IPCNamespace, Path: join + "ipc"}),
		oci.WithLinuxNamespace(specs.LinuxNamespace{Type: specs.UTSNamespace, Path: join + "uts"}),
		oci.WithLinuxNamespace(specs.LinuxNamespace{Type: specs.PIDNamespace, Path: join + "pid"}),
	)
	a := newContainer(t, member).start()

	shims := map[uint32]bool{}
	for _, n := range []*ctn{sandbox, a} {
		res, err := n.shimClient().Connect(t.Ctx, &task.ConnectRequest{ID: n.ID()})
		if err != nil {
			t.Fatal(err)
		}
		shims[res.ShimPid] = true
		if res.TaskPid != n.task.Pid() {
			t.Errorf("Connect says that %s is pid %d, it is %d", n.ID(), res.TaskPid, n.task.Pid())
		}
	}
	if len(shims) != 1 {
		t.Errorf("one pod has the shims %v", shims)
	}
	for _, ns := range []string{"net", "ipc", "uts", "pid"} {
		one, err1 := os.Readlink(join + ns)
		two, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", a.task.Pid(), ns))
		if one != two || err1 != nil || err2 != nil {
			t.Errorf("the %s namespaces are %s and %s (%v, %v)", ns, one, two, err1, err2)
		}
	}
	one, _ := os.Readlink(join + "mnt")
	two, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", a.task.Pid()))
	if one == two {
		t.Error("the containers of a pod share their mount namespace")
	}
	a.kill(syscall.SIGKILL)
	if code := a.wait(); code != 137 {
		t.Errorf("code %d", code)
	}
	a.deleteTask()
	if r := sandbox.exec("echo still"); r.out != "still\n" {
		t.Errorf("the pod after a container of it ended: %+v", r)
	}
	b := member
	b.id = newID(t) + "-ctr2"
	newContainer(t, b).start().remove()
	if s := sandbox.status(); s != containerd.Running {
		t.Errorf("the sandbox is %s", s)
	}
}

// zombies returns the shim's children in state Z.
func zombies(shim int) []harness.Process {
	var z []harness.Process
	for _, p := range harness.Processes() {
		if p.PPID == shim && p.State == "Z" {
			z = append(z, p)
		}
	}
	return z
}

// TestOrphans: without a pid namespace of its own a container's orphans become the shim's
// children. It must reap them, and must not take the exit of anyone else for it.
func TestOrphans(tb *testing.T) {
	t := setup(tb)
	n := newContainer(t, sh("while :; do (sleep 0.01 & ); (sh -c 'exit 77' & ); sleep 0.05; done", oci.WithHostNamespace(specs.PIDNamespace))).start()
	shim, err := t.ShimPID(n.ID())
	if err != nil {
		t.Fatal(err)
	}
	n.execMany(times(30), "(sleep 0.01 &);")
	if n.status() != containerd.Running {
		t.Errorf("the container is %s", n.status())
	}
	n.kill(syscall.SIGKILL, containerd.WithKillAll)
	if code := n.wait(); code != 137 {
		t.Errorf("code %d", code)
	}
	noZombies(t, shim)
	n.deleteTask()
}

// TestOrphansOutliveInit: with the host's pid namespace, the end of init is the end of all.
func TestOrphansOutliveInit(tb *testing.T) {
	t := setup(tb)
	n := newContainer(t, sh("sleep 1000 & sleep 1000 & exit 4", oci.WithHostNamespace(specs.PIDNamespace))).start()
	if code := exitCode(t, n.exit); code != 4 {
		t.Errorf("code %d", code)
	}
	left := waitEmpty(func() []string {
		pids, err := t.CgroupProcs(n.ID())
		if err != nil {
			t.Fatal(err)
		}
		return strings.Fields(strings.Trim(fmt.Sprint(pids), "[]"))
	})
	if len(left) > 0 {
		t.Errorf("processes %v outlive the container's init", left)
	}
	n.deleteTask()
}
