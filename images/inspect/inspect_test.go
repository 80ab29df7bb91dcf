package inspect

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/platforms"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/blob"
	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/oci/criuimage"
)

var update = flag.Bool("update", false, "write the golden files anew")

// pagesOf are the sizes of the memory that testdata/dump was made with. It is left
// out of testdata.
var pagesOf = map[string]int64{"pages-1.img": 77824, "pages-2.img": 65536, "pages-3.img": 61440}

// dumpDir is a dump that CRIU 4.2.1 made of a container of busybox with --seccomp:
//
//	sh -c 'nc -l -p 8080 & exec 5</etc/passwd; cd /etc; while :; do sleep 1000; done'
func dumpDir(tb testing.TB) string {
	tb.Helper()
	dir := tb.TempDir()
	if err := os.CopyFS(dir, os.DirFS(filepath.Join("testdata", "dump"))); err != nil {
		tb.Fatal(err)
	}
	for name, size := range pagesOf {
		data := make([]byte, size)
		for i := range data {
			data[i] = byte(i / images.SumSize * 7)
		}
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			tb.Fatal(err)
		}
	}
	return dir
}

func facts() oci.Manifest {
	var m oci.Manifest
	h := images.ThisHost(40201)
	h.PageSize, h.CgroupVersion = 4096, 2
	h.Describe(&m)
	m.Created = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	m.Container = oci.Container{ID: "c", Args: []string{"/bin/sh"}}
	m.Base = oci.Base{Name: "busybox:1"}
	return m
}

// tarLayer is a checkpoint layer, not compressed.
func tarLayer(tb testing.TB, dir string) []byte {
	tb.Helper()
	m := facts()
	var buf bytes.Buffer
	if _, err := images.WriteLayer(&buf, dir, []byte(`{"ociVersion":"1.2.0"}`), &m, nil); err != nil {
		tb.Fatal(err)
	}
	return buf.Bytes()
}

// stored is a content store with a checkpoint image.
type stored struct {
	content.Store
	t *testing.T
}

func newStored(t *testing.T) stored {
	t.Helper()
	s, err := local.NewStore(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	return stored{s, t}
}

func (s stored) blob(mediaType string, data []byte) ocispec.Descriptor {
	s.t.Helper()
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	if err := content.WriteBlob(s.t.Context(), s, desc.Digest.String(), bytes.NewReader(data), desc); err != nil {
		s.t.Fatal(err)
	}
	return desc
}

func (s stored) json(mediaType string, v any) ocispec.Descriptor {
	s.t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		s.t.Fatal(err)
	}
	return s.blob(mediaType, data)
}

func compressed(t *testing.T, mediaType string, data []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	var w io.WriteCloser = nopCloser{&buf}
	switch {
	case strings.HasSuffix(mediaType, "zstd"):
		z, err := zstd.NewWriter(&buf)
		if err != nil {
			t.Fatal(err)
		}
		w = z
	case strings.HasSuffix(mediaType, "gzip"):
		w = gzip.NewWriter(&buf)
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// image stores an image of a base layer and these, whose checkpoint is the one of
// this index, or none.
func (s stored) image(mediaType string, checkpoint int, annotated bool, layers ...[]byte) ocispec.Descriptor {
	s.t.Helper()
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest}
	m.SchemaVersion = 2
	config := ocispec.Image{Platform: platforms.DefaultSpec(), RootFS: ocispec.RootFS{Type: "layers"}}
	config.History = append(config.History, ocispec.History{CreatedBy: "ENV", EmptyLayer: true})
	for i, l := range layers {
		desc := s.blob(mediaType, compressed(s.t, mediaType, l))
		h := ocispec.History{CreatedBy: "COPY"}
		if i == checkpoint {
			h.CreatedBy = oci.CreatedByCheckpoint
			if annotated {
				h.CreatedBy = "other"
				desc.Annotations = map[string]string{oci.LayerAnnotation: oci.LayerCheckpoint}
			}
		}
		m.Layers = append(m.Layers, desc)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(l))
		config.History = append(config.History, h)
	}
	m.Config = s.json(ocispec.MediaTypeImageConfig, config)
	return s.json(ocispec.MediaTypeImageManifest, m)
}

