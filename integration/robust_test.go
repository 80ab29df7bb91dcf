package integration

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/images/build"
	"github.com/crac-shim/crac/integration/harness"
)

// keeps is what containerd keeps for a namespace, but for images and containers.
type keeps map[string]bool

// keepsNow lists content, unfinished content, snapshots and leases.
func keepsNow(t *harness.T) keeps {
	t.Helper()
	all := keeps{}
	err := t.Client.ContentStore().Walk(t.Ctx, func(i content.Info) error {
		all["content "+i.Digest.String()] = true
		return nil
	})
	for _, i := range ingests(t) {
		all["unfinished content "+i.Ref] = true
	}
	err = errors.Join(err, t.Client.SnapshotService("overlayfs").Walk(t.Ctx, func(_ context.Context, i snapshots.Info) error {
		all[fmt.Sprintf("snapshot (%s) %s", i.Kind, i.Name)] = true
		return nil
	}))
	held, lerr := t.Client.LeasesService().List(t.Ctx)
	for _, l := range held {
		all["lease "+l.ID] = true
	}
	if err := errors.Join(err, lerr); err != nil {
		t.Fatal(err)
	}
	return all
}

func ingests(t *harness.T) []content.Status {
	t.Helper()
	all, err := t.Client.ContentStore().ListStatuses(t.Ctx)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// since is what is there now and was not.
func (k keeps) since(t *harness.T) (added []string) {
	t.Helper()
	for what := range keepsNow(t) {
		if !k[what] {
			added = append(added, what)
		}
	}
	slices.Sort(added)
	return added
}

// collected checks that all that is new is held by leases that end, and that nothing of it is left when
// they have: they are deleted here, those that were there before are not.
func (k keeps) collected(t *harness.T) {
	t.Helper()
	lm := t.Client.LeasesService()
	all, err := lm.List(t.Ctx)
	if err != nil {
		t.Fatal(err)
	}
	ended := slices.DeleteFunc(all, func(l leases.Lease) bool { return k["lease "+l.ID] })
	for i, l := range ended {
		if l.Labels["containerd.io/gc.expire"] == "" {
			t.Errorf("lease %s is for ever: %+v", l.ID, l)
		}
		var opts []leases.DeleteOpt
		if i == len(ended)-1 {
			opts = append(opts, leases.SynchronousDelete)
		}
		if err := lm.Delete(t.Ctx, l, opts...); err != nil {
			t.Fatal(err)
		}
	}
	for _, what := range k.since(t) {
		t.Errorf("left when the leases have ended: %s", what)
	}
}

// largestSince is how much there is of the largest unfinished content that is new; 0 when there is none.
func (k keeps) largestSince(t *harness.T) (most int64) {
	t.Helper()
	for _, i := range ingests(t) {
		if !k["unfinished content "+i.Ref] {
			most = max(most, i.Offset)
		}
	}
	return most
}

// killAt kills a process when reached says so, which is asked while the process stands still. It
// returns false when the process has ended by itself before.
func killAt(t *harness.T, pid int, reached func() bool) bool {
	t.Helper()
	for t.Ctx.Err() == nil {
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			return false
		}
		for stopped := false; !stopped; {
			p, err := harness.ReadProcess(pid)
			if err != nil || p.State == "Z" || p.State == "X" {
				return false
			}
			stopped = p.State == "T"
		}
		if reached() {
			return syscall.Kill(pid, syscall.SIGKILL) == nil
		}
		if err := syscall.Kill(pid, syscall.SIGCONT); err != nil {
			return false
		}
		time.Sleep(500 * time.Microsecond) // a step of its work
	}
	t.Fatal("waited in vain for a program to get on")
	return false
}

