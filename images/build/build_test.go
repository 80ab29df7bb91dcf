package build

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	stdlog "log"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	coreimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/snapshots/native"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/containerd/typeurl/v2"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/oci"
)

// world is containerd's stores as the daemon has them, without the daemon and
// without mounting anything: real content, metadata, garbage collection and
// snapshotters.
type world struct {
	services
	ctx context.Context
	db  *metadata.DB
	t   *testing.T
	// noHistory leaves the history out of images, as some tools do.
	noHistory bool
}

func newWorld(t *testing.T) *world {
	t.Helper()
	dir := t.TempDir()
	cs, err := local.NewStore(filepath.Join(dir, "content"))
	if err != nil {
		t.Fatal(err)
	}
	ov, err := overlay.NewSnapshotter(filepath.Join(dir, "overlay"))
	if err != nil {
		t.Fatal(err)
	}
	nat, err := native.NewSnapshotter(filepath.Join(dir, "native"))
	if err != nil {
		t.Fatal(err)
	}
	bdb, err := bolt.Open(filepath.Join(dir, "meta.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, c := range []io.Closer{bdb, ov, nat} {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	db := metadata.NewDB(bdb, cs, map[string]snapshots.Snapshotter{"overlayfs": ov, "native": nat})
	ctx := namespaces.WithNamespace(t.Context(), "test")
	if err := db.Init(ctx); err != nil {
		t.Fatal(err)
	}
	w := &world{ctx: ctx, db: db, t: t}
	w.services = services{
		containers: metadata.NewContainerStore(db),
		images:     metadata.NewImageStore(db),
		content:    db.ContentStore(),
		leases:     metadata.NewLeaseManager(db),
		snapshots:  db.Snapshotter,
		platform:   platforms.Default(),
		diff:       comparer{db.ContentStore()},
	}
	return w
}

// comparer is containerd's own differ for directories that need no mounting.
type comparer struct{ content.Store }

func (c comparer) Compare(ctx context.Context, lower, upper []mount.Mount, opts ...diff.Opt) (ocispec.Descriptor, error) {
	var config diff.Config
	for _, o := range opts {
		if err := o(&config); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	if config.MediaType != ocispec.MediaTypeImageLayerGzip || config.Reference != "" || len(lower) != 1 || len(upper) != 1 {
		return ocispec.Descriptor{}, fmt.Errorf("unexpected request: %v %v %v", config, lower, upper)
	}
	comp, err := newCompression("gzip", nil)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	l, err := writeLayer(ctx, c.Store, "differ", comp, func(w io.Writer) error {
		return archive.WriteDiff(ctx, w, lower[0].Source, upper[0].Source)
	})
	return l.desc, err
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) blob(mediaType string, data []byte, labels map[string]string) ocispec.Descriptor {
	w.t.Helper()
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	w.must(content.WriteBlob(w.ctx, w.content, string(desc.Digest), bytes.NewReader(data), desc, content.WithLabels(labels)))
	return desc
}

func (w *world) json(mediaType string, v any, labels map[string]string) ocispec.Descriptor {
	w.t.Helper()
	data, err := json.Marshal(v)
	w.must(err)
	return w.blob(mediaType, data, labels)
}

// image stores a Docker image of layers with a file each, and unpacks it.
func (w *world) image(name, snapshotter string, files ...string) ocispec.Descriptor {
	w.t.Helper()
	var (
		layers  []ocispec.Descriptor
		diffIDs []digest.Digest
		history []ocispec.History
	)
	gc := make(map[string]string)
	sn := w.snapshots(snapshotter)
	for i, f := range files {
		var tarred, zipped bytes.Buffer
		tw := tar.NewWriter(&tarred)
		w.must(tw.WriteHeader(&tar.Header{Name: f, Mode: 0o644, Size: int64(len(f))}))
		_, err := io.WriteString(tw, f)
		w.must(err)
		w.must(tw.Close())
		zw := gzip.NewWriter(&zipped)
		_, err = zw.Write(tarred.Bytes())
		w.must(err)
		w.must(zw.Close())
		layers = append(layers, w.blob(coreimages.MediaTypeDockerSchema2LayerGzip, zipped.Bytes(), nil))
		gc[fmt.Sprintf("containerd.io/gc.ref.content.l.%d", i)] = layers[i].Digest.String()

		parent := identity.ChainID(diffIDs).String()
		diffIDs = append(diffIDs, digest.FromBytes(tarred.Bytes()))
		history = append(history, ocispec.History{CreatedBy: "COPY " + f}, ocispec.History{CreatedBy: "ENV", EmptyLayer: true})
		w.unpack(sn, parent, identity.ChainID(diffIDs).String(), func(dir string) {
			w.must(os.WriteFile(filepath.Join(dir, f), []byte(f), 0o644))
		})
	}
	if w.noHistory {
		history = nil
	}
	config := w.json(coreimages.MediaTypeDockerSchema2Config, map[string]any{
		"architecture": platforms.DefaultSpec().Architecture, "os": "linux",
		"config": map[string]any{"Entrypoint": []string{"/app"}, "Env": []string{"A=b"}, "User": "7", "Healthcheck": map[string]any{"Test": []string{"NONE"}}},
		"rootfs": map[string]any{"type": "layers", "diff_ids": diffIDs}, "history": history, "docker_version": "27",
	}, nil)
	gc["containerd.io/gc.ref.content.config"] = config.Digest.String()
	manifest := w.json(coreimages.MediaTypeDockerSchema2Manifest, map[string]any{
		"schemaVersion": 2, "mediaType": coreimages.MediaTypeDockerSchema2Manifest, "config": config, "layers": layers,
	}, gc)
	w.tag(name, manifest)
	return manifest
}

func (w *world) tag(name string, target ocispec.Descriptor) {
	w.t.Helper()
	img := coreimages.Image{Name: name, Target: target}
	_, err := w.images.Create(w.ctx, img)
	if errdefs.IsAlreadyExists(err) {
		_, err = w.images.Update(w.ctx, img)
	}
	w.must(err)
}

func (w *world) unpack(sn snapshots.Snapshotter, parent, chainID string, fill func(dir string)) {
	w.t.Helper()
	mounts, err := sn.Prepare(w.ctx, "unpack "+chainID, parent)
	w.must(err)
	fill(writable(w.t, mounts))
	w.must(sn.Commit(w.ctx, chainID, "unpack "+chainID, snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "1"})))
}

// writable is where a container's changes go.
func writable(t *testing.T, mounts []mount.Mount) string {
	t.Helper()
	if dir, ok := upperDir(mounts); ok {
		return dir
	}
	return mounts[0].Source
}

// container makes a container of an image as it is now and returns where its
// changes go.
func (w *world) container(id, image, snapshotter string) string {
	w.t.Helper()
	img, err := w.images.Get(w.ctx, image)
	w.must(err)
	m, err := coreimages.Manifest(w.ctx, w.content, img.Target, w.platform)
	w.must(err)
	diffIDs, err := coreimages.RootFS(w.ctx, w.content, m.Config)
	w.must(err)
	mounts, err := w.snapshots(snapshotter).Prepare(w.ctx, "snap-"+id, identity.ChainID(diffIDs).String())
	w.must(err)
	_, err = w.containers.Create(w.ctx, containers.Container{
		ID: id, Image: image, Snapshotter: snapshotter, SnapshotKey: "snap-" + id,
		Runtime: containers.RuntimeInfo{Name: oci.RuntimeName}, Spec: anySpec{},
	})
	w.must(err)
	return writable(w.t, mounts)
}

// anySpec satisfies the container store, which wants some spec.
type anySpec struct{}

func (anySpec) GetTypeUrl() string { return "spec" }
func (anySpec) GetValue() []byte   { return []byte("{}") }

var _ typeurl.Any = anySpec{}

// unpackImage does what a client does before it runs a pulled image.
func (w *world) unpackImage(name, snapshotter string) {
	w.t.Helper()
	img, err := w.images.Get(w.ctx, name)
	w.must(err)
	m, err := coreimages.Manifest(w.ctx, w.content, img.Target, w.platform)
	w.must(err)
	diffIDs, err := coreimages.RootFS(w.ctx, w.content, m.Config)
	w.must(err)
	sn := w.snapshots(snapshotter)
	for i := range diffIDs {
		chain := identity.ChainID(diffIDs[:i+1]).String()
		if _, err := sn.Stat(w.ctx, chain); err == nil {
			continue
		}
		w.unpack(sn, identity.ChainID(diffIDs[:i]).String(), chain, func(dir string) {
			for _, f := range w.entries(m.Layers[i]) {
				path := filepath.Join(dir, f.Name)
				switch f.Typeflag {
				case tar.TypeDir:
					w.must(os.MkdirAll(path, 0o700))
				case tar.TypeReg:
					w.must(os.WriteFile(path, f.data, 0o600))
				}
			}
		})
	}
}

func (w *world) request(container, ref string) Request {
	w.t.Helper()
	dir := w.t.TempDir()
	for name, data := range map[string]string{
		"inventory.img": "\x16\x31\x31\x58\x00\x00\x00\x00", "pages-1.img": strings.Repeat(container, 1<<16),
		// One thread, which has nothing but empty credentials.
		"core-1.img":       "\x19\x43\x56\x54\x47\x38\x05\x55\x04\x00\x00\x00\x2a\x02\x52\x00",
		"descriptors.json": "[]", "dump.log": "log", "stats-dump": "s",
	} {
		w.must(os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600))
	}
	spec := filepath.Join(w.t.TempDir(), "spec.json")
	w.must(os.WriteFile(spec, []byte(`{"ociVersion":"1.2.0"}`), 0o600))
	r := Request{Container: container, Ref: ref, SpecPath: spec, BuildDump: Dump{DumpDir: dir}}
	images.ThisHost(40101).Describe(&r.Manifest)
	r.Manifest.Created = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	r.Manifest.Container = oci.Container{ID: container, Args: []string{"/app"}}
	return r
}

