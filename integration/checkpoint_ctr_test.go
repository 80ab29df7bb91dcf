package integration

import (
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"

	"github.com/crac-shim/crac/integration/harness"
	"github.com/crac-shim/crac/runtime/thread"
)

// restoreFrom starts a container from a dump that a client names: a path, or the image that
// `ctr tasks checkpoint` made. ctr itself has no command for either.
func restoreFrom(t *harness.T, c config, from containerd.NewTaskOpts) *box {
	t.Helper()
	id := newID(t)
	b := newBox(t, id)
	c.id, c.io, c.task = id, cio.LogFile(b.out), []containerd.NewTaskOpts{from}
	n := newContainer(t, c)
	containerdLeak(t)
	n.start()
	return b
}

func TestTasksCheckpoint(tb *testing.T) {
	for _, exit := range []bool{false, true} {
		for _, path := range []bool{false, true} {
			name := map[bool]string{false: "leave-running", true: "exit"}[exit] + "-" + map[bool]string{false: "image", true: "path"}[path]
			tb.Run(name, func(tb *testing.T) {
				t := setup(tb)
				sameCgroups(t, func(onlyOf func(...*box)) {
					original := start(t, how{args: []string{"sh", "-c", tickNoFile}})
					original.waitTicks(3)

					args := []string{"tasks", "checkpoint"}
					var dir string
					if exit {
						args = append(args, "--exit")
					}
					if path {
						var err error
						if dir, err = t.Path(original.id); err != nil {
							t.Fatal(err)
						}
						dir = filepath.Join(dir, "dump") // the runtime makes it
						args = append(args, "--image-path", dir, "--work-path", dir+"-work")
					}
					out := strings.TrimSpace(t.CtrOK(append(args, original.id)...))
					onlyOf(original)
					if exit {
						original.wantStatus(containerd.Stopped)
					} else {
						original.wantStatus(containerd.Running)
						original.waitTicks(3)
						original.inOrder()
					}
					last := original.lastTick()

					var from containerd.NewTaskOpts
					if path {
						from = containerd.WithRestoreImagePath(dir)
						for _, f := range []string{"inventory.img", "descriptors.json"} {
							if _, err := os.Stat(filepath.Join(dir, f)); err != nil {
								t.Error(err)
							}
						}
					} else {
						img, err := t.Client.GetImage(t.Ctx, out)
						if err != nil {
							t.Fatal(err)
						}
						from = containerd.WithTaskCheckpoint(img)
					}
					clone := restoreFrom(t, sh(tickNoFile), from)
					onlyOf(original, clone)
					if exit {
						clone.goesOnFrom(last)
						return
					}
					clone.waitTicks(3)
					clone.inOrder()
					if first := clone.ticks()[0]; first < 2 || first > last {
						t.Errorf("the clone counts on from %d; the original was at %d after the dump", first, last)
					}
					original.waitTicks(3)
				})
			})
		}
	}
}

// The clone gets the changes of the original's root file system, and both run.
func TestContainersCheckpointRestore(tb *testing.T) {
	t := setup(tb)
	sameCgroups(t, func(onlyOf func(...*box)) {
		// Its name for itself is in its memory alone: one that is started anew has another.
		original := start(t, how{args: []string{"sh", "-c", `self=$(cat /proc/sys/kernel/random/uuid); i=0; while :; do i=$((i+1)); echo tick $i; echo $i >/n; echo $self >/self; sleep 0.05; done`}})
		original.waitTicks(3)
		self := original.exec("cat", "/self")
		original.exec("sh", "-c", "echo kept > /etc/kept; rm /self")
		image := ref(t)
		t.CtrOK("containers", "checkpoint", "--rw", "--task", original.id, image)
		original.wantStatus(containerd.Running)
		last := original.waitTicks(3)

		clone := newBox(t, newID(t))
		t.Cleanup(func() { removeFIFOs(t, clone.id) })
		containerdLeak(t)
		t.CtrOK("containers", "restore", "--rw", "--live", clone.id, image)
		onlyOf(original, clone)
		clone.wantStatus(containerd.Running)
		original.wantStatus(containerd.Running)
		if got := clone.exec("cat", "/etc/kept"); got != "kept" {
			t.Errorf("the clone's /etc/kept holds %q", got)
		}
		// ctr does not stay to read the clone's output, so look at its files.
		n := clone.fileTick()
		t.Eventually("the clone counts", func() bool { return clone.fileTick() > n })
		if got := clone.exec("cat", "/self"); got != self {
			t.Errorf("the clone is %q, the original %q: it was started anew", got, self)
		}
		original.waitTicks(3)
		original.inOrder()
		if original.lastTick() <= last {
			t.Error("the original does not count any more")
		}
		// Their cgroups are not the same one: ending one leaves the other alone.
		t.CtrOK("tasks", "kill", "--signal", "SIGKILL", "--all", clone.id)
		t.Eventually("the clone ends", func() bool { return clone.status() == containerd.Stopped })
		original.waitTicks(3)
	})
}