// builderOf is the process id of the program that builds an image for a shim. It is 0 when over says
// that there will be none any more.
func builderOf(t *harness.T, shim int, over <-chan error) int {
	t.Helper()
	for t.Ctx.Err() == nil && len(over) == 0 {
		lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", shim))
		if err != nil {
			t.Fatal(err)
		}
		for _, list := range lists {
			children, _ := os.ReadFile(list) // of a thread, which may have ended
			for _, child := range strings.Fields(string(children)) {
				cmdline, _ := os.ReadFile("/proc/" + child + "/cmdline")
				if pid, err := strconv.Atoi(child); err == nil && strings.Contains(string(cmdline), "\x00build-image") {
					return pid
				}
			}
		}
	}
	return 0
}

// clearTmp removes where a program that was killed has unpacked a dump, as the next one would.
func clearTmp(t *harness.T) {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(t.Dir, "tmp", "crac-*"))
	for _, l := range left {
		err = errors.Join(err, os.RemoveAll(l))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// Whatever makes an image and is killed, whenever that is, leaves no image by name, a container that
// runs on, and nothing that containerd does not collect with the lease.
func TestKilledWhileMakingImages(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	needImage(t, "python")
	args := []string{"python3", "-c", remembers}
	b := start(t, how{image: harness.ImageRef("python"), args: args})
	b.waitTicks(2)

	// What there is to work on: a whole checkpoint, one that continues it, an archive, a key, and what a
	// node learns of a lazy restore.
	whole, delta := ref(t), ref(t)
	t.CracctlOK("checkpoint", b.id, whole)
	b.waitTicks(2)
	t.CracctlOK("checkpoint", "--parent", whole, b.id, delta)
	_, public := keyPair(t)
	dir, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(dir, "archive.tar.zst")
	t.CracctlOK("export", "--format", "podman", whole, archive)
	learner := start(t, how{image: whole, args: args, flags: []string{option("restore", "require"), option("memory", "lazy")}})
	learner.drained()
	learner.remove()

	const part = 4 << 20 // of the 16 MiB that the workload remembers
	checkpoint := func(flags ...string) func(string) []string {
		return func(made string) []string {
			return append(append([]string{"checkpoint", "--quiet"}, flags...), b.id, made)
		}
	}
	// attempt runs cracctl and kills who makes the image when there are so many bytes of it. It returns
	// false when that was too late.
	attempt := func(args []string, made string, builder bool, moment int64) bool {
		t.Helper()
		before := keepsNow(t)
		cmd := t.Command(t.Ctx, "cracctl", args...)
		var said strings.Builder
		cmd.Stderr = &said
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		over := make(chan error, 1)
		go func() { over <- cmd.Wait() }()
		pid := cmd.Process.Pid
		if builder {
			shim, err := t.ShimPID(b.id)
			if err != nil {
				t.Fatal(err)
			}
			pid = builderOf(t, shim, over)
		}
		killed := pid != 0 && killAt(t, pid, func() bool { return before.largestSince(t) >= moment })
		if err := <-over; (err != nil) != killed {
			t.Fatalf("%q, killed at %d bytes: %v, and cracctl says: %v %s", args, moment, killed, err, said.String())
		}
		mustHaveImage(t, made, !killed)
		if !killed {
			return false
		}
		b.wantStatus(containerd.Running)
		if len(before.since(t)) == 0 && moment > 0 {
			t.Errorf("%q was killed in the middle, and nothing is there: the test does not test", args)
		}
		before.collected(t)
		clearTmp(t)
		return true
	}
	for _, c := range []struct {
		name    string
		args    func(made string) []string
		builder bool    // the program is the shim's
		moments []int64 // bytes of unfinished content
	}{
		{"checkpoint", checkpoint(), true, []int64{0, 1, part}},
		{"checkpoint --exit", checkpoint("--exit"), true, []int64{0, 1, part}},
		{"flatten", func(made string) []string { return []string{"flatten", delta, made} }, false, []int64{1, part}},
		{"tune", func(made string) []string { return []string{"tune", whole, made} }, false, []int64{1, part}},
		{"encrypt", func(made string) []string { return []string{"encrypt", whole, made, "--to", "jwe:" + public} }, false, []int64{1, part}},
		{"import", func(made string) []string { return []string{"import", archive, made} }, false, []int64{1, part}},
		{"export", func(made string) []string { return []string{"export", "--format", "containerd", whole, made} }, false, []int64{1, part}},
	} {
		for _, moment := range c.moments {
			made, tries := ref(t), 5 // a step of its work may be a long one
			for ; tries > 0 && !attempt(c.args(made), made, c.builder, moment); tries-- {
				if b.status() == containerd.Stopped {
					b.remove()
					b = start(t, how{image: made, args: args, flags: []string{option("restore", "require")}})
				}
				t.CtrOK("images", "rm", "--sync", made)
			}
			if tries == 0 {
				t.Errorf("%s was never killed in time, at %d bytes", c.name, moment)
			}
		}
	}
	b.waitTicks(2)
	b.inOrder()

	// An export into a file has no file by its name until it is whole.
	dest := filepath.Join(dir, "dest")
	if err := os.Mkdir(dest, 0o700); err != nil {
		t.Fatal(err)
	}
	unfinished := filepath.Join(dest, "unfinished.tar")
	export := t.Command(t.Ctx, "cracctl", "export", "--format", "podman", whole, unfinished)
	if err := export.Start(); err != nil {
		t.Fatal(err)
	}
	if !killAt(t, export.Process.Pid, func() bool {
		begun, err := os.ReadDir(dest)
		return err == nil && len(begun) > 0
	}) {
		t.Error("an export ended before it was killed")
	}
	_ = export.Wait()
	clearTmp(t)
	if _, err := os.Stat(unfinished); err == nil {
		t.Errorf("%s is there, and not whole", unfinished)
	}
	t.CracctlOK("export", "--format", "podman", whole, unfinished)
	// What was there is as good as it was, and so is what is made next.
	for _, image := range []string{whole, delta} {
		if v := fromJSON[verified](t, "verify", image); !v.OK {
			t.Errorf("%s: %+v", image, v)
		}
	}
	image := ref(t)
	t.CracctlOK("checkpoint", "--exit", b.id, image)
	if v := fromJSON[verified](t, "verify", image); !v.OK {
		t.Errorf("%+v", v)
	}
}

// A builder whose shim was killed ends, and makes no image: nobody would hear of it.
func TestBuilderEndsWithShim(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	needImage(t, "python")
	b := start(t, how{image: harness.ImageRef("python"), args: []string{"python3", "-c", strings.Replace(remembers, "16 << 20", "128 << 20", 1)}})
	b.waitTicks(1)
	image := ref(t)
	done := make(chan error, 1)
	go func() {
		_, err := t.Cracctl(t.Ctx, "checkpoint", "--quiet", b.id, image)
		done <- err
	}()
	// It is in the middle of the layer, and containerd, to which it writes, stands still until the
	// shim is dead.
	var pid int
	t.Eventually("the layer is being written", func() bool {
		for _, p := range t.OwnProcesses() {
			if strings.Contains(p.Cmdline, "cracctl build-image") {
				pid = p.PID
			}
		}
		list, err := t.Client.ContentStore().ListStatuses(t.Ctx, "ref~="+build.IngestRef(b.id))
		return err == nil && len(list) > 0 && list[0].Offset > 0
	})
	if err := syscall.Kill(t.PID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	goOn := func() error { return syscall.Kill(t.PID(), syscall.SIGCONT) }
	t.Cleanup(func() { _ = goOn() })
	if err := b.killOne("shim"); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err == nil {
		t.Error("the checkpoint succeeded without its shim")
	}
	if err := goOn(); err != nil {
		t.Fatal(err)
	}
	t.Eventually("the builder has ended", func() bool { return syscall.Kill(pid, 0) != nil })
	mustHaveImage(t, image, false)
	// And nothing of it is held.
	all, err := t.Client.LeasesService().List(t.Ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range all {
		t.Errorf("lease %s is left: %+v", l.ID, l)
	}
}

// What would stop the image is found before anybody is told, and before the workload stands still.
func TestRefusedBeforeAnybodyIsTold(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	ask, err := t.Path("ask")
	if err != nil {
		t.Fatal(err)
	}
	base := ref(t)
	needImage(t, "busybox")
	t.CtrOK("images", "tag", harness.ImageRef("busybox"), base)
	h := ticker("--mount", "type=bind,src="+ask+",dst=/ask,options=rbind:rw", option("hook.before-checkpoint", `["/bin/sh","-c","touch /ask/told"]`))
	h.image = base
	b := start(t, h)
	b.waitTicks(2)
	_, public := keyPair(t)
	told := func() bool {
		_, err := os.Stat(filepath.Join(ask, "told"))
		return err == nil
	}
	parent := ref(t)
	t.CracctlOK("checkpoint", b.id, parent)
	if !told() {
		t.Fatal("the hook does not tell that it was called")
	}
	sealed := ref(t)
	t.CracctlOK("encrypt", parent, sealed, "--encrypt-to", "jwe:"+public)
	before, err := t.Client.LeasesService().List(t.Ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		prepare func()
		flags   []string
		want    string
	}{
		{func() {}, []string{"--parent", sealed}, "--encrypt-to"},
		{func() { t.CtrOK("images", "delete", "--sync", base) }, nil, "no longer there"},
	} {
		tt.prepare()
		if err := os.Remove(filepath.Join(ask, "told")); err != nil && !os.IsNotExist(err) {
			t.Fatal(err)
		}
		image := ref(t)
		_, err := t.Cracctl(t.Ctx, append([]string{"checkpoint", b.id, image}, tt.flags...)...)
		if err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("got %v, want %q", err, tt.want)
		}
		if told() {
			t.Errorf("%q: the workload was told of a checkpoint", tt.want)
		}
		mustHaveImage(t, image, false)
		b.waitTicks(2)
	}
	b.inOrder()
	if after, err := t.Client.LeasesService().List(t.Ctx); err != nil || len(after) > len(before) {
		t.Errorf("leases left: %+v, %v", after, err)
	}
}

// On a full disk a checkpoint is an error; the container runs on, and nothing half-made has a name.
func TestFullDisk(tb *testing.T) {
	onlyCrac(tb)
	dir := filepath.Join(os.TempDir(), fmt.Sprintf("cracfull%d", os.Getpid()))
	if err := os.Mkdir(dir, 0o711); err != nil { //nolint:gosec // as the harness does
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = os.Remove(dir) })
	if err := unix.Mount("crac-test", dir, "tmpfs", 0, "size=96m,mode=711"); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			tb.Error(err)
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	d := ownDaemon(tb, harness.Options{Base: dir})
	t := d.For(tb, harness.TestLimit)
	// What the workload writes goes elsewhere, and is not lost.
	if err := os.Symlink(tb.TempDir(), filepath.Join(d.Dir, "x", "out")); err != nil {
		t.Fatal(err)
	}
	// Some megabytes in memory, which nothing makes smaller.
	b := start(t, how{args: []string{"sh", "-c", `x=$(head -c 4194304 /dev/urandom | base64); ` + tickNoFile}})
	b.waitTicks(3)
	// What a checkpoint takes: first the dump, then the layer beside it.
	image := ref(t)
	t.CracctlOK("checkpoint", b.id, image)
	takes := fromJSON[struct{ DumpSize, CheckpointSize int64 }](t, "inspect", image)
	t.CtrOK("images", "rm", "--sync", image)
	filler := filepath.Join(d.Dir, "x", "filler")
	for _, c := range []struct {
		left  int64
		stage string // that meets the end of the disk; empty: none
	}{
		{0, "dump"},
		{64 << 10, "criu dump failed"},
		{takes.DumpSize / 2, "criu dump failed"},
		{takes.DumpSize + takes.CheckpointSize/2, "pack the dump"},
		{3 * (takes.DumpSize + takes.CheckpointSize), ""},
	} {
		before := keepsNow(t)
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			t.Fatal(err)
		}
		f, err := os.Create(filler)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Fallocate(int(f.Fd()), 0, 0, max(1, int64(st.Bavail)*st.Bsize-c.left)); err != nil {
			t.Fatal(err)
		}
		image := ref(t)
		_, err = t.Cracctl(t.Ctx, "checkpoint", b.id, image)
		if err := os.Remove(filler); err != nil {
			t.Fatal(err)
		}
		_ = f.Close()
		tb.Logf("%d KiB left: %v", c.left>>10, err)
		b.wantStatus(containerd.Running)
		b.waitTicks(1)
		mustHaveImage(t, image, err == nil)
		switch {
		case err == nil:
			if v := fromJSON[verified](t, "verify", image); !v.OK {
				t.Errorf("%d KiB left: %+v", c.left>>10, v)
			}
			t.CtrOK("images", "rm", "--sync", image)
		case !strings.Contains(err.Error(), "space"):
			t.Errorf("%d KiB left, and the error does not speak of space: %v", c.left>>10, err)
		}
		if (err == nil) != (c.stage == "") || err != nil && !strings.Contains(err.Error(), c.stage) {
			t.Errorf("%d KiB left: %v, want an error of the stage %q", c.left>>10, err, c.stage)
		}
		before.collected(t)
	}
	b.inOrder()
	t.CracctlOK("checkpoint", "--exit", b.id, image)
	b.wantStatus(containerd.Stopped)
	clone := start(t, how{image: image, flags: []string{option("restore", "require")}})
	clone.goesOnFrom(b.lastTick())
	clone.remove()
	b.remove()
}