// build does all that makes an image.
func build(ctx context.Context, s services, r Request, emit func(Event)) (desc ocispec.Descriptor, err error) {
	p, err := prepare(ctx, s, r, emit)
	if err != nil {
		return desc, err
	}
	defer func() { p.Close(ctx, err) }()
	return p.Finish(ctx, r.BuildDump)
}

// build builds and returns what was told meanwhile.
func (w *world) build(r Request) (ocispec.Descriptor, []Event, error) {
	var events []Event
	desc, err := build(w.ctx, w.services, r, func(e Event) { events = append(events, e) })
	return desc, events, err
}

type entry struct {
	*tar.Header
	data []byte
}

// entries reads a stored layer and checks it against its descriptor.
func (w *world) entries(desc ocispec.Descriptor) (all []entry) {
	w.t.Helper()
	data, err := content.ReadBlob(w.ctx, w.content, desc)
	w.must(err)
	var r io.Reader
	if strings.HasSuffix(desc.MediaType, "zstd") {
		z, err := zstd.NewReader(bytes.NewReader(data))
		w.must(err)
		defer z.Close()
		r = z
	} else {
		r, err = gzip.NewReader(bytes.NewReader(data))
		w.must(err)
	}
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		w.must(err)
		data, err := io.ReadAll(tr)
		w.must(err)
		all = append(all, entry{h, data})
	}
}

func names(all []entry) (n []string) {
	for _, e := range all {
		n = append(n, e.Name)
	}
	return n
}

// loaded is an image as a client reads it.
type loaded struct {
	manifest ocispec.Manifest
	config   ocispec.Image
	raw      map[string]json.RawMessage
}

func (w *world) load(name string) loaded {
	w.t.Helper()
	img, err := w.images.Get(w.ctx, name)
	w.must(err)
	var l loaded
	for _, step := range []struct {
		desc func() ocispec.Descriptor
		to   []any
	}{
		{func() ocispec.Descriptor { return img.Target }, []any{&l.manifest}},
		{func() ocispec.Descriptor { return l.manifest.Config }, []any{&l.config, &l.raw}},
	} {
		data, err := content.ReadBlob(w.ctx, w.content, step.desc())
		w.must(err)
		if digest.FromBytes(data) != step.desc().Digest {
			w.t.Fatalf("%s has other content", step.desc().Digest)
		}
		for _, to := range step.to {
			w.must(json.Unmarshal(data, to))
		}
	}
	return l
}

// check asserts what holds for every checkpoint image.
func (w *world) check(name string) loaded {
	w.t.Helper()
	l := w.load(name)
	if l.manifest.MediaType != ocispec.MediaTypeImageManifest || l.manifest.SchemaVersion != 2 || l.manifest.Config.MediaType != ocispec.MediaTypeImageConfig {
		w.t.Errorf("no OCI manifest: %+v", l.manifest)
	}
	if len(l.manifest.Layers) != len(l.config.RootFS.DiffIDs) {
		w.t.Errorf("%d layers, %d diff IDs", len(l.manifest.Layers), len(l.config.RootFS.DiffIDs))
	}
	if n := layersOf(l.config.History); n != len(l.manifest.Layers) {
		w.t.Errorf("history of %d layers for %d", n, len(l.manifest.Layers))
	}
	for i, layer := range l.manifest.Layers {
		last := i == len(l.manifest.Layers)-1
		if mark := layer.Annotations[oci.LayerAnnotation] == oci.LayerCheckpoint; mark != last {
			w.t.Errorf("layer %d of %d is marked as a checkpoint: %v", i, len(l.manifest.Layers), mark)
		}
		if !strings.HasPrefix(layer.MediaType, "application/vnd.oci.image.layer.v1.tar+") {
			w.t.Errorf("layer %d has type %s", i, layer.MediaType)
		}
		for _, e := range w.entries(layer) {
			if inside := strings.HasPrefix(e.Name, ".crac/"); inside != last {
				w.t.Errorf("layer %d of %d has %s", i, len(l.manifest.Layers), e.Name)
			}
		}
	}
	if l.manifest.Annotations[oci.AnnotationVersion] != "1" || l.manifest.Annotations[oci.AnnotationRuntime] != oci.RuntimeName {
		w.t.Errorf("annotations %v", l.manifest.Annotations)
	}

	// The checkpoint layer, as a snapshotter would unpack it.
	dir := w.t.TempDir()
	for _, e := range w.entries(l.manifest.Layers[len(l.manifest.Layers)-1]) {
		if e.Typeflag == tar.TypeDir {
			w.must(os.Mkdir(filepath.Join(dir, e.Name), 0o700))
		} else {
			w.must(os.WriteFile(filepath.Join(dir, e.Name), e.data, 0o600))
		}
	}
	c, _, err := images.Find([]images.Mount{{Type: "bind", Source: dir}})
	w.must(err)
	if says := l.manifest.Annotations[oci.AnnotationManifest]; says != c.ManifestDigest() {
		w.t.Errorf("the image says that its checkpoint is %s, and it is %s", says, c.ManifestDigest())
	}
	w.must(c.VerifyAll())
	if got, want := len(c.Manifest.Files), 4; got != want {
		w.t.Errorf("%d files in the dump, want %d: %v", got, want, c.Manifest.Files)
	}
	return l
}

