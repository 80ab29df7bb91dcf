package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	tasks "github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types/runc/options"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/crac-shim/crac/integration/harness"
)

func TestExitCode(tb *testing.T) {
	t := setup(tb)
	for _, want := range []uint32{0, 1, 42, 255} {
		r := runContainer(t, sh(fmt.Sprintf("echo out; echo err >&2; exit %d", want)))
		if r != (result{want, "out\n", "err\n"}) {
			t.Errorf("exit %d: got %+v", want, r)
		}
	}
}

func TestSignals(tb *testing.T) {
	t := setup(tb)
	for _, c := range []struct {
		name string
		sig  syscall.Signal
		opts []containerd.KillOpts
		want uint32
	}{
		{"handled", syscall.SIGUSR1, nil, 3},
		{"kill", syscall.SIGKILL, nil, 137},
		{"kill all", syscall.SIGKILL, []containerd.KillOpts{containerd.WithKillAll}, 137},
	} {
		n := newContainer(t, sh("trap 'exit 3' USR1; sleep 1000 & sleep 1000 & echo ready; wait")).start()
		t.Eventually("the trap", func() bool { return n.out.String() == "ready\n" })
		n.kill(c.sig, c.opts...)
		if code := n.wait(); code != c.want {
			t.Errorf("%s: code %d, want %d", c.name, code, c.want)
		}
		if s := n.status(); s != containerd.Stopped {
			t.Errorf("%s: state %s after the exit", c.name, s)
		}
		// The pid namespace ends with its init: nothing may be left in the cgroup.
		if pids, err := t.CgroupProcs(n.ID()); err != nil || len(pids) > 0 {
			t.Errorf("%s: processes %v are left (%v)", c.name, pids, err)
		}
		n.deleteTask()
	}
}

// TestSignalAll: with All every process gets the signal, without it the container's own alone. (runc
// since 1.2 ignores All, but for a SIGKILL without a pid namespace.)
func TestSignalAll(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	for name, spec := range map[string][]oci.SpecOpts{"own pid namespace": nil, "the host's": {oci.WithHostNamespace(specs.PIDNamespace)}} {
		n := newContainer(t, sh(`trap 'echo init' USR1
			(trap 'echo child' USR1; trap 'echo told' USR2; sh -c 'echo pid $PPID'; while :; do sleep 0.02; done) &
			while :; do wait; done`, spec...)).start()
		var child int
		t.Eventually("the child's trap", func() bool {
			_, err := fmt.Sscanf(n.out.String(), "pid %d\n", &child)
			return err == nil
		})
		said := strings.TrimSpace(n.out.String()) + "\n"
		// next expects these words, in any order, and no others. The child has then heeded all that came
		// before: a trap of SIGUSR1 runs before one of SIGUSR2.
		next := func(words ...string) {
			t.Helper()
			t.Eventually("init's trap", func() bool { return strings.Contains(n.out.String()[len(said):], "init\n") })
			if r := n.exec(fmt.Sprintf("kill -USR2 %d", child)); r.code != 0 {
				t.Fatalf("%s: %+v", name, r)
			}
			t.Eventually("the child's word", func() bool { return strings.Contains(n.out.String()[len(said):], "told\n") })
			got := strings.Fields(n.out.String()[len(said):])
			slices.Sort(got)
			if words = append(words, "told"); !slices.Equal(got, words) {
				t.Errorf("%s: the processes say %q, want %q", name, got, words)
			}
			said = n.out.String()
		}
		n.kill(syscall.SIGUSR1)
		next("init")
		n.kill(syscall.SIGUSR1, containerd.WithKillAll)
		next("child", "init")
		n.kill(syscall.SIGKILL, containerd.WithKillAll)
		if code := n.wait(); code != 137 {
			t.Errorf("%s: code %d, want 137", name, code)
		}
		n.deleteTask()
	}
}

