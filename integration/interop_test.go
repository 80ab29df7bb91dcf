package integration

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
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
	layers := manifestOf(t, from).Layers
	if len(stat.History) > 0 && len(stat.History) != len(layers) {
		t.Errorf("umoci knows of %d layers, there are %d: %+v", len(stat.History), len(layers), stat)
	}

	// Debian's umoci unpacks gzip alone, so skopeo packs the layers anew: what is in them is the same.
	gzipped := filepath.Join(dir, "gzipped")
	tool("skopeo", "copy", "--dest-compress", "--dest-compress-format", "gzip", "docker://"+from, "oci:"+gzipped+":warm", "--src-tls-verify=false")
	bundle := filepath.Join(dir, "bundle")
	tool("umoci", "unpack", "--image", gzipped+":warm", bundle)
	f, err := os.Open(filepath.Join(bundle, "rootfs", oci.Dir, oci.ManifestName))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if m, err := oci.DecodeManifest(f); err != nil || m.Container.ID != b.id || m.Parent == nil {
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
