package build

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	coreimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/blob"
	"github.com/crac-shim/crac/images/compress"
	"github.com/crac-shim/crac/images/crypt"
	"github.com/crac-shim/crac/oci"
)

// compression is how new layers are stored.
type compression struct {
	compress.Format
	recipients *crypt.Recipients // nil: whoever has the image can read it
}

// newCompression reads what a request asks for. Encrypted layers are stored with gzip
// unless it asks for something else: containerd, as it is configured by default,
// decrypts no other.
func newCompression(name oci.Compression, encryptTo []string) (c compression, err error) {
	var recipients *crypt.Recipients
	if encrypts(encryptTo) {
		if recipients, err = crypt.ParseRecipients(encryptTo); err != nil {
			return c, err
		}
		name = cmp.Or(name, oci.CompressionGzip)
	}
	format, err := compress.Of(name)
	return compression{format, recipients}, err
}

// newLayer is a layer that a build made; the zero value is no layer.
type newLayer struct {
	desc   ocispec.Descriptor
	diffID digest.Digest
}

func (l newLayer) size() int64 { return l.desc.Size }

// writeLayer stores what write produces, compressed, in one pass.
func writeLayer(ctx context.Context, cs content.Store, ref string, comp compression, write func(io.Writer) error) (newLayer, error) {
	return storeLayer(ctx, cs, ref, comp, func(w io.Writer) (digest.Digest, error) {
		diffID := digest.SHA256.Digester()
		z, err := comp.NewWriter(w)
		if err != nil {
			return "", err
		}
		if err := write(io.MultiWriter(z, diffID.Hash())); err != nil {
			z.Close()
			return "", err
		}
		return diffID.Digest(), z.Close()
	})
}

// storeLayer stores a layer that write writes, compressed, and tells the diff ID of:
// encrypted, if it is to be.
func storeLayer(ctx context.Context, cs content.Store, ref string, comp compression, write func(io.Writer) (digest.Digest, error)) (newLayer, error) {
	var (
		l           newLayer
		annotations map[string]string
		err         error
	)
	l.desc, err = blob.Store(ctx, cs, ref, comp.storedType(), func(w io.Writer) (map[string]string, error) {
		out, end, err := comp.seal(w)
		if err != nil {
			return nil, err
		}
		l.diffID, err = write(out)
		var serr error
		annotations, serr = end()
		return map[string]string{labels.LabelUncompressed: l.diffID.String()}, cmp.Or(err, serr)
	})
	if err != nil {
		return newLayer{}, err
	}
	l.desc.Annotations = annotations
	return l, nil
}

// writeDump stores the checkpoint layer, whose ingest is named ref, and fills m.Files. It
// tells how many bytes of the memory parent has, which may be nil.
func (s services) writeDump(ctx context.Context, ref, dir string, spec []byte, m *oci.Manifest, parent images.ParentMemory, comp compression, total int64, emit func(Event)) (_ newLayer, reused int64, _ error) {
	l, err := writeLayer(ctx, s.content, ref, comp, func(w io.Writer) (err error) {
		reused, err = images.WriteLayer(&progress{w, Telling(Event{Event: images.EventProgress, Total: total}, emit)}, dir, spec, m, parent)
		return err
	})
	return l.asCheckpoint(), reused, err
}

// asCheckpoint marks a layer as a checkpoint layer. Of its annotations it keeps those
// that it is decrypted by.
func (l newLayer) asCheckpoint() newLayer {
	l.desc.Annotations = crypt.Annotations(l.desc.Annotations)
	if l.desc.Annotations == nil {
		l.desc.Annotations = make(map[string]string)
	}
	l.desc.Annotations[oci.LayerAnnotation] = oci.LayerCheckpoint
	return l
}

// Telling gives a function that is told how many bytes more are done, and emits e with how
// many that are in all, a few times a second.
func Telling(e Event, emit func(Event)) func(n int64) {
	var (
		done int64
		last time.Time
	)
	return func(n int64) {
		if done += n; time.Since(last) < 200*time.Millisecond {
			return
		}
		last = time.Now()
		if e.Done = done; e.Total > 0 {
			e.Done = min(done, e.Total) // a tar's headers are not part of a dump
		}
		emit(e)
	}
}