// clean asserts that nothing is held, half-written or left over but what images
// refer to. It returns how many blobs there are.
func (w *world) clean() int {
	w.t.Helper()
	held, err := w.leases.List(w.ctx)
	w.must(err)
	if len(held) > 0 {
		w.t.Errorf("leases left: %v", held)
	}
	writing, err := w.content.ListStatuses(w.ctx)
	w.must(err)
	if len(writing) > 0 {
		w.t.Errorf("unfinished content: %v", writing)
	}
	_, err = w.db.GarbageCollect(w.ctx)
	w.must(err)
	n := 0
	w.must(w.content.Walk(w.ctx, func(content.Info) error { n++; return nil }))
	return n
}

func kinds(events []Event) (k []string) {
	for _, e := range events {
		if len(k) == 0 || k[len(k)-1] != e.Event {
			k = append(k, e.Event)
		}
	}
	return k
}

func TestBuild(t *testing.T) {
	for _, comp := range []string{"", "gzip"} {
		t.Run("compression="+comp, func(t *testing.T) {
			w := newWorld(t)
			base := w.image("base:1", "overlayfs", "one", "two")
			upper := w.container("c", "base:1", "overlayfs")
			w.must(os.MkdirAll(filepath.Join(upper, "etc", "new"), 0o755))
			w.must(os.WriteFile(filepath.Join(upper, "etc", "file"), []byte("changed"), 0o640))
			w.must(unix.Mknod(filepath.Join(upper, "one"), unix.S_IFCHR, 0)) // a whiteout; needs no privilege
			// Not the container's, whoever put it there.
			w.must(os.MkdirAll(filepath.Join(upper, ".crac", "v1"), 0o700))
			w.must(os.WriteFile(filepath.Join(upper, ".crac", "v1", "x"), nil, 0o600))

			r := w.request("c", "warm:1")
			r.Compression = oci.Compression(comp)
			r.Frozen = time.Now()
			desc, events, err := w.build(r)
			w.must(err)

			if got := kinds(events); !slices.Equal(got, []string{images.EventDiffed, images.EventProgress, images.EventDone}) {
				t.Errorf("events %v", got)
			}
			done := events[len(events)-1]
			l := w.check("warm:1")
			size := desc.Size + l.manifest.Config.Size
			for _, layer := range l.manifest.Layers {
				size += layer.Size
			}
			if done.Name != "warm:1" || done.Digest != desc.Digest.String() || done.Size != size ||
				done.LayerSize != l.manifest.Layers[3].Size || done.ChangesSize != l.manifest.Layers[2].Size || done.DumpSize != 65536+8+16+2 {
				t.Errorf("done: %+v", done)
			}
			img, err := w.images.Get(w.ctx, "warm:1")
			w.must(err)
			if _, err := time.ParseDuration(img.Labels[LabelFrozen]); err != nil {
				t.Errorf("labels %v: %v", img.Labels, err)
			}

			// The base's layers are the base's, byte for byte.
			var old ocispec.Manifest
			data, err := content.ReadBlob(w.ctx, w.content, base)
			w.must(err)
			w.must(json.Unmarshal(data, &old))
			for i := range old.Layers {
				if l.manifest.Layers[i].Digest != old.Layers[i].Digest {
					t.Errorf("layer %d is %s, was %s", i, l.manifest.Layers[i].Digest, old.Layers[i].Digest)
				}
			}
			if l.config.Config.User != "7" || !slices.Equal(l.config.Config.Entrypoint, []string{"/app"}) ||
				!strings.Contains(string(l.raw["config"]), "Healthcheck") || string(l.raw["docker_version"]) != `"27"` {
				t.Errorf("config %s", l.raw)
			}
			if got, want := strings.Join(names(w.entries(l.manifest.Layers[2])), " "), "etc/ etc/file etc/new/ .wh.one"; got != want {
				t.Errorf("changes %s, want %s", got, want)
			}
			if n := len(l.config.History); n != 6 || l.config.History[5].CreatedBy != oci.CreatedByCheckpoint || l.config.History[4].CreatedBy != oci.CreatedByChanges {
				t.Errorf("history %+v", l.config.History)
			}
			if l.manifest.Annotations[oci.AnnotationBaseDigest] != base.Digest.String() || l.manifest.Annotations[oci.AnnotationBaseName] != "base:1" {
				t.Errorf("annotations %v", l.manifest.Annotations)
			}

			// The garbage collector keeps exactly what the name needs.
			w.must(w.images.Delete(w.ctx, "base:1"))
			if n := w.clean(); n != 2+4 {
				t.Errorf("%d blobs left, want manifest, config and 4 layers", n)
			}
			w.check("warm:1")
			w.must(w.images.Delete(w.ctx, "warm:1"))
			if n := w.clean(); n != 0 {
				t.Errorf("%d blobs left without any name", n)
			}
		})
	}
}

func TestBuildIsDeterministic(t *testing.T) {
	w := newWorld(t)
	w.image("base:1", "overlayfs", "one")
	upper := w.container("c", "base:1", "overlayfs")
	w.must(os.WriteFile(filepath.Join(upper, "f"), []byte("x"), 0o600))
	first, _, err := w.build(w.request("c", "warm:1"))
	w.must(err)
	second, _, err := w.build(w.request("c", "warm:2"))
	w.must(err)
	if first.Digest != second.Digest {
		t.Errorf("%s and %s", first.Digest, second.Digest)
	}
}

