package integration

import (
	"context"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/crac-shim/crac/integration/harness"
)

// touch changes files in every way that a checkpoint has to carry over.
const touch = "echo kept >/etc/kept; rm /bin/ping; mkdir -p /opt/d; echo two >/opt/d/two; ln -s two /opt/d/link; echo shared >/dev/shm/state"

// readTouched prints what touch has changed: touched.
const (
	readTouched = "cat /etc/kept /opt/d/link /dev/shm/state; ls /bin/ping 2>/dev/null | wc -l"
	touched     = "kept\ntwo\nshared\n0"
)

// wantTouched looks for the changes in a restored container.
func (b *box) wantTouched() {
	b.Helper()
	if got := b.exec("sh", "-c", readTouched); got != touched {
		b.Errorf("the files of %s: %q", b.id, got)
	}
}

// What podman exported starts warm here, with memory, files and /dev/shm as they were.
func TestImportPodman(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	needImage(t, "busybox")
	p := newPodman(t)
	c := p.ticker()
	c.waitTicks(3)
	p.ok("exec", c.name, "sh", "-c", touch)
	archive := p.path("archive.tar.zst")
	p.ok("container", "checkpoint", "--compress", "zstd", "--export", archive, c.name)
	last := c.lastTick()

	image := ref(t)
	if _, err := t.Cracctl(t.Ctx, "import", "--base", "crac.test/no-such:1", archive, image); err == nil || !strings.Contains(err.Error(), "--base") {
		t.Errorf("without the base image: %v", err)
	}
	mustHaveImage(t, image, false)
	out := t.CracctlOK("import", archive, image)
	for _, want := range []string{"podman", "/etc/hosts", "/dev/shm", image} {
		if !strings.Contains(out, want) {
			t.Errorf("cracctl does not speak of %s:\n%s", want, out)
		}
	}
	isCheckpointOf(t, image, harness.ImageRef("busybox"), 1)
	clone := start(t, warm(image))
	clone.goesOnFrom(last)
	clone.wantTouched()
	clone.seesNoDump()
}

// Podman's checkpoint image is the archive's files in a layer.
func TestImportCheckpointImage(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	needImage(t, "busybox")
	p := newPodman(t)
	c := p.ticker()
	c.waitTicks(3)
	p.ok("exec", c.name, "sh", "-c", touch)
	made := "crac.test/podman/" + newID(t) + ":1"
	p.ok("container", "checkpoint", "--create-image", made, c.name)
	last := c.lastTick()
	p.ok("save", "--quiet", "--format", "oci-archive", "--output", p.path("image.tar"), made)
	// The name is in the archive, and must not be given as --index-name as well: containerd 2.4 then
	// takes the image for a part of that index, and lets the next garbage collection remove both.
	t.CtrOK("images", "import", p.path("image.tar"))

	image := ref(t)
	if out := t.CracctlOK("import", made, image); !strings.Contains(out, "podman in an image") {
		t.Errorf("cracctl says:\n%s", out)
	}
	clone := start(t, warm(image))
	clone.goesOnFrom(last)
	clone.wantTouched()
}

// containerd's own checkpoint of a container under its own shim starts warm under ours.
func TestImportContainerd(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	b := start(t, how{runtime: runcRuntime, args: []string{"sh", "-c", tick}})
	b.waitTicks(3)
	b.exec("sh", "-c", touch)
	made := "crac.test/native/" + newID(t) + ":1"
	first := b.waitTicks(1)
	b.CtrOK("containers", "checkpoint", "--rw", "--image", "--task", b.id, made)
	last := b.lastTick()
	b.remove()

	image := ref(t)
	t.CracctlOK("import", made, image)
	isCheckpointOf(t, image, harness.ImageRef("busybox"), 1)
	clone := start(t, warm(image))
	clone.goesOnBetween(first, last)
	clone.wantTouched()
}

// goesOnBetween checks that a restored ticker counts on from a checkpoint that was made
// between two of the original's numbers.
func (b *box) goesOnBetween(first, last int) {
	b.Helper()
	b.waitTicks(3)
	if got := b.ticks()[0]; got <= first || got > last+1 {
		b.Errorf("%s counts on from %d, want %d to %d", b.id, got, first+1, last+1)
	}
	b.inOrder()
}

// exported is a checkpoint image of a ticker with changed files, and its last number.
func exported(t *harness.T) (image string, last int) {
	t.Helper()
	image = ref(t)
	b := start(t, ticker(option("checkpoint.image", image)))
	b.waitTicks(3)
	b.exec("sh", "-c", touch)
	b.checkpoint("--exit")
	last = b.lastTick()
	b.remove()
	return image, last
}

