package trust

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/content"
	coreimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/platforms"
	fakeregistry "github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content/memory"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/registry"
	"github.com/crac-shim/crac/oci"
)

// world is containerd's stores as the daemon has them.
type world struct {
	services
	t   *testing.T
	ctx context.Context
	db  *metadata.DB
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t}
	dir := t.TempDir()
	cs, err := local.NewStore(filepath.Join(dir, "content"))
	w.must(err)
	sn, err := overlay.NewSnapshotter(filepath.Join(dir, "overlay"))
	w.must(err)
	bdb, err := bolt.Open(filepath.Join(dir, "meta.db"), 0o600, nil)
	w.must(err)
	t.Cleanup(func() { w.must(errors.Join(bdb.Close(), sn.Close())) })
	w.db = metadata.NewDB(bdb, cs, map[string]snapshots.Snapshotter{"overlayfs": sn})
	ctx := namespaces.WithNamespace(t.Context(), "test")
	w.must(w.db.Init(ctx))
	lease, err := metadata.NewLeaseManager(w.db).Create(ctx, leases.WithRandomID())
	w.must(err)
	w.ctx = leases.WithLease(ctx, lease.ID)
	w.services = services{
		containers: metadata.NewContainerStore(w.db), images: metadata.NewImageStore(w.db), content: w.db.ContentStore(),
		snapshots: w.db.Snapshotter, platform: platforms.Default(),
	}
	return w
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) blob(mediaType string, v any) ocispec.Descriptor {
	w.t.Helper()
	data, err := json.Marshal(v)
	w.must(err)
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	w.must(content.WriteBlob(w.ctx, w.content, string(desc.Digest), strings.NewReader(string(data)), desc))
	return desc
}

// image stores an image of two layers, of which nothing but their names is there, and names it.
func (w *world) image(name, manifest string, layers ...string) ocispec.Descriptor {
	w.t.Helper()
	config := ocispec.Image{Platform: platforms.DefaultSpec(), RootFS: ocispec.RootFS{Type: "layers"}}
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Annotations: map[string]string{oci.AnnotationManifest: manifest}}
	m.SchemaVersion = 2
	for _, l := range layers {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromString(l))
		m.Layers = append(m.Layers, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerZstd, Digest: digest.FromString("stored " + l), Size: 1})
	}
	m.Config = w.blob(ocispec.MediaTypeImageConfig, config)
	desc := w.blob(ocispec.MediaTypeImageManifest, m)
	w.tag(name, desc)
	// Unpacked.
	sn := w.snapshots("overlayfs")
	for i := range layers {
		chain, key := identity.ChainID(config.RootFS.DiffIDs[:i+1]).String(), fmt.Sprintf("unpack-%s-%d", name, i)
		if _, err := sn.Stat(w.ctx, chain); err == nil {
			continue
		}
		_, err := sn.Prepare(w.ctx, key, identity.ChainID(config.RootFS.DiffIDs[:i]).String())
		w.must(err)
		w.must(sn.Commit(w.ctx, chain, key))
	}
	return desc
}

func (w *world) tag(name string, desc ocispec.Descriptor) {
	w.t.Helper()
	_ = w.images.Delete(w.ctx, name)
	_, err := w.images.Create(w.ctx, coreimages.Image{Name: name, Target: desc})
	w.must(err)
}

// container makes a container of an image, and returns what its shim would ask.
func (w *world) container(id, image, manifest, policy string) images.PolicyRequest {
	w.t.Helper()
	record, err := w.images.Get(w.ctx, image)
	w.must(err)
	m, err := coreimages.Manifest(w.ctx, w.content, record.Target, w.platform)
	w.must(err)
	diffIDs, err := coreimages.RootFS(w.ctx, w.content, m.Config)
	w.must(err)
	mounts, err := w.snapshots("overlayfs").Prepare(w.ctx, "snap-"+id, identity.ChainID(diffIDs).String())
	w.must(err)
	_, err = w.containers.Create(w.ctx, containers.Container{
		ID: id, Image: image, Snapshotter: "overlayfs", SnapshotKey: "snap-" + id, Runtime: containers.RuntimeInfo{Name: oci.RuntimeName}, Spec: anySpec{},
	})
	w.must(err)
	own := make([]images.Mount, len(mounts))
	for i, m := range mounts {
		own[i] = images.Mount(m)
	}
	layers, err := images.Layers(own)
	w.must(err)
	p, err := images.LoadPolicy(policy)
	w.must(err)
	return images.PolicyRequest{Container: id, Policy: policy, PolicyDigest: p.Digest(), Manifest: manifest, Layers: layers}
}

