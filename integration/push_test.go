package integration

import (
	"crypto/sha256"
	"fmt"
	"io"
	"strings"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/crac-shim/crac/integration/harness"
)

// inRegistry checks with a client that is not containerd's that a registry has an image, whole
// and the same as containerd has.
func inRegistry(t *harness.T, image string) {
	t.Helper()
	tag, err := name.NewTag(image)
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(tag, remote.WithContext(t.Ctx))
	if err != nil {
		t.Fatalf("%s is not in its registry: %v", image, err)
	}
	validImage(t, image, img)
	record, err := t.Client.ImageService().Get(t.Ctx, image)
	if err != nil {
		t.Fatal(err)
	}
	if d, err := img.Digest(); err != nil || d.String() != record.Target.Digest.String() {
		t.Errorf("%s has the digest %s in the registry (%v) and %s here", image, d, err, record.Target.Digest)
	}
}

// validImage reads every byte, and compares digests, diff IDs and sizes. The client's own
// validation knows gzip alone.
func validImage(t *harness.T, what string, img v1.Image) {
	t.Helper()
	layers, err := img.Layers()
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	config, err := img.ConfigFile()
	if err != nil || len(config.RootFS.DiffIDs) != len(layers) {
		t.Fatalf("%s has %d layers and another configuration: %+v, %v", what, len(layers), config, err)
	}
	hash := func(open func() (io.ReadCloser, error)) (string, int64) {
		r, err := open()
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		defer func() { _ = r.Close() }()
		h := sha256.New()
		n, err := io.Copy(h, r)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		return fmt.Sprintf("sha256:%x", h.Sum(nil)), n
	}
	for i, l := range layers {
		want, err := l.Digest()
		if err != nil {
			t.Fatal(err)
		}
		size, err := l.Size()
		if err != nil {
			t.Fatal(err)
		}
		if got, n := hash(l.Compressed); got != want.String() || n != size {
			t.Errorf("layer %d of %s: %s, %d bytes; want %s, %d", i, what, got, n, want, size)
		}
		if got, _ := hash(l.Uncompressed); got != config.RootFS.DiffIDs[i].String() {
			t.Errorf("layer %d of %s unpacks to %s, want %s", i, what, got, config.RootFS.DiffIDs[i])
		}
	}
}

func TestCheckpointPush(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	host, err := registryHost()
	if err != nil {
		t.Fatal(err)
	}
	fromRegistry := func(image string, last int) {
		t.Helper()
		inRegistry(t, image)
		t.CtrOK("images", "delete", "--sync", image)
		t.CtrOK("images", "pull", "--plain-http", image)
		clone := start(t, warm(image))
		clone.goesOnFrom(last)
	}

	// By annotation, for clients that know nothing of it.
	image := host + "/push/annotation:warm"
	b := start(t, ticker(option("checkpoint.image", image), option("checkpoint.push", "true")))
	b.waitTicks(3)
	made := watch(t, "/crac/checkpoint-image")
	b.checkpoint("--exit")
	if f := made.of(b.id); f["pushed"] != true {
		t.Errorf("the event says: %v", f)
	}
	last := b.lastTick()
	b.remove()
	fromRegistry(image, last)

	// By hand, compressed as any reader knows. The registry has the base's layers in another
	// repository and is not sent them again.
	base := host + "/push/base:1"
	needImage(t, "busybox")
	t.CtrOK("images", "tag", harness.ImageRef("busybox"), base)
	t.CracctlOK("push", base)
	b = start(t, how{image: base, args: ticker().args})
	b.waitTicks(3)
	image = host + "/push/hand:warm"
	out := t.CracctlOK("checkpoint", "--push", "--compression", "gzip", "--exit", b.id, image)
	if !strings.Contains(out, "Pushed") || strings.Contains(out, "the other 0 B") {
		t.Errorf("cracctl says %q; it should have pushed all but the base", out)
	}
	for _, l := range manifestOf(t, image).Layers[len(manifestOf(t, base).Layers):] {
		if !strings.HasSuffix(l.MediaType, "gzip") {
			t.Errorf("layer %s is %s", l.Digest, l.MediaType)
		}
	}
	t.Eventually("the container has ended", func() bool { return b.status() == containerd.Stopped })
	fromRegistry(image, b.lastTick())
}

// A push that fails is an error, and the image is there all the same.
func TestCheckpointPushFails(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	const nowhere = "127.0.0.1:1/push/nowhere"
	image := nowhere + ":annotation"
	b := start(t, ticker(option("checkpoint.image", image), option("checkpoint.push", "true")))
	b.waitTicks(3)
	made := watch(t, "/crac/checkpoint-image")
	wants := func(what string, err error) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), "is the registry running") || !strings.Contains(err.Error(), "cracctl push") {
			t.Errorf("%s: %v", what, err)
		}
	}
	_, err := t.Ctr(t.Ctx, "tasks", "checkpoint", b.id)
	wants("by annotation", err)
	if f := made.of(b.id); f["pushed"] != false {
		t.Errorf("the event says: %v", f)
	}
	b.wantStatus(containerd.Running)
	mustHaveImage(t, image, true)

	_, err = t.Cracctl(t.Ctx, "push", image)
	wants("push", err)
	b.remove()

	b = start(t, ticker())
	b.waitTicks(3)
	_, err = t.Cracctl(t.Ctx, "checkpoint", "--push", b.id, nowhere+":hand")
	wants("by hand", err)
	mustHaveImage(t, nowhere+":hand", true)
	b.goesOnFrom(0)

	// What cannot be pushed is refused before anything stands still.
	if _, err := t.Cracctl(t.Ctx, "checkpoint", "--push", b.id, "app:warm"); err == nil || !strings.Contains(err.Error(), "registry") {
		t.Errorf("a name without a registry: %v", err)
	}
	mustHaveImage(t, "app:warm", false)
}