// Real podman restores what we export.
func TestExportPodman(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image, last := exported(t)
	p := newPodman(t)
	archive := p.path("exported.tar.zst")
	t.CracctlOK("export", "--format", "podman", image, archive)
	if _, err := t.Cracctl(t.Ctx, "export", "--format", "podman", image, archive); err == nil || !strings.Contains(err.Error(), "already") {
		t.Errorf("a second export to the same file: %v", err)
	}
	id := p.ok("container", "restore", "--import", archive)
	t.Eventually("the container in podman counts on", func() bool {
		n, err := strconv.Atoi(p.ok("exec", id, "cat", "/n"))
		return err == nil && n > last+2
	})
	if got := p.ok("exec", id, "sh", "-c", readTouched); got != touched {
		t.Errorf("the files in podman: %q", got)
	}
	if out := p.ok("logs", id); !strings.HasPrefix(out, "tick "+strconv.Itoa(last+1)+"\n") {
		t.Errorf("its output begins with %q, want tick %d", out[:min(len(out), 20)], last+1)
	}
}

// containerd restores what we export under its own shim.
func TestExportContainerd(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image, last := exported(t)
	made := "crac.test/native/" + newID(t) + ":1"
	t.CracctlOK("export", "--format", "containerd", image, made)
	b := newBox(t, newID(t))
	t.Cleanup(func() { removeFIFOs(t, b.id) })
	containerdLeak(t)
	t.CtrOK("containers", "restore", "--rw", "--live", b.id, made)
	t.Eventually("it counts on", func() bool { return b.fileTick() > last+2 })
	b.wantTouched()
	if info, err := t.Client.LoadContainer(t.Ctx, b.id); err != nil {
		t.Error(err)
	} else if i, err := info.Info(t.Ctx); err != nil || i.Runtime.Name != runcRuntime {
		t.Errorf("it runs under %s, %v", i.Runtime.Name, err)
	}
}

// runc restores what we export, and what it checkpoints is imported again.
func TestExportBundle(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image, last := exported(t)
	dir, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	tb.Cleanup(func() { _ = os.RemoveAll(dir) })
	dir = filepath.Join(dir, "exported")
	t.CracctlOK("export", "--format", "bundle", image, dir)
	id := t.Namespace + "-" + newID(t) // by this its cgroup is known as ours
	bundle, dump := filepath.Join(dir, "bundle"), filepath.Join(dir, "dump")
	runc := func(args ...string) string {
		t.Helper()
		cmd := t.Command(t.Ctx, "runc", append([]string{"--root", filepath.Join(dir, "runc")}, args...)...)
		out, err := harness.Run(t.Ctx, cmd)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(out)
	}
	t.Cleanup(func() {
		_, _ = harness.Run(context.Background(), t.Command(context.Background(), "runc", "--root", filepath.Join(dir, "runc"), "delete", "--force", id))
	})
	log := filepath.Join(dir, "log")
	restore := t.Command(t.Ctx, "runc", "--root", filepath.Join(dir, "runc"), "restore", "--detach", "--image-path", filepath.Join(dir, "images"), "--work-path", dir, "--bundle", bundle, id)
	f, err := os.Create(log)
	if err != nil {
		t.Fatal(err)
	}
	// A pipe, which a dump leaves to whoever restores it; a file outside it cannot.
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		_, _ = io.Copy(f, r)
		_, _ = f.Close(), r.Close()
	}()
	restore.Stdout, restore.Stderr = w, w
	err = restore.Run()
	_ = w.Close()
	if err != nil {
		text, _ := os.ReadFile(log)
		criu, _ := os.ReadFile(filepath.Join(dir, "restore.log"))
		t.Fatalf("runc restore: %v: %s\n%s", err, text, tailOf(string(criu), 2000))
	}
	t.Eventually("it counts on", func() bool {
		n, err := strconv.Atoi(runc("exec", id, "cat", "/n"))
		return err == nil && n > last+2
	})
	if got := runc("exec", id, "sh", "-c", readTouched+"; echo again >/etc/again"); got != touched {
		t.Errorf("the files in runc: %q", got)
	}
	runc("checkpoint", "--image-path", dump, "--work-path", dir, id)
	<-copied
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	b := &box{T: t, id: id, out: log}
	last = b.lastTick()
	if last == 0 {
		t.Fatalf("runc's container wrote %q", text)
	}

	again := ref(t)
	t.CracctlOK("import", "--images", dump, "--bundle", bundle, "--base", harness.ImageRef("busybox"), again)
	clone := start(t, warm(again))
	clone.goesOnFrom(last)
	clone.wantTouched()
	if got := clone.exec("cat", "/etc/again"); got != "again" {
		t.Errorf("the file that was made under runc holds %q", got)
	}
}