func TestSignalOfExec(tb *testing.T) {
	t := setup(tb)
	n := newContainer(t, sh("sleep 1000")).start()
	p := n.startExec("one", "sh", "-c", "trap 'exit 9' TERM; echo ready; while :; do sleep 0.02; done")
	t.Eventually("the trap", func() bool { return p.out.String() == "ready\n" })
	if err := p.Kill(t.Ctx, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if r := n.end(p); r.code != 9 {
		t.Errorf("the exec ended with code %d, want 9", r.code)
	}
	p = n.startExec("two", "sleep", "1000")
	if err := p.Kill(t.Ctx, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if r := n.end(p); r.code != 137 {
		t.Errorf("the killed exec ended with code %d, want 137", r.code)
	}
	if s := n.status(); s != containerd.Running {
		t.Errorf("the container is %s after its execs were killed", s)
	}
}

// verbs calls every verb of the task service that does not move the container on in this state,
// and returns each one's gRPC code.
func verbs(n *ctn, state string) map[string]codes.Code {
	n.Helper()
	svc, id, ctx := n.Client.TaskService(), n.ID(), n.Ctx
	got := map[string]codes.Code{}
	call := func(verb string, f func() error) { got[state+": "+verb] = status.Code(f()) }
	res, err := typeurl.MarshalAnyToProto(&specs.LinuxResources{})
	if err != nil {
		n.Fatal(err)
	}
	legal := map[string][]string{
		"deleted": {"Create"},
		"created": {"Start", "Delete", "Kill", "Exec"},
		"running": {"Kill", "Pause", "Exec"},
		"paused":  {"Resume", "Kill"},
		"stopped": {"Delete"},
	}[state]
	for verb, f := range map[string]func() error{
		"Create": func() error {
			_, err := svc.Create(ctx, &tasks.CreateTaskRequest{ContainerID: id})
			return err
		},
		"Start": func() error { _, err := svc.Start(ctx, &tasks.StartRequest{ContainerID: id}); return err },
		"Start none": func() error {
			_, err := svc.Start(ctx, &tasks.StartRequest{ContainerID: id, ExecID: "none"})
			return err
		},
		"Delete": func() error { _, err := svc.Delete(ctx, &tasks.DeleteTaskRequest{ContainerID: id}); return err },
		"Delete none": func() error {
			_, err := svc.DeleteProcess(ctx, &tasks.DeleteProcessRequest{ContainerID: id, ExecID: "none"})
			return err
		},
		"Exec": func() error {
			spec, err := n.Spec(ctx)
			if err != nil {
				return err
			}
			p := *spec.Process
			p.Args = []string{"true"}
			body, err := typeurl.MarshalAny(&p)
			if err != nil {
				return err
			}
			if _, err := svc.Exec(ctx, &tasks.ExecProcessRequest{ContainerID: id, ExecID: "e", Spec: typeurl.MarshalProto(body)}); err != nil {
				return err
			}
			_, err = svc.Start(ctx, &tasks.StartRequest{ContainerID: id, ExecID: "e"})
			_, derr := svc.DeleteProcess(ctx, &tasks.DeleteProcessRequest{ContainerID: id, ExecID: "e"})
			if derr != nil {
				return fmt.Errorf("delete the exec: %w", derr)
			}
			return err
		},
		"Kill": func() error { _, err := svc.Kill(ctx, &tasks.KillRequest{ContainerID: id, Signal: 10}); return err },
		"Kill none": func() error {
			_, err := svc.Kill(ctx, &tasks.KillRequest{ContainerID: id, ExecID: "none", Signal: 10})
			return err
		},
		"Pause":  func() error { _, err := svc.Pause(ctx, &tasks.PauseTaskRequest{ContainerID: id}); return err },
		"Resume": func() error { _, err := svc.Resume(ctx, &tasks.ResumeTaskRequest{ContainerID: id}); return err },
		"State":  func() error { _, err := svc.Get(ctx, &tasks.GetRequest{ContainerID: id}); return err },
		"State none": func() error {
			_, err := svc.Get(ctx, &tasks.GetRequest{ContainerID: id, ExecID: "none"})
			return err
		},
		"Pids": func() error { _, err := svc.ListPids(ctx, &tasks.ListPidsRequest{ContainerID: id}); return err },
		"CloseIO": func() error {
			_, err := svc.CloseIO(ctx, &tasks.CloseIORequest{ContainerID: id, Stdin: true})
			return err
		},
		"CloseIO none": func() error {
			_, err := svc.CloseIO(ctx, &tasks.CloseIORequest{ContainerID: id, ExecID: "none", Stdin: true})
			return err
		},
		"Resize none": func() error {
			_, err := svc.ResizePty(ctx, &tasks.ResizePtyRequest{ContainerID: id, ExecID: "none"})
			return err
		},
		"Wait none": func() error {
			_, err := svc.Wait(ctx, &tasks.WaitRequest{ContainerID: id, ExecID: "none"})
			return err
		},
		"Update": func() error {
			_, err := svc.Update(ctx, &tasks.UpdateTaskRequest{ContainerID: id, Resources: res})
			return err
		},
	} {
		if !slices.Contains(legal, verb) {
			call(verb, f)
		}
	}
	return got
}

// TestErrorsLikeRunc takes a container of either runtime through all states and compares what
// every verb answers that is out of order.
func TestErrorsLikeRunc(tb *testing.T) {
	t := setup(tb)
	matrix := func(runtime string) map[string]codes.Code {
		c := sh("sleep 1000")
		c.runtime = runtime
		n := newContainer(t, c)
		got := verbs(n, "deleted")
		add := func(state string) {
			for k, v := range verbs(n, state) {
				got[k] = v
			}
		}
		n.create()
		add("created")
		if err := n.task.Start(t.Ctx); err != nil {
			t.Fatal(err)
		}
		add("running")
		if err := n.task.Pause(t.Ctx); err != nil {
			t.Fatal(err)
		}
		add("paused")
		if err := n.task.Resume(t.Ctx); err != nil {
			t.Fatal(err)
		}
		n.kill(syscall.SIGKILL)
		n.wait()
		add("stopped")
		n.deleteTask()
		return got
	}
	want, got := matrix(runcRuntime), matrix(testRuntime)
	for k, w := range want {
		g := got[k]
		switch {
		case w == codes.Unknown && g != codes.OK:
			// runc's shim did not think of a code here: any refusal is as good.
		case w != g:
			t.Errorf("%s: %v, and %v from runc's shim", k, g, w)
		}
	}
	// The ones that clients rely on, whatever the other shim does.
	for k, w := range map[string]codes.Code{
		"deleted: Start": codes.NotFound, "deleted: Delete": codes.NotFound, "deleted: Kill": codes.NotFound, "deleted: State": codes.NotFound,
		"created: Create": codes.AlreadyExists, "running: Create": codes.AlreadyExists, "running: Kill none": codes.NotFound,
		"stopped: Kill": codes.NotFound,
	} {
		if g, ok := got[k]; !ok || g != w {
			t.Errorf("%s: %v, want %v", k, g, w)
		}
	}
}

func TestCreateStartDelete(tb *testing.T) {
	t := setup(tb)
	n := newContainer(t, sh("sleep 1000"))
	if _, err := n.Task(t.Ctx, nil); !errdefs.IsNotFound(err) {
		t.Errorf("a container without a task: got %v, want NotFound", err)
	}
	n.create()
	if s := n.status(); s != containerd.Created {
		t.Errorf("state %s after Create", s)
	}
	if n.task.Pid() == 0 {
		t.Error("Create reports no pid")
	}
	// The workload must not run before Start.
	cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", n.task.Pid()))
	if err != nil || strings.HasPrefix(string(cmdline), "sleep") {
		t.Errorf("before Start the process is %q (%v)", cmdline, err)
	}
	if _, err := n.NewTask(t.Ctx, cio.NullIO); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second task: got %v, want AlreadyExists", err)
	}
	pid := n.task.Pid()
	if err := n.task.Start(t.Ctx); err != nil {
		t.Fatal(err)
	}
	if n.task.Pid() != pid {
		t.Errorf("the pid was %d at Create and is %d after Start", pid, n.task.Pid())
	}
	if s := n.status(); s != containerd.Running {
		t.Errorf("state %s after Start", s)
	}
	if _, err := n.task.Delete(t.Ctx); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("delete of a running task: got %v, want FailedPrecondition", err)
	}
	n.kill(syscall.SIGKILL)
	if code := n.wait(); code != 137 {
		t.Errorf("code %d", code)
	}
	if code := n.deleteTask(); code != 137 {
		t.Errorf("Delete reports code %d", code)
	}
	if _, err := n.Task(t.Ctx, nil); !errdefs.IsNotFound(err) {
		t.Errorf("the task after Delete: got %v, want NotFound", err)
	}
	// The same container can have another task.
	n.start()
	n.kill(syscall.SIGKILL)
	n.wait()
	n.deleteTask()
}

