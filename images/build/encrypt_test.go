package build

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	archivecompression "github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/crypt"
	"github.com/crac-shim/crac/images/inspect"
	"github.com/crac-shim/crac/oci"
)

// node has a key, and is a recipient.
func node(t *testing.T) (key, recipient string) {
	t.Helper()
	private, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(&private.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	key, recipient = filepath.Join(dir, "key.pem"), filepath.Join(dir, "pub.pem")
	for name, block := range map[string]*pem.Block{
		key: {Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(private)}, recipient: {Type: "PUBLIC KEY", Bytes: public},
	} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return key, "jwe:" + recipient
}

// whole reads an image's checkpoint with a key, and checks all digests.
func (w *world) whole(ref, key string) *inspect.Layer {
	w.t.Helper()
	record, err := w.images.Get(w.ctx, ref)
	w.must(err)
	img, err := inspect.Open(w.ctx, w.content, ref, record.Target, w.platform)
	w.must(err)
	keys, err := crypt.ParseKeys([]string{key})
	w.must(err)
	chain, err := img.ReadChain(w.ctx, w.content, inspect.Options{Digests: true, Keys: keys})
	w.must(err)
	for _, l := range chain {
		w.must(l.Verify())
	}
	if says := img.Manifest.Annotations[oci.AnnotationManifest]; says != chain[0].ManifestDigest {
		w.t.Errorf("the image says that its checkpoint is %s, and it is %s", says, chain[0].ManifestDigest)
	}
	_, err = img.ReadChain(w.ctx, w.content, inspect.Options{})
	if err == nil || !strings.Contains(err.Error(), "--key") {
		w.t.Errorf("%s read without a key: %v", ref, err)
	}
	return chain[0]
}

// TestBuildEncrypted: the container's own layers are encrypted, the base's are as they were, and
// what is inside is what would be there otherwise.
func TestBuildEncrypted(t *testing.T) {
	w := newWorld(t)
	key, recipient := node(t)
	w.image("base:1", "overlayfs", "one")
	upper := w.container("c", "base:1", "overlayfs")
	w.must(os.WriteFile(filepath.Join(upper, "token"), []byte("t"), 0o600))

	for _, comp := range []oci.Compression{oci.CompressionGzip, oci.CompressionZstd, ""} {
		r := w.request("c", "plain:1")
		r.Compression = comp
		_, _, err := w.build(r)
		w.must(err)
		r.Ref, r.EncryptTo = "sealed:1", []string{recipient}
		_, _, err = w.build(r)
		w.must(err)
		plain, sealed := w.load("plain:1"), w.load("sealed:1")
		if !slices.Equal(plain.config.RootFS.DiffIDs, sealed.config.RootFS.DiffIDs) || len(sealed.manifest.Layers) != 3 {
			t.Fatalf("other contents: %v and %v", plain.config.RootFS, sealed.config.RootFS)
		}
		for i, l := range sealed.manifest.Layers {
			want := plain.manifest.Layers[i].MediaType
			if comp == "" && i > 0 {
				want = ocispec.MediaTypeImageLayerGzip // what containerd decrypts by default
			}
			if i > 0 {
				want += "+encrypted"
			}
			if l.MediaType != want {
				t.Errorf("layer %d is %s, want %s", i, l.MediaType, want)
			}
		}
		if sealed.manifest.Layers[0].Digest != plain.manifest.Layers[0].Digest {
			t.Error("the base is another")
		}
		if mark := sealed.manifest.Layers[2].Annotations[oci.LayerAnnotation]; mark != oci.LayerCheckpoint {
			t.Errorf("the checkpoint layer is marked %q", mark)
		}
		w.whole("sealed:1", key)
	}
	if _, _, err := w.build(func() Request {
		r := w.request("c", "x:1")
		r.EncryptTo = []string{recipient + ".gone"}
		return r
	}()); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("a recipient that is not there: %v", err)
	}

	// An image of its own, later: the same layers inside, and encrypted once.
	desc, err := encrypt(w.ctx, w.services, EncryptRequest{From: "plain:1", Ref: "later:1", To: []string{recipient}}, func(Event) {})
	w.must(err)
	later, plain := w.load("later:1"), w.load("plain:1")
	if later.manifest.Config.Digest != plain.manifest.Config.Digest || later.manifest.Layers[0].Digest != plain.manifest.Layers[0].Digest {
		t.Errorf("%s is of another image: %+v", desc.Digest, later.manifest)
	}
	w.whole("later:1", key)
	for from, want := range map[string]string{"later:1": "--key", "base:1": "no checkpoint", "gone:1": "not there"} {
		_, err := encrypt(w.ctx, w.services, EncryptRequest{From: from, Ref: "x:1", To: []string{recipient}}, func(Event) {})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("encrypt %s: %v, want %q", from, err, want)
		}
	}

	// Nothing but the images' own content is left, and what they refer to is kept.
	for _, ref := range []string{"plain:1"} {
		w.must(w.images.Delete(w.ctx, ref))
	}
	w.clean()
	w.whole("later:1", key)
	w.whole("sealed:1", key)
}