func TestInspect(t *testing.T) {
	layer := tarLayer(t, dumpDir(t))
	for _, tt := range []struct {
		mediaType string
		annotated bool
	}{
		{ocispec.MediaTypeImageLayerZstd, true},
		{ocispec.MediaTypeImageLayerGzip, false},
		{ocispec.MediaTypeImageLayer, true},
	} {
		s := newStored(t)
		target := s.image(tt.mediaType, 1, tt.annotated, []byte("base"), layer)
		img, err := Open(t.Context(), s, "app:1", target, platforms.Default())
		if err != nil {
			t.Fatal(err)
		}
		var progress int64
		r, err := Inspect(t.Context(), s, img, images.ThisHost(40201), Options{Digests: true, Progress: func(n int64) { progress += n }})
		if err != nil {
			t.Fatalf("%s: %v", tt.mediaType, err)
		}
		if progress != r.CheckpointSize || r.Covered || len(r.Layers) != 2 || r.Layers[1].Kind != "checkpoint" || r.Layers[0].Kind != "base" || r.Layers[0].CreatedBy != "COPY" {
			t.Errorf("%s: read %d of %+v", tt.mediaType, progress, r)
		}
		golden(t, "processes.json", r.Processes)
		if got := fmt.Sprint(r.Sockets()); got != "[tcp6 *:8080 listen]" {
			t.Errorf("sockets %s", got)
		}
	}
}

func golden(t *testing.T, name string, v any) {
	t.Helper()
	got, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	got = append(got, '\n')
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs; got:\n%s", path, got)
	}
}

func TestOpen(t *testing.T) {
	s := newStored(t)
	layer := tarLayer(t, dumpDir(t))
	target := s.image(ocispec.MediaTypeImageLayerZstd, 0, true, layer, []byte("above"))
	index := s.json(ocispec.MediaTypeImageIndex, ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{
		{MediaType: target.MediaType, Digest: target.Digest, Size: target.Size, Platform: &ocispec.Platform{OS: "linux", Architecture: platforms.DefaultSpec().Architecture}},
		{MediaType: target.MediaType, Digest: digest.FromString("elsewhere"), Size: 1, Platform: &ocispec.Platform{OS: "plan9", Architecture: "mips"}},
	}})
	img, err := Open(t.Context(), s, "app:1", index, platforms.Default())
	if err != nil || img.Desc.Digest != target.Digest || img.Target.Digest != index.Digest || !img.Covered() {
		t.Errorf("%+v, %v", img, err)
	}

	plain := s.image(ocispec.MediaTypeImageLayerZstd, -1, false, []byte("base"))
	if img, err = Open(t.Context(), s, "plain:1", plain, platforms.Default()); err != nil || img.Checkpoint != -1 {
		t.Errorf("%+v, %v", img, err)
	}
	if _, err := img.Read(t.Context(), s, Options{}); !errors.Is(err, ErrNoCheckpoint) || !strings.Contains(err.Error(), "plain:1") {
		t.Errorf("an image without a checkpoint: %v", err)
	}
	// What a manifest has besides what its configuration says, or far too much of it.
	many := make([][]byte, maxLayers+1)
	for i := range many {
		many[i] = []byte("x")
	}
	var m ocispec.Manifest
	if err := blob.ReadJSON(t.Context(), s, target, &m); err != nil {
		t.Fatal(err)
	}
	m.Layers = append(m.Layers, m.Layers...)
	for name, desc := range map[string]ocispec.Descriptor{
		"its manifest has 4 layers and its configuration 2": s.json(ocispec.MediaTypeImageManifest, m),
		"no more than 4096":    s.image(ocispec.MediaTypeImageLayer, -1, false, many...),
		"no more than 8388608": s.blob(ocispec.MediaTypeImageManifest, bytes.Repeat([]byte(" "), 8<<20+1)),
	} {
		if _, err := Open(t.Context(), s, "odd:1", desc, platforms.Default()); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("got %v, want %q", err, name)
		}
	}
	if _, err := Open(t.Context(), s, "other:1", ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("x"), Size: 1}, platforms.Default()); err == nil {
		t.Error("an image whose manifest is not there")
	}
}

