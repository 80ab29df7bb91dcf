package integration

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/core/images"
	ocispecs "github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/platforms"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/crac-shim/crac/integration/harness"
	"github.com/crac-shim/crac/oci"
)

// registryHost is the private registry of all tests.
var registryHost = sync.OnceValues(func() (string, error) {
	r, err := shared.StartRegistry(context.Background())
	if err != nil {
		return "", err
	}
	return r.Host, nil
})

func manifestOf(t *harness.T, name string) ocispec.Manifest {
	t.Helper()
	img, err := t.Client.ImageService().Get(t.Ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	m, err := images.Manifest(t.Ctx, t.Client.ContentStore(), img.Target, platforms.Default())
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// isCheckpointOf checks an image's form: the base's layers with their digests, at most a layer
// of changes for each generation, and one checkpoint layer on top.
func isCheckpointOf(t *harness.T, name, base string, generation int) {
	t.Helper()
	m, b := manifestOf(t, name), manifestOf(t, base)
	if m.MediaType != ocispec.MediaTypeImageManifest {
		t.Errorf("%s has the media type %q", name, m.MediaType)
	}
	if len(m.Layers) > len(b.Layers)+generation+1 {
		t.Errorf("generation %d has %d layers on a base of %d", generation, len(m.Layers), len(b.Layers))
	}
	for i, l := range b.Layers {
		if i >= len(m.Layers) || m.Layers[i].Digest != l.Digest {
			t.Errorf("layer %d of %s is not the base's layer %s", i, name, l.Digest)
		}
	}
	for i, l := range m.Layers {
		top := i == len(m.Layers)-1
		if is := l.Annotations[oci.LayerAnnotation] == oci.LayerCheckpoint; is != top {
			t.Errorf("layer %d of %d of %s is a checkpoint layer: %v", i, len(m.Layers), name, is)
		}
	}
	for _, key := range []string{oci.AnnotationContainer, oci.AnnotationHostArch, oci.AnnotationCRIUMinimum, oci.AnnotationBaseDigest} {
		if m.Annotations[key] == "" {
			t.Errorf("%s lacks the annotation %s", name, key)
		}
	}
}

// seesNoDump checks that a container does not see where it comes from.
func (b *box) seesNoDump() {
	b.Helper()
	names := strings.Fields(b.exec("ls", "-A", "/"))
	if !slices.Contains(names, "etc") {
		b.Fatalf("/ of %s holds only %v", b.id, names)
	}
	if slices.Contains(names, oci.Root) {
		b.Errorf("%s sees /%s", b.id, oci.Root)
	}
}

// checkpointed makes a checkpoint image of a ticker and returns where that stopped.
func checkpointed(t *harness.T, flags ...string) (image string, last int) {
	t.Helper()
	image = ref(t)
	b := start(t, ticker(append(flags, option("checkpoint.image", image))...))
	b.waitTicks(3)
	b.checkpoint("--exit")
	b.wantStatus(containerd.Stopped)
	last = b.lastTick()
	b.remove()
	return image, last
}

func TestCheckpointImage(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	sameCgroups(t, func(onlyOf func(...*box)) {
		image := ref(t)
		original := start(t, ticker(option("checkpoint.image", image)))
		original.waitTicks(3)
		original.exec("sh", "-c", "echo kept > /etc/kept; rm /bin/ping")
		made := watch(t, "/crac/checkpoint-image")
		original.checkpoint()
		if f := made.of(original.id); f["image"] != image {
			t.Errorf("the event names the image %v", f["image"])
		}
		original.wantStatus(containerd.Running)
		dumped := original.lastTick()
		original.waitTicks(3)
		original.inOrder()
		isCheckpointOf(t, image, harness.ImageRef("busybox"), 1)

		clone := start(t, warm(image))
		onlyOf(original, clone)
		clone.waitTicks(3)
		clone.inOrder()
		if first := clone.ticks()[0]; first < 4 || first > dumped+1 {
			t.Errorf("the clone counts on from %d; the original was at %d when the checkpoint was done", first, dumped)
		}
		clone.seesNoDump()
		if got := clone.exec("sh", "-c", "cat /etc/kept; ls /bin/ping 2>/dev/null | wc -l"); got != "kept\n0" {
			t.Errorf("the clone's files: %q", got)
		}
		if first := clone.fileTick(); first < 4 {
			t.Errorf("the clone's file holds %d", first)
		}
		original.waitTicks(3)
	})
}

// A checkpoint of a clone is as good as one of the original, and as large.
func TestCheckpointImageOfAClone(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	from := how{args: []string{"sh", "-c", tick}}
	last := 0
	for generation := 1; generation <= 3; generation++ {
		image := ref(t)
		from.flags = []string{option("checkpoint.image", image), option("restore", "require")} // require has no meaning without a checkpoint
		b := start(t, from)
		b.goesOnFrom(last)
		b.exec("sh", "-c", fmt.Sprintf("echo %d > /etc/generation-%d", generation, generation))
		b.seesNoDump()
		b.checkpoint("--exit")
		b.wantStatus(containerd.Stopped)
		last = b.lastTick()
		isCheckpointOf(t, image, harness.ImageRef("busybox"), generation)
		b.remove()
		from = warm(image)
	}
	b := start(t, from)
	b.goesOnFrom(last)
	if got := b.exec("sh", "-c", "cat /etc/generation-*"); got != "1\n2\n3" {
		t.Errorf("the files of the generations: %q", got)
	}
}

func TestCracctlCheckpoint(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	b := start(t, ticker())
	b.waitTicks(3)
	first, second := ref(t), ref(t)
	out := t.CracctlOK("checkpoint", b.id, first)
	if want := manifestOf(t, first).Layers; len(want) == 0 || !strings.Contains(out, first) {
		t.Errorf("cracctl says %q", out)
	}
	b.wantStatus(containerd.Running)
	b.waitTicks(3)
	b.inOrder()
	t.CracctlOK("checkpoint", "--exit", b.id, second)
	t.Eventually("the container has ended", func() bool { return b.status() == containerd.Stopped })
	isCheckpointOf(t, second, harness.ImageRef("busybox"), 1)
	clone := start(t, warm(second))
	clone.goesOnFrom(b.lastTick())

	// An error says what to do.
	if out, err := t.Cracctl(t.Ctx, "checkpoint", "no-such-container", ref(t)); err == nil || !strings.Contains(err.Error(), "no-such-container") {
		t.Errorf("a container that is not there gives %q, %v", out, err)
	}
	if _, err := t.Cracctl(t.Ctx, "checkpoint", b.id, ref(t)); err == nil || !strings.Contains(err.Error(), "has stopped; start it first") {
		t.Error("a stopped container was checkpointed")
	}
}

func TestCheckpointImageThroughRegistry(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	host, err := registryHost()
	if err != nil {
		t.Fatal(err)
	}
	image := host + "/e2e/ticker:warm"
	b := start(t, ticker(option("checkpoint.image", image)))
	b.waitTicks(3)
	b.checkpoint("--exit")
	last := b.lastTick()
	b.remove()
	pushed := manifestOf(t, image)
	t.CtrOK("images", "push", "--plain-http", image)
	t.CtrOK("images", "delete", "--sync", image)
	top := pushed.Layers[len(pushed.Layers)-1].Digest
	if _, err := t.Client.ContentStore().Info(t.Ctx, top); err == nil {
		t.Error("the checkpoint layer is still in the content store after its image was deleted")
	}
	t.CtrOK("images", "pull", "--plain-http", image)
	clone := start(t, warm(image))
	clone.goesOnFrom(last)
	clone.seesNoDump()
}

// Two clones at once, each with a network, an address and a name of its own.
func TestTwoClonesAtOnce(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	needImage(t, "goserver")
	image := ref(t)
	original := start(t, how{
		image: harness.ImageRef("goserver"), cni: true,
		flags: []string{noMPTCP, "--hostname", "original", option("checkpoint.image", image)},
	})
	for want := 1; want <= 3; want++ {
		if got := count(t, original); got != want {
			t.Fatalf("the server counts %d, want %d", got, want)
		}
	}
	original.checkpoint()
	if got := count(t, original); got != 4 {
		t.Errorf("after the checkpoint the original counts %d, want 4", got)
	}
	clones := make([]*box, 2)
	errs := make([]error, 2)
	var wg sync.WaitGroup
	for i := range clones {
		wg.Go(func() {
			clones[i], errs[i] = tryStart(t, how{
				image: image, cni: true,
				flags: []string{"--hostname", fmt.Sprintf("clone-%d", i), option("restore", "require")},
			})
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	taken := map[string]bool{original.address(): true, original.exec("readlink", "/proc/self/ns/net"): true}
	for i, c := range clones {
		if name := c.exec("cat", "/proc/sys/kernel/hostname"); name != fmt.Sprintf("clone-%d", i) {
			t.Errorf("clone %d has the hostname %q", i, name)
		}
		for _, own := range []string{c.address(), c.exec("readlink", "/proc/self/ns/net")} {
			if taken[own] {
				t.Errorf("clone %d shares %s", i, own)
			}
			taken[own] = true
		}
		if lo := c.exec("ip", "link", "show", "lo"); !strings.Contains(lo, ",UP") {
			t.Errorf("clone %d has no loopback: %s", i, lo)
		}
	}
	// They count on from the checkpoint, each for itself.
	for want := 4; want <= 5; want++ {
		for i, c := range clones {
			if got := count(t, c); got != want {
				t.Errorf("clone %d counts %d, want %d", i, got, want)
			}
		}
	}
	if got := count(t, original); got != 5 {
		t.Errorf("the original counts %d, want 5", got)
	}
}

// noMPTCP keeps a Go server from listening with multipath TCP, which CRIU cannot dump.
const noMPTCP = "--env=GODEBUG=multipathtcp=0"

// count asks a server of integration/apps for its counter, which goes up.
func count(t *harness.T, b *box) int {
	t.Helper()
	body, _, err := harness.WaitHTTP(t.Ctx, "http://"+b.address()+":8080/count")
	if err != nil {
		t.Fatal(err)
	}
	return countIn(t, body)
}

func countIn(t *harness.T, body string) (n int) {
	t.Helper()
	for line := range strings.Lines(body) {
		if _, err := fmt.Sscanf(line, "count=%d", &n); err == nil {
			return n
		}
	}
	t.Fatalf("no count in %q", body)
	return 0
}

func TestCheckpointImageStartsColdUnderRunc(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image, _ := checkpointed(t)
	b := start(t, how{image: image, runtime: runcRuntime, args: []string{"sh", "-c", tick}})
	b.goesOnFrom(0)
	if got := b.exec("ls", "/n"); got != "/n" {
		t.Errorf("the file that the original wrote: %q", got)
	}
}

// Other snapshotters give one directory, with the dump in it.
func TestNativeSnapshotterMasksTheDump(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	if _, err := t.ImportImageFor(t.Ctx, "busybox", "native"); err != nil {
		t.Fatal(err)
	}
	native := []string{"--snapshotter", "native"}
	image, last := checkpointed(t, native...)
	for _, mode := range []oci.RestoreMode{oci.RestoreRequire, oci.RestoreNever} {
		b := start(t, how{image: image, flags: append(native, option("restore", string(mode))), args: []string{"sh", "-c", tick}})
		b.goesOnFrom(map[oci.RestoreMode]int{oci.RestoreRequire: last}[mode])
		if out, err := b.tryExec("sh", "-c", "ls -A /.crac | wc -l; cat /.crac/v1/manifest.json"); err == nil || strings.TrimSpace(out) != "0" {
			t.Errorf("restore=%s: the container sees %q (%v)", mode, out, err)
		}
		if out, err := b.tryExec("sh", "-c", "umount /.crac || rmdir /.crac"); err == nil {
			t.Errorf("restore=%s: the container can take the mask away: %s", mode, out)
		}
	}
}

// facts are the events of one topic, by container.
type facts struct {
	t    *harness.T
	seen <-chan *events.Envelope
	errs <-chan error
}

// watch subscribes to the runtime's own events of a topic.
func watch(t *harness.T, topic string) *facts {
	t.Helper()
	seen, errs := t.Client.Subscribe(t.Ctx, fmt.Sprintf("topic==%q", topic))
	return &facts{t, seen, errs}
}

// of waits for the event about a container.
func (f *facts) of(id string) map[string]any {
	f.t.Helper()
	timeout := time.After(harness.WaitLimit)
	for {
		select {
		case e := <-f.seen:
			v, err := typeurl.UnmarshalAny(e.Event)
			if err != nil {
				f.t.Fatal(err)
			}
			told, ok := v.(*status.Status)
			if !ok || len(told.Details) != 1 || told.Message == "" {
				f.t.Fatalf("event %s is a %T: %v", e.Topic, v, v)
			}
			var s structpb.Struct
			if err := told.Details[0].UnmarshalTo(&s); err != nil {
				f.t.Fatal(err)
			}
			if m := s.AsMap(); m["container_id"] == id {
				return m
			}
		case err := <-f.errs:
			f.t.Fatal(err)
		case <-timeout:
			f.t.Fatalf("no event about %s", id)
		}
	}
}

// tells checks that the event of a cold start and, from mark on, containerd's log say why it was one.
// It returns the reason.
func (f *facts) tells(id string, mark int, code, reason string) string {
	f.t.Helper()
	fact := f.of(id)
	said := fmt.Sprint(fact["reason"])
	if fact["code"] != code || !strings.Contains(said, reason) {
		f.t.Errorf("the event says %v, want the code %q and a reason with %q", fact, code, reason)
	}
	f.t.Eventually(fmt.Sprintf("a line of containerd's log that says that %s was started cold because of %q", id, reason), func() bool {
		return slices.ContainsFunc(strings.Split(f.t.Daemon.Log()[mark:], "\n"), func(line string) bool {
			return strings.Contains(line, id) && strings.Contains(line, "cold") && strings.Contains(line, reason)
		})
	})
	return said
}

// startsCold checks that an image with a checkpoint starts cold, and that log and event say why.
func startsCold(t *harness.T, h how, code, reason string) {
	t.Helper()
	cold := watch(t, "/crac/cold-start")
	mark := len(t.Daemon.Log())
	b := start(t, h)
	b.goesOnFrom(0)
	b.seesNoDump()
	said := cold.tells(b.id, mark, code, reason)
	if got := b.exec("echo", "alive"); got != "alive" {
		t.Errorf("exec says %q", got)
	}
	procs, err := t.CgroupProcs(b.id)
	if err != nil {
		t.Error(err)
	}
	for _, pid := range procs {
		if p, err := harness.ReadProcess(pid); err == nil && strings.HasPrefix(p.Cmdline, "criu") {
			t.Errorf("the CRIU that was to restore it is still there: %s", p)
		}
	}
	if code == "criu" {
		keptLog(t, said)
	}
	b.remove() // checks that nothing is left
}

var logPlace = regexp.MustCompile(`\(log: ([^)]+)\)`)

// keptLog checks that CRIU's log is where the message says, and removes it.
func keptLog(t *harness.T, message string) {
	t.Helper()
	m := logPlace.FindStringSubmatch(message)
	if m == nil {
		t.Errorf("%q does not say where CRIU's log is", message)
		return
	}
	if log, err := os.ReadFile(m[1]); err != nil || !strings.Contains(string(log), "Error (criu/") {
		t.Errorf("CRIU's log %s holds %d bytes and no error (%v)", m[1], len(log), err)
	}
	if err := os.Remove(m[1]); err != nil {
		t.Error(err)
	}
}

// refuses checks that a start under restore=require is an error with the reason.
func refuses(t *harness.T, h how, reason string) {
	t.Helper()
	h.flags = append(slices.Clone(h.flags), option("restore", "require"))
	b, err := tryStart(t, h)
	if err == nil || !strings.Contains(err.Error(), reason) {
		t.Errorf("restore=require gives %v, want an error with %q", err, reason)
	}
	if err == nil {
		return
	}
	if strings.Contains(reason, "criu/") {
		keptLog(t, err.Error())
	}
	if c, lerr := t.Client.LoadContainer(t.Ctx, b.id); lerr == nil {
		if task, terr := c.Task(t.Ctx, nil); terr == nil {
			// One that was refused by what it was told is killed, and its end comes a moment later.
			t.Eventually(b.id+" does not run: its start was refused", func() bool {
				s, serr := task.Status(t.Ctx)
				return serr != nil || s.Status != containerd.Running
			})
		}
	}
	b.remove()
}

func TestRequestThatIsNoRestore(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image, last := checkpointed(t)
	other := how{image: image, args: []string{"sh", "-c", "echo other; " + tick}}
	startsCold(t, other, "args", "echo other")
	refuses(t, other, "nothing that listens in /run/crac has taken it")
	user := how{image: image, args: []string{"sh", "-c", `i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.05; done`}, flags: []string{"--user", "65534"}}
	refuses(t, user, "65534")
	startsCold(t, how{image: image, args: ticker().args, flags: []string{option("restore", "never")}}, "restore-never", "restore=never")
	startsCold(t, how{image: image, args: ticker().args, flags: []string{"--env", "CRAC_RESTORE=never"}}, "restore-never", "restore=never")
	// A start that names no command is a restore, whatever the image's own command is.
	start(t, how{image: image, flags: []string{option("restore", "require")}}).goesOnFrom(last)
	// The annotation wins.
	start(t, warm(image, "--env", "CRAC_RESTORE=never")).goesOnFrom(last)

	for flag, known := range map[string]string{
		option("restore", "perhaps"): "require",
		option("restor", "auto"):     "io.containerd.crac.restore",
	} {
		if _, err := tryStart(t, how{image: image, flags: []string{flag}}); err == nil || !strings.Contains(err.Error(), known) {
			t.Errorf("%s gives %v, want an error that names %q", flag, err, known)
		}
	}
}

// What a request has to have in common with the dump, end to end: whatever it is, the start is cold, and
// log and event say why. (TestRequestThatIsNoRestore has another command, TestDamagedCheckpoint and
// TestHostWithoutCRIU the image and the host.)
func TestRequestThatDoesNotFit(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	dir, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	mount := "--mount=type=bind,src=" + dir + ",dst=/data,options=rbind:rw"
	image, last := checkpointed(t, mount)
	asBefore := func(flags ...string) how { return how{image: image, args: ticker().args, flags: flags} }
	for _, c := range []struct {
		code, reason string
		flags        []string
	}{
		{"user", "asks for user 65534", []string{mount, "--user", "65534:65534"}},
		{"namespaces", "ask for the same to restore it", []string{mount, "--net-host"}},
		{"mounts", "/data", nil},
	} {
		startsCold(t, asBefore(c.flags...), c.code, c.reason)
		refuses(t, asBefore(c.flags...), c.reason)
	}

	// ctr takes no terminal when it does not stay.
	dump, err := t.Client.GetImage(t.Ctx, image)
	if err != nil {
		t.Fatal(err)
	}
	for _, mode := range []oci.RestoreMode{oci.RestoreAuto, oci.RestoreRequire} {
		id := newID(t)
		c := config{
			id: id, args: ticker().args, terminal: true,
			spec: []ocispecs.SpecOpts{
				ocispecs.WithAnnotations(map[string]string{oci.AnnotationPrefix + "restore": string(mode)}),
				ocispecs.WithMounts([]specs.Mount{{Type: "bind", Source: dir, Destination: "/data", Options: []string{"rbind", "rw"}}}),
			},
			container: []containerd.NewContainerOpts{containerd.WithImage(dump), containerd.WithNewSnapshot(id, dump)},
		}
		cold, mark := watch(t, "/crac/cold-start"), len(t.Daemon.Log())
		n := newContainer(t, c)
		err := n.tryCreate()
		const reason = "the request is with a terminal"
		if mode == oci.RestoreRequire {
			if err == nil || !strings.Contains(err.Error(), reason) {
				t.Errorf("restore=require gives %v, want an error with %q", err, reason)
			}
			n.remove()
			continue
		}
		if err == nil {
			err = n.task.Start(t.Ctx)
		}
		if err != nil {
			t.Fatal(err)
		}
		cold.tells(id, mark, "terminal", reason)
		t.Eventually("a cold start", func() bool { return strings.HasPrefix(n.out.String(), "tick 1\r\n") })
		n.remove()
	}
	start(t, warm(image, mount)).goesOnFrom(last)
}

// unpacked is the directory of an image's topmost layer in the snapshotter.
func unpacked(t *harness.T, name string) string {
	t.Helper()
	img, err := t.Client.GetImage(t.Ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	if ok, err := img.IsUnpacked(t.Ctx, ""); err != nil {
		t.Fatal(err)
	} else if !ok {
		if err := img.Unpack(t.Ctx, ""); err != nil {
			t.Fatal(err)
		}
	}
	diffIDs, err := img.RootFS(t.Ctx)
	if err != nil {
		t.Fatal(err)
	}
	snapshots := t.Client.SnapshotService("overlayfs")
	key := newID(t)
	mounts, err := snapshots.View(t.Ctx, key, identity.ChainID(diffIDs).String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := snapshots.Remove(t.Ctx, key); err != nil {
			t.Error(err)
		}
	}()
	for _, o := range mounts[0].Options {
		if lower, ok := strings.CutPrefix(o, "lowerdir="); ok {
			top, _, _ := strings.Cut(lower, ":")
			return top
		}
	}
	t.Fatalf("no lowerdir in %v", mounts)
	return ""
}

// damage changes a file for the time of f.
func damage(t *harness.T, file string, change func([]byte) []byte, f func()) {
	t.Helper()
	good, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	write := func(data []byte) {
		if data == nil {
			err = os.Remove(file)
		} else {
			err = os.WriteFile(file, data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	write(change(slices.Clone(good)))
	defer write(good)
	f()
}

func TestDamagedCheckpoint(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image, last := checkpointed(t)
	dir := filepath.Join(unpacked(t, image), oci.Dir)
	manifest := filepath.Join(dir, oci.ManifestName)
	cores, err := filepath.Glob(filepath.Join(dir, oci.CRIUDirName, "core-*.img"))
	if err != nil || len(cores) == 0 {
		t.Fatalf("no core images in %s (%v)", dir, err)
	}
	core := cores[0]
	asBefore := how{image: image, args: ticker().args}

	edit := func(f func(*oci.Manifest)) func([]byte) []byte {
		return func(data []byte) []byte {
			m, err := oci.DecodeManifest(strings.NewReader(string(data)))
			if err != nil {
				t.Fatal(err)
			}
			f(m)
			if data, err = m.Encode(); err != nil {
				t.Fatal(err)
			}
			return data
		}
	}
	for _, c := range []struct {
		name, file   string
		change       func([]byte) []byte
		code, reason string
	}{
		{"truncated", core, func(b []byte) []byte { return b[:len(b)/2] }, "damaged", filepath.Base(core)},
		{"changed", core, func(b []byte) []byte { b[len(b)/2] ^= 1; return b }, "damaged", filepath.Base(core)},
		{"missing", core, func([]byte) []byte { return nil }, "damaged", filepath.Base(core)},
		{"no manifest to read", manifest, func([]byte) []byte { return []byte("{") }, "damaged", oci.ManifestName},
		{"other architecture", manifest, edit(func(m *oci.Manifest) { m.Platform.Architecture = "riscv64" }), "architecture", "riscv64"},
		{"other page size", manifest, edit(func(m *oci.Manifest) { m.Host.PageSize = 65536 }), "page-size", "65536"},
		{"newer CRIU needed", manifest, edit(func(m *oci.Manifest) { m.CRIU.Minimum = 990000 }), "criu-too-old", "99.0"},
		{"other CPU", manifest, edit(func(m *oci.Manifest) { m.Host.CPU.Features = append(m.Host.CPU.Features, "zz_future") }), "cpu-features", "zz_future"},
	} {
		tb.Run(c.name, func(tb *testing.T) {
			t := setup(tb)
			damage(t, c.file, c.change, func() {
				startsCold(t, asBefore, c.code, c.reason)
				refuses(t, asBefore, c.reason)
			})
		})
	}
	// What verification cannot find is found at Start, when CRIU waits already: by us, or by
	// CRIU, whose words must arrive. (Whoever can write a digest can write a core image too, but
	// those are read before.)
	for _, c := range []struct{ name, file, code, reason string }{
		{"nonsense with the right digest", strings.Replace(core, "core-", "mm-", 1), "criu", "Error (criu/"},
		{"no processes with the right digest", filepath.Join(filepath.Dir(core), "pstree.img"), "damaged", "pstree.img"},
	} {
		tb.Run(c.name, func(tb *testing.T) {
			t := setup(tb)
			nonsense := []byte("this is not an image file of CRIU")
			damage(t, c.file, func([]byte) []byte { return nonsense }, func() {
				damage(t, manifest, edit(func(m *oci.Manifest) {
					for i, f := range m.Files {
						if f.Name == filepath.Base(c.file) {
							m.Files[i].Size, m.Files[i].Digest = int64(len(nonsense)), digest.FromBytes(nonsense).String()
						}
					}
				}), func() {
					startsCold(t, asBefore, c.code, c.reason)
					refuses(t, asBefore, c.reason)
				})
			})
		})
	}
	start(t, warm(image)).goesOnFrom(last)
}

// A host without a usable CRIU runs checkpoint images cold.
func TestHostWithoutCRIU(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image, _ := checkpointed(t)
	dir, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	archive := filepath.Join(dir, "image.tar")
	t.CtrOK("images", "export", archive, image)

	criu := filepath.Join(dir, "criu")
	other := ownDaemon(tb, harness.Options{Env: []string{"CRAC_CRIU=" + criu}})
	o := other.For(tb, harness.TestLimit)
	o.CtrOK("images", "import", archive)
	asBefore := how{image: image, args: ticker().args}

	startsCold(o, asBefore, "no-criu", "CRIU")
	refuses(o, asBefore, "CRIU")

	script := "#!/bin/sh\necho 'Version: 3.17.1'\n"
	if err := os.WriteFile(criu, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	startsCold(o, asBefore, "criu-too-old", "3.17.1")
	// Whoever asks before is told the same, in the same words.
	verify := o.Command(o.Ctx, "cracctl", "verify", "--format", "json", image)
	var v verified
	if out, err := harness.Run(o.Ctx, verify); err == nil || json.Unmarshal([]byte(out), &v) != nil || !v.Whole || len(v.Here.Reasons) != 1 ||
		v.Here.Reasons[0].Code != "criu-too-old" || !strings.Contains(o.Daemon.Log(), v.Here.Reasons[0].Text) {
		t.Errorf("cracctl verify says %+v (%v)", v, err)
	}
	refuses(o, asBefore, "3.17.1")

	// Such a host cannot make a checkpoint either; the container does not suffer.
	b := start(o, how{image: image, args: ticker().args, flags: []string{option("restore", "never")}})
	b.waitTicks(3)
	if _, err := o.Ctr(o.Ctx, "tasks", "checkpoint", b.id); err == nil || !strings.Contains(err.Error(), "3.17.1") {
		t.Errorf("a checkpoint with an old CRIU gives %v", err)
	}
	b.wantStatus(containerd.Running)
	b.waitTicks(3)
	b.inOrder()
	b.remove()
}

// A dump that fails leaves the container as it was: here because of a connection to the outside,
// which tcp=error does not allow.
func TestFailedDumpLeavesTheContainerRunning(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	needImage(t, "goserver")
	sameCgroups(t, func(onlyOf func(...*box)) {
		image := ref(t)
		b := start(t, how{image: harness.ImageRef("goserver"), cni: true, flags: []string{noMPTCP, option("checkpoint.image", image), option("tcp", "error")}})
		count(t, b)
		conn, ask := countsBy(t, b.address())
		defer func() { _ = conn.Close() }()
		if got := ask(); got != 2 {
			t.Errorf("the server counts %d, want 2", got)
		}
		before := imageNames(t)
		for i, flags := range [][]string{nil, {"--exit"}} {
			_, err := t.Ctr(t.Ctx, append(append([]string{"tasks", "checkpoint"}, flags...), b.id)...)
			if err == nil || !strings.Contains(strings.ToLower(err.Error()), "tcp") {
				t.Errorf("checkpoint %v with an open connection gives %v, want an error about TCP", flags, err)
			}
			b.wantStatus(containerd.Running)
			onlyOf(b)
			if got := ask(); got != 3+i {
				t.Errorf("after the failed dump the server counts %d on the same connection, want %d", got, 3+i)
			}
		}
		if after := imageNames(t); !slices.Equal(before, after) {
			t.Errorf("images before the failed dumps: %v, after: %v", before, after)
		}
		if _, err := t.Cracctl(t.Ctx, "checkpoint", b.id, image); err == nil || !strings.Contains(strings.ToLower(err.Error()), "tcp") {
			t.Errorf("cracctl checkpoint with an open connection gives %v, want an error about TCP", err)
		}
		// The dry run says the same, and what would help.
		for _, tt := range []struct {
			flags  []string
			status int
			says   string
		}{
			{status: 1, says: "One thing stands in the way of a checkpoint"},
			{flags: []string{"--tcp", "close"}, status: 0, says: "a clone finds it closed"},
			{flags: []string{"--tcp", "established"}, status: 0, says: "address"},
			{flags: []string{"--tcp", "shut"}, status: 2},
			{flags: []string{"--parent", image + "-of-nobody"}, status: 2},
		} {
			out, err := t.Cracctl(t.Ctx, append(append([]string{"checkpoint", "--dry-run"}, tt.flags...), b.id, image)...)
			if harness.ExitCode(err) != tt.status || !strings.Contains(out, tt.says) {
				t.Errorf("cracctl checkpoint --dry-run %v: %v, want exit status %d and %q:\n%s", tt.flags, err, tt.status, tt.says, out)
			}
		}
		mustHaveImage(t, image, false)
		// What a call asks for comes before the container's option.
		t.CracctlOK("checkpoint", "--tcp", "close", b.id, image+"-closed")
		if got := ask(); got != 5 {
			t.Errorf("after the checkpoint with --tcp close the server counts %d on the same connection, want 5", got)
		}
		mustHaveImage(t, image, false)
		_ = conn.Close()
		// Nothing in the way any more.
		t.Eventually("a checkpoint without the connection", func() bool {
			_, err := t.Ctr(t.Ctx, "tasks", "checkpoint", b.id)
			return err == nil
		})
		mustHaveImage(t, image, true)
		if got := count(t, b); got != 6 {
			t.Errorf("the server counts %d, want 6", got)
		}
	})
}

func imageNames(t *harness.T) []string {
	t.Helper()
	names := strings.Fields(t.CtrOK("images", "ls", "-q"))
	slices.Sort(names)
	return names
}

// countsBy connects to a server that counts, and gives what asks it by that connection, which stays open.
func countsBy(t *harness.T, address string) (conn net.Conn, ask func() int) {
	t.Helper()
	conn, err := net.Dial("tcp", address+":8080")
	if err != nil {
		t.Fatal(err)
	}
	if err := conn.SetDeadline(time.Now().Add(harness.TestLimit)); err != nil {
		t.Fatal(err)
	}
	answers := bufio.NewReader(conn)
	return conn, func() int {
		t.Helper()
		if _, err := fmt.Fprintf(conn, "GET /count HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(answers, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return countIn(t, string(body))
	}
}

// With tcp=established a clone that takes over the original's address goes on with its connections, which
// their other ends do not notice. The original goes on with them meanwhile, or is ended.
func TestCheckpointKeepsConnections(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	needImage(t, "goserver")
	network, err := t.Network()
	if err != nil {
		t.Fatal(err)
	}
	name := newID(t)
	netns, err := t.NetNS(t.Ctx, name)
	if err != nil {
		t.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := errors.Join(network.Detach(context.Background(), name, netns), t.DeleteNetNS(context.Background(), name)); err != nil {
			t.Error(err)
		}
	})
	address, err := network.Attach(t.Ctx, name, netns)
	if err != nil {
		t.Fatal(err)
	}
	image := ref(t)
	flags := []string{noMPTCP, "--with-ns", "network:" + netns, option("tcp", "established"), option("checkpoint.image", image)}
	b := start(t, how{image: harness.ImageRef("goserver"), flags: flags})
	if _, _, err := harness.WaitHTTP(t.Ctx, "http://"+address+":8080/count"); err != nil {
		t.Fatal(err)
	}
	conn, ask := countsBy(t, address)
	defer func() { _ = conn.Close() }()
	want := ask()
	next := func(who string) {
		t.Helper()
		if want++; ask() != want {
			t.Errorf("%s does not count on from %d", who, want-1)
		}
	}
	t.CracctlOK("checkpoint", b.id, image+"-before")
	next("the original")
	b.checkpoint("--exit")
	b.wantStatus(containerd.Stopped)
	b.remove()
	clone := start(t, how{image: image, flags: append(flags, option("restore", "require"))})
	next("the clone")
	next("the clone")
	clone.remove()
}

// By default, which is tcp=close, a clone has no connections of the original.
func TestCheckpointClosesConnections(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	needImage(t, "goserver")
	image := ref(t)
	b := start(t, how{image: harness.ImageRef("goserver"), cni: true, flags: []string{noMPTCP, option("checkpoint.image", image)}})
	count(t, b)
	conn, err := net.Dial("tcp", b.address()+":8080")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	t.Eventually("the server has accepted the connection", func() bool {
		return strings.Contains(b.exec("cat", "/proc/net/tcp6"), " 01 ")
	})
	b.checkpoint()
	clone := start(t, how{image: image, cni: true, flags: []string{option("restore", "require")}})
	if got := count(t, clone); got != 2 {
		t.Errorf("the clone counts %d, want 2", got)
	}
}

// A restored task is a task like any other.
func TestRestoredTask(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image := ref(t)
	script := `trap 'echo got usr1' USR1; i=0; while [ ! -e /stop ]; do i=$((i+1)); echo tick $i; sleep 0.05; done; exit 7`
	b := start(t, how{args: []string{"sh", "-c", script}, flags: []string{option("checkpoint.image", image)}})
	b.waitTicks(3)
	b.checkpoint("--exit")
	last := b.lastTick()
	b.remove()

	clone := start(t, how{
		image: image, args: []string{"sh", "-c", script},
		flags: []string{option("restore", "require"), "--memory-limit", "67108864"},
	})
	clone.goesOnFrom(last)
	task := clone.task()
	if m := t.CtrOK("tasks", "metrics", clone.id); !strings.Contains(m, "memory") {
		t.Errorf("metrics of the clone:\n%s", m)
	}
	pids, err := task.Pids(t.Ctx)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.ContainsFunc(pids, func(p containerd.ProcessInfo) bool { return p.Pid == task.Pid() }) {
		t.Errorf("the pids %v of the clone lack its own %d", pids, task.Pid())
	}
	inCgroup, err := t.CgroupProcs(clone.id)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(inCgroup, int(task.Pid())) {
		t.Errorf("the clone's cgroup holds %v, not its process %d", inCgroup, task.Pid())
	}
	if _, err := clone.tryExec("sh", "-c", "exit 3"); harness.ExitCode(err) != 3 {
		t.Errorf("an exec that ends with code 3 gives %v", err)
	}
	// Not SIGHUP: who runs the tests may ignore that (nohup), and then the workload is started so.
	if err := task.Kill(t.Ctx, syscall.SIGUSR1); err != nil {
		t.Error(err)
	}
	t.Eventually("the signal arrives", func() bool { return strings.Contains(clone.log(), "got usr1") })
	t.CtrOK("tasks", "pause", clone.id)
	clone.wantStatus(containerd.Paused)
	t.CtrOK("tasks", "resume", clone.id)
	clone.waitTicks(3)
	if err := t.Restart(t.Ctx, true); err != nil {
		t.Fatal(err)
	}
	clone.waitTicks(3)
	exited, err := clone.task().Wait(t.Ctx)
	if err != nil {
		t.Fatal(err)
	}
	clone.exec("touch", "/stop")
	if code := exitCode(t, exited); code != 7 {
		t.Errorf("the clone ends with code %d, want 7", code)
	}
	clone.inOrder()
}

// Network namespaces that a dump was made in, and those that clones get, may be made by anyone.
func TestNetworkNamespaceForms(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	needImage(t, "goserver")
	network, err := t.Network()
	if err != nil {
		t.Fatal(err)
	}
	// given is a namespace that was prepared before, as CRI does.
	given := func() string {
		name := newID(t)
		path, err := t.NetNS(t.Ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := network.Attach(t.Ctx, name, path); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			ctx := t.Daemon.Context(context.Background())
			if err := errors.Join(network.Detach(ctx, name, path), t.DeleteNetNS(ctx, name)); err != nil {
				t.Error(err)
			}
		})
		return path
	}
	forms := map[string]func() how{
		"given": func() how { return how{flags: []string{"--with-ns", "network:" + given()}} },
		"cni":   func() how { return how{cni: true} },
	}
	for from, dumpIn := range forms {
		image := ref(t)
		h := dumpIn()
		h.image, h.flags = harness.ImageRef("goserver"), append(h.flags, noMPTCP, option("checkpoint.image", image))
		b := start(t, h)
		count(t, b)
		b.checkpoint("--exit")
		for to, restoreIn := range forms {
			tb.Run(from+" to "+to, func(tb *testing.T) {
				h := restoreIn()
				h.image, h.flags = image, append(h.flags, option("restore", "require"))
				clone := start(setup(tb), h)
				if got := count(clone.T, clone); got != 2 {
					clone.Errorf("the clone counts %d, want 2", got)
				}
				links := clone.exec("ip", "-o", "link")
				if n := len(strings.Split(links, "\n")); n != 2 {
					clone.Errorf("the clone has other links than lo and eth0:\n%s", links)
				}
			})
		}
		tb.Run(from+" to none", func(tb *testing.T) {
			clone := start(setup(tb), how{image: image, flags: []string{option("restore", "require")}})
			if got := clone.exec("sh", "-c", "wget -q -O - http://127.0.0.1:8080/count"); countIn(clone.T, got) != 2 {
				clone.Errorf("the clone says %q", got)
			}
		})
	}
}

// CRIU is in the workload's network namespace when it dumps, and can be so only where
// there is no other.
func TestNestedNetworkNamespace(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image := ref(t)
	nested := how{flags: []string{"--privileged", option("checkpoint.image", image)}, args: []string{"sh", "-c", "unshare -n sleep 1000 & exec sleep 1001"}}
	// networks are those of the two processes.
	networks := func(b *box) (init, child string) {
		return b.exec("readlink", "/proc/1/ns/net"), b.exec("sh", "-c", "readlink /proc/$(pidof sleep | tr ' ' '\\n' | grep -vx 1)/ns/net")
	}
	b := start(t, nested)
	t.Eventually("the second network namespace", func() bool {
		init, child := networks(b)
		return child != "" && child != init
	})
	b.checkpoint("--exit")
	nested.image, nested.flags = image, []string{"--privileged", option("restore", "require")}
	clone := start(setup(tb), nested)
	if init, child := networks(clone); init == child || init == "" || child == "" {
		clone.Errorf("the network namespaces %s and %s, want two", init, child)
	}
}