func TestDeleteCreated(tb *testing.T) {
	t := setup(tb)
	n := newContainer(t, sh("sleep 1000")).create()
	if _, err := n.task.Delete(t.Ctx, containerd.WithProcessKill); err != nil {
		t.Fatalf("delete a task that was never started: %v", err)
	}
	if _, err := n.Task(t.Ctx, nil); !errdefs.IsNotFound(err) {
		t.Errorf("the task after Delete: got %v, want NotFound", err)
	}
}

// TestDeleteCreatedIsTold: what is deleted before it was started ends like everything else. Go clients kill
// first; others need not.
func TestDeleteCreatedIsTold(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	c := sh("sleep 1000")
	c.id = newID(t)
	ch, errs := t.Client.EventService().Subscribe(t.Ctx, fmt.Sprintf(`topic~="/tasks/(exit|delete)",event.container_id==%q`, c.id))
	n := newContainer(t, c).create()
	pid := n.task.Pid()
	deleted, err := t.Client.TaskService().Delete(t.Ctx, &tasks.DeleteTaskRequest{ContainerID: c.id})
	if err != nil {
		t.Fatal(err)
	}
	if deleted.ExitStatus != 137 || deleted.Pid != pid {
		t.Errorf("deleted: %v", deleted)
	}
	for _, want := range []string{fmt.Sprintf("TaskExit id=%s pid=%d code=137", c.id, pid), fmt.Sprintf("TaskDelete pid=%d code=137", pid)} {
		select {
		case env := <-ch:
			ev, err := typeurl.UnmarshalAny(env.Event)
			if got := eventString(ev); err != nil || got != want {
				t.Errorf("the event is %s, %v, want %s", got, err, want)
			}
		case err := <-errs:
			t.Fatal(err)
		case <-time.After(harness.WaitLimit):
			t.Fatalf("no event %s", want)
		}
	}
	n.remove()
}