func TestBuildWithoutChanges(t *testing.T) {
	for _, sn := range []string{"overlayfs", "native"} {
		t.Run(sn, func(t *testing.T) {
			w := newWorld(t)
			w.image("base:1", sn, "one", "two")
			w.container("c", "base:1", sn)
			r := w.request("c", "warm:1")
			r.Compression = "gzip"
			_, events, err := w.build(r)
			w.must(err)
			if l := w.check("warm:1"); len(l.manifest.Layers) != 3 {
				t.Errorf("%d layers, want 3", len(l.manifest.Layers))
			}
			if events[0].Event != images.EventDiffed || events[0].ChangesSize != 0 {
				t.Errorf("%+v", events[0])
			}
		})
	}
}

// A snapshotter without upper directories goes through containerd's differ.
func TestBuildNative(t *testing.T) {
	w := newWorld(t)
	w.image("base:1", "native", "one", "two")
	dir := w.container("c", "base:1", "native")
	w.must(os.WriteFile(filepath.Join(dir, "f"), []byte("x"), 0o600))
	w.must(os.Remove(filepath.Join(dir, "two")))
	r := w.request("c", "warm:1")
	r.Compression = "gzip"
	_, _, err := w.build(r)
	w.must(err)
	l := w.check("warm:1")
	if got := strings.Join(names(w.entries(l.manifest.Layers[2])), " "); got != "f .wh.two" {
		t.Errorf("changes %s", got)
	}
	w.clean()
	n := 0
	w.must(w.snapshots("native").Walk(w.ctx, func(_ context.Context, i snapshots.Info) error {
		if i.Kind == snapshots.KindView {
			n++
		}
		return nil
	}))
	if n > 0 {
		t.Errorf("%d views left", n)
	}
}

// A second checkpoint of a clone replaces the first one's layer, keeps both
// layers of changes, and is of the same base.
func TestBuildOfClone(t *testing.T) {
	w := newWorld(t)
	base := w.image("base:1", "overlayfs", "one")
	w.must(os.WriteFile(filepath.Join(w.container("c", "base:1", "overlayfs"), "f1"), nil, 0o600))
	r := w.request("c", "warm:1")
	r.Manifest.TCPEstablished = true
	_, _, err := w.build(r)
	w.must(err)
	first := w.check("warm:1")

	w.unpackImage("warm:1", "overlayfs")
	w.must(os.WriteFile(filepath.Join(w.container("clone", "warm:1", "overlayfs"), "f2"), nil, 0o600))
	_, _, err = w.build(w.request("clone", "warm:2"))
	w.must(err)
	second := w.check("warm:2")

	if len(second.manifest.Layers) != 4 {
		t.Fatalf("%d layers, want base, changes, changes, checkpoint", len(second.manifest.Layers))
	}
	for i := range 2 {
		if first.manifest.Layers[i].Digest != second.manifest.Layers[i].Digest {
			t.Errorf("layer %d changed", i)
		}
	}
	if got := names(w.entries(second.manifest.Layers[2])); !slices.Equal(got, []string{"f2"}) {
		t.Errorf("changes of the clone: %v", got)
	}
	a := second.manifest.Annotations
	if a[oci.AnnotationBaseDigest] != base.Digest.String() || a[oci.AnnotationBaseName] != "base:1" {
		t.Errorf("the base is %s %s", a[oci.AnnotationBaseName], a[oci.AnnotationBaseDigest])
	}
	if v, ok := a[oci.AnnotationTCPEstablished]; ok {
		t.Errorf("the first checkpoint's fact is on the second: %s", v)
	}
	if a[oci.AnnotationContainer] != "clone" {
		t.Errorf("annotations %v", a)
	}
}

// A tool that drops annotations of layers must not make old dumps pile up.
func TestBuildOfCloneWithoutAnnotations(t *testing.T) {
	w := newWorld(t)
	w.image("base:1", "overlayfs", "one")
	w.container("c", "base:1", "overlayfs")
	_, _, err := w.build(w.request("c", "warm:1"))
	w.must(err)
	l := w.load("warm:1")
	for i := range l.manifest.Layers {
		l.manifest.Layers[i].Annotations = nil
	}
	w.tag("warm:1", w.json(ocispec.MediaTypeImageManifest, l.manifest, nil))
	w.unpackImage("warm:1", "overlayfs")
	w.container("clone", "warm:1", "overlayfs")
	_, _, err = w.build(w.request("clone", "warm:2"))
	w.must(err)
	if l := w.check("warm:2"); len(l.manifest.Layers) != 2 {
		t.Errorf("%d layers, want base and checkpoint", len(l.manifest.Layers))
	}
}

// The new layers can be told apart, also where the base says nothing of its own.
func TestBuildFromImageWithoutHistory(t *testing.T) {
	w := newWorld(t)
	w.noHistory = true
	w.image("base:1", "overlayfs", "one", "two")
	upper := w.container("c", "base:1", "overlayfs")
	w.must(os.WriteFile(filepath.Join(upper, "f"), nil, 0o600))
	_, _, err := w.build(w.request("c", "warm:1"))
	w.must(err)
	var by []string
	for _, h := range w.check("warm:1").config.History {
		by = append(by, h.CreatedBy)
	}
	if want := []string{"", "", oci.CreatedByChanges, oci.CreatedByCheckpoint}; !slices.Equal(by, want) {
		t.Errorf("history %q, want %q", by, want)
	}
}

// A container can be checkpointed again after its image's name was moved to its
// own checkpoint.
func TestBuildOntoOwnName(t *testing.T) {
	w := newWorld(t)
	w.image("app:1", "overlayfs", "one", "two")
	upper := w.container("c", "app:1", "overlayfs")
	w.must(os.WriteFile(filepath.Join(upper, "f"), nil, 0o600))
	for range 2 {
		_, _, err := w.build(w.request("c", "app:1"))
		w.must(err)
		l := w.check("app:1")
		if len(l.manifest.Layers) != 4 || len(l.config.History) != 6 {
			t.Fatalf("%d layers, history %+v", len(l.manifest.Layers), l.config.History)
		}
		if l.manifest.Annotations[oci.AnnotationBaseName] != "app:1" {
			t.Errorf("annotations %v", l.manifest.Annotations)
		}
	}
}

func TestBuildFromIndex(t *testing.T) {
	w := newWorld(t)
	m := w.image("base:1", "overlayfs", "one")
	mine, other := m, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("elsewhere"), Size: 9}
	p := platforms.DefaultSpec()
	mine.Platform, other.Platform = &p, &ocispec.Platform{OS: "plan9", Architecture: "mips"}
	w.container("c", "base:1", "overlayfs")
	w.tag("base:1", w.json(ocispec.MediaTypeImageIndex, ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{other, mine}},
		map[string]string{"containerd.io/gc.ref.content.m.0": m.Digest.String()}))
	_, _, err := w.build(w.request("c", "warm:1"))
	w.must(err)
	if l := w.check("warm:1"); l.manifest.Annotations[oci.AnnotationBaseDigest] != m.Digest.String() {
		t.Errorf("annotations %v", l.manifest.Annotations)
	}
}

