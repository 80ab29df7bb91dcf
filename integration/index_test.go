package integration

import (
	"os/exec"
	"reflect"
	goruntime "runtime"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/crac-shim/crac/integration/harness"
	"github.com/crac-shim/crac/oci"
)

// otherPlatforms are those that the images of this test have beside this machine's.
var otherPlatforms = []v1.Platform{{OS: "linux", Architecture: "arm64", Variant: "v8"}, {OS: "linux", Architecture: "riscv64"}}

// pushMultiArch makes an image for several platforms in a registry, with a client that is not
// ours. Nobody here can run the others: they are busybox under another name.
func pushMultiArch(t *harness.T, ref string) {
	t.Helper()
	needImage(t, "busybox")
	t.CtrOK("images", "tag", "--force", harness.ImageRef("busybox"), ref)
	t.CracctlOK("push", ref)
	t.CtrOK("images", "delete", ref)
	tag, err := name.NewTag(ref)
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(tag, remote.WithContext(t.Ctx))
	if err != nil {
		t.Fatal(err)
	}
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, p := range append(slices.Clone(otherPlatforms), v1.Platform{OS: config.OS, Architecture: config.Architecture}) {
		c := config.DeepCopy()
		c.OS, c.Architecture, c.Variant = p.OS, p.Architecture, p.Variant
		one, err := mutate.ConfigFile(img, c)
		if err != nil {
			t.Fatal(err)
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: one, Descriptor: v1.Descriptor{Platform: &p}})
	}
	if err := remote.WriteIndex(tag, index, remote.WithContext(t.Ctx)); err != nil {
		t.Fatal(err)
	}
}

// indexInRegistry reads an index as somebody else's client does.
func indexInRegistry(t *harness.T, ref string) *v1.IndexManifest {
	t.Helper()
	tag, err := name.NewTag(ref)
	if err != nil {
		t.Fatal(err)
	}
	index, err := remote.Index(tag, remote.WithContext(t.Ctx))
	if err != nil {
		t.Fatalf("%s is no index: %v", ref, err)
	}
	m, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// A checkpoint takes the place of one platform in an image for several, in containerd and in a
// registry, for every client.
func TestCheckpointIntoIndex(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	host, err := registryHost()
	if err != nil {
		t.Fatal(err)
	}
	base, image := host+"/index/app:1", host+"/index/app:warm"
	pushMultiArch(t, base)
	plain := indexInRegistry(t, base)
	t.CtrOK("images", "pull", "--plain-http", base)
	b := start(t, how{image: base, args: ticker().args})
	b.waitTicks(3)
	out := t.CracctlOK("checkpoint", "--index", "--push", "--exit", b.id, image)
	if !strings.Contains(out, "Pushed") {
		t.Errorf("cracctl says %q", out)
	}
	last := b.lastTick()
	b.remove()

	// byPlatform leaves out what tools may drop on the way, and the order.
	byPlatform := func(m *v1.IndexManifest) map[string]v1.Descriptor {
		all := make(map[string]v1.Descriptor)
		for _, d := range m.Manifests {
			all[d.Platform.String()] = v1.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size, Annotations: d.Annotations}
		}
		return all
	}
	// replaced checks the index: a checkpoint for this platform, the others as they were.
	replaced := func(ref string) v1.Hash {
		t.Helper()
		now, was := indexInRegistry(t, ref), byPlatform(plain)
		if now.MediaType != types.OCIImageIndex || len(now.Manifests) != len(plain.Manifests) || now.Annotations[oci.AnnotationVersion] == "" {
			t.Fatalf("%s is %+v", ref, now)
		}
		is := byPlatform(now)
		for _, p := range otherPlatforms {
			if got, want := is[p.String()], was[p.String()]; want.Size == 0 || !reflect.DeepEqual(got, want) {
				t.Errorf("the entry of %s is %+v and was %+v", p, got, want)
			}
		}
		here := "linux/" + goruntime.GOARCH
		own := is[here]
		if own.Digest == was[here].Digest || own.Annotations[oci.AnnotationEngine] == "" || own.Annotations[oci.AnnotationCPUFeatures] == "" {
			t.Errorf("the entry of %s is %+v", here, own)
		}
		return own.Digest
	}
	first := replaced(image)
	if got := manifestDigest(t, image); got != digestInRegistry(t, image) {
		t.Errorf("%s is %s here and %s in the registry", image, got, digestInRegistry(t, image))
	}
	if v := fromJSON[verified](t, "verify", image); !v.OK {
		t.Errorf("cracctl verify: %+v", v)
	}
	if i := fromJSON[inspected](t, "inspect", image); i.Digest != first.String() {
		t.Errorf("cracctl inspect tells of %s, want %s", i.Digest, first)
	}

	// Another client carries all of it into another repository, and back come both clients of
	// containerd, with the platform that they are on.
	skopeo, err := exec.LookPath("skopeo")
	if err != nil {
		t.Fatalf("%v: run integration/tools/install.sh host", err)
	}
	moved := host + "/index/moved:warm"
	if _, err := harness.Run(t.Ctx, t.Command(t.Ctx, skopeo, "copy", "--multi-arch", "all", "--src-tls-verify=false", "--dest-tls-verify=false",
		"docker://"+image, "docker://"+moved)); err != nil {
		t.Fatal(err)
	}
	replaced(moved)
	t.CtrOK("images", "delete", "--sync", base, image)
	t.CtrOK("images", "pull", "--plain-http", image)
	clone := start(t, warm(image))
	clone.goesOnFrom(last)
	clone.seesNoDump()
	t.NerdctlOK("pull", "--quiet", moved)
	id := newBox(t, newID(t)).id
	t.NerdctlOK("run", "-d", "--name", id, "--net", "none", "--runtime", cracRuntime, "--annotation", oci.AnnotationPrefix+"restore=never", moved, "sleep", "1000")
	t.NerdctlOK("rm", "-f", id)

	// A second checkpoint, by a client that knows nothing of all this, to the name that the clone
	// came from: it replaces its own platform's, and nothing else, though their content was never here.
	clone.remove()
	clone = start(t, warm(image, option("checkpoint.image", image), option("checkpoint.push", "true"), option("checkpoint.index", "true")))
	clone.waitTicks(2)
	clone.checkpoint("--exit")
	last = clone.lastTick()
	clone.remove()
	if second := replaced(image); second == first {
		t.Error("the second checkpoint is the first")
	}
	start(t, warm(image)).goesOnFrom(last)

	// And a plain image, made elsewhere, goes into the index by hand.
	t.CtrOK("images", "pull", "--plain-http", base)
	again := start(t, how{image: base, args: ticker().args})
	again.waitTicks(2)
	third := host + "/index/app:third"
	t.CracctlOK("checkpoint", again.id, third)
	if record, err := t.Client.ImageService().Get(t.Ctx, third); err != nil || !images.IsManifestType(record.Target.MediaType) {
		t.Errorf("%s is %s (%v) without having been asked for an index", third, record.Target.MediaType, err)
	}
	t.CtrOK("images", "tag", "--force", third, image)
	before := digestInRegistry(t, image)
	t.CracctlOK("push", "--index", image)
	if replaced(image); digestInRegistry(t, image) == before {
		t.Error("cracctl push --index changed nothing")
	}
}

func digestInRegistry(t *harness.T, ref string) string {
	t.Helper()
	tag, err := name.NewTag(ref)
	if err != nil {
		t.Fatal(err)
	}
	d, err := remote.Head(tag, remote.WithContext(t.Ctx))
	if err != nil {
		t.Fatal(err)
	}
	return d.Digest.String()
}