// TestDeleteCreatedClone: what waits to restore a clone is not the clone's, and goes with it.
func TestDeleteCreatedClone(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	script := sh("sleep 1000")
	original := newContainer(t, script).start()
	dir, err := t.Path(original.ID())
	if err != nil {
		t.Fatal(err)
	}
	t.CtrOK("tasks", "checkpoint", "--image-path", dir, original.ID())

	script.task = []containerd.NewTaskOpts{containerd.WithRestoreImagePath(dir)}
	for name, end := range map[string]func(*ctn){
		"deleted": func(*ctn) {},
		"killed":  func(n *ctn) { n.kill(syscall.SIGKILL); exitCode(t, n.exit) },
	} {
		n := newContainer(t, script).create()
		t.Eventually("CRIU waits in the cgroup", func() bool {
			procs, err := t.CgroupProcs(n.ID())
			return err == nil && len(procs) > 0
		})
		// It stands for the clone: containerd takes a task without a process for one that is no more.
		if pids, err := n.task.Pids(t.Ctx); err != nil || len(pids) != 1 {
			t.Errorf("%s: the task has the processes %v, %v; want the one that waits", name, pids, err)
		}
		end(n)
		if _, err := n.task.Delete(t.Ctx, containerd.WithProcessKill); err != nil {
			t.Errorf("%s: delete a clone that was never started: %v", name, err)
		}
		n.remove() // sees what is left
	}
}