// TestEncryptionIsNotLostOnTheWay: what came from an encrypted image does not get into one that
// anybody can read, unless it is said.
func TestEncryptionIsNotLostOnTheWay(t *testing.T) {
	w := newWorld(t)
	key, recipient := node(t)
	w.image("base:1", "overlayfs", "one")
	w.container("c", "base:1", "overlayfs")
	build := func(ref, parent string, to ...string) error {
		r := w.request("c", ref)
		r.Manifest.Host.PageSize = 4096
		r.Parent, r.EncryptTo, r.Keys = parent, to, []string{key}
		// A page map of one page.
		w.must(os.WriteFile(filepath.Join(r.DumpDir, "pages-1.img"), []byte(strings.Repeat("s", 4096)), 0o600))
		w.must(os.WriteFile(filepath.Join(r.DumpDir, "pagemap-1.img"),
			[]byte("\x19\x43\x56\x54\x25\x40\x08\x56\x02\x00\x00\x00\x08\x01\x0a\x00\x00\x00\x08\x80\x80\x04\x10\x00\x20\x04\x28\x01"), 0o600))
		_, _, err := w.build(r)
		return err
	}
	w.must(build("sealed:0", "", recipient))
	w.must(build("plain:0", ""))
	for _, tt := range []struct {
		parent, to, want string
	}{
		{"sealed:0", "", "would not be"},
		{"sealed:0", recipient, ""},
		{"sealed:0", oci.NoRecipients, ""},
		{"plain:0", recipient, ""},
		{"plain:0", "", ""},
	} {
		var to []string
		if tt.to != "" {
			to = []string{tt.to}
		}
		err := build("next:1", tt.parent, to...)
		if (tt.want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("on %s for %q: %v, want %q", tt.parent, tt.to, err, tt.want)
		}
		if err != nil || tt.to != recipient {
			continue
		}
		if n := len(w.load("next:1").manifest.Layers) - 1; w.readers("next:1", key) != n || n != 2 {
			t.Errorf("on %s it has %d layers of its own, and not all are encrypted", tt.parent, n)
		}
	}
	w.must(build("next:1", "sealed:0", recipient))
	if l := w.whole("next:1", key); l.Manifest.Parent == nil {
		t.Error("it continues nothing")
	}
	flat := func(to ...string) error {
		_, err := flatten(w.ctx, w.services, FlattenRequest{From: "next:1", Ref: "flat:1", WorkDir: t.TempDir(), EncryptTo: to, Keys: []string{key}}, func(Event) {})
		return err
	}
	if err := flat(); err == nil || !strings.Contains(err.Error(), "would not be") {
		t.Errorf("flattened in the open: %v", err)
	}
	w.must(flat(recipient))
	w.whole("flat:1", key)

	// A clone's next checkpoint, too.
	r := w.request("clone", "again:1")
	diffIDs, sn := w.load("flat:1").config.RootFS.DiffIDs, w.snapshots("overlayfs")
	w.unpack(sn, identity.ChainID(diffIDs[:1]).String(), identity.ChainID(diffIDs).String(), func(string) {})
	w.container("clone", "flat:1", "overlayfs")
	if _, _, err := w.build(r); err == nil || !strings.Contains(err.Error(), "would not be") {
		t.Errorf("a clone's checkpoint: %v", err)
	}
	r.EncryptTo = []string{oci.NoRecipients}
	_, _, err := w.build(r)
	w.must(err)
	w.check("again:1")
}

