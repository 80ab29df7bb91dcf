package shim

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/runtime"
)

func TestEventsInOrder(t *testing.T) {
	sent := &published{hold: make(chan struct{})}
	stop := make(chan struct{})
	s := newEventSender(sent, stop)
	const n = eventQueue / 2
	for i := range n {
		s.send(&eventstypes.TaskExit{Pid: uint32(i)})
	}
	s.sendFacts(ColdStartTopic, "c", map[string]any{"reason": "why"})
	s.sendFacts(ColdStartTopic, "c", map[string]any{"reason": make(chan int)}) // no event can hold it
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.run(context.Background())
	}()
	// What was sent before the end is published, however slow containerd is.
	close(stop)
	close(sent.hold)
	<-ended
	if len(sent.events) != n+1 {
		t.Fatalf("%d events were published, want %d", len(sent.events), n+1)
	}
	for i := range n {
		if e, ok := sent.events[i].(*eventstypes.TaskExit); !ok || int(e.Pid) != i || sent.topics[i] != "/tasks/exit" {
			t.Fatalf("event %d is %v on %s", i, sent.events[i], sent.topics[i])
		}
	}
	if sent.topics[n] != ColdStartTopic || !strings.Contains(fmt.Sprint(sent.events[n]), "why") {
		t.Errorf("the last is %v on %s", sent.events[n], sent.topics[n])
	}
	// After the end nobody waits for a place in the queue.
	for range 2 * eventQueue {
		s.send(&eventstypes.TaskExit{})
	}
}

// containerd's publisher keeps the context for what it tries again later, and one that has ended by
// then makes it send an event again and again.
func TestEventsOutliveTheirPublishing(t *testing.T) {
	s, sent, finish := newTestService(t)
	s.events.send(&eventstypes.TaskExit{})
	finish()
	if len(sent.ctxs) != 1 || sent.ctxs[0].Err() != nil {
		t.Errorf("published with contexts %v, want one that has not ended", sent.ctxs)
	}
	if deadline, ok := sent.ctxs[0].Deadline(); ok {
		t.Errorf("it ends at %v", deadline)
	}
}

