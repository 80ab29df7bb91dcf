package build

import (
	"encoding/json"
	"fmt"
	"io"
	stdlog "log"
	"net/http/httptest"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	coreimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/registry"
	"github.com/crac-shim/crac/oci"
)

// entry is one of an index, with a digest by its name and a platform such as
// linux/arm64/v8; "" is none.
func entryFor(name, platform string) ocispec.Descriptor {
	d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString(name), Size: 9}
	if platform != "" {
		parts := append(strings.Split(platform, "/"), "")
		d.Platform = &ocispec.Platform{OS: parts[0], Architecture: parts[1], Variant: parts[2]}
	}
	return d
}

// attestation is an entry of BuildKit's about another one.
func attestation(of string) ocispec.Descriptor {
	d := entryFor("attestation of "+of, "unknown/unknown")
	d.Annotations = map[string]string{attestationOf: digest.FromString(of).String()}
	return d
}

func TestPlaceInIndex(t *testing.T) {
	for _, tt := range []struct {
		name       string
		list, want []ocispec.Descriptor
		own        ocispec.Descriptor
	}{
		{name: "empty", own: entryFor("new", "linux/amd64"), want: []ocispec.Descriptor{entryFor("new", "linux/amd64")}},
		{
			name: "in its place", own: entryFor("new", "linux/amd64"),
			list: []ocispec.Descriptor{entryFor("a", "linux/386"), entryFor("old", "linux/amd64"), entryFor("b", "linux/arm64")},
			want: []ocispec.Descriptor{entryFor("a", "linux/386"), entryFor("new", "linux/amd64"), entryFor("b", "linux/arm64")},
		},
		{
			name: "a platform of its own", own: entryFor("new", "linux/amd64"),
			list: []ocispec.Descriptor{entryFor("a", "windows/amd64"), entryFor("b", "linux/amd64/v3"), entryFor("c", "")},
			want: []ocispec.Descriptor{entryFor("a", "windows/amd64"), entryFor("b", "linux/amd64/v3"), entryFor("c", ""), entryFor("new", "linux/amd64")},
		},
		{
			name: "the same platform in other words", own: entryFor("new", "linux/arm64"),
			list: []ocispec.Descriptor{entryFor("old", "linux/arm64/v8"), entryFor("older", "linux/aarch64")},
			want: []ocispec.Descriptor{entryFor("new", "linux/arm64")},
		},
		{
			name: "what was said about the old one", own: entryFor("new", "linux/amd64"),
			list: []ocispec.Descriptor{entryFor("old", "linux/amd64"), entryFor("b", "linux/arm64"), attestation("old"), attestation("b")},
			want: []ocispec.Descriptor{entryFor("new", "linux/amd64"), entryFor("b", "linux/arm64"), attestation("b")},
		},
		{
			name: "once more", own: entryFor("same", "linux/amd64"),
			list: []ocispec.Descriptor{entryFor("same", "linux/amd64"), attestation("same")},
			want: []ocispec.Descriptor{entryFor("same", "linux/amd64"), attestation("same")},
		},
		{
			name: "attestations are no platform", own: attestation("b"),
			list: []ocispec.Descriptor{attestation("a")},
			want: []ocispec.Descriptor{attestation("a"), attestation("b")},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := slices.Clone(tt.list)
			if got := place(tt.list, tt.own); !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got  %+v\nwant %+v", got, tt.want)
			}
			if !reflect.DeepEqual(tt.list, before) {
				t.Errorf("the list itself became %+v", tt.list)
			}
		})
	}
}

