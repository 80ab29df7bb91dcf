package integration

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/opencontainers/runtime-spec/specs-go"

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

// recoded writes an archive as CRI-O lays one out, with what change makes of its config.dump.
// The dump is podman's: both have it made by runc and CRIU in the same way.
func recoded(t *harness.T, from, to string, change func(config map[string]any)) {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = in.Close() }()
	out, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	tw := tar.NewWriter(out)
	for tr := tar.NewReader(in); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		edit := func(do func(v map[string]any)) {
			var v map[string]any
			if err := json.Unmarshal(data, &v); err != nil {
				t.Fatal(err)
			}
			do(v)
			if data, err = json.Marshal(v); err != nil {
				t.Fatal(err)
			}
		}
		switch h.Name {
		case "config.dump":
			edit(func(v map[string]any) {
				// What CRI-O writes (internal/lib/checkpoint.go), and no more.
				for k := range v {
					if !slices.Contains([]string{"id", "name", "rootfsImage", "rootfsImageName", "runtime", "createdTime", "checkpointedTime"}, k) {
						delete(v, k)
					}
				}
				change(v)
			})
		case "spec.dump":
			edit(func(v map[string]any) {
				v["annotations"] = map[string]any{"io.container.manager": "cri-o", "io.kubernetes.cri-o.ContainerName": "web", "io.kubernetes.cri-o.ContainerType": "container"}
			})
		case "network.status", "ctr.log":
			continue // CRI-O's has none
		}
		h.Size = int64(len(data))
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(tw.Close(), out.Close()); err != nil {
		t.Fatal(err)
	}
}