// readers asserts that each of these keys alone reads all of an image, or that anybody can, and
// tells how many layers are encrypted.
func (w *world) readers(ref string, keys ...string) (encrypted int) {
	w.t.Helper()
	l := w.load(ref)
	for n, desc := range l.manifest.Layers {
		if !crypt.IsEncrypted(desc.MediaType) {
			w.entriesOf(desc, l.config.RootFS.DiffIDs[n], nil)
			continue
		}
		encrypted++
		if len(keys) == 0 {
			w.t.Errorf("layer %d of %s is encrypted", n, ref)
		}
		for _, key := range keys {
			k, err := crypt.ParseKeys([]string{key})
			w.must(err)
			w.entriesOf(desc, l.config.RootFS.DiffIDs[n], k)
		}
	}
	return encrypted
}

// entriesOf reads a layer to its end, and compares it with its diff ID.
func (w *world) entriesOf(desc ocispec.Descriptor, diffID digest.Digest, keys *crypt.Keys) {
	w.t.Helper()
	ra, err := w.content.ReaderAt(w.ctx, desc)
	w.must(err)
	defer ra.Close()
	r := content.NewReader(ra)
	if crypt.IsEncrypted(desc.MediaType) {
		if r, err = keys.Decrypt(r, desc); err != nil {
			w.t.Error(err)
			return
		}
	}
	packed, err := io.ReadAll(r)
	w.must(err)
	plain, err := archivecompression.DecompressStream(bytes.NewReader(packed))
	w.must(err)
	defer plain.Close()
	if got, err := digest.FromReader(plain); err != nil || got != diffID {
		w.t.Errorf("layer %s has the diff ID %s instead of %s: %v", desc.Digest, got, diffID, err)
	}
}

// clone makes a container of an image that is encrypted, and returns where its changes go.
func (w *world) clone(id, ref string) string {
	w.t.Helper()
	sn, diffIDs := w.snapshots("overlayfs"), w.load(ref).config.RootFS.DiffIDs
	for i := range diffIDs {
		chain := identity.ChainID(diffIDs[:i+1]).String()
		if _, err := sn.Stat(w.ctx, chain); err != nil {
			w.unpack(sn, identity.ChainID(diffIDs[:i]).String(), chain, func(string) {})
		}
	}
	return w.container(id, ref, "overlayfs")
}