// What people run, and not a shell, through every form that containerd has of its own: sockets, epoll,
// threads, timers, pipes and child processes go on. (TestApplications has the checkpoint image.)
func TestNativeCheckpointsOfApplications(tb *testing.T) {
	onlyCrac(tb)
	flows := map[string]func(original *box, app string) (clone *box){
		"path": func(original *box, app string) *box {
			dir, err := original.Path(original.id)
			if err != nil {
				original.Fatal(err)
			}
			original.checkpoint("--image-path", dir)
			return restoreFrom(original.T, config{image: app}, containerd.WithRestoreImagePath(dir))
		},
		"image": func(original *box, app string) *box {
			img, err := original.Client.GetImage(original.Ctx, strings.TrimSpace(original.CtrOK("tasks", "checkpoint", original.id)))
			if err != nil {
				original.Fatal(err)
			}
			return restoreFrom(original.T, config{image: app}, containerd.WithTaskCheckpoint(img))
		},
		"container": func(original *box, _ string) *box {
			image, clone := ref(original), newBox(original.T, newID(original))
			original.CtrOK("containers", "checkpoint", "--rw", "--task", original.id, image)
			original.Cleanup(func() { removeFIFOs(original.T, clone.id) })
			containerdLeak(original.T)
			original.CtrOK("containers", "restore", "--rw", "--live", clone.id, image)
			return clone
		},
	}
	for _, app := range []string{"goserver", "python", "nginx"} {
		for flow, cloneOf := range flows {
			tb.Run(app+"-"+flow, func(tb *testing.T) {
				t := setup(tb)
				needImage(t, app)
				sameCgroups(t, func(onlyOf func(...*box)) {
					original := start(t, how{image: harness.ImageRef(app)})
					for range 2 {
						original.countInside()
					}
					before, processes := original.countInside(), original.settled()
					clone := cloneOf(original, app)
					onlyOf(original, clone)
					countsOn(t, clone.countInside, before)
					if got := clone.settled(); !slices.Equal(got, processes) {
						t.Errorf("the clone has the processes %q, the original %q", got, processes)
					}
					countsOn(t, original.countInside, before)
				})
			})
		}
	}
}

// countInside asks a server that counts from within its network namespace, which need have no address.
func (b *box) countInside() (body string) {
	b.Helper()
	b.Eventually("the server answers", func() bool {
		return thread.InNetwork(int(b.task().Pid()), func() error {
			conn, err := net.Dial("tcp", "127.0.0.1:8080") // on this thread, as an http.Client's would not be
			if err != nil {
				return err
			}
			defer conn.Close()
			if _, err := fmt.Fprint(conn, "GET /count HTTP/1.0\r\n\r\n"); err != nil {
				return err
			}
			answer, err := io.ReadAll(conn)
			if err != nil {
				b.Fatal(err)
			}
			body = string(answer)
			return nil
		}) == nil
	})
	return body
}

// removeFIFOs removes what `ctr containers restore` leaves: it has no option for the place.
func removeFIFOs(t *harness.T, id string) {
	fifos, err := filepath.Glob("/run/containerd/fifo/*/" + id + "-*")
	if err != nil {
		t.Error(err)
	}
	for _, f := range fifos {
		if err := os.RemoveAll(filepath.Dir(f)); err != nil {
			t.Error(err)
		}
	}
}

// A client that checkpoints pauses the task itself; one that was paused before must stay so.
func TestCheckpointOfPausedTask(tb *testing.T) {
	t := setup(tb)
	b := start(t, ticker())
	b.waitTicks(3)
	t.CtrOK("tasks", "pause", b.id)
	t.CtrOK("tasks", "checkpoint", b.id)
	b.wantStatus(containerd.Paused)
	n := b.lastTick()
	t.CtrOK("tasks", "resume", b.id)
	b.wantStatus(containerd.Running)
	b.waitTicks(3)
	b.inOrder()
	if first := b.ticks()[n]; first != n+1 {
		t.Errorf("after the resume it counts on from %d, want %d", first, n+1)
	}
	if got := b.exec("echo", "alive"); got != "alive" {
		t.Errorf("exec says %q", got)
	}
}