// An archive as CRI-O makes it, and images of such archives as are made by hand for CRI-O
// (buildah from scratch, add, config --annotation) and by checkpointctl, start warm.
func TestImportCRIO(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	needImage(t, "busybox")
	p := newPodman(t)
	c := p.ticker()
	c.waitTicks(3)
	p.ok("exec", c.name, "sh", "-c", touch)
	made := p.path("podman.tar")
	p.ok("container", "checkpoint", "--compress", "none", "--export", made, c.name)
	last := c.lastTick()

	const nobody = "crac.test/nobody:1"
	build := func(name string, annotations map[string]string, change func(config map[string]any)) (image string) {
		dir := p.path(name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		recoded(t, made, filepath.Join(dir, "checkpoint.tar"), change)
		// podman build is buildah.
		if err := os.WriteFile(filepath.Join(dir, "Containerfile"), []byte("FROM scratch\nADD checkpoint.tar /\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		image = "crac.test/" + name + "/" + newID(t) + ":1"
		args := []string{"build", "--quiet", "--isolation", "chroot", "--signature-policy", p.path("policy.json"), "--tag", image}
		for k, v := range annotations {
			args = append(args, "--annotation", k+"="+v)
		}
		p.ok(append(args, dir)...)
		p.ok("save", "--quiet", "--format", "oci-archive", "--output", filepath.Join(dir, "image.tar"), image)
		t.CtrOK("images", "import", filepath.Join(dir, "image.tar"))
		return image
	}
	crio := build("crio", map[string]string{"io.kubernetes.cri-o.annotations.checkpoint.name": "web"}, func(map[string]any) {})
	// The annotations say what the archive does not.
	checkpointctl := build("checkpointctl", map[string]string{
		"org.criu.checkpoint.container.name": "web", "org.criu.checkpoint.engine.name": "CRI-O", "org.criu.checkpoint.engine.version": "1.32",
		"org.criu.checkpoint.rootfs.image.name": harness.ImageRef("busybox"), "org.criu.checkpoint.criu.version": "40201", "org.criu.checkpoint.host.kernel": "6.1.0-made-there",
	}, func(config map[string]any) { delete(config, "rootfsImageName") })

	for _, tt := range []struct {
		source, from string
	}{
		{source: filepath.Join(p.path("crio"), "checkpoint.tar"), from: "a checkpoint of CRI-O"},
		{source: crio, from: "a checkpoint of CRI-O in an image"},
		{source: checkpointctl, from: "a checkpoint of CRI-O in an image"},
	} {
		image := ref(t)
		if _, err := t.Cracctl(t.Ctx, "import", "--base", nobody, tt.source, image); err == nil || !strings.Contains(err.Error(), nobody) {
			t.Errorf("%s: without its base image: %v", tt.source, err)
		}
		out := t.CracctlOK("import", tt.source, image)
		if !strings.Contains(out, tt.from+"\n") {
			t.Errorf("%s: cracctl says:\n%s", tt.source, out)
		}
		isCheckpointOf(t, image, harness.ImageRef("busybox"), 1)
		// The same source gives the same image.
		before := manifestDigest(t, image)
		t.CracctlOK("import", tt.source, image)
		if after := manifestDigest(t, image); after != before {
			t.Errorf("%s: imported again it is %s instead of %s", tt.source, after, before)
		}
		clone := start(t, warm(image))
		clone.goesOnFrom(last)
		clone.wantTouched()
		clone.remove()
		if tt.source == checkpointctl {
			if got := t.CracctlOK("inspect", "--format", "{{.Manifest.Host.Kernel}} {{.Manifest.CRIU.Version}}", image); strings.TrimSpace(got) != "6.1.0-made-there 40201" {
				t.Errorf("of its host the image says %q", got)
			}
		}
	}
}

// A dump that nobody but criu made, of a container of runc's, and its bundle.
func TestImportCRIU(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	needImage(t, "busybox")
	dir, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	tb.Cleanup(func() { _ = os.RemoveAll(dir) })
	bundle, dump, root := filepath.Join(dir, "bundle"), filepath.Join(dir, "dump"), filepath.Join(dir, "runc")
	rootfs := filepath.Join(bundle, "rootfs")
	for _, d := range []string{rootfs, dump} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	run := func(ctx context.Context, in, name string, args ...string) (string, error) {
		cmd := t.Command(ctx, name, args...)
		cmd.Dir = in
		return harness.Run(ctx, cmd)
	}
	ok := func(name string, args ...string) string {
		t.Helper()
		out, err := run(t.Ctx, bundle, name, args...)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(out)
	}
	unpackImage(t, harness.ImageRef("busybox"), rootfs)
	ok("runc", "spec")
	var spec specs.Spec
	data, err := os.ReadFile(filepath.Join(bundle, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &spec); err != nil {
		t.Fatal(err)
	}
	// Nothing that criu would have to be told of: no cgroup file system, no output that leads out.
	spec.Process.Args, spec.Process.Terminal, spec.Root.Readonly = []string{"sh", "-c", touch + "; " + tick}, false, false
	spec.Mounts = slices.DeleteFunc(spec.Mounts, func(m specs.Mount) bool { return m.Type == "cgroup" || m.Type == "mqueue" })
	spec.Linux.Namespaces = slices.DeleteFunc(spec.Linux.Namespaces, func(n specs.LinuxNamespace) bool { return n.Type == specs.CgroupNamespace })
	if data, err = json.Marshal(spec); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), data, 0o600); err != nil {
		t.Fatal(err)
	}
	id := t.Namespace + "-" + newID(t) // by this its cgroup is known as ours
	t.Cleanup(func() {
		_, _ = run(context.Background(), dir, "runc", "--root", root, "delete", "--force", id)
	})
	begin := t.Command(t.Ctx, "runc", "--root", root, "run", "--detach", id) // with nothing but /dev/null for its output
	begin.Dir = bundle
	if err := begin.Run(); err != nil {
		t.Fatal(err)
	}
	count := func() int {
		data, err := os.ReadFile(filepath.Join(rootfs, "n"))
		if err != nil {
			return 0
		}
		n, _ := strconv.Atoi(strings.TrimSpace(string(data)))
		return n
	}
	t.Eventually("it counts", func() bool { return count() > 3 })
	var state struct{ Pid int }
	if err := json.Unmarshal([]byte(ok("runc", "--root", root, "state", id)), &state); err != nil {
		t.Fatal(err)
	}
	if out, err := run(t.Ctx, dir, "criu", "dump", "--tree", strconv.Itoa(state.Pid), "--images-dir", dump, "--manage-cgroups=ignore", "--log-file", "dump.log", "-v2"); err != nil {
		log, _ := os.ReadFile(filepath.Join(dump, "dump.log"))
		t.Fatalf("%v: %s\n%s", err, out, tailOf(string(log), 2000))
	}
	last := max(count(), 3) // it may have been about to write the file

	image := ref(t)
	args := []string{"import", "--images", dump, "--bundle", bundle, "--base", harness.ImageRef("busybox"), image}
	t.CracctlOK(args...)
	before := manifestDigest(t, image)
	t.CracctlOK(args...)
	if after := manifestDigest(t, image); after != before {
		t.Errorf("imported again it is %s instead of %s", after, before)
	}
	isCheckpointOf(t, image, harness.ImageRef("busybox"), 1)
	clone := start(t, how{image: image, flags: []string{option("restore", "require")}})
	t.Eventually("it counts on", func() bool { return clone.fileTick() > last+2 })
	clone.wantTouched()
	clone.seesNoDump()
}

// unpackImage makes a root file system of an image, outside of containerd.
func unpackImage(t *harness.T, ref, dir string) {
	t.Helper()
	img, err := t.Client.GetImage(t.Ctx, ref)
	if err != nil {
		t.Fatal(err)
	}
	m, err := images.Manifest(t.Ctx, img.ContentStore(), img.Target(), img.Platform())
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range m.Layers {
		ra, err := img.ContentStore().ReaderAt(t.Ctx, l)
		if err != nil {
			t.Fatal(err)
		}
		plain, err := compression.DecompressStream(content.NewReader(ra))
		if err != nil {
			t.Fatal(err)
		}
		_, err = archive.Apply(t.Ctx, dir, plain)
		if err := errors.Join(err, plain.Close(), ra.Close()); err != nil {
			t.Fatal(err)
		}
	}
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