type anySpec struct{}

func (anySpec) GetTypeUrl() string { return "spec" }
func (anySpec) GetValue() []byte   { return []byte("{}") }

// signer makes a key with a self-signed certificate, and gives the names of their files.
func (w *world) signer(cn string, notAfter time.Time) (key, cert string) {
	w.t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	w.must(err)
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: cn, Organization: []string{"shop"}, Country: []string{"AQ"}, Province: []string{"Ross"}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: notAfter, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning},
	}
	public, err := x509.CreateCertificate(rand.Reader, c, c, &private.PublicKey, private)
	w.must(err)
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	w.must(err)
	dir := w.t.TempDir()
	key, cert = filepath.Join(dir, "key.pem"), filepath.Join(dir, "cert.pem")
	w.must(os.WriteFile(key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: secret}), 0o600))
	w.must(os.WriteFile(cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: public}), 0o600))
	return key, cert
}

// policy trusts certificates for all names but those below skip.test/, which need no signature.
func (w *world) policy(certs ...string) string {
	w.t.Helper()
	dir := w.t.TempDir()
	store := filepath.Join(dir, images.TrustStoreName, "x509", "ca", "shop")
	w.must(os.MkdirAll(store, 0o700))
	for i, cert := range certs {
		data, err := os.ReadFile(cert)
		w.must(err)
		w.must(os.WriteFile(filepath.Join(store, fmt.Sprintf("%d.pem", i)), data, 0o600))
	}
	w.must(os.WriteFile(filepath.Join(dir, images.TrustPolicyName), []byte(`{"version": "1.0", "trustPolicies": [
		{"name": "all", "registryScopes": ["*"], "signatureVerification": {"level": "strict"}, "trustStores": ["ca:shop"], "trustedIdentities": ["*"]},
		{"name": "own", "registryScopes": ["skip.test/app"], "signatureVerification": {"level": "skip"}}]}`), 0o600))
	path := filepath.Join(dir, "policy.json")
	w.must(os.WriteFile(path, []byte(`{"version":"1","signature":"require"}`), 0o600))
	return path
}

