package integration

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/crac-shim/crac/integration/harness"
	"github.com/crac-shim/crac/oci"
)

// Tools that know nothing of checkpoints read the image and keep it whole: Debian's registry and
// a current one, skopeo, umoci, and a client library.
func TestOtherTools(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	tool := func(name string, args ...string) string {
		t.Helper()
		path, err := exec.LookPath(name)
		if err != nil {
			t.Fatalf("%v: run integration/tools/install.sh host", err)
		}
		out, err := harness.Run(t.Ctx, t.Command(t.Ctx, path, args...))
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	current, err := registryHost()
	if err != nil {
		t.Fatal(err)
	}
	debian, err := t.StartRegistryOf(t.Ctx, harness.DebianRegistry)
	if err != nil {
		t.Fatal(err)
	}
	from, to := current+"/interop/app:warm", debian.Host+"/copied/app:warm"
	parent := current + "/interop/app:parent"
	b := start(t, ticker())
	b.waitTicks(3)
	t.CracctlOK("checkpoint", b.id, parent)
	b.waitTicks(3)
	t.CracctlOK("checkpoint", "--push", "--exit", "--parent", parent, b.id, from)
	last := b.lastTick()
	inRegistry(t, from)
	digest := manifestDigest(t, from)
	var layers []string
	for _, l := range manifestOf(t, from).Layers {
		layers = append(layers, l.Digest.String())
	}

	// From a registry of one line into one of another, with annotations and digests as they were.
	tool("skopeo", "copy", "--src-tls-verify=false", "--dest-tls-verify=false", "docker://"+from, "docker://"+to)
	if got := strings.TrimSpace(tool("skopeo", "inspect", "--tls-verify=false", "--format", "{{.Digest}}", "docker://"+to)); got != digest {
		t.Errorf("skopeo made %s of %s", got, digest)
	}
	tag, err := name.NewTag(to)
	if err != nil {
		t.Fatal(err)
	}
	img, err := remote.Image(tag, remote.WithContext(t.Ctx))
	if err != nil {
		t.Fatal(err)
	}
	validImage(t, to, img)
	t.CtrOK("images", "pull", "--plain-http", to)
	clone := start(t, warm(to))
	clone.goesOnFrom(last)
	clone.remove()

	// Debian's takes it from everybody who pushes, and gives it away as it was.
	for who, push := range map[string]func(string){
		"cracctl": func(image string) { t.CracctlOK("push", image) },
		"ctr":     func(image string) { t.CtrOK("images", "push", "--plain-http", image) },
		"nerdctl": func(image string) { t.NerdctlOK("push", "--quiet", image) },
	} {
		pushed, back := debian.Host+"/pushed/"+who+":warm", current+"/back/"+who+":warm"
		t.CtrOK("images", "tag", from, pushed)
		push(pushed)
		tool("skopeo", "copy", "--src-tls-verify=false", "--dest-tls-verify=false", "docker://"+pushed, "docker://"+back)
		for _, image := range []string{pushed, back} {
			if got := strings.TrimSpace(tool("skopeo", "inspect", "--tls-verify=false", "--format", "{{.Digest}}", "docker://"+image)); got != digest {
				t.Errorf("%s pushed %s, and %s is %s", who, digest, image, got)
			}
		}
		t.CtrOK("images", "rm", pushed)
	}
	for _, image := range []string{from, to} {
		t.CtrOK("images", "rm", "--sync", image)
	}
	t.CtrOK("images", "pull", "--plain-http", debian.Host+"/pushed/cracctl:warm")
	clone = start(t, warm(debian.Host+"/pushed/cracctl:warm"))
	clone.goesOnFrom(last)

	// Into a directory, as an OCI layout, and back.
	dir, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	layout := filepath.Join(dir, "layout")
	tool("skopeo", "copy", "--src-tls-verify=false", "docker://"+from, "oci:"+layout+":warm")
	if tags := tool("umoci", "list", "--layout", layout); strings.TrimSpace(tags) != "warm" {
		t.Errorf("umoci lists %q", tags)
	}
	var stat struct {
		History []struct {
			Layer     *struct{ Digest string }
			CreatedBy string `json:"created_by"`
			Empty     bool   `json:"empty_layer"`
		}
	}
	if err := json.Unmarshal([]byte(tool("umoci", "stat", "--json", "--image", layout+":warm")), &stat); err != nil {
		t.Fatal(err)
	}
	var known []string
	for _, h := range stat.History {
		if h.Layer != nil {
			known = append(known, h.Layer.Digest)
		}
	}
	if !slices.Equal(known, layers) {
		t.Errorf("umoci knows of the layers %q, there are %q: %+v", known, layers, stat)
	}

	// Debian's umoci unpacks gzip alone, which our layers are on request. Those of the base are made so by skopeo;
	// they stay in the registry: containerd has no need to fetch what it has unpacked of another image.
	base, old := current+"/interop/app:base", current+"/interop/app:gzip"
	archive, err := t.Tools.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	tool("skopeo", "copy", "--dest-compress", "--dest-compress-format", "gzip", "oci-archive:"+archive, "oci:"+filepath.Join(dir, "base")+":gzip")
	tool("skopeo", "copy", "--dest-tls-verify=false", "oci:"+filepath.Join(dir, "base")+":gzip", "docker://"+base)
	t.CtrOK("images", "pull", "--plain-http", base)
	zipped := start(t, how{image: base, args: ticker().args})
	zipped.waitTicks(3)
	t.CracctlOK("checkpoint", "--push", "--exit", "--compression", "gzip", zipped.id, old)
	gzipped, bundle := filepath.Join(dir, "gzipped"), filepath.Join(dir, "bundle")
	tool("skopeo", "copy", "--src-tls-verify=false", "docker://"+old, "oci:"+gzipped+":warm")
	tool("umoci", "unpack", "--image", gzipped+":warm", bundle)
	f, err := os.Open(filepath.Join(bundle, "rootfs", oci.Dir, oci.ManifestName))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if m, err := oci.DecodeManifest(f); err != nil || m.Container.ID != zipped.id || m.Name != old {
		t.Errorf("umoci unpacked %+v, %v", m, err)
	}
	if _, err := os.Stat(filepath.Join(bundle, "rootfs", "bin", "sh")); err != nil {
		t.Error(err)
	}
}

func manifestDigest(t *harness.T, image string) string {
	t.Helper()
	record, err := t.Client.ImageService().Get(t.Ctx, image)
	if err != nil {
		t.Fatal(err)
	}
	return record.Target.Digest.String()
}