// TestCreateFails: an error that names the cause, nothing left, and the id can be used again.
func TestCreateFails(tb *testing.T) {
	t := setup(tb)
	id := newID(t)
	bad := mount.Mount{Type: "bind", Source: "/no/such/rootfs", Options: []string{"rbind"}}
	for _, c := range []struct {
		name, want string
		config     config
	}{
		{"program", "no-such-program", config{args: []string{"no-such-program"}}},
		{"not executable", "/etc/passwd", config{args: []string{"/etc/passwd"}}},
		{"mount", "/no/such/source", sh("true", oci.WithMounts([]specs.Mount{{Type: "bind", Source: "/no/such/source", Destination: "/mnt", Options: []string{"rbind"}}}))},
		{"rootfs", "/no/such/rootfs", config{args: []string{"true"}, task: []containerd.NewTaskOpts{containerd.WithRootFS([]mount.Mount{bad})}}},
	} {
		c.config.id = id
		n := newContainer(t, c.config)
		err := n.tryCreate()
		if err == nil { // exec's own errors may come with Start
			err = n.task.Start(t.Ctx)
		}
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: the error does not name %q: %v", c.name, c.want, err)
		}
		n.remove()
	}
	if r := runContainer(t, config{id: id, args: []string{"echo", "again"}}); r.out != "again\n" {
		t.Errorf("the id cannot be used again: %+v", r)
	}
}

func TestWait(tb *testing.T) {
	t := setup(tb)
	n := newContainer(t, sh("read x; exit 5"))
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close(); _ = w.Close() }()
	n.io = n.streams(r, n.out, n.err, false)
	n.start()
	var waits []<-chan containerd.ExitStatus
	for range 4 {
		ch, err := n.task.Wait(t.Ctx)
		if err != nil {
			t.Fatal(err)
		}
		waits = append(waits, ch)
	}
	if _, err := w.WriteString("go\n"); err != nil {
		t.Fatal(err)
	}
	_ = w.Close()
	n.wait()
	late, err := n.task.Wait(t.Ctx)
	if err != nil {
		t.Fatal(err)
	}
	st, err := n.task.Status(t.Ctx)
	if err != nil {
		t.Fatal(err)
	}
	if age := time.Since(st.ExitTime); st.Status != containerd.Stopped || st.ExitStatus != 5 || age < 0 || age > time.Hour {
		t.Errorf("state after the exit: %+v", st)
	}
	for i, ch := range append(waits, late) {
		select {
		case s := <-ch:
			if s.ExitCode() != 5 || s.Error() != nil || !s.ExitTime().Equal(st.ExitTime) {
				t.Errorf("waiter %d: code %d at %v, %v; State says %v", i, s.ExitCode(), s.ExitTime(), s.Error(), st.ExitTime)
			}
		case <-t.Ctx.Done():
			t.Fatalf("waiter %d waits for ever", i)
		}
	}
	n.deleteTask()
}

func TestPauseResume(tb *testing.T) {
	t := setup(tb)
	n := newContainer(t, sh("while :; do echo .; sleep 0.01; done")).start()
	t.Eventually("output", func() bool { return n.out.String() != "" })
	if err := n.task.Pause(t.Ctx); err != nil {
		t.Fatal(err)
	}
	if s := n.status(); s != containerd.Paused {
		t.Errorf("state %s after Pause", s)
	}
	// What was on its way arrives: until nothing has come for twenty times as long as it writes a line in.
	before := ""
	t.Eventually("the output stands still", func() bool {
		before = n.out.String()
		time.Sleep(200 * time.Millisecond)
		return n.out.String() == before
	})
	if err := n.task.Resume(t.Ctx); err != nil {
		t.Fatal(err)
	}
	if s := n.status(); s != containerd.Running {
		t.Errorf("state %s after Resume", s)
	}
	t.Eventually("output after Resume", func() bool { return n.out.String() != before })
}

