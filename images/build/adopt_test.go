package build

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/workdir"
	"github.com/crac-shim/crac/oci"
)

func (w *world) adoption(ref string) AdoptRequest {
	w.t.Helper()
	r := w.request("foreign", ref)
	return AdoptRequest{
		Ref: ref, Base: "base:1", DumpDir: r.DumpDir, Spec: []byte(`{"ociVersion":"1.2.0"}`), Manifest: r.Manifest,
		Changes: func(out io.Writer) error {
			tw := tar.NewWriter(out)
			return errors.Join(tw.WriteHeader(&tar.Header{Name: "changed", Mode: 0o600}), tw.Close())
		},
	}
}

// A dump that no container of this containerd made becomes the same kind of image.
func TestAdopt(t *testing.T) {
	w := newWorld(t)
	base := w.image("base:1", "overlayfs", "one", "two")
	_, err := adopt(w.ctx, w.services, w.adoption("warm:1"), func(Event) {})
	w.must(err)
	l := w.check("warm:1")
	if len(l.manifest.Layers) != 4 || l.manifest.Layers[3].Annotations[oci.LayerAnnotation] != oci.LayerCheckpoint {
		t.Fatalf("layers %+v", l.manifest.Layers)
	}
	if got := names(w.entries(l.manifest.Layers[2])); !slices.Equal(got, []string{"changed"}) {
		t.Errorf("changes %v", got)
	}
	if a := l.manifest.Annotations; a[oci.AnnotationBaseName] != "base:1" || a[oci.AnnotationBaseDigest] != base.Digest.String() {
		t.Errorf("annotations %v", a)
	}

	// By its descriptor, whatever the name means; and without any change.
	r := w.adoption("warm:2")
	w.image("base:1", "overlayfs", "other")
	r.BaseTarget = &base
	r.Changes = func(out io.Writer) error { return tar.NewWriter(out).Close() }
	_, err = adopt(w.ctx, w.services, r, func(Event) {})
	w.must(err)
	if l := w.check("warm:2"); len(l.manifest.Layers) != 3 || l.manifest.Annotations[oci.AnnotationBaseDigest] != base.Digest.String() {
		t.Errorf("%d layers, annotations %v", len(l.manifest.Layers), l.manifest.Annotations)
	}
	w.clean()
}

// An error leaves nothing, and moves no name.
func TestAdoptRefuses(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(w *world, r *AdoptRequest, cancel func())
		want   string
	}{
		{"no base", func(_ *world, r *AdoptRequest, _ func()) { r.Base = "none:1" }, "--base"},
		{"a layer of the base is gone", func(w *world, _ *AdoptRequest, _ func()) {
			w.must(w.content.Delete(w.ctx, w.load("base:1").manifest.Layers[0].Digest))
		}, "fetch the image again"},
		{"compression", func(_ *world, r *AdoptRequest, _ func()) { r.Compression = "lzma" }, "lzma"},
		{"name", func(_ *world, r *AdoptRequest, _ func()) { r.Ref = "a b" }, `"a b"`},
		{"changes", func(_ *world, r *AdoptRequest, _ func()) {
			r.Changes = func(io.Writer) error { return errors.New("hostile tar") }
		}, "hostile tar"},
		{"no dump", func(_ *world, r *AdoptRequest, _ func()) { r.DumpDir = t.TempDir() }, images.ErrNotDump.Error()},
		{"manifest", func(_ *world, r *AdoptRequest, _ func()) { r.Manifest.Container.Args = nil }, "arguments"},
		{"cancelled", func(_ *world, r *AdoptRequest, cancel func()) {
			changes := r.Changes
			r.Changes = func(w io.Writer) error { defer cancel(); return changes(w) }
		}, context.Canceled.Error()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			w := newWorld(t)
			before := w.image("base:1", "overlayfs", "one")
			w.tag("warm:1", before)
			r := w.adoption("warm:1")
			ctx, cancel := context.WithCancel(w.ctx)
			defer cancel()
			tt.change(w, &r, cancel)
			want := w.clean()
			if _, err := adopt(ctx, w.services, r, func(Event) {}); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an error that says %s", err, tt.want)
			}
			img, err := w.images.Get(w.ctx, "warm:1")
			w.must(err)
			if img.Target.Digest != before.Digest {
				t.Error("the name was moved")
			}
			if got := w.clean(); got != want {
				t.Errorf("%d blobs, before %d", got, want)
			}
		})
	}
}

// That a directory stays which was worked in is known, and changes nothing about what was made.
func TestRemoveWork(t *testing.T) {
	cannot := &workdir.Dir{Path: "/proc/version"}
	for _, failed := range []error{nil, errors.New("failed")} {
		var warned []string
		err := failed
		RemoveWork(cannot, &err, func(e Event) { warned = append(warned, e.Event+": "+e.Error) })
		switch {
		case failed == nil && (err != nil || len(warned) != 1 || !strings.HasPrefix(warned[0], images.EventWarning) || !strings.Contains(warned[0], cannot.Path)):
			t.Errorf("after success: %v, %q", err, warned)
		case failed != nil && (!errors.Is(err, failed) || !strings.Contains(err.Error(), cannot.Path) || len(warned) > 0):
			t.Errorf("after a failure: %v, %q", err, warned)
		}
	}
}