// Multipath TCP is off in a network namespace that the container gets, also in one that belongs to a
// user namespace, unless the request says otherwise.
func TestAdaptMPTCP(t *testing.T) {
	if _, err := os.Stat("/proc/sys/net/mptcp/enabled"); err != nil {
		t.Skip("this kernel has no Multipath TCP")
	}
	s, _, _ := newTestService(t)
	network := specs.LinuxNamespace{Type: specs.NetworkNamespace}
	for name, tt := range map[string]struct {
		namespaces []specs.LinuxNamespace
		sysctl     map[string]string
		want       string
	}{
		"a new one":           {[]specs.LinuxNamespace{network}, nil, "0"},
		"of a user namespace": {[]specs.LinuxNamespace{{Type: specs.UserNamespace}, network}, nil, "0"},
		"asked for":           {[]specs.LinuxNamespace{network}, map[string]string{mptcpSysctl: "1"}, "1"},
		"somebody's":          {[]specs.LinuxNamespace{{Type: specs.NetworkNamespace, Path: "/run/netns/x"}}, nil, ""},
		"the host's":          {nil, nil, ""},
	} {
		spec := &specs.Spec{Linux: &specs.Linux{Namespaces: tt.namespaces, Sysctl: tt.sysctl}}
		s.adapt(spec, "c")
		if got := spec.Linux.Sysctl[mptcpSysctl]; got != tt.want {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
}

// A client's pause waits for a dump: what stands still answers nobody.
func TestPauseDuringDump(t *testing.T) {
	c := newTestContainer(t, "c")
	release, err := hold(t.Context(), c.dumping)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := c.pause(ctx); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "checkpointed") {
		t.Errorf("a pause that nobody waits for any more: %v", err)
	}
	release()
	again, err := hold(t.Context(), c.dumping)
	if err != nil {
		t.Fatal(err)
	}
	again()
}

// What waits to be restored has no process, but can be killed.
func TestKillBeforeRestore(t *testing.T) {
	ctx := context.Background()
	for sig, dies := range map[unix.Signal]bool{unix.SIGKILL: true, unix.SIGTERM: true, unix.SIGHUP: false, 0: false} {
		s, sent, finish := newTestService(t)
		c := newTestContainer(t, "c")
		c.init.pid = 42 // of what stands for it
		s.containers["c"] = c
		_, err := s.Kill(ctx, &taskapi.KillRequest{ID: "c", Signal: uint32(sig)})
		if !dies {
			if status.Code(err) != codes.NotFound {
				t.Errorf("%s: %v, want NotFound", unix.SignalName(sig), err)
			}
			if _, ended := c.init.ended(); ended {
				t.Errorf("%s ended it", unix.SignalName(sig))
			}
			continue
		}
		if err != nil {
			t.Fatalf("%s: %v", unix.SignalName(sig), err)
		}
		w, err := s.Wait(ctx, &taskapi.WaitRequest{ID: "c"})
		if err != nil || w.ExitStatus != 128+uint32(sig) {
			t.Errorf("Wait: %v, %v; want status %d", w, err, 128+sig)
		}
		if _, err := s.Kill(ctx, &taskapi.KillRequest{ID: "c", Signal: uint32(sig)}); status.Code(err) != codes.NotFound {
			t.Errorf("a second kill: %v, want NotFound", err)
		}
		if _, err := s.Start(ctx, &taskapi.StartRequest{ID: "c"}); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("a start afterwards: %v, want FailedPrecondition", err)
		}
		exec := &taskapi.ExecProcessRequest{ID: "c", ExecID: "e", Spec: &anypb.Any{Value: []byte("{}")}}
		if _, err := s.Exec(ctx, exec); status.Code(err) != codes.FailedPrecondition && status.Code(err) != codes.NotFound {
			t.Errorf("an exec afterwards: %v, want it refused", err)
		}
		finish()
		if len(sent.events) != 1 {
			t.Fatalf("%d events: %v", len(sent.events), sent.events)
		}
		e, ok := sent.events[0].(*eventstypes.TaskExit)
		if !ok || e.ContainerID != "c" || e.ID != "c" || e.Pid != 42 || e.ExitStatus != 128+uint32(sig) {
			t.Errorf("announced: %v", sent.events[0])
		}
	}
}

// A kill that comes while a start is under way waits for what comes of it.
func TestKillDuringStart(t *testing.T) {
	s, _, _ := newTestService(t)
	c := newTestContainer(t, "c")
	s.containers["c"] = c
	c.init.announce.Lock() // as Start does
	killed := make(chan error, 1)
	go func() {
		_, err := s.Kill(context.Background(), &taskapi.KillRequest{ID: "c", Signal: uint32(unix.SIGKILL)})
		killed <- err
	}()
	select {
	case err := <-killed:
		t.Fatalf("the kill did not wait: %v", err)
	case <-c.init.done:
		t.Fatal("the end was announced during the start")
	case <-time.After(50 * time.Millisecond): // enough to see it go wrong
	}
	c.init.announce.Unlock()
	if err := <-killed; err != nil {
		t.Error(err)
	}
	if _, ended := c.init.ended(); !ended {
		t.Error("it was not killed after the start")
	}
}

// The container that is being made cannot be seen, nor made twice, and keeps the
// shim alive.
func TestReserve(t *testing.T) {
	s, _, _ := newTestService(t)
	ctx := context.Background()
	if err := s.reserve("c"); err != nil {
		t.Fatal(err)
	}
	if err := s.reserve("c"); !errors.Is(err, errdefs.ErrAlreadyExists) {
		t.Errorf("while it is made: %v", err)
	}
	if _, err := s.State(ctx, &taskapi.StateRequest{ID: "c"}); status.Code(err) != codes.NotFound {
		t.Errorf("State while it is made: %v, want NotFound", err)
	}
	if _, err := s.Shutdown(ctx, &taskapi.ShutdownRequest{}); err != nil { // would call a nil service
		t.Error(err)
	}
	c := newTestContainer(t, "c")
	s.publish(c, true)
	if err := s.reserve("c"); !errors.Is(err, errdefs.ErrAlreadyExists) {
		t.Errorf("when it is made: %v", err)
	}
	if got, err := s.container("c"); got != c || err != nil {
		t.Errorf("%v, %v", got, err)
	}
	if err := s.reserve("d"); err != nil {
		t.Fatal(err)
	}
	s.publish(&container{id: "d"}, false)
	if err := s.reserve("d"); err != nil {
		t.Errorf("after it failed: %v", err)
	}
}