func TestKillPaused(tb *testing.T) {
	t := setup(tb)
	n := newContainer(t, sh("sleep 1000")).start()
	if err := n.task.Pause(t.Ctx); err != nil {
		t.Fatal(err)
	}
	n.kill(syscall.SIGKILL)
	if code := n.wait(); code != 137 {
		t.Errorf("code %d", code)
	}
	n.deleteTask()
}

func TestPids(tb *testing.T) {
	t := setup(tb)
	n := newContainer(t, sh("sleep 1000 & wait")).start()
	p := n.startExec("my-exec", "sleep", "1000")
	t.Eventually("three processes", func() bool {
		pids, err := n.task.Pids(t.Ctx)
		return err == nil && len(pids) == 3
	})
	pids, err := n.task.Pids(t.Ctx)
	if err != nil {
		t.Fatal(err)
	}
	var all []uint32
	for _, info := range pids {
		all = append(all, info.Pid)
		if info.Info == nil {
			if info.Pid == p.Pid() {
				t.Error("Pids does not say that the exec is one")
			}
			continue
		}
		details, err := typeurl.UnmarshalAny(info.Info)
		if err != nil {
			t.Fatal(err)
		}
		d, ok := details.(*options.ProcessDetails)
		if !ok || d.ExecID != "my-exec" || info.Pid != p.Pid() {
			t.Errorf("process %d: details %#v; the exec is %d", info.Pid, details, p.Pid())
		}
	}
	if !slices.Contains(all, n.task.Pid()) || !slices.Contains(all, p.Pid()) {
		t.Errorf("Pids: %v does not hold init %d and exec %d", all, n.task.Pid(), p.Pid())
	}
}