// Content that somebody else stored before, without containerd's label, can
// still be unpacked.
func TestBuildLabelsOldContent(t *testing.T) {
	w := newWorld(t)
	w.image("base:1", "overlayfs", "one")
	w.container("c", "base:1", "overlayfs")
	_, _, err := w.build(w.request("c", "warm:1"))
	w.must(err)
	dump := w.load("warm:1").manifest.Layers[1]
	_, err = w.content.Update(w.ctx, content.Info{Digest: dump.Digest}, "labels."+labels.LabelUncompressed)
	w.must(err)
	_, _, err = w.build(w.request("c", "warm:2"))
	w.must(err)
	info, err := w.content.Info(w.ctx, dump.Digest)
	w.must(err)
	if info.Labels[labels.LabelUncompressed] == "" {
		t.Errorf("labels %v", info.Labels)
	}
}

func TestBuildWarnsOfMissingLayers(t *testing.T) {
	w := newWorld(t)
	w.image("base:1", "overlayfs", "one")
	w.container("c", "base:1", "overlayfs")
	gone := w.load("base:1").manifest.Layers[0]
	w.must(w.content.Delete(w.ctx, gone.Digest))
	_, events, err := w.build(w.request("c", "warm:1"))
	w.must(err)
	if i := slices.IndexFunc(events, func(e Event) bool { return e.Event == images.EventWarning }); i < 0 || !strings.Contains(events[i].Error, gone.Digest.String()) {
		t.Errorf("events %+v", events)
	}
}

func TestBuildPushes(t *testing.T) {
	srv := httptest.NewServer(registry.New(registry.Logger(stdlog.New(io.Discard, "", 0))))
	defer srv.Close()
	t.Setenv("NERDCTL_TOML", filepath.Join(t.TempDir(), "none"))
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	for ref, ok := range map[string]bool{strings.TrimPrefix(srv.URL, "http://") + "/a:1": true, "127.0.0.1:1/a:1": false} {
		w := newWorld(t)
		w.image("base:1", "overlayfs", "one")
		w.container("c", "base:1", "overlayfs")
		r := w.request("c", ref)
		r.Push = true
		desc, events, err := w.build(r)
		// In either case the image is there, and known to be before the push began.
		w.check(ref)
		var kinds []string
		for _, e := range events {
			if !slices.Contains(kinds, e.Event) {
				kinds = append(kinds, e.Event)
			}
		}
		last := events[len(events)-1]
		var perr *PushError
		switch done := slices.Index(kinds, images.EventDone); {
		case done < 0 || slices.Index(kinds, images.EventPushing) == 0:
			t.Errorf("events %v", kinds)
		case ok && (err != nil || last.Event != images.EventPushed || last.Uploaded != last.Total || last.Digest != desc.Digest.String()):
			t.Errorf("%v, last event %+v", err, last)
		case !ok && (!errors.As(err, &perr) || desc.Digest == "" || !strings.Contains(err.Error(), "complete in containerd")):
			t.Errorf("got %v beside %s, want a *PushError beside the image", err, desc.Digest)
		}
	}
	// Refused before anything is built.
	w := newWorld(t)
	w.image("base:1", "overlayfs", "one")
	w.container("c", "base:1", "overlayfs")
	r := w.request("c", "warm:1")
	r.Push = true
	if _, events, err := w.build(r); err == nil || len(events) > 0 {
		t.Errorf("%v, %+v", err, events)
	}
}

func TestBuildRefuses(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(w *world, r *Request)
		want   []string
	}{
		{"container", func(_ *world, r *Request) { r.Container = "other" }, []string{"other", "not found"}},
		{"compression", func(_ *world, r *Request) { r.Compression = "lzma" }, []string{"lzma", "zstd, gzip"}},
		{"empty name", func(_ *world, r *Request) { r.Ref = "" }, []string{"image name"}},
		{"name with a space", func(_ *world, r *Request) { r.Ref = "a b" }, []string{`"a b"`}},
		{"unfinished dump", func(w *world, r *Request) { w.must(os.Remove(filepath.Join(r.DumpDir, "inventory.img"))) }, []string{"inventory.img"}},
		{"spec", func(w *world, r *Request) { w.must(os.WriteFile(r.SpecPath, []byte("{"), 0o600)) }, []string{specName, "not JSON"}},
		{"no spec", func(w *world, r *Request) { w.must(os.Remove(r.SpecPath)) }, []string{"runtime spec"}},
		{"manifest", func(_ *world, r *Request) { r.Manifest.Container.Args = nil }, []string{"arguments"}},
		{"encrypted image, and nobody to read the new one", func(w *world, r *Request) {
			_, recipient := node(w.t)
			sealed := w.request("c", "base:1")
			sealed.EncryptTo = []string{recipient}
			_, _, err := w.build(sealed)
			w.must(err)
			w.clone("clone", "base:1")
			r.Container = "clone"
		}, []string{"--encrypt-to", "clone"}},
		{"control characters", func(_ *world, r *Request) { r.Manifest.Mounts = []oci.Mount{{Destination: "/a\nb"}} }, []string{"control"}},
		{"image gone", func(w *world, _ *Request) { w.must(w.images.Delete(w.ctx, "base:1")) }, []string{"base:1", "no longer there"}},
		{"name is another image now", func(w *world, _ *Request) { w.image("base:1", "overlayfs", "entirely", "different") }, []string{"base:1", "means now"}},
		{"no image", func(w *world, r *Request) {
			_, err := w.containers.Create(w.ctx, containers.Container{ID: "rootfs", Runtime: containers.RuntimeInfo{Name: "x"}, Spec: anySpec{}})
			w.must(err)
			r.Container = "rootfs"
		}, []string{"rootfs", "--image-path"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			before := w.image("base:1", "overlayfs", "one")
			w.container("c", "base:1", "overlayfs")
			w.tag("warm:1", before) // an older image of that name
			r := w.request("c", "warm:1")
			tt.change(w, &r)
			want := w.clean()

			// All but what is wrong with the dump shows before there is one.
			p, err := prepare(w.ctx, w.services, r, func(Event) {})
			if late := tt.name == "unfinished dump"; late != (err == nil) {
				t.Errorf("prepared: %v", err)
			}
			if err == nil {
				p.Close(w.ctx, nil)
			}
			_, events, err := w.build(r)
			if err == nil {
				t.Fatal("no error")
			}
			for _, s := range tt.want {
				if !strings.Contains(err.Error(), s) {
					t.Errorf("%q does not say %q", err, s)
				}
			}
			if slices.ContainsFunc(events, func(e Event) bool { return e.Event == images.EventDone }) {
				t.Errorf("events %+v", events)
			}
			img, gerr := w.images.Get(w.ctx, "warm:1")
			w.must(gerr)
			if img.Target.Digest != before.Digest {
				t.Error("the name was moved")
			}
			if got := w.clean(); got != want {
				t.Errorf("%d blobs, before %d", got, want)
			}
		})
	}
}

const specName = "spec.json"