// progress tells how much was written.
type progress struct {
	w    io.Writer
	tell func(n int64)
}

func (p *progress) Write(b []byte) (int, error) {
	n, err := p.w.Write(b)
	p.tell(int64(n))
	return n, err
}

// writeImage stores configuration and manifest. It returns the manifest's
// descriptor and the size of all that it refers to.
func writeImage(ctx context.Context, cs content.Store, b *base, changes newLayer, below []newLayer, dump newLayer, m *oci.Manifest) (ocispec.Descriptor, int64, error) {
	none := ocispec.Descriptor{}
	layers, diffIDs, history := b.layers(), b.diffIDs, b.history
	created := m.Created
	add := func(l newLayer, by string) {
		layers = append(layers, l.desc)
		diffIDs = append(diffIDs, l.diffID)
		history = append(history, ocispec.History{Created: &created, CreatedBy: by})
	}
	if changes.diffID != "" {
		add(changes, oci.CreatedByChanges)
	}
	for _, l := range append(below, dump) {
		add(l, oci.CreatedByCheckpoint)
	}

	config := make(map[string]json.RawMessage, len(b.config))
	for k, v := range b.config {
		config[k] = v
	}
	delete(config, "history")
	for k, v := range map[string]any{
		"created": created,
		"rootfs":  ocispec.RootFS{Type: "layers", DiffIDs: diffIDs},
		"history": history,
	} {
		if k == "history" && len(history) == 0 {
			continue
		}
		data, err := json.Marshal(v)
		if err != nil {
			return none, 0, err
		}
		config[k] = data
	}
	configData, err := json.Marshal(config)
	if err != nil {
		return none, 0, err
	}
	configDesc, err := writeBlob(ctx, cs, ocispec.MediaTypeImageConfig, configData, nil)
	if err != nil {
		return none, 0, err
	}

	annotations := b.annotations(m)
	written, err := m.Encode()
	if err != nil {
		return none, 0, err
	}
	annotations[oci.AnnotationManifest] = digest.FromBytes(written).String()
	manifest := ocispec.Manifest{
		Versioned:   specs.Versioned{SchemaVersion: 2},
		MediaType:   ocispec.MediaTypeImageManifest,
		Config:      configDesc,
		Layers:      layers,
		Annotations: annotations,
	}
	return storeManifest(ctx, cs, manifest)
}

// storeManifest stores a manifest. It returns its descriptor and the size of all that
// it refers to.
func storeManifest(ctx context.Context, cs content.Store, manifest ocispec.Manifest) (ocispec.Descriptor, int64, error) {
	none := ocispec.Descriptor{}
	manifestData, err := json.MarshalIndent(manifest, "", "  ")
	if err != nil {
		return none, 0, err
	}
	children := append([]ocispec.Descriptor{manifest.Config}, manifest.Layers...)
	size := int64(len(manifestData))
	for _, child := range children {
		size += child.Size
	}
	desc, err := writeBlob(ctx, cs, ocispec.MediaTypeImageManifest, manifestData, gcLabels(children))
	if err != nil {
		return none, 0, err
	}
	return desc, size, nil
}

// gcLabels keep what a manifest or an index refers to as long as itself.
func gcLabels(children []ocispec.Descriptor) map[string]string {
	gc := make(map[string]string)
	keys := make(map[string]int)
	for _, child := range children {
		for _, key := range coreimages.ChildGCLabels(child) {
			i := keys[key]
			keys[key]++
			if i > 0 || strings.HasSuffix(key, ".") {
				key = fmt.Sprintf("%s%d", key, i)
			}
			gc[key] = child.Digest.String()
		}
	}
	return gc
}

func writeBlob(ctx context.Context, cs content.Store, mediaType string, data []byte, gc map[string]string) (ocispec.Descriptor, error) {
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	return desc, blob.Write(ctx, cs, desc, data, gc)
}