func TestEvents(tb *testing.T) {
	t := setup(tb)
	id := newID(t)
	ctx, cancel := context.WithCancel(t.Ctx)
	defer cancel()
	ch, errs := t.Client.EventService().Subscribe(ctx, fmt.Sprintf(`event.container_id==%q`, id))
	c := sh("sleep 1000")
	c.id = id
	n := newContainer(t, c).start()
	e := n.startExec("ev", "sh", "-c", "exit 3")
	if r := n.end(e); r.code != 3 {
		t.Errorf("the exec ended with code %d", r.code)
	}
	if err := n.task.Pause(t.Ctx); err != nil {
		t.Fatal(err)
	}
	if err := n.task.Resume(t.Ctx); err != nil {
		t.Fatal(err)
	}
	pid := n.task.Pid()
	n.kill(syscall.SIGKILL)
	n.wait()
	if testRuntime == cracRuntime {
		n.deleteTask()
	} // runc's shim sends the exit after it answered Wait: a quick Delete overtakes it, or it gets lost

	want := []string{
		fmt.Sprintf("TaskCreate pid=%d", pid),
		fmt.Sprintf("TaskStart pid=%d", pid),
		"TaskExecAdded exec=ev",
		fmt.Sprintf("TaskExecStarted exec=ev pid=%d", e.Pid()),
		fmt.Sprintf("TaskExit id=ev pid=%d code=3", e.Pid()),
		"TaskPaused",
		"TaskResumed",
		fmt.Sprintf("TaskExit id=%s pid=%d code=137", id, pid),
		fmt.Sprintf("TaskDelete pid=%d code=137", pid),
	}
	var got []string
	for len(got) < len(want) {
		select {
		case env := <-ch:
			ev, err := typeurl.UnmarshalAny(env.Event)
			if err != nil {
				t.Fatal(err)
			}
			if s := eventString(ev); s != "" {
				got = append(got, s)
			}
			if testRuntime != cracRuntime && len(got) == len(want)-1 {
				n.deleteTask()
			}
		case err := <-errs:
			t.Fatal(err)
		case <-time.After(harness.WaitLimit):
			t.Fatalf("events so far:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("events:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestConcurrentContainers(tb *testing.T) {
	t := setup(tb)
	total := times(12)
	type outcome struct {
		i int
		r result
	}
	done := make(chan outcome, total)
	var all []*ctn
	for i := range total {
		c := sh(fmt.Sprintf("echo n%d; exit %d", i, i))
		c.id = newID(t)
		all = append(all, newContainer(t, c))
	}
	for i, n := range all {
		go func() {
			r := result{code: 999}
			if err := n.tryCreate(); err != nil {
				r.err = err.Error()
			} else if err := n.task.Start(t.Ctx); err != nil {
				r.err = err.Error()
			} else {
				s := <-n.exit
				if err := harness.WaitIO(t.Ctx, n.task.IO()); err != nil {
					t.Error(err)
				}
				r = result{s.ExitCode(), n.out.String(), n.err.String()}
				if _, err := n.task.Delete(t.Ctx); err != nil {
					r.err = err.Error()
				}
			}
			done <- outcome{i, r}
		}()
	}
	for range total {
		select {
		case o := <-done:
			if want := (result{uint32(o.i), fmt.Sprintf("n%d\n", o.i), ""}); o.r != want {
				t.Errorf("container %d: %+v", o.i, o.r)
			}
		case <-t.Ctx.Done():
			t.Fatal("the containers did not end")
		}
	}
}

// TestCtr runs what people type.
func TestCtr(tb *testing.T) {
	t := setup(tb)
	needImage(t, "busybox")
	ref, id := harness.ImageRef("busybox"), newID(t)
	ctr := func(args ...string) string { t.Helper(); return t.CtrOK(args...) }
	t.Cleanup(func() { t.NoLeftovers(id) })

	if out := ctr("run", "--rm", "--runtime", testRuntime, ref, id, "echo", "hello"); out != "hello\n" {
		t.Errorf("ctr run printed %q", out)
	}
	_, err := t.Ctr(t.Ctx, "run", "--rm", "--runtime", testRuntime, ref, id, "sh", "-c", "exit 9")
	if code := harness.ExitCode(err); code != 9 {
		t.Errorf("ctr run ended with %d, want 9: %v", code, err)
	}
	ctr("run", "-d", "--runtime", testRuntime, "--env", "A=b", "--memory-limit", "67108864", ref, id, "sleep", "1000")
	if out := ctr("tasks", "exec", "--exec-id", "x", id, "sh", "-c", "echo $A"); out != "b\n" {
		t.Errorf("ctr tasks exec printed %q", out)
	}
	if out := ctr("tasks", "ls"); !strings.Contains(out, id) || !strings.Contains(out, "RUNNING") {
		t.Errorf("ctr tasks ls:\n%s", out)
	}
	if out := ctr("tasks", "metrics", id); !strings.Contains(out, "memory.") {
		t.Errorf("ctr tasks metrics:\n%s", out)
	}
	ctr("tasks", "pause", id)
	if out := ctr("tasks", "ls"); !strings.Contains(out, "PAUSED") {
		t.Errorf("ctr tasks ls:\n%s", out)
	}
	ctr("tasks", "resume", id)
	ctr("tasks", "ps", id)
	ctr("tasks", "kill", "-s", "SIGKILL", "--all", id)
	t.Eventually("the task to stop", func() bool { return strings.Contains(ctr("tasks", "ls"), "STOPPED") })
	ctr("tasks", "delete", id)
	ctr("containers", "delete", id)
}

// bundle is the directory that containerd made for a task.
func (c *ctn) bundle() string {
	return filepath.Join(c.Dir, "state/io.containerd.runtime.v2.task", c.Namespace, c.ID())
}