func TestJudge(t *testing.T) {
	w := newWorld(t)
	soon := time.Now().Add(time.Hour)
	key, cert := w.signer("builds", soon)
	otherKey, otherCert := w.signer("somebody", soon)
	policy := w.policy(cert)
	const manifest, another = "sha256:m", "sha256:another"
	signed := w.image("shop.test/app:warm", manifest, "base", "checkpoint")
	w.must(Sign(w.ctx, w.content, signed, otherKey, otherCert))
	w.must(Sign(w.ctx, w.content, signed, key, cert))
	w.must(Sign(w.ctx, w.content, w.image("shop.test/app:theirs", manifest, "base", "theirs"), otherKey, otherCert))
	w.image("shop.test/app:unsigned", manifest, "base", "evil")
	// The signed checkpoint on other files, and other files' checkpoint under a signed manifest.
	w.image("shop.test/app:mixed", manifest, "evil base", "checkpoint")
	w.image("skip.test/app:own", manifest, "base", "own")
	w.must(Sign(w.ctx, w.content, w.image("shop.test/app:old", "", "base", "old"), key, cert))
	index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{signed}}
	index.SchemaVersion = 2
	w.tag("shop.test/app:list", w.blob(ocispec.MediaTypeImageIndex, index))

	for id, tt := range map[string]struct {
		image, want string // empty: allowed
		change      func(*images.PolicyRequest)
	}{
		"signed":          {image: "shop.test/app:warm"},
		"in-an-index":     {image: "shop.test/app:list"},
		"needs-none":      {image: "skip.test/app:own"},
		"unsigned":        {image: "shop.test/app:unsigned", want: "no signature is associated"},
		"by-others":       {image: "shop.test/app:theirs", want: "trusted certificate"},
		"other-files":     {image: "shop.test/app:mixed", want: "no signature is associated"},
		"from-before":     {image: "shop.test/app:old", want: "older cracctl"},
		"other-dump":      {image: "shop.test/app:warm", want: "is not the one of image", change: func(r *images.PolicyRequest) { r.Manifest = another }},
		"other-rootfs":    {image: "shop.test/app:warm", want: "is not that of its snapshot", change: func(r *images.PolicyRequest) { r.Layers[0] = "/evil" }},
		"more-layers":     {image: "shop.test/app:warm", want: "is not that of its snapshot", change: func(r *images.PolicyRequest) { r.Layers = append([]string{"/evil"}, r.Layers...) }},
		"moved-name":      {image: "shop.test/app:moved", want: "now: make the container again", change: func(*images.PolicyRequest) { w.tag("shop.test/app:moved", signed) }},
		"name-that-is-no": {image: "shop.test/app:gone", want: "no longer there", change: func(*images.PolicyRequest) { w.must(w.images.Delete(w.ctx, "shop.test/app:gone")) }},
	} {
		t.Run(id, func(t *testing.T) {
			w.t = t
			if tt.image == "shop.test/app:gone" || id == "moved-name" {
				w.image(tt.image, manifest, "base", id)
			}
			r := w.container(id, tt.image, manifest, policy)
			if tt.change != nil {
				tt.change(&r)
			}
			v, err := judge(w.ctx, w.services, r)
			if err != nil {
				t.Fatal(err)
			}
			if v.Allowed != (tt.want == "") || !strings.Contains(v.Reason, tt.want) {
				t.Errorf("%+v, want %q", v, tt.want)
			}
			if v.Allowed && (v.Until.After(time.Now().Add(recheck)) || id != "needs-none" && v.Until.After(soon)) {
				t.Errorf("it is good until %s", v.Until)
			}
		})
	}
	w.t = t

	r := w.container("changed", "shop.test/app:warm", manifest, policy)
	r.PolicyDigest = "another"
	if _, err := judge(w.ctx, w.services, r); err == nil || !strings.Contains(err.Error(), "changed meanwhile") {
		t.Errorf("another policy: %v", err)
	}
	// Signatures live as long as what they sign.
	_, err := w.db.GarbageCollect(w.ctx)
	w.must(err)
	if all, err := Signatures(w.ctx, w.content, signed); err != nil || len(all) != 2 {
		t.Errorf("%d signatures, %v", len(all), err)
	}
}

// TestExpired: a certificate's end is the end of its signatures.
func TestExpired(t *testing.T) {
	w := newWorld(t)
	const name = "shop.test/app:warm"
	// A busy machine may need all of a short life to sign and to verify: it gets a longer one then.
	for life := 2 * time.Second; ; life *= 2 {
		key, cert := w.signer("builds", time.Now().Add(life))
		image := w.image(name, "sha256:m", "base")
		signed := Sign(w.ctx, w.content, image, key, cert)
		p, err := images.LoadPolicy(w.policy(cert))
		w.must(err)
		v := Verify(w.ctx, w.content, p, name, image)
		if signed != nil || !v.Allowed {
			if life > time.Minute {
				t.Fatalf("%v, %+v", signed, v)
			}
			continue
		}
		time.Sleep(time.Until(v.Until) + 100*time.Millisecond)
		if v := Verify(w.ctx, w.content, p, name, image); v.Allowed {
			t.Errorf("%+v", v)
		}
		return
	}
}

