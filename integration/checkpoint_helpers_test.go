package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/errdefs"

	"github.com/crac-shim/crac/integration/harness"
	"github.com/crac-shim/crac/oci"
)

// tick is a workload that counts: in memory, on its standard output and in a file. It has a
// child process at nearly all times.
const tick = `i=0; while :; do i=$((i+1)); echo tick $i; echo $i >/n; sleep 0.05; done`

// tickNoFile is tick for a restore into a root file system that the dump does not come with.
const tickNoFile = `i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.05; done`

// box is a container that stock ctr started, with its output in a file.
type box struct {
	*harness.T
	id  string
	out string // the file with its output
	cni bool
}

// how says how ctr starts a box. The zero value is busybox on the runtime under test.
type how struct {
	image   string
	runtime string
	flags   []string
	args    []string
	cni     bool
}

// ticker is how the counting workload is started.
func ticker(flags ...string) how {
	return how{flags: flags, args: []string{"sh", "-c", tick}}
}

// warm is a start that has to be a restore, with the command that the dump runs.
func warm(image string, flags ...string) how {
	return how{image: image, flags: append(flags, option("restore", "require")), args: ticker().args}
}

// start runs a container with stock ctr, detached. It is deleted when the test ends, and the
// test fails if anything of it is left then.
func start(t *harness.T, h how) *box {
	t.Helper()
	b, err := tryStart(t, h)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func tryStart(t *harness.T, h how) (*box, error) {
	t.Helper()
	if h.image == "" {
		needImage(t, "busybox")
		h.image = harness.ImageRef("busybox")
	}
	if h.runtime == "" {
		h.runtime = testRuntime
	}
	b := newBox(t, newID(t))
	args := []string{"run", "--detach", "--runtime", h.runtime, "--log-uri", "file://" + b.out}
	if h.cni {
		if _, err := t.Network(); err != nil {
			return nil, err
		}
		b.cni = true
		args = append(args, "--cni")
	}
	args = append(append(args, h.flags...), h.image, b.id)
	_, err := t.Ctr(t.Ctx, append(args, h.args...)...)
	return b, err
}

// newBox is a container that the test starts in its own way.
func newBox(t *harness.T, id string) *box {
	t.Helper()
	dir, err := t.Path("out")
	if err != nil {
		t.Fatal(err)
	}
	b := &box{T: t, id: id, out: filepath.Join(dir, id)}
	t.Cleanup(b.remove)
	return b
}

// remove deletes the container with its task and snapshot, unless the test did it.
func (b *box) remove() {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Daemon.Context(context.Background()), 2*harness.WaitLimit)
	defer cancel()
	if b.Failed() {
		b.Logf("the output of %s ends with:\n%s", b.id, tailOf(b.log(), 500))
	}
	c, err := b.Client.LoadContainer(ctx, b.id)
	if err == nil {
		var task containerd.Task
		if task, err = c.Task(ctx, nil); err == nil {
			_, err = task.Delete(ctx, containerd.WithProcessKill)
		}
		if err == nil || errdefs.IsNotFound(err) {
			err = c.Delete(ctx, containerd.WithSnapshotCleanup)
		}
	}
	if err != nil && !errdefs.IsNotFound(err) {
		b.Errorf("delete %s: %v", b.id, err)
	}
	if b.cni {
		b.cni = false
		n, err := b.Network()
		if err == nil {
			err = n.Release(ctx, b.id)
		}
		if err != nil {
			b.Error(err)
		}
	}
	b.NoLeftovers(b.id)
}

func tailOf(s string, n int) string { return s[max(0, len(s)-n):] }

// log is what the container has written to its standard output and error.
func (b *box) log() string {
	data, err := os.ReadFile(b.out)
	if err != nil {
		return ""
	}
	return string(data)
}

// exec runs a command in the container; it has to succeed.
func (b *box) exec(args ...string) string {
	b.Helper()
	out, err := b.tryExec(args...)
	if err != nil {
		b.Fatal(err)
	}
	return strings.TrimSpace(out)
}

func (b *box) tryExec(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(b.Ctx, harness.WaitLimit)
	defer cancel()
	return b.Ctr(ctx, append([]string{"tasks", "exec", "--exec-id", newID(b), b.id}, args...)...)
}

func (b *box) task() containerd.Task {
	b.Helper()
	c, err := b.Client.LoadContainer(b.Ctx, b.id)
	if err != nil {
		b.Fatal(err)
	}
	task, err := c.Task(b.Ctx, nil)
	if err != nil {
		b.Fatalf("task of %s: %v", b.id, err)
	}
	return task
}

func (b *box) status() containerd.ProcessStatus {
	b.Helper()
	s, err := b.task().Status(b.Ctx)
	if err != nil {
		b.Fatalf("state of %s: %v", b.id, err)
	}
	return s.Status
}

func (b *box) wantStatus(want containerd.ProcessStatus) {
	b.Helper()
	if got := b.status(); got != want {
		b.Errorf("%s is %s, want %s", b.id, got, want)
	}
}

// address is the container's address in the private network.
func (b *box) address() string {
	b.Helper()
	n, err := b.Network()
	if err != nil {
		b.Fatal(err)
	}
	ip, err := n.IP(b.Ctx, int(b.task().Pid()))
	if err != nil {
		b.Fatal(err)
	}
	return ip
}

