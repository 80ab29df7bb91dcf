package integration

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/images/build"
	"github.com/crac-shim/crac/integration/harness"
)

// blobs are the digests of all that is in the content store.
func blobs(t *harness.T) map[string]bool {
	t.Helper()
	all := make(map[string]bool)
	if err := t.Client.ContentStore().Walk(t.Ctx, func(i content.Info) error {
		all[i.Digest.String()] = true
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return all
}

// A builder that is killed, whenever it is, leaves no image by name, a container that runs on, and
// nothing that containerd does not collect with the lease.
func TestKilledBuilder(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	needImage(t, "python")
	b := start(t, how{image: harness.ImageRef("python"), args: []string{"python3", "-c", remembers}})
	b.waitTicks(2)
	before := blobs(t)
	killed := 0
	for i := range 8 {
		image := ref(t)
		done := make(chan error, 1)
		go func() {
			_, err := t.Cracctl(t.Ctx, "checkpoint", "--quiet", b.id, image)
			done <- err
		}()
		var pid int
		t.Eventually("the builder is there", func() bool {
			for _, p := range t.OwnProcesses() {
				if strings.Contains(p.Cmdline, "cracctl build-image") {
					pid = p.PID
				}
			}
			return pid != 0
		})
		time.Sleep(time.Duration(i*i) * 8 * time.Millisecond) // soon at first
		err := syscall.Kill(pid, syscall.SIGKILL)
		cerr := <-done
		if err == nil && cerr != nil {
			killed++
			mustHaveImage(t, image, false)
		} else if cerr == nil {
			mustHaveImage(t, image, true) // it was too late
			t.CracctlOK("rm", image)
		}
		b.wantStatus(containerd.Running)
	}
	if killed < 3 {
		t.Errorf("only %d of the builders were killed in time", killed)
	}
	b.waitTicks(2)
	b.inOrder()

	// The leases bound how long it is kept; without them it goes at once.
	lm := t.Client.LeasesService()
	all, err := lm.List(t.Ctx)
	if err != nil {
		t.Fatal(err)
	}
	for i, l := range all {
		if l.Labels["containerd.io/gc.expire"] == "" {
			t.Errorf("lease %s is for ever: %+v", l.ID, l)
		}
		var opts []leases.DeleteOpt
		if i == len(all)-1 {
			opts = append(opts, leases.SynchronousDelete)
		}
		if err := lm.Delete(t.Ctx, l, opts...); err != nil {
			t.Fatal(err)
		}
	}
	for d := range blobs(t) {
		if !before[d] {
			t.Errorf("%s is left of the builds", d)
		}
	}
	// And the next one is as good as any.
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
	before, err := t.Client.LeasesService().List(t.Ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		prepare func()
		flags   []string
		want    string
	}{
		{func() {}, []string{"--parent", parent, "--encrypt-to", "jwe:" + public}, "encrypt it first"},
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
	b := start(t, ticker())
	b.waitTicks(3)
	filler := filepath.Join(d.Dir, "x", "filler")
	failed := 0
	for _, left := range []int64{0, 64 << 10, 256 << 10, 512 << 10} {
		var st unix.Statfs_t
		if err := unix.Statfs(dir, &st); err != nil {
			t.Fatal(err)
		}
		f, err := os.Create(filler)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Fallocate(int(f.Fd()), 0, 0, max(1, int64(st.Bavail)*st.Bsize-left)); err != nil {
			t.Fatal(err)
		}
		image := ref(t)
		_, err = t.Cracctl(t.Ctx, "checkpoint", b.id, image)
		if err := os.Remove(filler); err != nil {
			t.Fatal(err)
		}
		_ = f.Close()
		if err != nil {
			failed++
			mustHaveImage(t, image, false)
		}
		b.wantStatus(containerd.Running)
	}
	if failed == 0 {
		t.Error("no checkpoint met a full disk")
	}
	image := ref(t)
	t.CracctlOK("checkpoint", "--exit", b.id, image)
	t.Eventually("the container has ended", func() bool { return b.status() == containerd.Stopped })
	clone := start(t, warm(image))
	clone.goesOnFrom(b.lastTick())
	clone.remove()
	b.remove()
}

// used is what a directory takes on disk, in bytes.
func used(t *harness.T, dir string) (sum int64) {
	t.Helper()
	seen := make(map[uint64]bool)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil //nolint:nilerr // gone meanwhile
		}
		info, err := d.Info()
		if err != nil {
			return nil //nolint:nilerr // gone meanwhile
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if ok && !seen[st.Ino] {
			seen[st.Ino] = true
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

	root := filepath.Join(t.Dir, "root")
	before := used(t, root)
	clones := make([]*box, 10)
	var first int64
	for i := range clones {
		clones[i] = start(t, how{image: image, args: args, flags: []string{option("restore", "require")}})
		if i == 0 {
			first = used(t, root) - before
			before = used(t, root)
		}
	}
	for _, c := range clones {
		c.waitTicks(1)
	}
	rest := used(t, root) - before
	tb.Logf("the first of ten clones wrote %d bytes, the other nine %d", first, rest)
	if first < 16<<20 || first > 2*(16<<20) {
		t.Errorf("the first clone wrote %d bytes for 16 MiB of memory", first)
	}
	if rest > 4<<20 {
		t.Errorf("nine more clones wrote %d bytes", rest)
	}
}