func TestExecBookkeeping(t *testing.T) {
	c := newTestContainer(t, "c")
	p := newProcess("e", stdioConfig{}, nil)
	if err := c.addExec(p); err != nil {
		t.Fatal(err)
	}
	if err := c.addExec(newProcess("e", stdioConfig{}, nil)); !errors.Is(err, errdefs.ErrAlreadyExists) {
		t.Errorf("the same name again: %v", err)
	}
	if got, err := c.process("e"); got != p || err != nil {
		t.Errorf("%v, %v", got, err)
	}
	if got, err := c.process(""); got != c.init || err != nil {
		t.Errorf("the init: %v, %v", got, err)
	}
	if _, err := c.process("f"); !errors.Is(err, errdefs.ErrNotFound) {
		t.Errorf("one that is not there: %v", err)
	}
	p.pid = 7
	if got := c.execsByPid(); !reflect.DeepEqual(got, map[int]string{7: "e"}) {
		t.Errorf("by pid: %v", got)
	}

	// The init's end waits for the execs that have begun, and lets none begin.
	first, err := c.beginExec()
	if err != nil {
		t.Fatal(err)
	}
	second, err := c.beginExec()
	if err != nil {
		t.Fatal(err)
	}
	first()
	first() // counts once
	ended := make(chan struct{})
	go func() {
		c.endExecs()
		close(ended)
	}()
	waitFor(t, "the end to be noted", func() bool {
		release, err := c.beginExec()
		if err == nil {
			release()
		}
		return errors.Is(err, errdefs.ErrFailedPrecondition)
	})
	select {
	case <-ended:
		t.Error("the init's end did not wait for an exec that runs")
	case <-time.After(20 * time.Millisecond): // enough to see it go wrong
	}
	second()
	<-ended
	if err := c.addExec(newProcess("g", stdioConfig{}, nil)); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("another after the end: %v", err)
	}
	c.removeExec("e")
	if _, err := c.process("e"); err == nil {
		t.Error("it is there after it was removed")
	}
}

func TestTakeExecs(t *testing.T) {
	c := newTestContainer(t, "c")
	if err := c.addExec(newProcess("e", stdioConfig{}, nil)); err != nil {
		t.Fatal(err)
	}
	if got := c.takeExecs(); len(got) != 1 {
		t.Errorf("%v", got)
	}
	// A request that comes at the same time.
	if err := c.addExec(newProcess("f", stdioConfig{}, nil)); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("an exec in a container that is deleted: %v", err)
	}
}