var tickLine = regexp.MustCompile(`(?m)^tick (\d+)$`)

// ticks returns the numbers that a ticker has written.
func (b *box) ticks() []int {
	var all []int
	for _, m := range tickLine.FindAllStringSubmatch(b.log(), -1) {
		n, err := strconv.Atoi(m[1])
		if err != nil {
			b.Fatal(err)
		}
		all = append(all, n)
	}
	return all
}

func (b *box) lastTick() int {
	all := b.ticks()
	if len(all) == 0 {
		return 0
	}
	return all[len(all)-1]
}

// waitTicks waits until a ticker has written n more lines and returns the last number.
func (b *box) waitTicks(n int) int {
	b.Helper()
	have := len(b.ticks())
	b.Eventually(fmt.Sprintf("%d more ticks of %s", n, b.id), func() bool { return len(b.ticks()) >= have+n })
	return b.lastTick()
}

// goesOnFrom checks that a restored ticker counts on where the dumped one was: after its last
// number, without a gap.
func (b *box) goesOnFrom(last int) {
	b.Helper()
	b.waitTicks(3)
	all := b.ticks()
	if all[0] != last+1 {
		b.Errorf("%s counts on from %d, want %d", b.id, all[0], last+1)
	}
	b.inOrder()
}

// inOrder checks that a ticker's output has neither gaps nor repetitions.
func (b *box) inOrder() {
	b.Helper()
	all := b.ticks()
	for i := 1; i < len(all); i++ {
		if all[i] != all[i-1]+1 {
			b.Errorf("%s writes %d after %d", b.id, all[i], all[i-1])
		}
	}
}

// sameCgroups runs f, which makes containers, and checks that no cgroup is left when they are
// removed, which they are when the test ends. f gets a check of its own for the time when they run:
// every cgroup that is new then must be one of the given containers'.
func sameCgroups(t *harness.T, f func(onlyOf func(...*box))) {
	t.Helper()
	before := map[string]bool{}
	for _, p := range cgroups(t) {
		before[p] = true
	}
	// added are the new cgroups that are none of these containers'.
	added := func(boxes ...*box) []string {
		return slices.DeleteFunc(cgroups(t), func(p string) bool {
			return before[p] || slices.ContainsFunc(boxes, func(b *box) bool {
				// A tree that CRIU has nested once more repeats the containers' names in one path.
				return strings.Count(p, t.Namespace) == 1 && strings.Count(p, b.id) == 1
			})
		})
	}
	// Registered first, so it runs after the containers' own clean-up.
	t.Cleanup(func() {
		for _, p := range waitEmpty(func() []string { return added() }) {
			t.Errorf("cgroup %s is left", p)
		}
	})
	f(func(boxes ...*box) {
		t.Helper()
		for _, p := range waitEmpty(func() []string { return added(boxes...) }) {
			t.Errorf("new cgroup %s", p)
		}
	})
}

// cgroups are those of this machine that may be ours: other daemons' are left out, and where other
// programs run all that do not have our name. The parent of all containers of the namespace, which
// appears with the first of them and stays, is nobody's.
func cgroups(t *harness.T) []string {
	t.Helper()
	all, err := harness.Cgroups(func(p string) bool {
		if strings.Contains(p, t.Namespace) {
			return filepath.Base(p) != t.Namespace || strings.Count(p, t.Namespace) > 1
		}
		return quietHost() && !strings.Contains(p, "crac-e2e-")
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// containerdLeak removes a directory that containerd makes when a task is created from a
// checkpoint in the content store, and forgets.
func containerdLeak(t *harness.T) {
	t.Helper()
	t.Cleanup(func() {
		dirs, err := filepath.Glob(filepath.Join(t.Dir, "tmp", "ctrd-checkpoint*"))
		if err != nil {
			t.Error(err)
		}
		for _, d := range dirs {
			if err := os.RemoveAll(d); err != nil {
				t.Error(err)
			}
		}
	})
}

// option is a flag of ctr run that sets one of the runtime's options.
func option(key, value string) string {
	return "--annotation=" + oci.AnnotationPrefix + key + "=" + value
}

// ref is an image name of the test's own.
func ref(tb testing.TB) string { return "crac.test/checkpoint/" + newID(tb) + ":1" }

// checkpointTo makes a checkpoint image of a box that was started with the option for it.
func (b *box) checkpoint(flags ...string) {
	b.Helper()
	b.CtrOK(append(append([]string{"tasks", "checkpoint"}, flags...), b.id)...)
}

// mustHaveImage fails the test when there is no image of the name, or, with want false, when there is.
func mustHaveImage(t *harness.T, name string, want bool) {
	t.Helper()
	_, err := t.Client.ImageService().Get(t.Ctx, name)
	if err != nil && !errdefs.IsNotFound(err) {
		t.Fatal(err)
	}
	if (err == nil) != want {
		t.Errorf("image %s exists: %v, want %v", name, err == nil, want)
	}
}

// fileTick is the number that a ticker has written to its file.
func (b *box) fileTick() (n int) {
	b.Helper()
	b.Eventually("a number in /n", func() bool {
		var err error
		n, err = strconv.Atoi(b.exec("cat", "/n"))
		return err == nil // between truncating and writing, the file is empty
	})
	return n
}