// What a list has several of for one platform, somebody has told apart by what is not looked at
// here: it stays until there is another list, or an image, for that platform.
func TestMergeKeepsWhatIsAlike(t *testing.T) {
	features := func(name string, features ...string) ocispec.Descriptor {
		d := entryFor(name, "windows/amd64")
		d.Platform.OSFeatures = features
		return d
	}
	list := []ocispec.Descriptor{entryFor("a", "linux/amd64"), entryFor("b", "linux/amd64"), entryFor("c", "linux/arm64"), features("d", "win32k", "x"), features("e")}
	first := merge(ocispec.Index{}, ocispec.Index{Manifests: list})
	again := merge(first, ocispec.Index{Manifests: list})
	for _, got := range [][]ocispec.Descriptor{first.Manifests, again.Manifests} {
		if !reflect.DeepEqual(got, list) {
			t.Errorf("got  %+v\nwant %+v", got, list)
		}
	}
	later := []ocispec.Descriptor{entryFor("new", "linux/arm64"), features("f", "x", "win32k"), entryFor("a2", "linux/amd64"), entryFor("b2", "linux/amd64")}
	want := []ocispec.Descriptor{later[2], later[3], later[0], later[1], list[4]}
	if got := merge(first, ocispec.Index{Manifests: later}).Manifests; !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

// An index whose image for this platform is encrypted may still tell the memory of others.
func TestInTheOpen(t *testing.T) {
	key, recipient := node(t)
	w := newWorld(t)
	w.image("base:1", "overlayfs", "one")
	w.container("c", "base:1", "overlayfs")
	made := func(ref string, to ...string) ocispec.Descriptor {
		r := w.request("c", ref)
		r.EncryptTo, r.Manifest.Container.Hostname = to, ref
		desc, _, err := w.build(r)
		w.must(err)
		desc.Annotations = map[string]string{oci.AnnotationVersion: "1"}
		return desc
	}
	on := func(d ocispec.Descriptor, platform string) ocispec.Descriptor {
		d.Platform = entryFor("", platform).Platform
		return d
	}
	gone := on(entryFor("gone", ""), "linux/s390x")
	gone.Annotations = map[string]string{oci.AnnotationVersion: "1"}
	own := made("own:1")
	own.Platform = ptr(platforms.DefaultSpec())
	plain := w.load("base:1")
	list := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{
		own, on(made("open:1"), "linux/arm64"), on(made("sealed:1", recipient), "linux/riscv64"), gone, entryFor("no checkpoint", "linux/mips"),
		on(w.json(ocispec.MediaTypeImageManifest, plain.manifest, nil), "linux/386"),
	}}
	index := w.json(ocispec.MediaTypeImageIndex, list, gcLabels(list.Manifests))
	for name, make := range map[string]func(to []string, emit func(Event)) error{
		"encrypt": func(to []string, emit func(Event)) error {
			if to == nil {
				return nil
			}
			_, err := encrypt(w.ctx, w.services, EncryptRequest{From: "warm:1", Ref: "warm:1", To: to}, emit)
			return err
		},
		"flatten": func(to []string, emit func(Event)) error {
			_, err := flatten(w.ctx, w.services, FlattenRequest{From: "warm:1", Ref: "warm:1", WorkDir: t.TempDir(), EncryptTo: to, Compression: oci.CompressionGzip}, emit)
			return err
		},
		"build": func(to []string, emit func(Event)) error {
			r := w.request("c", "warm:1")
			r.Index, r.EncryptTo = true, to
			_, err := build(w.ctx, w.services, r, emit)
			return err
		},
	} {
		for _, to := range [][]string{nil, {recipient}} {
			w.tag("warm:1", index)
			var warned []string
			w.must(make(to, func(e Event) {
				if e.Event == images.EventWarning {
					warned = append(warned, e.Error)
				}
			}))
			want := "for linux/arm64, linux/s390x (perhaps: it is not here);"
			if to == nil && len(warned) > 0 || to != nil && (len(warned) != 1 || !strings.Contains(warned[0], want)) {
				t.Errorf("%s for %v warns %q", name, to, warned)
			}
		}
	}
	w.whole("sealed:1", key)
}

// index reads what a name means, which has to be an index.
func (w *world) index(name string) (index ocispec.Index, target ocispec.Descriptor) {
	w.t.Helper()
	img, err := w.images.Get(w.ctx, name)
	w.must(err)
	if !coreimages.IsIndexType(img.Target.MediaType) {
		w.t.Fatalf("%s is %s", name, img.Target.MediaType)
	}
	data, err := content.ReadBlob(w.ctx, w.content, img.Target)
	w.must(err)
	w.must(json.Unmarshal(data, &index))
	return index, img.Target
}

// manifestHere gives the manifest of this platform a name of its own, and checks it.
func (w *world) manifestHere(index ocispec.Index) loaded {
	w.t.Helper()
	for _, m := range index.Manifests {
		if samePlatform(m.Platform, ptr(platforms.DefaultSpec())) {
			want := oci.AnnotationsOf(w.named(m).manifest.Annotations)
			if len(want) < 10 || !reflect.DeepEqual(m.Annotations, want) {
				w.t.Errorf("the entry says %v and the manifest %v", m.Annotations, want)
			}
			return w.check("entry:1")
		}
	}
	w.t.Fatalf("nothing for this platform in %+v", index)
	return loaded{}
}

func (w *world) named(desc ocispec.Descriptor) loaded {
	w.t.Helper()
	w.tag("entry:1", ocispec.Descriptor{MediaType: desc.MediaType, Digest: desc.Digest, Size: desc.Size})
	return w.load("entry:1")
}