// TestEncryptedForTheNewRecipients: what an image has of earlier ones, layers of changes and parents,
// is for those that it is encrypted for, and for nobody else; or for anybody.
func TestEncryptedForTheNewRecipients(t *testing.T) {
	keyA, toA := node(t)
	keyB, toB := node(t)
	nobody := t.TempDir()
	setNodeKeys(t, nobody)
	w := newWorld(t)
	w.image("base:1", "overlayfs", "one")
	request := func(container, ref string, to ...string) Request {
		r := w.request(container, ref)
		r.Manifest.Host.PageSize = 4096
		r.EncryptTo = to
		w.must(os.WriteFile(filepath.Join(r.DumpDir, "pages-1.img"), []byte(strings.Repeat("s", 4096)), 0o600))
		w.must(os.WriteFile(filepath.Join(r.DumpDir, "pagemap-1.img"),
			[]byte("\x19\x43\x56\x54\x25\x40\x08\x56\x02\x00\x00\x00\x08\x01\x0a\x00\x00\x00\x08\x80\x80\x04\x10\x00\x20\x04\x28\x01"), 0o600))
		return r
	}
	changed := func(dir string) {
		w.must(os.WriteFile(filepath.Join(dir, "token"), []byte("t"), 0o600))
	}
	changed(w.container("c", "base:1", "overlayfs"))
	for ref, to := range map[string][]string{"sealed:0": {toA}, "plain:0": nil} {
		_, _, err := w.build(request("c", ref, to...))
		w.must(err)
	}
	changed(w.clone("clone", "sealed:0"))
	changed(w.clone("open", "plain:0"))
	// A delta on top of one that is encrypted.
	delta := request("c", "delta:0", toA)
	delta.Parent, delta.Keys = "sealed:0", []string{keyA}
	_, _, err := w.build(delta)
	w.must(err)

	checkpoint := func(container, parent string) func(ref string, to, keys []string) error {
		return func(ref string, to, keys []string) error {
			r := request(container, ref, to...)
			r.Keys, r.Parent = keys, parent
			_, events, err := w.build(r)
			if err != nil && len(events) > 0 {
				t.Errorf("what stands in the way shows after %v", kinds(events))
			}
			return err
		}
	}
	flat := func(from string) func(ref string, to, keys []string) error {
		return func(ref string, to, keys []string) error {
			_, err := flatten(w.ctx, w.services, FlattenRequest{From: from, Ref: ref, WorkDir: t.TempDir(), EncryptTo: to, Keys: keys}, func(Event) {})
			return err
		}
	}
	none, forA, forB := []string{oci.NoRecipients}, []string{toA}, []string{toB}
	for _, tt := range []struct {
		name      string
		make      func(ref string, to, keys []string) error
		encrypted int // layers of its own
		key       bool
	}{
		{"a clone's checkpoint", checkpoint("clone", ""), 3, true},
		{"a delta", checkpoint("c", "sealed:0"), 3, true},
		{"a delta of a delta", checkpoint("c", "delta:0"), 4, true},
		{"a clone's delta", checkpoint("clone", "sealed:0"), 4, true},
		{"flattened", flat("delta:0"), 2, true},
		{"a clone's checkpoint of a plain one", checkpoint("open", ""), 3, false},
		{"flattened from a plain one", flat("plain:0"), 2, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w.t = t
			for _, step := range []struct {
				to, readers []string
			}{{none, nil}, {forA, []string{keyA}}, {forB, []string{keyB}}, {[]string{toA, toB}, []string{keyA, keyB}}} {
				if err := tt.make("new:1", step.to, []string{keyA}); err != nil {
					t.Errorf("for %v: %v", step.to, err)
					continue
				}
				if n := w.readers("new:1", step.readers...); n != tt.encrypted && step.readers != nil {
					t.Errorf("for %v: %d layers are encrypted, want %d", step.to, n, tt.encrypted)
				}
				if l := w.load("new:1"); len(step.readers) == 1 {
					other := map[string]string{keyA: keyB, keyB: keyA}[step.readers[0]]
					k, err := crypt.ParseKeys([]string{other})
					w.must(err)
					for n, desc := range l.manifest.Layers {
						if crypt.IsEncrypted(desc.MediaType) && k.Fit(desc) == nil {
							t.Errorf("for %v: another key reads layer %d", step.to, n)
						}
					}
				}
				// Without the key it is refused, unless the node has it.
				for _, keys := range [][]string{nil, {keyB}} {
					err := tt.make("new:2", step.to, keys)
					if tt.key != (err != nil) || err != nil && (!errors.Is(err, crypt.ErrEncrypted) || !strings.Contains(err.Error(), "key")) {
						t.Errorf("for %v with %v: %v", step.to, keys, err)
					}
				}
			}
			setNodeKeys(t, filepath.Dir(keyA))
			w.must(tt.make("new:3", forB, nil))
			w.readers("new:3", keyB)
		})
	}
	w.t = t
	w.clean()
}