// What verify finds.
func TestVerify(t *testing.T) {
	good := tarLayer(t, dumpDir(t))
	change := func(f func(h *tar.Header, data []byte) (*tar.Header, []byte)) []byte { return rewrite(t, good, f) }
	for _, tt := range []struct {
		name  string
		layer []byte
		want  string
	}{
		{"good", good, ""},
		{"memory changed", change(func(h *tar.Header, data []byte) (*tar.Header, []byte) {
			if strings.HasSuffix(h.Name, "pages-2.img") {
				data[5000]++
			}
			return h, data
		}), "pages-2.img: has digest"},
		{"shorter", change(func(h *tar.Header, data []byte) (*tar.Header, []byte) {
			if strings.HasSuffix(h.Name, "pages-2.img") {
				return h, data[:4096]
			}
			return h, data
		}), "pages-2.img: has 4096 bytes, the manifest says 65536"},
		{"file gone", change(func(h *tar.Header, data []byte) (*tar.Header, []byte) {
			if strings.HasSuffix(h.Name, "mm-8.img") {
				return nil, nil
			}
			return h, data
		}), "mm-8.img: file does not exist"},
		{"file more", change(func(h *tar.Header, data []byte) (*tar.Header, []byte) {
			if strings.HasSuffix(h.Name, "cgroup.img") {
				more := *h
				more.Name = strings.Replace(h.Name, "cgroup", "extra", 1)
				return &more, data
			}
			return h, data
		}), "cgroup.img"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newStored(t)
			img, err := Open(t.Context(), s, "app:1", s.image(ocispec.MediaTypeImageLayerZstd, 0, true, tt.layer), platforms.Default())
			if err != nil {
				t.Fatal(err)
			}
			l, err := img.Read(t.Context(), s, Options{Digests: true})
			if err == nil {
				err = l.Verify()
			}
			if tt.want == "" && err != nil || tt.want != "" && (!errors.Is(err, images.ErrDamaged) || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}

	// Digests of the layer itself.
	s := newStored(t)
	desc := s.blob(ocispec.MediaTypeImageLayerZstd, compressed(t, "zstd", good))
	if _, err := readBlob(t.Context(), s, desc, digest.FromString("other"), Options{Digests: true}); !errors.Is(err, images.ErrDamaged) || !strings.Contains(err.Error(), "diff ID") {
		t.Errorf("other diff ID: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := readBlob(ctx, s, desc, digest.FromBytes(good), Options{}); !errors.Is(err, context.Canceled) || errors.Is(err, images.ErrDamaged) {
		t.Errorf("cancelled: %v", err)
	}
	desc.MediaType = "application/vnd.oci.image.layer.v1.tar+lz4"
	if _, err := readBlob(t.Context(), s, desc, digest.FromBytes(good), Options{}); err == nil || !strings.Contains(err.Error(), "lz4") {
		t.Errorf("unknown compression: %v", err)
	}
}

// The shim, which finds a damaged dump unpacked, has the words of who reads its layer.
func TestSameWords(t *testing.T) {
	good := tarLayer(t, dumpDir(t))
	of := func(name string, data func([]byte) []byte) []byte {
		return rewrite(t, good, func(h *tar.Header, was []byte) (*tar.Header, []byte) {
			if path.Base(h.Name) != name {
				return h, was
			}
			if was = data(was); was == nil {
				return nil, nil
			}
			return h, was
		})
	}
	const manifest = oci.ManifestName
	for name, layer := range map[string][]byte{
		"shorter":          of("core-1.img", func(b []byte) []byte { return b[1:] }),
		"changed":          of("core-1.img", func(b []byte) []byte { b[7]++; return b }),
		"missing":          of("core-1.img", func([]byte) []byte { return nil }),
		"memory missing":   of("pages-1.img", func([]byte) []byte { return nil }),
		"memory shorter":   of("pages-1.img", func(b []byte) []byte { return b[4096:] }),
		"not listed":       of(manifest, func(b []byte) []byte { return bytes.ReplaceAll(b, []byte("mm-8.img"), []byte("mm-8.old")) }),
		"listed no more":   renamed(t, good, "mm-8.img", "mm-77.img"),
		"no manifest":      of(manifest, func([]byte) []byte { return nil }),
		"no JSON":          of(manifest, func([]byte) []byte { return []byte("{") }),
		"another version":  of(manifest, func([]byte) []byte { return []byte(`{"version":"2"}`) }),
		"parent is absent": of(manifest, continuing),
	} {
		t.Run(name, func(t *testing.T) {
			s := newStored(t)
			img, err := Open(t.Context(), s, "app:1", s.image(ocispec.MediaTypeImageLayerZstd, 0, true, layer), platforms.Default())
			if err != nil {
				t.Fatal(err)
			}
			chain, err := img.ReadChain(t.Context(), s, Options{Digests: true})
			if err == nil {
				err = VerifyChain(chain)
			}
			dir := unpacked(t, layer)
			c, _, ferr := images.Find([]images.Mount{{Type: "overlay", Options: []string{"lowerdir=" + dir + ":" + t.TempDir()}}})
			if ferr == nil {
				ferr = c.Verify()
			}
			if !errors.Is(err, images.ErrDamaged) || !errors.Is(ferr, images.ErrDamaged) || !strings.HasSuffix(err.Error(), ferr.Error()) {
				t.Errorf("where it is stored:   %v\nwhere it is unpacked: %v", err, ferr)
			}
		})
	}
}

// continuing makes a manifest one of a dump that continues another.
func continuing(manifest []byte) []byte {
	m, err := oci.DecodeManifest(bytes.NewReader(manifest))
	if err != nil {
		return nil
	}
	m.Parent = &oci.Parent{Manifest: "sha256:" + strings.Repeat("a", 64), Depth: 1}
	m.Requires = append(m.Requires, oci.RequireParent)
	manifest, _ = m.Encode()
	return manifest
}

func renamed(t *testing.T, layer []byte, from, to string) []byte {
	return rewrite(t, layer, func(h *tar.Header, data []byte) (*tar.Header, []byte) {
		h.Name = strings.Replace(h.Name, from, to, 1)
		return h, data
	})
}

// unpacked is a layer as a snapshotter has it.
func unpacked(t *testing.T, layer []byte) string {
	t.Helper()
	dir := t.TempDir()
	tr := tar.NewReader(bytes.NewReader(layer))
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return dir
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeDir {
			err = os.Mkdir(filepath.Join(dir, h.Name), 0o700)
		} else if data, rerr := io.ReadAll(tr); rerr != nil {
			err = rerr
		} else {
			err = os.WriteFile(filepath.Join(dir, h.Name), data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// rewrite passes a tar's entries through f; nil drops one.
func rewrite(t *testing.T, layer []byte, f func(h *tar.Header, data []byte) (*tar.Header, []byte)) []byte {
	t.Helper()
	var out bytes.Buffer
	tr, tw := tar.NewReader(bytes.NewReader(layer)), tar.NewWriter(&out)
	for {
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
		if h, data = f(h, data); h == nil {
			continue
		}
		h.Size = int64(len(data))
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := tw.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestHostileLayers(t *testing.T) {
	good := tarLayer(t, dumpDir(t))
	add := func(h *tar.Header, data string) []byte {
		done := false
		return rewrite(t, good, func(old *tar.Header, was []byte) (*tar.Header, []byte) {
			if !done && old.Typeflag == tar.TypeReg {
				done = true
				return h, []byte(data)
			}
			return old, was
		})
	}
	file := func(name string) *tar.Header { return &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600} }
	for name, tt := range map[string]struct {
		layer []byte
		want  string
	}{
		"outside":  {add(file("etc/passwd"), "x"), "no entry of a checkpoint layer"},
		"above":    {add(file(".crac/v1/criu/../../../etc/passwd"), "x"), "no entry"},
		"absolute": {add(file("/.crac/v1/criu/x.img"), "x"), "no entry"},
		"deeper":   {add(file(".crac/v1/criu/a/x.img"), "x"), "no entry"},
		"hidden":   {add(file(".crac/v1/criu/.x"), "x"), "no entry"},
		"link":     {add(&tar.Header{Typeflag: tar.TypeSymlink, Name: ".crac/v1/criu/parent", Linkname: "/"}, ""), "no entry"},
		"device":   {add(&tar.Header{Typeflag: tar.TypeChar, Name: ".crac/v1/criu/x.img"}, ""), "no entry"},
		// archive/tar writes no such thing, but reads it.
		"sparse": {bytes.ReplaceAll(add(&tar.Header{
			Typeflag: tar.TypeReg, Name: ".crac/v1/criu/x.img", Mode: 0o600,
			PAXRecords: map[string]string{"NOT.sparse.map": "0,1", "NOT.sparse.numblocks": "1", "NOT.sparse.size": "4611686018427387904"},
		}, "x"), []byte("NOT.sparse"), []byte("GNU.sparse")), "no entry"},
		"twice":         {add(file(".crac/v1/criu/mm-8.img"), "x"), "twice"},
		"two manifests": {add(file(".crac/v1/manifest.json"), "{}"), "twice"},
		"no manifest":   {nil, ".crac/v1/manifest.json: file does not exist"},
		"cut off":       {good[:len(good)/2], "unexpected EOF"},
		"not a tar":     {bytes.Repeat([]byte("x"), 2048), "invalid"},
		"other manifest": {rewrite(t, good, func(h *tar.Header, d []byte) (*tar.Header, []byte) {
			if strings.HasSuffix(h.Name, "manifest.json") {
				return h, []byte(`{"version":"2"}`)
			}
			return h, d
		}), `version "2"`},
	} {
		_, err := readLayer(bytes.NewReader(tt.layer), Options{})
		if !errors.Is(err, images.ErrDamaged) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want ErrDamaged with %q", name, err, tt.want)
		}
	}
	// A header that claims much must not take the memory for it, or the bound away.
	for _, size := range []int64{1 << 40, math.MaxInt64} {
		layer := claims(t, size)
		if _, err := readLayer(bytes.NewReader(layer), Options{}); !errors.Is(err, images.ErrDamaged) || !strings.Contains(err.Error(), "looked into") {
			t.Errorf("a file of %d bytes: %v", size, err)
		}
		if _, err := readLayer(bytes.NewReader(layer), Options{most: 10}); !errors.Is(err, images.ErrDamaged) || !strings.Contains(err.Error(), oci.AnnotationDumpBytes) {
			t.Errorf("a dump of %d bytes: %v", size, err)
		}
	}
}

// claims is the beginning of a layer with a file, and with the header of one of this size.
func claims(tb testing.TB, size int64) []byte {
	tb.Helper()
	var layer bytes.Buffer
	tw := tar.NewWriter(&layer)
	for _, h := range []*tar.Header{{Name: ".crac/v1/criu/mm-7.img", Size: 1}, {Name: ".crac/v1/criu/mm-8.img", Size: size}} {
		h.Typeflag, h.Mode, h.Format = tar.TypeReg, 0o600, tar.FormatPAX
		if err := tw.WriteHeader(h); err != nil {
			tb.Fatal(err)
		}
		if _, err := tw.Write([]byte("x")); err != nil {
			tb.Fatal(err)
		}
	}
	return layer.Bytes()
}

// What is kept at the same time has one budget, however many layers it comes from.
func TestBudget(t *testing.T) {
	layer := tarLayer(t, dumpDir(t))
	read := func(b *Budget) error {
		_, err := readLayer(bytes.NewReader(layer), Options{Pages: true, Budget: b})
		return err
	}
	whole := NewBudget()
	left := *whole
	if err := read(&left); err != nil {
		t.Fatal(err)
	}
	taken := Budget{whole.kept - left.kept, whole.whole - left.whole, whole.hashed - left.hashed}
	for want, b := range map[string]Budget{
		"that would have to be looked into": {taken.kept*2 - 1, whole.whole, whole.hashed},
		"of messages":                       {whole.kept, taken.whole*2 - 1, whole.hashed},
		"more memory":                       {whole.kept, whole.whole, taken.hashed*2 - 1},
	} {
		if err := read(&b); err != nil {
			t.Errorf("the first: %v", err)
		}
		if err := read(&b); !errors.Is(err, images.ErrDamaged) || !strings.Contains(err.Error(), want) {
			t.Errorf("the second: %v, want %q", err, want)
		}
	}
	if taken.kept <= taken.whole || taken.whole <= 0 || taken.hashed != (77824+65536+61440)/images.SumSize*16 {
		t.Errorf("a layer takes %+v", taken)
	}

	// A chain, of which the lower layers take no more than they are needed for.
	s := newStored(t)
	var digest string
	delta := rewrite(t, layer, func(h *tar.Header, data []byte) (*tar.Header, []byte) {
		if path.Base(h.Name) == oci.ManifestName {
			sum := sha256.Sum256(data)
			digest = "sha256:" + hex.EncodeToString(sum[:])
			data = bytes.ReplaceAll(continuing(data), []byte(strings.Repeat("a", 64)), []byte(hex.EncodeToString(sum[:])))
		}
		return h, data
	})
	target := s.image(ocispec.MediaTypeImageLayerZstd, -1, true, layer, delta)
	img, err := Open(t.Context(), s, "app:1", target, platforms.Default())
	if err != nil {
		t.Fatal(err)
	}
	for i := range img.Manifest.Layers {
		img.Manifest.Layers[i].Annotations = map[string]string{oci.LayerAnnotation: oci.LayerCheckpoint}
	}
	img.Checkpoint = 1
	for _, pages := range []bool{false, true} {
		b := NewBudget()
		chain, err := img.ReadChain(t.Context(), s, Options{Pages: pages, Budget: b})
		if err != nil || len(chain) != 2 || chain[1].ManifestDigest != digest {
			t.Fatalf("%d layers, %v", len(chain), err)
		}
		for name := range chain[1].Images {
			if _, ok := pagemapPID(name); !ok || !pages {
				t.Errorf("%s of the parent is kept (pages: %v)", name, pages)
			}
		}
		if want := map[bool]int64{true: 2 * taken.hashed}[pages]; whole.hashed-b.hashed != want || whole.whole-b.whole != taken.whole {
			t.Errorf("the chain takes %+v of %+v", b, whole)
		}
	}
}

// However many mappings a few bytes claim, and whatever else an image of them holds.
func TestHostileMappings(t *testing.T) {
	entry := func(start, end uint64) (m []byte) {
		for n := range protowire.Number(8) {
			m = protowire.AppendVarint(protowire.AppendTag(m, n+1, protowire.VarintType), map[protowire.Number]uint64{0: start, 1: end}[n])
		}
		return protowire.AppendBytes(protowire.AppendTag(nil, mmMapping, protowire.BytesType), m)
	}
	var many []byte
	for n := range uint64(maxMessages + 1) {
		many = append(many, entry(n, n+1)...)
	}
	for name, tt := range map[string]struct {
		message []byte
		want    string
	}{
		"empty ones": {bytes.Repeat([]byte{mmMapping<<3 | 2, 0}, 1<<20), "required"},
		"many":       {many, "more than"},
		"backwards":  {entry(2, 1), "mapping from"},
		"two at one": {append(entry(1, 3), entry(2, 4)...), "two mappings"},
		"cut off":    {entry(1, 2)[:5], "EOF"},
	} {
		var p Process
		err := dump{"mm-0.img": criuimage.New(criuimage.MM, tt.message)}.memory(&p, openFiles{}, 4096)
		if !errors.Is(err, images.ErrDamaged) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
	}
}

func TestPageHashes(t *testing.T) {
	l, err := readLayer(bytes.NewReader(tarLayer(t, dumpDir(t))), Options{Pages: true})
	if err != nil {
		t.Fatal(err)
	}
	for name, size := range pagesOf {
		hashes := l.Pages[name]
		if len(hashes) != int(size/images.SumSize) {
			t.Fatalf("%s has %d hashes", name, len(hashes))
		}
		if hashes[0] == hashes[1] {
			t.Errorf("%s: different pages have one hash", name)
		}
	}
	if l.Pages["pages-1.img"][3] != l.Pages["pages-2.img"][3] {
		t.Error("equal pages have different hashes")
	}
	r := &reader{o: Options{Budget: &Budget{hashed: 3 * 16}}}
	if _, err := r.hashPages(strings.NewReader("xyz")); err == nil {
		t.Error("part of a page is no error")
	}
	if _, err := r.hashPages(bytes.NewReader(make([]byte, 4*images.SumSize))); err == nil || !strings.Contains(err.Error(), "more memory") {
		t.Errorf("more than can be held: %v", err)
	}
}

func TestDiff(t *testing.T) {
	read := func(dir string) (*Image, *Layer) {
		s := newStored(t)
		img, err := Open(t.Context(), s, dir, s.image(ocispec.MediaTypeImageLayerZstd, 1, true, []byte("base"), tarLayer(t, dir)), platforms.Default())
		if err != nil {
			t.Fatal(err)
		}
		l, err := img.Read(t.Context(), s, Options{Digests: true, Pages: true})
		if err != nil {
			t.Fatal(err)
		}
		return img, l
	}
	first := dumpDir(t)
	second := dumpDir(t)
	// Two pages of the second process, whose memory is in pages-2.img.
	file := filepath.Join(second, "pages-2.img")
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	data[0]++
	data[len(data)-1]++
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	imgA, a := read(first)
	imgB, b := read(second)

	same, err := Diff(t.Context(), imgA, imgA, []*Layer{a}, []*Layer{a})
	total := int64(77824 + 65536 + 61440)
	if err != nil || !same.SameLayers || len(same.Facts) > 0 || same.Memory != (Pages{Equal: total}) || len(same.Processes) != 3 {
		t.Errorf("with itself: %+v, %v", same, err)
	}
	// The same files, stored otherwise.
	s := newStored(t)
	stored, err := Open(t.Context(), s, "gzip", s.image(ocispec.MediaTypeImageLayerGzip, 1, true, []byte("base"), tarLayer(t, first)), platforms.Default())
	if err != nil {
		t.Fatal(err)
	}
	other, err := Open(t.Context(), s, "other", s.image(ocispec.MediaTypeImageLayerGzip, 1, true, []byte("other base"), tarLayer(t, first)), platforms.Default())
	if err != nil {
		t.Fatal(err)
	}
	if !sameLayers(imgA, stored) || sameLayers(imgA, other) {
		t.Errorf("stored otherwise they are the same: %v, others: %v", sameLayers(imgA, stored), sameLayers(imgA, other))
	}
	b.Manifest.Host.CPU.Model = "Other"
	b.Manifest.Container.Args = []string{"a\x1b[2J"}
	d, err := Diff(t.Context(), imgA, imgB, []*Layer{a}, []*Layer{b})
	if err != nil {
		t.Fatal(err)
	}
	if d.Memory != (Pages{Equal: total - 2*images.SumSize, Changed: 2 * images.SumSize}) || len(d.Facts) != 2 || d.Facts[0].To != `["a\x1b[2J"]` || d.Facts[1].To != "Other" {
		t.Errorf("%+v", d)
	}
	for _, p := range d.Processes {
		sum := Pages{}
		for _, k := range p.Kinds {
			sum.add(k)
		}
		if sum != p.Memory || p.In != "both" || (p.PID == 8) != (p.Memory.Changed > 0) {
			t.Errorf("process %d: %+v", p.PID, p)
		}
	}

	// A process more, and one less.
	tree := a.Images["pstree.img"]
	less := *a
	less.Images = map[string][]byte{}
	for k, v := range a.Images {
		less.Images[k] = v
	}
	all, err := criuimage.Split(tree, criuimage.Pstree, maxMessages)
	if err != nil {
		t.Fatal(err)
	}
	less.Images["pstree.img"] = tree[:8+4+len(all[0])]
	for _, tt := range []struct {
		x, y *Layer
		in   string
	}{{a, &less, "from"}, {&less, a, "to"}} {
		d, err := Diff(t.Context(), imgA, imgA, []*Layer{tt.x}, []*Layer{tt.y})
		if err != nil || len(d.Processes) != 3 || d.Processes[2].In != tt.in || d.Memory.Added+d.Memory.Removed != 65536+61440 {
			t.Errorf("%s: %+v, %v", tt.in, d, err)
		}
	}

	// What is read is what was checked.
	bad := *b
	bad.Found = slices.Clone(b.Found)
	bad.Found[len(bad.Found)-1].Digest = "sha256:" + strings.Repeat("0", 64)
	for _, pair := range [][2]*Layer{{a, &bad}, {&bad, a}} {
		if _, err := Diff(t.Context(), imgA, imgB, []*Layer{pair[0]}, []*Layer{pair[1]}); !errors.Is(err, images.ErrDamaged) || !strings.Contains(err.Error(), "digest") {
			t.Errorf("a changed file: %v", err)
		}
	}
	// Memory that is not what the page map says.
	a.Pages["pages-1.img"] = a.Pages["pages-1.img"][1:]
	if _, err := Diff(t.Context(), imgA, imgB, []*Layer{a}, []*Layer{b}); !errors.Is(err, images.ErrDamaged) {
		t.Errorf("a page is missing: %v", err)
	}
}

// run is of a page map: pages at an address.
type run struct{ at, pages, flags uint64 }

const (
	inParent = 1
	present  = 4
)

// pagemap is of a process whose memory is in pages-ID.img, as CRIU 4.2 writes it.
func pagemap(id uint64, runs ...run) []byte {
	head := protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), id)
	all := criuimage.New(criuimage.Pagemap, head)
	for _, r := range runs {
		var m []byte
		for i, v := range []uint64{r.at, 0, r.flags, r.pages} {
			m = protowire.AppendVarint(protowire.AppendTag(m, []protowire.Number{1, 2, 4, 5}[i], protowire.VarintType), v)
		}
		all = criuimage.Append(all, m)
	}
	return all
}

// dumped is a layer with the memory of process 1.
func dumped(pages int, pagemaps map[string][]byte) *Layer {
	m := facts()
	return &Layer{Manifest: &m, Images: pagemaps, Pages: map[string][]images.PageSum{"pages-1.img": make([]images.PageSum, pages)}}
}

// A few bytes claim as many pages as there are addresses: they are there, or it is damaged, and
// nobody counts them one by one.
func TestHostilePagemaps(t *testing.T) {
	const lot = 1 << 51
	base := dumped(4, map[string][]byte{"pagemap-1.img": pagemap(1, run{0x1000, 2, present}, run{0x3000, 1, present}, run{0x8000, 1, present})})
	for _, tt := range []struct {
		name  string
		chain []*Layer
		want  string // empty: it is fine
	}{
		{"whole", []*Layer{base}, ""},
		{"a run over two of the parent's", []*Layer{dumped(0, map[string][]byte{"pagemap-1.img": pagemap(1, run{0x2000, 2, inParent}, run{0x8000, 1, inParent})}), base}, ""},
		{"three dumps", []*Layer{
			dumped(0, map[string][]byte{"pagemap-1.img": pagemap(1, run{0x1000, 3, inParent})}),
			dumped(1, map[string][]byte{"pagemap-1.img": pagemap(1, run{0x1000, 2, inParent}, run{0x3000, 1, present})}), base,
		}, ""},
		{"no parent", []*Layer{dumped(0, map[string][]byte{"pagemap-1.img": pagemap(1, run{0, lot, inParent})})}, "page at 0x0 the parent's"},
		{"more than the parent's", []*Layer{dumped(0, map[string][]byte{"pagemap-1.img": pagemap(1, run{0x1000, lot, inParent})}), base}, "page at 0x4000 the parent's"},
		{"between the parent's", []*Layer{dumped(0, map[string][]byte{"pagemap-1.img": pagemap(1, run{0x5000, 1, inParent}, run{0x8000, 1, inParent})}), base}, "page at 0x5000 the parent's"},
		{"another process's", []*Layer{dumped(0, map[string][]byte{"pagemap-2.img": pagemap(1, run{0x1000, 1, inParent})}), base}, "page at 0x1000 the parent's"},
		{"present", []*Layer{dumped(4, map[string][]byte{"pagemap-1.img": pagemap(1, run{0, lot, present})})}, "more pages"},
		{"one file for two", []*Layer{dumped(1, map[string][]byte{
			"pagemap-1.img": pagemap(1, run{0, 1, present}), "pagemap-2.img": pagemap(1, run{0, 1, present}),
		})}, "belongs to two"},
	} {
		_, err := NewMemory(tt.chain)
		if (tt.want == "") != (err == nil) || err != nil && (!errors.Is(err, images.ErrDamaged) || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: got %v, want %q", tt.name, err, tt.want)
		}
	}
}

// What is not looked into may be as large as it likes, and what a dump says of its own size is
// held against it.
func TestLargeFiles(t *testing.T) {
	dir := dumpDir(t)
	for _, name := range []string{"tmpfs-dev-7.tar.gz.img", "ghost-file-1.img"} {
		f, err := os.Create(filepath.Join(dir, name))
		if err == nil {
			err = errors.Join(f.Truncate(maxImages/2+1), f.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	m := facts()
	r, w := io.Pipe()
	go func() {
		_, err := images.WriteLayer(w, dir, []byte("{}"), &m, nil)
		_ = w.CloseWithError(err)
	}()
	l, err := readLayer(r, Options{Digests: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Verify(); err != nil {
		t.Error(err)
	}
	if _, err := l.Processes(); err != nil {
		t.Error(err)
	}

	layer := tarLayer(t, dumpDir(t))
	for most, want := range map[int64]string{0: "", 1 << 30: "", 1 << 10: oci.AnnotationDumpBytes} {
		_, err := readLayer(bytes.NewReader(layer), Options{most: most})
		if (want == "") != (err == nil) || err != nil && (!errors.Is(err, images.ErrDamaged) || !strings.Contains(err.Error(), want)) {
			t.Errorf("at most %d: %v", most, err)
		}
	}
	// That there is no room for it is no fault of the image.
	if _, err := readLayer(bytes.NewReader(layer), Options{Extract: filepath.Join(t.TempDir(), "none")}); err == nil || errors.Is(err, images.ErrDamaged) {
		t.Errorf("no directory to unpack into: %v", err)
	}
	if _, err := extract(t.TempDir(), "x.img", 1<<60); err == nil || !strings.Contains(err.Error(), "--work-dir") {
		t.Errorf("no room: %v", err)
	}
}