// Whenever a build ends early, it leaves nothing and no name moves.
func TestBuildCancelled(t *testing.T) {
	for _, at := range []string{images.EventDiffed, images.EventProgress} {
		t.Run(at, func(t *testing.T) {
			w := newWorld(t)
			w.image("base:1", "overlayfs", "one")
			upper := w.container("c", "base:1", "overlayfs")
			w.must(os.WriteFile(filepath.Join(upper, "f"), nil, 0o600))
			want := w.clean()
			ctx, cancel := context.WithCancel(w.ctx)
			_, err := build(ctx, w.services, w.request("c", "warm:1"), func(e Event) {
				if e.Event == at {
					cancel()
				}
			})
			if !errors.Is(err, context.Canceled) {
				t.Errorf("got %v", err)
			}
			if _, err := w.images.Get(w.ctx, "warm:1"); !errdefs.IsNotFound(err) {
				t.Errorf("image: %v", err)
			}
			if got := w.clean(); got != want {
				t.Errorf("%d blobs, before %d", got, want)
			}
		})
	}
}

func TestBuildTwoAtATime(t *testing.T) {
	w := newWorld(t)
	w.image("base:1", "overlayfs", "one")
	w.container("c", "base:1", "overlayfs")
	r := w.request("c", "warm:1")
	tried := false
	_, err := build(w.ctx, w.services, r, func(e Event) {
		if e.Event != images.EventProgress || tried {
			return
		}
		tried = true
		_, _, err := w.build(w.request("c", "warm:2"))
		w.must(err)
	})
	w.must(err)
	if !tried {
		t.Error("no progress was told")
	}
	w.check("warm:1")
	w.check("warm:2")
	w.clean()
}

// A builder that was killed leaves the beginning of a layer.
func TestBuildAfterKill(t *testing.T) {
	w := newWorld(t)
	w.image("base:1", "overlayfs", "one")
	w.container("c", "base:1", "overlayfs")
	cw, err := w.content.Writer(w.ctx, content.WithRef(IngestRef("c")))
	w.must(err)
	_, err = cw.Write([]byte("half a layer"))
	w.must(err)
	w.must(cw.Close())
	_, _, err = w.build(w.request("c", "warm:1"))
	w.must(err)
	w.check("warm:1")
	w.clean()
}

// containerd locks a name for good when it could not record the ingest.
func TestBuildBesideLocked(t *testing.T) {
	for _, snapshotter := range []string{"overlayfs", "native"} {
		t.Run(snapshotter, func(t *testing.T) {
			w := newWorld(t)
			w.image("base:1", snapshotter, "one")
			dir := w.container("c", "base:1", snapshotter)
			w.must(os.WriteFile(filepath.Join(dir, "changed"), []byte("two"), 0o644))
			defer w.clean()
			for _, ref := range []string{IngestRef("c"), "crac-changes-c"} {
				cw, err := w.content.Writer(w.ctx, content.WithRef(ref))
				w.must(err)
				defer func() {
					w.must(cw.Close())
					w.must(w.content.Abort(w.ctx, ref))
				}()
			}
			r := w.request("c", "warm:1")
			r.Compression = oci.CompressionGzip // comparer knows no other
			_, _, err := w.build(r)
			w.must(err)
			w.check("warm:1")
		})
	}
}

func TestUpper(t *testing.T) {
	dir := t.TempDir()
	set := func(path, attr, value string) {
		t.Helper()
		err := unix.Lsetxattr(filepath.Join(dir, path), attr, []byte(value), 0)
		if errors.Is(err, unix.ENOTSUP) {
			t.Skipf("the file system of %s has no extended attributes", dir)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{"a/b", "z"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "a/f"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Link(filepath.Join(dir, "a/f"), filepath.Join(dir, "z/g")); err != nil {
		t.Fatal(err)
	}
	set("a", "user.overlay.opaque", "y")
	set("z", "user.overlay.opaque", "x") // overlayfs: may hold whiteouts, hides nothing
	if changed, err := plainUpper(dir); !changed || err != nil {
		t.Errorf("got %v, %v", changed, err)
	}
	var buf bytes.Buffer
	if err := tarUpper(t.Context(), &buf, dir); err != nil {
		t.Fatal(err)
	}
	var got []string
	tr := tar.NewReader(&buf)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, strings.TrimSpace(h.Name+" "+h.Linkname))
	}
	if want := []string{"a/", "a/.wh..wh..opq", "a/b/", "a/f", "z/", "z/g a/f"}; !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}

	for path, attr := range map[string]string{"a/b": "user.overlay.redirect", "a/f": "user.overlay.metacopy"} {
		set(path, attr, "y")
		if _, err := plainUpper(dir); !errors.Is(err, errUnusual) {
			t.Errorf("%s on %s: %v", attr, path, err)
		}
		if err := unix.Lremovexattr(filepath.Join(dir, path), attr); err != nil {
			t.Fatal(err)
		}
	}
}