// used is what a directory takes on disk, in bytes.
func used(t *harness.T, dir string) (sum int64) {
	t.Helper()
	seen := make(map[[2]uint64]bool)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil //nolint:nilerr // gone meanwhile
		}
		info, err := d.Info()
		if err != nil {
			return nil //nolint:nilerr // gone meanwhile
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return nil
		}
		if file := [2]uint64{st.Dev, st.Ino}; !seen[file] {
			seen[file] = true
			sum += st.Blocks * 512
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

// Ten clones of an image unpack it once: what they write is nothing beside the memory they share.
func TestClonesUnpackOnce(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	needImage(t, "python")
	args := []string{"python3", "-c", "import os,time\nm=os.urandom(16<<20)\ni=0\nwhile True:\n  i+=1\n  print('tick',i,flush=True)\n  time.sleep(0.2)"}
	b := start(t, how{image: harness.ImageRef("python"), args: args})
	b.waitTicks(2)
	image := ref(t)
	t.CracctlOK("checkpoint", "--exit", b.id, image)
	b.remove()

	// containerd unpacks, in its own process. Beside that it writes its database, its log and its answers.
	written := func() (n int64) {
		t.Helper()
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", t.PID()))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			if _, err := fmt.Sscanf(line, "wchar: %d", &n); err == nil {
				return n
			}
		}
		t.Fatalf("no wchar in %s", text)
		return 0
	}
	snapshotter := filepath.Join(t.Dir, "root/io.containerd.snapshotter.v1.overlayfs/snapshots")
	begin, space := written(), used(t, snapshotter)
	clones := make([]*box, 10)
	var first, firstSpace int64
	for i := range clones {
		clones[i] = start(t, how{image: image, args: args, flags: []string{option("restore", "require")}})
		if i == 0 {
			first, firstSpace = written()-begin, used(t, snapshotter)-space
		}
	}
	for _, c := range clones {
		c.waitTicks(1)
	}
	rest, restSpace := written()-begin-first, used(t, snapshotter)-space-firstSpace
	tb.Logf("for the first of ten clones containerd wrote %d bytes, %d of them files of the image; for the other nine %d and %d", first, firstSpace, rest, restSpace)
	const memory = 16 << 20
	if first < memory || firstSpace < memory {
		t.Errorf("for the first clone containerd wrote %d bytes, and its files take %d, for %d of memory", first, firstSpace, memory)
	}
	if rest >= memory || restSpace >= memory {
		t.Errorf("for nine more clones containerd wrote %d bytes, and their files take %d: enough for the memory once more", rest, restSpace)
	}
}