// TestPushAndFetch: with a registry that knows referrers, and with one that does not.
func TestPushAndFetch(t *testing.T) {
	quiet := fakeregistry.Logger(log.New(io.Discard, "", 0))
	for name, options := range map[string][]fakeregistry.Option{
		"referrers": {fakeregistry.WithReferrersSupport(true), quiet}, "tags": {fakeregistry.WithReferrersSupport(false), quiet},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			srv := httptest.NewServer(fakeregistry.New(options...))
			t.Cleanup(srv.Close)
			ref := strings.TrimPrefix(srv.URL, "http://") + "/shop/app:warm"
			image := w.image(ref, "sha256:m")
			key, cert := w.signer("builds", time.Now().Add(time.Hour))
			for range 2 {
				w.must(Sign(w.ctx, w.content, image, key, cert))
			}
			remote, err := registry.Config{}.Repository(w.ctx, ref)
			w.must(err)
			w.must(oras.CopyGraph(w.ctx, store{w.content, image.Digest}, remote, image, oras.DefaultCopyGraphOptions))
			for range 2 { // twice is no harm
				if n, err := Push(w.ctx, w.content, remote, image); err != nil || n != 2 {
					t.Fatalf("%d pushed, %v", n, err)
				}
			}

			// Another node has the image and not its signatures.
			other := newWorld(t)
			if got := other.image(ref, "sha256:m"); got.Digest != image.Digest {
				t.Fatal("another image")
			}
			r := other.container("c", ref, "sha256:m", other.policy(cert))
			if v, err := judge(other.ctx, other.services, r); err != nil || v.Allowed {
				t.Errorf("%+v, %v", v, err)
			}
			other.fetch = func(ctx context.Context, _ string, all ...ocispec.Descriptor) error {
				for _, d := range all {
					if n, err := Fetch(ctx, other.content, remote, d); err != nil || n != 2 {
						return fmt.Errorf("%d fetched: %w", n, err)
					}
				}
				return nil
			}
			if v, err := judge(other.ctx, other.services, r); err != nil || !v.Allowed {
				t.Errorf("%+v, %v", v, err)
			}
			other.fetch = nil // here by now
			if v, err := judge(other.ctx, other.services, r); err != nil || !v.Allowed {
				t.Errorf("%+v, %v", v, err)
			}
		})
	}
}

// liar is a registry that gives signatures of one image for those of any other.
type liar struct {
	oras.GraphTarget
	signatures []ocispec.Descriptor
}

func (l liar) Referrers(_ context.Context, _ ocispec.Descriptor, _ string, take func([]ocispec.Descriptor) error) error {
	return take(l.signatures)
}

// A registry has a say in nothing but the image that it was asked about.
func TestSignaturesOfAnother(t *testing.T) {
	w := newWorld(t)
	key, cert := w.signer("builds", time.Now().Add(time.Hour))
	asked, another := w.image("shop.test/app:asked", "sha256:m", "asked"), w.image("shop.test/app:another", "sha256:m", "another")
	w.must(Sign(w.ctx, w.content, another, key, cert))
	remote := liar{GraphTarget: memory.New()}
	if n, err := Push(w.ctx, w.content, remote, another); err != nil || n != 1 {
		t.Fatalf("%d, %v", n, err)
	}
	var err error
	remote.signatures, err = Signatures(w.ctx, w.content, another)
	w.must(err)

	node := newWorld(t)
	for _, name := range []string{"asked", "another"} {
		node.image("shop.test/app:"+name, "sha256:m", name)
	}
	if _, err := Fetch(node.ctx, node.content, remote, asked); err == nil || !strings.Contains(err.Error(), "is a signature of "+another.Digest.String()) {
		t.Errorf("fetched: %v", err)
	}
	for _, image := range []ocispec.Descriptor{asked, another} {
		info, err := node.content.Info(node.ctx, image.Digest)
		node.must(err)
		for k := range info.Labels {
			if strings.HasPrefix(k, referrerLabel) {
				t.Errorf("%s has the label %s", image.Digest, k)
			}
		}
	}
	// Of the right image it is taken.
	if n, err := Fetch(node.ctx, node.content, remote, another); err != nil || n != 1 {
		t.Errorf("%d, %v", n, err)
	}
}

// What is large is not read to find out that it is no image.
func TestResolveIsBounded(t *testing.T) {
	w := newWorld(t)
	large := w.blob(ocispec.MediaTypeImageManifest, strings.Repeat("x", 8<<20))
	if _, err := (store{w.content, large.Digest}).Resolve(w.ctx, large.Digest.String()); err == nil || !strings.Contains(err.Error(), "no more than") {
		t.Errorf("got %v", err)
	}
}