// A checkpoint that continues another one stores what changed, and brings the other's layer along.
func TestBuildWithParent(t *testing.T) {
	w := newWorld(t)
	w.image("base:1", "overlayfs", "one")
	w.container("c", "base:1", "overlayfs")
	const pages = 64
	request := func(ref, parent string, change int) Request {
		r := w.request("c", ref)
		r.Parent = parent
		r.Manifest.Host.PageSize = 4096
		memory := make([]byte, pages*4096)
		for i := range memory {
			memory[i] = byte(1 + i/4096)
		}
		memory[change*4096] = 255
		for name, data := range map[string]string{
			"pages-1.img": string(memory),
			// One run of 64 pages at 0x10000, as CRIU 4.2 writes it.
			"pagemap-1.img": "\x19\x43\x56\x54\x25\x40\x08\x56\x02\x00\x00\x00\x08\x01\x0a\x00\x00\x00\x08\x80\x80\x04\x10\x00\x20\x04\x28\x40",
		} {
			w.must(os.WriteFile(filepath.Join(r.DumpDir, name), []byte(data), 0o600))
		}
		return r
	}
	name, size := "", int64(0)
	for depth := range oci.MaxDepth + 1 {
		ref := fmt.Sprintf("warm:%d", depth)
		_, events, err := w.build(request(ref, name, depth))
		if err != nil {
			t.Fatalf("depth %d: %v", depth, err)
		}
		done := events[len(events)-1]
		if depth == 0 {
			size = done.DumpSize
		} else if done.ReusedSize != (pages-2)*4096 || slices.Contains(kinds(events), images.EventWarning) {
			t.Errorf("at depth %d %d bytes are the parent's; %v", depth, done.ReusedSize, kinds(events))
		} else if done.DumpSize > size-(pages-2)*4096+1024 {
			t.Errorf("at depth %d %d bytes are stored, of %d", depth, done.DumpSize, size)
		}
		l := w.load(ref)
		if n := len(l.manifest.Layers); n != 1+depth+1 {
			t.Errorf("at depth %d there are %d layers", depth, n)
		}
		for i, layer := range l.manifest.Layers {
			if got := layer.Annotations[oci.LayerAnnotation] == oci.LayerCheckpoint; got != (i > 0) {
				t.Errorf("at depth %d layer %d is a checkpoint: %v", depth, i, got)
			}
		}
		if want := strconv.Itoa(depth); depth > 0 && l.manifest.Annotations[oci.AnnotationDepth] != want {
			t.Errorf("at depth %d the annotation says %q", depth, l.manifest.Annotations[oci.AnnotationDepth])
		}
		if name != "" {
			// What it continues stays, also without its name.
			w.must(w.images.Delete(w.ctx, name))
			_, err := w.db.GarbageCollect(w.ctx)
			w.must(err)
		}
		name = ref
	}
	// Flattened it is one layer again, with all of the memory, every time the same.
	work := w.t.TempDir()
	var first ocispec.Descriptor
	for i, comp := range []oci.Compression{"", "zstd"} {
		desc, err := flatten(w.ctx, w.services, FlattenRequest{From: name, Ref: "flat:1", WorkDir: work, Compression: comp}, func(Event) {})
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			first = desc
		}
		if desc.Digest != first.Digest {
			t.Errorf("flattened again it is %s, not %s", desc.Digest, first.Digest)
		}
	}
	flat := w.load("flat:1")
	if len(flat.manifest.Layers) != 2 || flat.manifest.Annotations[oci.AnnotationDepth] != "" {
		t.Errorf("%+v", flat.manifest)
	}
	for _, e := range w.entries(flat.manifest.Layers[1]) {
		if !strings.HasSuffix(e.Name, "pages-1.img") {
			continue
		}
		for i := range pages {
			want := byte(1 + i)
			if i == oci.MaxDepth {
				want = 255 // the last one changed this page, and the earlier ones' are as they were
			}
			if got := e.data[i*4096]; len(e.data) != pages*4096 || got != want {
				t.Errorf("page %d of %d begins with %d, want %d", i, len(e.data)/4096, got, want)
			}
		}
	}
	if left, err := os.ReadDir(work); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	for _, r := range []FlattenRequest{{From: "gone:1", Ref: "x:1"}, {From: "base:1", Ref: "x:1"}, {From: name, Ref: "x y"}, {From: name, Ref: "x:1", Compression: "lz4"}} {
		if _, err := flatten(w.ctx, w.services, r, func(Event) {}); err == nil {
			t.Errorf("%+v gives no error", r)
		}
	}
	// One that has nothing of the memory is of no use, and that is said.
	unrelated := request("other:1", "", 0)
	w.must(os.WriteFile(filepath.Join(unrelated.DumpDir, "pages-1.img"), bytes.Repeat([]byte("u"), pages*4096), 0o600))
	_, _, err := w.build(unrelated)
	w.must(err)
	_, events, err := w.build(request("more:1", "other:1", 0))
	w.must(err)
	if i := slices.IndexFunc(events, func(e Event) bool { return e.Event == images.EventWarning }); i < 0 || !strings.Contains(events[i].Error, "without --parent") {
		t.Errorf("%+v", events)
	}
	img, err := w.images.Get(w.ctx, "more:1")
	w.must(err)
	if reused, memory, ok := Reused(img.Labels); !ok || reused != 0 || memory != pages*4096 {
		t.Errorf("%v", img.Labels)
	}
	// All of it before there is a dump: at the depth that there may be, of another machine, gone.
	for parent, want := range map[string]string{
		name: "cracctl flatten", "base:1": "no checkpoint", "gone:1": "pull it", "flat:1": "pages of 4096 bytes",
	} {
		r := request("more:1", parent, 0)
		if parent == "flat:1" {
			r.Manifest.Host.PageSize = 65536
		}
		p, err := prepare(w.ctx, w.services, r, func(Event) {})
		if err == nil {
			p.Close(w.ctx, nil)
		}
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("on %s: %v, want %q", parent, err, want)
		}
	}
	// Content that containerd was told to discard.
	w.must(w.content.Delete(w.ctx, w.load("flat:1").manifest.Layers[1].Digest))
	if _, err := prepare(w.ctx, w.services, request("more:1", "flat:1", 0), func(Event) {}); err == nil || !strings.Contains(err.Error(), "fetch") {
		t.Errorf("on a parent that is not stored: %v", err)
	}
	w.clean()
}

// A dump that continues a pre-dump becomes an image like any other, also on top of a parent.
func TestBuildAfterPreDump(t *testing.T) {
	w := newWorld(t)
	w.image("base:1", "overlayfs", "one")
	w.container("c", "base:1", "overlayfs")
	const (
		pages            = 64
		inParent, inDump = 1, 4 // flags of a page map
	)
	memory := func(pages int, first byte) string {
		b := make([]byte, pages*4096)
		for i := range b {
			b[i] = first + byte(i/4096)
		}
		return string(b)
	}
	// pagemap is of runs of pages from 0x10000 on, as CRIU 4.2 writes it.
	pagemap := func(runs ...[2]uint64) string {
		image, at := []byte("\x19\x43\x56\x54\x25\x40\x08\x56\x02\x00\x00\x00\x08\x01"), uint64(0x10000)
		for _, r := range runs {
			var m []byte
			for i, v := range []uint64{at, 0, r[1], r[0]} {
				m = binary.AppendUvarint(append(m, "\x08\x10\x20\x28"[i]), v)
			}
			image = append(binary.LittleEndian.AppendUint32(image, uint32(len(m))), m...)
			at += r[0] * 4096
		}
		return string(image)
	}
	request := func(ref string, continues bool) Request {
		r := w.request("c", ref)
		r.Manifest.Host.PageSize = 4096
		files := map[string]string{"pages-1.img": memory(pages, 1), "pagemap-1.img": pagemap([2]uint64{pages, inDump})}
		if continues {
			r.PreDumpDir = filepath.Join(filepath.Dir(r.DumpDir), "pre-dump")
			w.must(os.Mkdir(r.PreDumpDir, 0o700))
			for name, data := range files {
				w.must(os.WriteFile(filepath.Join(r.PreDumpDir, name), []byte(data), 0o600))
			}
			files = map[string]string{"pages-1.img": memory(2, 200), "pagemap-1.img": pagemap([2]uint64{pages - 2, inParent}, [2]uint64{2, inDump})}
			w.must(os.Symlink("../pre-dump", filepath.Join(r.DumpDir, "parent")))
		}
		for name, data := range files {
			w.must(os.WriteFile(filepath.Join(r.DumpDir, name), []byte(data), 0o600))
		}
		return r
	}
	_, events, err := w.build(request("first:1", false))
	w.must(err)
	if done := events[len(events)-1]; done.MemorySize != pages*4096 || done.PreDumpedSize != 0 {
		t.Errorf("without a pre-dump: %+v", done)
	}
	want := memory(pages-2, 1) + memory(2, 200)
	for parent, stored := range map[string]string{"": want, "first:1": memory(2, 200)} {
		r := request("warm:1", true)
		r.Parent = parent
		_, events, err := w.build(r)
		w.must(err)
		if done := events[len(events)-1]; done.MemorySize != pages*4096 || done.PreDumpedSize != (pages-2)*4096 {
			t.Errorf("on %q: %+v", parent, done)
		}
		l := w.load("warm:1")
		img, err := w.images.Get(w.ctx, "warm:1")
		w.must(err)
		if got := img.Labels[LabelPreDumped]; got != strconv.Itoa((pages-2)*4096) {
			t.Errorf("on %q: the label says %q", parent, got)
		}
		for _, e := range w.entries(l.manifest.Layers[len(l.manifest.Layers)-1]) {
			if strings.HasSuffix(e.Name, "pages-1.img") && string(e.data) != stored {
				t.Errorf("on %q: %d bytes of memory are stored, want %d, or others", parent, len(e.data), len(stored))
			}
		}
		if _, err := os.Stat(r.PreDumpDir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("on %q: the pre-dump is still there: %v", parent, err)
		}
	}
	// A page that is in neither.
	r := request("bad:1", true)
	w.must(os.WriteFile(filepath.Join(r.PreDumpDir, "pagemap-1.img"), []byte(pagemap([2]uint64{pages - 3, inDump})), 0o600))
	if _, _, err := w.build(r); !errors.Is(err, images.ErrDamaged) {
		t.Errorf("a page is missing: %v", err)
	}
}

