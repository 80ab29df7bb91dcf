package integration

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crac-shim/crac/integration/harness"
)

// ociHooks are containers with a hook of every kind of the OCI specification. Each notes its kind and
// the container's status, as it was told.
type ociHooks struct {
	*harness.T
	dir  string
	maps []specs.LinuxIDMapping // of a user namespace
	spec []oci.SpecOpts         // what else they have
}

var hookKinds = []string{"prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"}

func newOCIHooks(t *harness.T, maps []specs.LinuxIDMapping, spec ...oci.SpecOpts) ociHooks {
	t.Helper()
	dir, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	// Some hooks run as the root of the container's user namespace.
	if err := os.Chmod(dir, 0o777); err != nil { //nolint:gosec // see above
		t.Fatal(err)
	}
	return ociHooks{t, dir, maps, spec}
}

// container has the hook of one kind fail, if it names one.
func (h ociHooks) container(runtime, fail string) config {
	h.Helper()
	hook := func(kind string) []specs.Hook {
		if kind == fail {
			return h.hook(kind, 1)
		}
		return h.hook(kind, 0)
	}
	spec := []oci.SpecOpts{
		// startContainer runs inside, and has to find the log.
		oci.WithMounts([]specs.Mount{{Type: "bind", Source: h.dir, Destination: h.dir, Options: []string{"rbind", "rw"}}}),
		withSpec(func(s *oci.Spec) {
			s.Hooks = &specs.Hooks{
				Prestart: hook("prestart"), CreateRuntime: hook("createRuntime"), CreateContainer: hook("createContainer"), //nolint:staticcheck // deprecated, and run
				StartContainer: hook("startContainer"), Poststart: hook("poststart"), Poststop: hook("poststop"),
			}
		}),
	}
	c := sh(tickNoFile)
	c.id, c.runtime = newID(h), runtime
	if h.maps != nil {
		img, err := h.ImportImage(h.Ctx, "busybox")
		if err != nil {
			h.Fatal(err)
		}
		spec = append(spec, oci.WithUserNamespace(h.maps, h.maps))
		c.container = []containerd.NewContainerOpts{containerd.WithNewSnapshot(c.id, img, containerd.WithUserNSRemapperLabels(h.maps, h.maps))}
	}
	c.spec = slices.Concat(spec, h.spec)
	return c
}

// hook notes that it was called, and exits with this status.
func (h ociHooks) hook(kind string, status int) []specs.Hook {
	script := fmt.Sprintf(`umask 0; echo %s $(grep -o '"status": *"[a-z]*"' | head -n 1 | cut -d '"' -f 4) >>%s/log; echo bad-%s >&2; exit %d`, kind, h.dir, kind, status)
	return []specs.Hook{{Path: "/bin/sh", Args: []string{"sh", "-c", script}, Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}}}
}

// noted is what the hooks have noted since it was last asked.
func (h ociHooks) noted() []string {
	h.Helper()
	log := filepath.Join(h.dir, "log")
	text, err := os.ReadFile(log)
	if err == nil {
		err = os.Remove(log)
	}
	if err != nil && !os.IsNotExist(err) {
		h.Fatal(err)
	}
	return strings.FieldsFunc(string(text), func(r rune) bool { return r == '\n' })
}

// life is what becomes of a container: what the hooks noted by then, and the errors.
type life struct {
	created, started, deleted []string
	createErr, startErr       error
	code                      uint32 // of a workload that ended by itself; 137 of one that was killed
}

func (h ociHooks) live(c config) (l life) {
	h.Helper()
	n := newContainer(h.T, c)
	l.createErr = n.tryCreate()
	l.created = h.noted()
	if l.createErr == nil {
		l.startErr = n.task.Start(h.Ctx)
		if l.startErr == nil {
			ended := false
			h.Eventually("a tick, or the end", func() bool {
				s, err := n.task.Status(h.Ctx)
				ended = err == nil && s.Status == containerd.Stopped
				return ended || strings.Contains(n.out.String(), "tick")
			})
			l.started = h.noted()
			if !ended {
				n.kill(syscall.SIGKILL)
			}
			l.code = n.wait()
			n.deleteTask()
			l.deleted = h.noted()
		} else {
			l.started = h.noted()
		}
	}
	n.remove()
	l.deleted = append(l.deleted, h.noted()...)
	return l
}