func ptr[T any](v T) *T { return &v }

// indexedBase is an image for this platform, and for one of which nothing is here.
func (w *world) indexedBase(name string, other ocispec.Descriptor) {
	w.t.Helper()
	mine := w.image(name, "overlayfs", "one")
	mine.Platform = ptr(platforms.DefaultSpec())
	w.tag(name, w.json(ocispec.MediaTypeImageIndex, ocispec.Index{
		MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{other, mine}, Annotations: map[string]string{"kept": "yes"},
	}, map[string]string{"containerd.io/gc.ref.content.m.0": mine.Digest.String()}))
}

func TestBuildIntoIndex(t *testing.T) {
	w := newWorld(t)
	other := entryFor("elsewhere", "plan9/mips")
	w.indexedBase("base:1", other)
	w.container("c", "base:1", "overlayfs")
	r := w.request("c", "warm:1")
	r.Index = true
	target, events, err := w.build(r)
	w.must(err)
	index, named := w.index("warm:1")
	if named.Digest != target.Digest || events[len(events)-1].Digest != target.Digest.String() {
		t.Errorf("built %s, named %s, told %+v", target.Digest, named.Digest, events[len(events)-1])
	}
	if index.SchemaVersion != 2 || index.Annotations["kept"] != "yes" || index.Annotations[oci.AnnotationVersion] != "1" {
		t.Errorf("%+v", index)
	}
	if len(index.Manifests) != 2 || !reflect.DeepEqual(index.Manifests[0], other) {
		t.Fatalf("%+v", index.Manifests)
	}
	first := w.manifestHere(index)

	// Whatever else the name has by now stays: an image of another machine's.
	third := entryFor("third", "linux/riscv64")
	index.Manifests = append(index.Manifests, third)
	w.tag("warm:1", w.json(ocispec.MediaTypeImageIndex, index, gcLabels(index.Manifests)))
	r = w.request("c", "warm:1")
	r.Index, r.Manifest.Container.Hostname = true, "second"
	_, _, err = w.build(r)
	w.must(err)
	index, _ = w.index("warm:1")
	if len(index.Manifests) != 3 || !reflect.DeepEqual(index.Manifests[0], other) || !reflect.DeepEqual(index.Manifests[2], third) {
		t.Fatalf("%+v", index.Manifests)
	}
	if second := w.manifestHere(index); reflect.DeepEqual(second.manifest.Layers, first.manifest.Layers) {
		t.Error("the second checkpoint is the first")
	}
	// The index alone holds what it lists.
	w.must(w.images.Delete(w.ctx, "entry:1"))
	w.clean()
	w.manifestHere(index)

	// Without the option it is a plain image again.
	_, _, err = w.build(w.request("c", "warm:1"))
	w.must(err)
	w.check("warm:1")
}