// touched calls back whenever something is to be written.
type touched struct {
	content.Store
	before func()
}

func (s touched) Writer(ctx context.Context, opts ...content.WriterOpt) (content.Writer, error) {
	s.before()
	return s.Store.Writer(ctx, opts...)
}

// What an image is made of, and only another's name holds, is there until it has its own: also if
// that other name is removed meanwhile and containerd collects what nothing refers to.
func TestSourcesAreHeld(t *testing.T) {
	_, recipient := node(t)
	request := func(w *world, ref string) Request {
		r := w.request("c", ref)
		r.Manifest.Host.PageSize = 4096
		w.must(os.WriteFile(filepath.Join(r.DumpDir, "pages-1.img"), []byte(strings.Repeat("s", 4096)), 0o600))
		w.must(os.WriteFile(filepath.Join(r.DumpDir, "pagemap-1.img"),
			[]byte("\x19\x43\x56\x54\x25\x40\x08\x56\x02\x00\x00\x00\x08\x01\x0a\x00\x00\x00\x08\x80\x80\x04\x10\x00\x20\x04\x28\x01"), 0o600))
		return r
	}
	for name, make := range map[string]func(w *world, s services) error{
		"build": func(w *world, s services) error {
			_, err := build(w.ctx, s, request(w, "new:1"), func(Event) {})
			return err
		},
		"build into an index": func(w *world, s services) error {
			r := request(w, "new:1")
			r.Index = true
			_, err := build(w.ctx, s, r, func(Event) {})
			return err
		},
		"build with a parent": func(w *world, s services) error {
			r := request(w, "new:1")
			r.Parent = "delta:1"
			_, err := build(w.ctx, s, r, func(Event) {})
			return err
		},
		"flatten": func(w *world, s services) error {
			_, err := flatten(w.ctx, s, FlattenRequest{From: "delta:1", Ref: "new:1", WorkDir: t.TempDir()}, func(Event) {})
			return err
		},
		"encrypt": func(w *world, s services) error {
			_, err := encrypt(w.ctx, s, EncryptRequest{From: "delta:1", Ref: "new:1", To: []string{recipient}}, func(Event) {})
			return err
		},
		"adopt": func(w *world, s services) error {
			r := request(w, "new:1")
			_, err := adopt(w.ctx, s, AdoptRequest{Ref: "new:1", Base: "base:1", DumpDir: r.DumpDir, Spec: []byte("{}"), Manifest: r.Manifest}, func(Event) {})
			return err
		},
	} {
		// Without the labels by which containerd keeps an image together each part is held.
		for _, labelled := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, labelled %v", name, labelled), func(t *testing.T) {
				w := newWorld(t)
				w.image("base:1", "overlayfs", "one", "two")
				upper := w.container("c", "base:1", "overlayfs")
				w.must(os.WriteFile(filepath.Join(upper, "f"), []byte("x"), 0o600))
				_, _, err := w.build(request(w, "whole:1"))
				w.must(err)
				delta := request(w, "delta:1")
				delta.Parent = "whole:1"
				_, _, err = w.build(delta)
				w.must(err)
				names := []string{"base:1", "whole:1", "delta:1"}
				if !labelled {
					for _, name := range names {
						img, err := w.images.Get(w.ctx, name)
						w.must(err)
						_, err = w.content.Update(w.ctx, content.Info{Digest: img.Target.Digest}, "labels")
						w.must(err)
					}
				}
				s := w.services
				s.content = touched{w.content, func() {
					for _, name := range names {
						if err := w.images.Delete(w.ctx, name); err != nil && !errdefs.IsNotFound(err) {
							t.Error(err)
						}
					}
					_, err := w.db.GarbageCollect(w.ctx)
					w.must(err)
				}}
				w.must(make(w, s))
				w.clean()
				img, err := w.images.Get(w.ctx, "new:1")
				w.must(err)
				m, err := coreimages.Manifest(w.ctx, w.content, img.Target, w.platform)
				w.must(err)
				for _, part := range append(m.Layers, m.Config) {
					if _, err := w.content.Info(w.ctx, part.Digest); err != nil {
						t.Errorf("%s: %v", part.MediaType, err)
					}
				}
			})
		}
	}
}

// Content that is removed by its digest no lease holds: then there is no image by name.
func TestRemovedMeanwhile(t *testing.T) {
	_, recipient := node(t)
	for name, make := range map[string]func(w *world, s services) error{
		"build": func(w *world, s services) error {
			_, err := build(w.ctx, s, w.request("c", "new:1"), func(Event) {})
			return err
		},
		"flatten": func(w *world, s services) error {
			_, err := flatten(w.ctx, s, FlattenRequest{From: "warm:1", Ref: "new:1", WorkDir: t.TempDir(), Compression: oci.CompressionGzip}, func(Event) {})
			return err
		},
		"encrypt": func(w *world, s services) error {
			_, err := encrypt(w.ctx, s, EncryptRequest{From: "warm:1", Ref: "new:1", To: []string{recipient}}, func(Event) {})
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.image("base:1", "overlayfs", "one")
			w.container("c", "base:1", "overlayfs")
			_, _, err := w.build(w.request("c", "warm:1"))
			w.must(err)
			layer := w.load("base:1").manifest.Layers[0].Digest
			s := w.services
			s.content = touched{w.content, func() {
				if err := w.content.Delete(w.ctx, layer); err != nil && !errdefs.IsNotFound(err) {
					t.Error(err)
				}
			}}
			if err := make(w, s); err == nil || !strings.Contains(err.Error(), layer.String()) || !strings.Contains(err.Error(), "try again") {
				t.Errorf("got %v", err)
			}
			if _, err := w.images.Get(w.ctx, "new:1"); !errdefs.IsNotFound(err) {
				t.Errorf("the image: %v", err)
			}
			w.clean()
		})
	}
}