// TestOCIHooksInOrder: which hooks run when, in a cold start as under runc's shim, and in a restore.
// There createContainer and startContainer have nothing to do: CRIU makes the container as it was.
func TestOCIHooksInOrder(tb *testing.T) {
	onlyCrac(tb)
	for name, maps := range map[string][]specs.LinuxIDMapping{"plain": nil, "in a user namespace": {{HostID: 100000, Size: 65536}}} {
		tb.Run(name, func(tb *testing.T) {
			t := setup(tb)
			h := newOCIHooks(t, maps)
			want := h.live(h.container(runcRuntime, ""))
			got := h.live(h.container(cracRuntime, ""))
			if order := slices.Concat(got.created, got.started, got.deleted); len(order) != len(hookKinds) {
				t.Errorf("a cold start runs the hooks %q", order)
			}
			if !slices.Equal(got.created, want.created) || !slices.Equal(got.started, want.started) || !slices.Equal(got.deleted, want.deleted) ||
				got.createErr != nil || got.startErr != nil || got.code != want.code {
				t.Errorf("a cold start: %+v, under runc's shim %+v", got, want)
			}

			dump := h.dump()
			c := h.container(cracRuntime, "")
			c.task = []containerd.NewTaskOpts{containerd.WithRestoreImagePath(dump)}
			clone := h.live(c)
			if clone.createErr != nil || clone.startErr != nil || clone.code != 137 {
				t.Errorf("a restore: %+v", clone)
			}
			order := slices.Concat(clone.created, clone.started, clone.deleted)
			if want := []string{"prestart creating", "createRuntime creating", "poststart running", "poststop stopped"}; !slices.Equal(order, want) {
				t.Errorf("a restore runs the hooks %q, want %q", order, want)
			}
			// A client makes the network in createRuntime, before the start.
			if len(clone.created) != 2 {
				t.Errorf("before the start of a restore these hooks have run: %q", clone.created)
			}
		})
	}
}

// dump makes a dump of a container that has no hook that fails.
func (h ociHooks) dump() string {
	h.Helper()
	original := newContainer(h.T, h.container(cracRuntime, "")).start()
	h.Eventually("the workload ticks", func() bool { return strings.Contains(original.out.String(), "tick 3") })
	dir := filepath.Join(h.dir, "dump")
	h.CtrOK("tasks", "checkpoint", "--image-path", dir, original.ID())
	original.remove()
	h.noted()
	return dir
}

// TestOCIHookFails: a hook that fails, fails the call that runs it, with what the hook said, and nothing
// stays: in a cold start as under runc's shim, and in a restore.
func TestOCIHookFails(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	h := newOCIHooks(t, nil)
	dump := h.dump()
	for _, kind := range hookKinds {
		if kind == "poststop" {
			continue // TestPoststopHookFails
		}
		want, got := h.live(h.container(runcRuntime, kind)), h.live(h.container(cracRuntime, kind))
		if !slices.Equal(got.created, want.created) || !slices.Equal(got.started, want.started) || !slices.Equal(got.deleted, want.deleted) ||
			(got.createErr == nil) != (want.createErr == nil) || (got.startErr == nil) != (want.startErr == nil) || got.code != want.code {
			t.Errorf("%s fails in a cold start: %+v, under runc's shim %+v", kind, got, want)
		}
		if got.createErr == nil && got.startErr == nil && got.code == 137 {
			t.Errorf("%s fails in a cold start, and the workload runs", kind)
		}

		c := h.container(cracRuntime, kind)
		c.task = []containerd.NewTaskOpts{containerd.WithRestoreImagePath(dump)}
		clone := h.live(c)
		said := func(err error) bool { return err != nil && strings.Contains(err.Error(), "bad-"+kind) }
		switch kind {
		case "prestart", "createRuntime":
			if !said(clone.createErr) {
				t.Errorf("%s fails in a restore: %+v", kind, clone)
			}
		case "poststart":
			if !said(clone.startErr) {
				t.Errorf("%s fails in a restore: %+v", kind, clone)
			}
		default: // is not run
			if clone.createErr != nil || clone.startErr != nil || clone.code != 137 {
				t.Errorf("%s, which a restore does not run: %+v", kind, clone)
			}
		}
		for _, err := range []error{got.createErr, got.startErr} {
			if err != nil && !said(err) {
				t.Errorf("the error does not tell what the hook said: %v", err)
			}
		}
		if last := clone.deleted; len(last) == 0 && !slices.Contains(clone.created, "poststop stopped") && !slices.Contains(clone.started, "poststop stopped") {
			t.Errorf("%s fails in a restore, and poststop does not run: %+v", kind, clone)
		}
	}
}