// What is made of an image in an index takes its place there, and leaves the others.
func TestRewriteInIndex(t *testing.T) {
	_, recipient := node(t)
	other, said := entryFor("elsewhere", "plan9/mips"), attestation("elsewhere")
	for name, rewrite := range map[string]func(w *world, ref string) (ocispec.Descriptor, error){
		"flatten": func(w *world, ref string) (ocispec.Descriptor, error) {
			return flatten(w.ctx, w.services, FlattenRequest{From: "warm:1", Ref: ref, WorkDir: t.TempDir(), Compression: oci.CompressionGzip}, func(Event) {})
		},
		"tune": func(w *world, ref string) (ocispec.Descriptor, error) {
			return tune(w.ctx, w.services, TuneRequest{
				FlattenRequest: FlattenRequest{From: "warm:1", Ref: ref, WorkDir: t.TempDir()},
				WorkingSet:     func(string) ([]byte, error) { return []byte("set"), nil },
			}, func(Event) {})
		},
		"encrypt": func(w *world, ref string) (ocispec.Descriptor, error) {
			return encrypt(w.ctx, w.services, EncryptRequest{From: "warm:1", Ref: ref, To: []string{recipient}}, func(Event) {})
		},
	} {
		for _, ref := range []string{"warm:1", "new:1"} {
			for _, platform := range []*ocispec.Platform{ptr(platforms.DefaultSpec()), nil} {
				t.Run(fmt.Sprintf("%s to %s, of %v", name, ref, platform), func(t *testing.T) {
					w := newWorld(t)
					w.image("base:1", "overlayfs", "one")
					w.container("c", "base:1", "overlayfs")
					old, _, err := w.build(w.request("c", "warm:1"))
					w.must(err)
					old.Platform = platform
					list := ocispec.Index{
						MediaType: ocispec.MediaTypeImageIndex, Annotations: map[string]string{"kept": "yes"},
						Manifests: []ocispec.Descriptor{other, old, said, {
							MediaType: old.MediaType, Digest: digest.FromString("x"), Size: 9, Platform: ptr(ocispec.Platform{OS: unknown, Architecture: unknown}),
							Annotations: map[string]string{attestationOf: old.Digest.String()},
						}},
					}
					w.tag("warm:1", w.json(ocispec.MediaTypeImageIndex, list, gcLabels(list.Manifests)))
					target, err := rewrite(w, ref)
					w.must(err)
					index, named := w.index(ref)
					if named.Digest != target.Digest || index.Annotations["kept"] != "yes" {
						t.Errorf("made %s, named %s: %+v", target.Digest, named.Digest, index)
					}
					if len(index.Manifests) != 3 || !reflect.DeepEqual(index.Manifests[0], other) || !reflect.DeepEqual(index.Manifests[2], said) {
						t.Fatalf("%+v", index.Manifests)
					}
					if own := index.Manifests[1]; own.Digest == old.Digest || own.Platform == nil || own.Annotations[oci.AnnotationVersion] != "1" {
						t.Errorf("%+v", own)
					}
				})
			}
		}
	}
	// What changes nothing changes no index either.
	w := newWorld(t)
	w.indexedBase("base:1", other)
	w.container("c", "base:1", "overlayfs")
	r := w.request("c", "warm:1")
	r.Index = true
	before, _, err := w.build(r)
	w.must(err)
	after, err := flatten(w.ctx, w.services, FlattenRequest{From: "warm:1", Ref: "warm:1", WorkDir: t.TempDir()}, func(Event) {})
	if err != nil || after.Digest != before.Digest {
		t.Errorf("flattened for nothing: %s, was %s, %v", after.Digest, before.Digest, err)
	}
}

// An image that goes into a registry beside one of another platform that somebody
// else has pushed there.
func TestBuildIntoIndexOfRegistry(t *testing.T) {
	srv := httptest.NewServer(ggcr.New(ggcr.Logger(stdlog.New(io.Discard, "", 0))))
	defer srv.Close()
	t.Setenv("NERDCTL_TOML", filepath.Join(t.TempDir(), "none"))
	t.Setenv("DOCKER_CONFIG", t.TempDir())
	ref := strings.TrimPrefix(srv.URL, "http://") + "/app:warm"

	there := newWorld(t)
	config := there.json(ocispec.MediaTypeImageConfig, ocispec.Image{Platform: ocispec.Platform{OS: "plan9", Architecture: "mips"}}, nil)
	foreign := there.json(ocispec.MediaTypeImageManifest, map[string]any{
		"schemaVersion": 2, "mediaType": ocispec.MediaTypeImageManifest, "config": config, "layers": []ocispec.Descriptor{},
		"annotations": map[string]string{oci.AnnotationVersion: "1", "org.example": "not in an index"},
	}, nil)
	if _, err := registry.Push(there.ctx, registry.Config{}, there.content, ref, foreign, nil); err != nil {
		t.Fatal(err)
	}

	w := newWorld(t)
	w.image("base:1", "overlayfs", "one")
	w.container("c", "base:1", "overlayfs")
	for range 2 { // the second time the index is there, too
		r := w.request("c", ref)
		r.Index, r.Push = true, true
		target, events, err := w.build(r)
		w.must(err)
		if last := events[len(events)-1]; last.Digest != target.Digest.String() {
			t.Errorf("last event %+v, built %s", last, target.Digest)
		}
		list, err := registry.List(w.ctx, registry.Config{}, ref)
		w.must(err)
		if index, _ := w.index(ref); !reflect.DeepEqual(list, index) {
			t.Errorf("the registry has %+v\nand containerd %+v", list, index)
		}
		if len(list.Manifests) != 2 {
			t.Fatalf("%+v", list.Manifests)
		}
		want := ocispec.Descriptor{
			MediaType: foreign.MediaType, Digest: foreign.Digest, Size: foreign.Size,
			Platform: &ocispec.Platform{OS: "plan9", Architecture: "mips"}, Annotations: map[string]string{oci.AnnotationVersion: "1"},
		}
		if !slices.ContainsFunc(list.Manifests, func(m ocispec.Descriptor) bool { return reflect.DeepEqual(m, want) }) {
			t.Errorf("%+v\ndoes not have %+v", list.Manifests, want)
		}
		w.manifestHere(list)
	}
}