// What of an image is encrypted already is passed on: whoever the new one is for reads all of it.
func TestEncryptPartly(t *testing.T) {
	keyA, toA := node(t)
	keyB, toB := node(t)
	w := newWorld(t)
	w.image("base:1", "overlayfs", "one")
	upper := w.container("c", "base:1", "overlayfs")
	w.must(os.WriteFile(filepath.Join(upper, "token"), []byte("t"), 0o600))
	for ref, to := range map[string][]string{"plain:1": nil, "sealed:1": {toA}} {
		r := w.request("c", ref)
		r.Compression, r.EncryptTo = oci.CompressionGzip, to
		_, _, err := w.build(r)
		w.must(err)
	}
	mixed, sealed := w.load("plain:1").manifest, w.load("sealed:1").manifest
	mixed.Layers[1] = sealed.Layers[1]
	w.tag("mixed:1", w.json(ocispec.MediaTypeImageManifest, mixed, gcLabels(append(mixed.Layers, mixed.Config))))
	for from, progress := range map[string]bool{"mixed:1": true, "sealed:1": false} {
		for _, keys := range [][]string{nil, {keyB}} {
			_, err := encrypt(w.ctx, w.services, EncryptRequest{From: from, Ref: "new:1", To: []string{toB}, Keys: keys}, func(Event) {})
			if !errors.Is(err, crypt.ErrEncrypted) {
				t.Errorf("%s with the keys %v: %v", from, keys, err)
			}
		}
		var told []Event
		_, err := encrypt(w.ctx, w.services, EncryptRequest{From: from, Ref: "new:1", To: []string{toB}, Keys: []string{keyA}}, func(e Event) { told = append(told, e) })
		w.must(err)
		if n := w.readers("new:1", keyB); n != 2 {
			t.Errorf("of %s %d layers are encrypted", from, n)
		}
		k, err := crypt.ParseKeys([]string{keyA})
		w.must(err)
		for n, l := range w.load("new:1").manifest.Layers[1:] {
			if k.Fit(l) == nil {
				t.Errorf("of %s layer %d is still for the old recipient", from, n+1)
			}
		}
		if progress != (kinds(told)[0] == images.EventProgress) {
			t.Errorf("of %s: %v", from, kinds(told))
		}
		w.whole("new:1", keyB)
	}
	w.clean()
}

// The keys of a node matter where something is encrypted, and nowhere else.
func TestNodeKeysThatCannotBeRead(t *testing.T) {
	key, recipient := node(t)
	setNodeKeys(t, key) // no directory
	w := newWorld(t)
	w.image("base:1", "overlayfs", "one")
	w.container("c", "base:1", "overlayfs")
	_, _, err := w.build(w.request("c", "plain:1"))
	w.must(err)
	sealed := w.request("c", "sealed:1")
	sealed.EncryptTo = []string{recipient}
	_, _, err = w.build(sealed)
	w.must(err)
	flat := func(from string) error {
		_, err := flatten(w.ctx, w.services, FlattenRequest{From: from, Ref: "flat:1", WorkDir: t.TempDir(), EncryptTo: []string{recipient}}, func(Event) {})
		return err
	}
	w.must(flat("plain:1"))
	_, err = adopt(w.ctx, w.services, w.adoption("adopted:1"), func(Event) {})
	w.must(err)
	if err := flat("sealed:1"); !errors.Is(err, crypt.ErrEncrypted) || !strings.Contains(err.Error(), "cannot be read") || !strings.Contains(err.Error(), "--key") {
		t.Errorf("an encrypted one: %v", err)
	}
}

// What another tool made can go on top of what is encrypted.
func TestAdoptOnEncrypted(t *testing.T) {
	key, recipient := node(t)
	w := newWorld(t)
	w.image("base:1", "overlayfs", "one")
	upper := w.container("c", "base:1", "overlayfs")
	w.must(os.WriteFile(filepath.Join(upper, "token"), []byte("t"), 0o600))
	r := w.request("c", "sealed:1")
	r.EncryptTo = []string{recipient}
	_, _, err := w.build(r)
	w.must(err)
	for _, to := range []string{recipient, oci.NoRecipients} {
		a := w.adoption("adopted:1")
		a.Base, a.EncryptTo = "sealed:1", []string{to}
		if _, err := adopt(w.ctx, w.services, a, func(Event) {}); !errors.Is(err, crypt.ErrEncrypted) || !strings.Contains(err.Error(), "--key") {
			t.Errorf("for %s without a key: %v", to, err)
		}
		a.Keys = []string{key}
		_, err := adopt(w.ctx, w.services, a, func(Event) {})
		w.must(err)
		if to == recipient && w.readers("adopted:1", key) != 3 || to != recipient && w.readers("adopted:1") != 0 {
			t.Errorf("for %s: %+v", to, w.load("adopted:1").manifest.Layers)
		}
	}
}

func setNodeKeys(t *testing.T, dir string) {
	t.Helper()
	was := nodeKeyDir
	t.Cleanup(func() { nodeKeyDir = was })
	nodeKeyDir = dir
}