func TestProcessLife(t *testing.T) {
	p := newProcess("e", stdioConfig{}, nil)
	if got := p.execStatus(); got != task.Status_CREATED {
		t.Error(got)
	}
	if err := p.signal(nil, unix.SIGTERM); !errors.Is(err, runtime.ErrNotStarted) {
		t.Errorf("a signal before its start: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := p.wait(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("a client that waits no longer: %v", err)
	}
	p.abandon(255)
	p.abandon(0) // the first end counts
	if e, err := p.wait(context.Background()); err != nil || e.Status != 255 || e.At.IsZero() {
		t.Errorf("%+v, %v", e, err)
	}
	if got := p.execStatus(); got != task.Status_STOPPED {
		t.Error(got)
	}
}

// Deleting what never started ends the waits for it.
func TestDeleteExecThatNeverStarted(t *testing.T) {
	s, _, _ := newTestService(t)
	c := newTestContainer(t, "c")
	s.containers["c"] = c
	p := newProcess("e", stdioConfig{}, nil)
	if err := c.addExec(p); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Delete(context.Background(), &taskapi.DeleteRequest{ID: "c", ExecID: "e"}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.done:
	default:
		t.Error("whoever waits for it waits for ever")
	}
	if _, err := c.process("e"); err == nil {
		t.Error("it is still there")
	}
}

func TestStartExecAfterItsEnd(t *testing.T) {
	s, _, _ := newTestService(t)
	c := newTestContainer(t, "c")
	p := newProcess("e", stdioConfig{}, nil)
	p.abandon(3)
	if err := s.startExec(context.Background(), c, p); !errors.Is(err, errdefs.ErrFailedPrecondition) {
		t.Errorf("%v", err)
	}
	if e, _ := p.ended(); e.Status != 3 {
		t.Errorf("the refused start changed the exit status to %d", e.Status)
	}
	c.endExecs() // must not wait for it
}

func TestOwnCgroup(t *testing.T) {
	for path, want := range map[string]string{
		"":                              "",
		"/default/original":             "/default/clone",
		"/kubepods/burstable/pod1/orig": "/kubepods/burstable/pod1/clone",
		"original":                      "clone",
		"system.slice:crac:original":    "system.slice:crac:clone",
		":crac:original":                ":crac:clone",
		"/a:b/original":                 "/a:b/clone",
	} {
		spec := &specs.Spec{Linux: &specs.Linux{CgroupsPath: path}}
		ownCgroup(spec, "clone")
		if got := spec.Linux.CgroupsPath; got != want {
			t.Errorf("%q: %q, want %q", path, got, want)
		}
	}
}

func TestMountsBeyond(t *testing.T) {
	spec := &specs.Spec{Mounts: []specs.Mount{{Destination: "/proc"}, {Destination: "/data/"}, {Destination: "relative"}, {Destination: "/new"}, {Destination: "/a/../b"}}}
	m := &oci.Manifest{Mounts: []oci.Mount{{Destination: "/b"}, {Destination: "/data"}, {Destination: "/gone"}, {Destination: "/proc"}, {Destination: "/relative"}}}
	var got []string
	for _, b := range mountsBeyond(spec, m) {
		got = append(got, b.Destination)
	}
	if !slices.Equal(got, []string{"/new"}) {
		t.Errorf("%v, want only /new", got)
	}
	if got := mountsBeyond(spec, nil); got != nil {
		t.Errorf("of a dump without a manifest, %v: nobody knows what it has", got)
	}
}

func TestCheckpointOptions(t *testing.T) {
	c := newTestContainer(t, "c")
	c.options = oci.Options{CheckpointImage: "annotated", TCP: oci.TCPError}
	c.criu = criuPaths{work: "/work", config: "/config"}
	pack := func(m *runcoptions.CheckpointOptions) *anypb.Any {
		a, err := typeurl.MarshalAnyToProto(m)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	other, err := typeurl.MarshalAnyToProto(durationpb.New(1))
	if err != nil {
		t.Fatal(err)
	}
	base := runtime.CRIUOptions{WorkDir: "/work", ConfigFile: "/config", TCP: runtime.TCPError, ExternalUnixSockets: true}
	with := func(f func(*runtime.CRIUOptions)) runtime.CRIUOptions {
		o := base
		f(&o)
		return o
	}
	for name, tt := range map[string]struct {
		path    string
		options *anypb.Any
		want    checkpointRequest
		says    string
	}{
		"none":            {"/p", nil, checkpointRequest{dir: "/p", ref: "annotated", criu: base}, ""},
		"empty":           {"", &anypb.Any{}, checkpointRequest{ref: "annotated", criu: base}, ""},
		"path and option": {"/p", pack(&runcoptions.CheckpointOptions{ImagePath: "/o", Exit: true}), checkpointRequest{dir: "/p", ref: "annotated", exit: true, criu: base}, ""},
		"option alone":    {"", pack(&runcoptions.CheckpointOptions{ImagePath: "/o"}), checkpointRequest{dir: "/o", ref: "annotated", criu: base}, ""},
		"all of runc's": {
			"", pack(&runcoptions.CheckpointOptions{OpenTcp: true, Terminal: true, WorkPath: "/w", EmptyNamespaces: []string{"network"}}),
			checkpointRequest{ref: "annotated", criu: with(func(o *runtime.CRIUOptions) {
				o.TCP, o.ShellJob, o.WorkDir, o.EmptyNamespaces = runtime.TCPEstablished, true, "/w", []string{"network"}
			})},
			"",
		},
		"ours": {"", &anypb.Any{TypeUrl: oci.CheckpointOptionsType, Value: []byte(`{"ref":"asked","exit":true}`)}, checkpointRequest{ref: "asked", exit: true, criu: base}, ""},
		"ours, pre-dump": {
			"", &anypb.Any{TypeUrl: oci.CheckpointOptionsType, Value: []byte(`{"ref":"asked","preDump":"require"}`)},
			checkpointRequest{ref: "asked", preDump: oci.PreDumpRequire, criu: base},
			"",
		},
		"ours, torn":   {"", &anypb.Any{TypeUrl: oci.CheckpointOptionsType, Value: []byte(`{"ref":`)}, checkpointRequest{}, "checkpoint options"},
		"a parent":     {"", pack(&runcoptions.CheckpointOptions{ParentPath: "/x"}), checkpointRequest{}, "ParentPath"},
		"another type": {"", other, checkpointRequest{}, "google.protobuf.Duration"},
	} {
		got, err := c.checkpointOptions(tt.path, tt.options)
		if tt.says != "" {
			if err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%s: error is %v, want one that says %q", name, err, tt.says)
			}
			continue
		}
		if err == nil {
			if got.id == "" {
				t.Errorf("%s: no id", name)
			}
			got.id = ""
		}
		if err != nil || !reflect.DeepEqual(*got, tt.want) {
			t.Errorf("%s:\ngot  %+v, %v\nwant %+v", name, got, err, tt.want)
		}
	}
}

// A dump that failed half-way over an older one does not pass for it.
func TestDumpManifest(t *testing.T) {
	dir := t.TempDir()
	m := &oci.Manifest{Created: time.Now(), Container: oci.Container{ID: "c", Args: []string{"true"}}}
	images.ThisHost(40200).Describe(m)
	if err := clearDump(dir); err != nil {
		t.Errorf("an empty directory: %v", err)
	}
	if err := writeDumpManifest(dir, m); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a dump without an inventory: %v", err)
	}
	path := filepath.Join(dir, inventory)
	if err := os.WriteFile(path, []byte("\x16\x31\x31\x58\x00\x00\x00\x00"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writeDumpManifest(dir, m); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(filepath.Join(dir, manifestInDump))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	back, err := oci.DecodeManifest(f)
	if err != nil {
		t.Fatal(err)
	}
	if err := checkInventory(dir, back); err != nil {
		t.Errorf("its own dump: %v", err)
	}
	if err := os.WriteFile(path, []byte("other"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := checkInventory(dir, back); !errors.Is(err, images.ErrDamaged) {
		t.Errorf("another dump: %v, want ErrDamaged", err)
	}
	if err := clearDump(dir); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestAddressRange(t *testing.T) {
	for s, want := range map[string]uint64{"1000-3000": 0x2000, "7f0000000000-7f0000001000": 0x1000, "": 0, "-": 0, "1000": 0, "3000-1000": 0, "1000-1000": 0, "x-y": 0, "0-10000000000000000": 0} {
		if got := addressRange(s); uint64(len(got)) != want {
			t.Errorf("%q: %#x bytes, want %#x", s, len(got), want)
		}
	}
}

// Dropping the program's own pages leaves the program as it is.
func TestTrim(t *testing.T) {
	text := ownText()
	if len(text) == 0 {
		t.Fatal("no mapping of the program's own file was found")
	}
	tr := newTrimmer()
	tr.timer.Stop()
	tr.crowded = func() bool { return false }
	for range 3 {
		tr.trim()
		if got := addressRange("1000-2000"); len(got) != 0x1000 {
			t.Fatal("the program does not work any more")
		}
	}
}

// A trim waits while the machine is crowded, but not forever, and a call begins anew.
func TestTrimInACrowd(t *testing.T) {
	tr := newTrimmer()
	tr.timer.Stop()
	trimmed := 0
	tr.text = func() [][]byte { trimmed++; return nil }
	tr.crowded = func() bool { return true }
	want := func(n int, when string) {
		t.Helper()
		tr.trim()
		tr.timer.Stop()
		if trimmed != n {
			t.Fatalf("%s: it has trimmed %d times, want %d", when, trimmed, n)
		}
	}
	want(0, "in a crowd")
	tr.due = tr.due.Add(-trimPatience)
	want(1, "in a crowd that does not end")
	tr.busy()()
	tr.timer.Stop()
	want(1, "in a crowd, after a call")
	tr.crowded = func() bool { return false }
	want(2, "after the crowd")
}

// fakeBuilder puts a builder that runs a shell script where the shim finds it.
func fakeBuilder(t *testing.T, script string) {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, builder), []byte("#!/bin/sh\n"+script), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":/usr/bin:/bin")
}

func TestImageBuild(t *testing.T) {
	s, _, _ := newTestService(t)
	start := func(t *testing.T) *imageBuild {
		t.Helper()
		c := newTestContainer(t, "c")
		b, err := s.startBuilder()
		if err != nil {
			t.Fatal(err)
		}
		if err := b.say(s.buildRequest(c, &checkpointRequest{ref: "r"}, &oci.Manifest{})); err != nil {
			t.Fatal(err)
		}
		if err := b.ready(t.Context()); err != nil {
			b.abort()
			t.Fatal(err)
		}
		if err := b.ask(images.BuildDump{DumpDir: c.bundle}); err != nil {
			t.Fatal(err)
		}
		return b
	}
	const (
		first   = "read -r request\ncase $1$request in build-image{*'\"r\"'*) ;; *) echo \"asked for $1 $request\" >&2; exit 1 ;; esac\n"
		request = first + "echo '{\"event\":\"ready\"}'\nread -r dump\ncase $dump in {'\"dumpDir\"'*) ;; *) echo \"a dump $dump\" >&2; exit 1 ;; esac\n"
	)
	for name, tt := range map[string]struct {
		script          string
		diff, wait, end string // what the errors say; none if empty
	}{
		"good":                  {`echo '{"event":"progress"}'; echo '{"event":"diffed"}'; echo '{"event":"done","name":"r","digest":"d"}'`, "", "", ""},
		"says why":              {`echo '{"event":"error","error":"no space"}'; exit 1`, "no space", "", ""},
		"says why, later":       {`echo '{"event":"diffed"}'; echo '{"event":"error","error":"no space"}'; exit 1`, "", "no space", ""},
		"dies":                  {`echo oops >&2; exit 3`, "oops", "", ""},
		"dies without a word":   {`exit 3`, "exit status 3", "", ""},
		"ends too early":        {`echo '{"event":"diffed"}'`, "", "ended early", ""},
		"is no builder":         {`echo hello`, `said "hello"`, "", ""},
		"fails after its words": {`echo '{"event":"diffed"}'; echo '{"event":"done","name":"r","digest":"d"}'; exit 4`, "", "", "exit status 4"},
		"pushes":                {`echo '{"event":"diffed"}'; echo '{"event":"done","name":"r","digest":"d"}'; echo '{"event":"pushing"}'; echo '{"event":"pushed"}'`, "", "", ""},
		"cannot push":           {`echo '{"event":"diffed"}'; echo '{"event":"done","name":"r","digest":"d"}'; echo '{"event":"pushing"}'; echo '{"event":"error","error":"no such registry"}'; exit 1`, "", "", "no such registry"},
	} {
		t.Run(name, func(t *testing.T) {
			noMoreFiles(t)
			fakeBuilder(t, request+tt.script)
			b := start(t)
			defer b.abort() // whatever has happened
			err := b.untilDiffed()
			if tt.diff != "" {
				if err == nil || !strings.Contains(err.Error(), tt.diff) {
					t.Errorf("until the changes are taken: %v, want %q", err, tt.diff)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			done, err := b.wait()
			if tt.wait != "" {
				if err == nil || !strings.Contains(err.Error(), tt.wait) {
					t.Errorf("until the image is there: %v, want %q", err, tt.wait)
				}
				return
			}
			if err != nil || done.Name != "r" || done.Digest != "d" {
				t.Fatalf("%+v, %v", done, err)
			}
			for range 2 { // the second time there is nothing to wait for
				if err = b.end(); err != nil {
					break
				}
			}
			if tt.end == "" && err != nil || tt.end != "" && (err == nil || !strings.Contains(err.Error(), tt.end)) {
				t.Errorf("until the builder's end: %v, want %q", err, tt.end)
			}
		})
	}
	for name, tt := range map[string]struct{ script, want string }{
		"gone before it is asked": {"echo no socket >&2; exit 1", "no socket"},
		"something in the way":    {first + `echo '{"event":"warning","error":"w"}'; echo '{"event":"error","error":"no such parent"}'; exit 1`, "no such parent"},
		"ends without a word":     {first + "exit 0", "ended early"},
	} {
		t.Run(name, func(t *testing.T) {
			noMoreFiles(t)
			fakeBuilder(t, tt.script)
			b, err := s.startBuilder()
			if err != nil {
				t.Fatal(err)
			}
			defer b.abort()
			if name == "gone before it is asked" {
				for unix.Waitid(unix.P_PID, b.cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
				}
			}
			if err := b.say(images.BuildRequest{Ref: "r"}); err != nil {
				t.Fatal(err)
			}
			if err := b.ready(t.Context()); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error is %v, want %q", err, tt.want)
			}
		})
	}
	// What has something to give back does so.
	t.Run("never asked", func(t *testing.T) {
		noMoreFiles(t)
		gaveBack := filepath.Join(t.TempDir(), "gave-back")
		fakeBuilder(t, "read -r request; touch '"+gaveBack+"'")
		b, err := s.startBuilder()
		if err != nil {
			t.Fatal(err)
		}
		b.abort()
		if _, err := os.Stat(gaveBack); err != nil {
			t.Error(err)
		}
	})
	t.Run("nobody waits for the answer", func(t *testing.T) {
		noMoreFiles(t)
		fakeBuilder(t, first+"exec sleep 1000")
		b, err := s.startBuilder()
		if err != nil {
			t.Fatal(err)
		}
		defer b.abort()
		if err := b.say(images.BuildRequest{Ref: "r"}); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := b.ready(ctx); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("aborted", func(t *testing.T) {
		fakeBuilder(t, request+`echo '{"event":"diffed"}'; exec sleep 1000`)
		b := start(t)
		if err := b.untilDiffed(); err != nil {
			t.Fatal(err)
		}
		b.abort()
		if err := unix.Kill(b.cmd.Process.Pid, 0); !errors.Is(err, unix.ESRCH) {
			t.Errorf("the builder is still there: %v", err)
		}
	})
	t.Run("not installed", func(t *testing.T) {
		t.Setenv("PATH", t.TempDir())
		if _, err := s.startBuilder(); err == nil || !strings.Contains(err.Error(), builder) {
			t.Errorf("error is %v, want one that names %s", err, builder)
		}
	})
	var none *imageBuild
	none.abort()
	if err := none.ready(t.Context()); err != nil {
		t.Error(err)
	}
	if done, err := none.wait(); done != nil || err != nil {
		t.Errorf("of no build: %v, %v", done, err)
	}
}

func FuzzBuildEvents(f *testing.F) {
	for _, s := range []string{`{"event":"diffed"}`, `{"event":"error","error":"x"}`, "[]", "\x00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, line string) {
		b := &imageBuild{events: bufio.NewScanner(strings.NewReader(line)), stderr: &bytes.Buffer{}, waitCmd: func() error { return nil }}
		if e, err := b.next(); (e == nil) == (err == nil) {
			t.Errorf("%+v, %v", e, err)
		}
	})
}