// TestOCIHookFailsInUserNamespace: there CRIU makes what a hook finds at Create, and a hook that fails is
// no reason to start in another way.
func TestOCIHookFailsInUserNamespace(tb *testing.T) {
	onlyCrac(tb)
	// With the host's network CRIU makes the rest at Start.
	hostNetwork := withSpec(func(s *oci.Spec) {
		s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.NetworkNamespace })
		s.Mounts = slices.DeleteFunc(s.Mounts, func(m specs.Mount) bool { return m.Type == "sysfs" }) // not to be had there
	})
	for name, spec := range map[string]oci.SpecOpts{"own network": oci.Compose(), "the host's network": hostNetwork} {
		tb.Run(name, func(tb *testing.T) {
			t := setup(tb)
			h := newOCIHooks(t, []specs.LinuxIDMapping{{HostID: 100000, Size: 65536}}, spec)
			c := h.container(cracRuntime, "createRuntime")
			c.spec = append(c.spec, oci.WithAnnotations(map[string]string{"io.containerd.crac.restore": "auto"}))
			c.task = []containerd.NewTaskOpts{containerd.WithRestoreImagePath(h.dump())}
			clone := h.live(c)
			if err := cmp.Or(clone.createErr, clone.startErr); err == nil || !strings.Contains(err.Error(), "bad-createRuntime") {
				t.Errorf("the hook: %v", err)
			}
			ran := slices.Concat(clone.created, clone.started, clone.deleted)
			if want := []string{"prestart creating", "createRuntime creating"}; len(ran) < 2 || !slices.Equal(ran[:2], want) || slices.Contains(ran[2:], want[1]) {
				t.Errorf("these hooks have run: %q", ran)
			}
		})
	}
}

// TestOCIHooksOfAColdStartInstead: what the hooks have set up for a restore that then fails, is what the
// cold start gets, which they run for once.
func TestOCIHooksOfAColdStartInstead(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	h := newOCIHooks(t, nil)
	original := newContainer(t, h.container(cracRuntime, "")).start()
	if r := original.exec("touch /dev/shm/file"); r.code != 0 {
		t.Fatalf("%+v", r)
	}
	dir := filepath.Join(h.dir, "dump")
	t.CtrOK("tasks", "checkpoint", "--image-path", dir, original.ID())
	original.remove()
	h.noted()

	// The file is in the way when all of the restore but this mount is done.
	c := h.container(cracRuntime, "")
	c.spec = append(c.spec,
		oci.WithMounts([]specs.Mount{{Type: "tmpfs", Source: "tmpfs", Destination: "/dev/shm/file/below"}}),
		oci.WithAnnotations(map[string]string{"io.containerd.crac.restore": "auto"}))
	c.task = []containerd.NewTaskOpts{containerd.WithRestoreImagePath(dir)}
	clone := h.live(c)
	if clone.createErr != nil || clone.startErr != nil || clone.code != 137 {
		t.Errorf("the clone: %+v", clone)
	}
	if reason := coldReason(t, c.id); !strings.Contains(reason, "/dev/shm/file/below") {
		t.Errorf("the reason: %s", reason)
	}
	cold := h.live(h.container(runcRuntime, ""))
	order, want := slices.Concat(clone.created, clone.started, clone.deleted), slices.Concat(cold.created, cold.started, cold.deleted)
	if !slices.Equal(order, want) || len(order) != len(hookKinds) {
		t.Errorf("these hooks have run: %q, in a cold start under runc's shim %q", order, want)
	}
}

// TestPoststopHookFails: it does not keep the container, nor the hooks behind it (runtime-spec, Lifecycle).
// Under runc's shim it does.
func TestPoststopHookFails(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	h := newOCIHooks(t, nil)
	c := h.container(cracRuntime, "poststop")
	c.spec = append(c.spec, withSpec(func(s *oci.Spec) { s.Hooks.Poststop = append(s.Hooks.Poststop, h.hook("poststop", 0)...) }))
	if l := h.live(c); !slices.Equal(l.deleted, []string{"poststop stopped", "poststop stopped"}) {
		t.Errorf("%+v; want both poststop hooks to have run", l)
	}
	t.Eventually("a warning", func() bool {
		return strings.Contains(t.Daemon.Log(), "poststop hook 0 of container "+c.id) && strings.Contains(t.Daemon.Log(), "bad-poststop")
	})
}
