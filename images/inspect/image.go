package inspect

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/containerd/containerd/v2/core/content"
	coreimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/crac-shim/crac/images/blob"
	"github.com/crac-shim/crac/images/compress"
	"github.com/crac-shim/crac/images/crypt"
	"github.com/crac-shim/crac/oci"
)

// ErrNoCheckpoint is wrapped by errors about images without a checkpoint layer.
var ErrNoCheckpoint = errors.New("no checkpoint in this image")

// Image is an image's metadata, for one platform.
type Image struct {
	Name     string
	Target   ocispec.Descriptor // what the name means: a manifest or an index
	Desc     ocispec.Descriptor // of the manifest
	Manifest ocispec.Manifest
	Config   ocispec.Image
	// Checkpoint is the index of the topmost checkpoint layer, -1 if there is none.
	Checkpoint int
	// history is what the configuration says of each layer, as far as it does.
	history []*ocispec.History
}

// maxLayers is more than any snapshotter can put on top of each other.
const maxLayers = 1 << 12

// Open reads an image's manifest and configuration, which have one diff ID for each layer.
func Open(ctx context.Context, store content.Provider, name string, target ocispec.Descriptor, platform platforms.MatchComparer) (*Image, error) {
	img := &Image{Name: name, Target: target, Checkpoint: -1}
	var err error
	if img.Desc, err = ManifestOf(ctx, store, target, platform); err != nil {
		return nil, fmt.Errorf("image %s: %w", name, err)
	}
	if err := blob.ReadJSON(ctx, store, img.Desc, &img.Manifest); err != nil {
		return nil, fmt.Errorf("image %s: %w", name, err)
	}
	if err := blob.ReadJSON(ctx, store, img.Manifest.Config, &img.Config); err != nil {
		return nil, fmt.Errorf("image %s: %w", name, err)
	}
	if layers, diffIDs := len(img.Manifest.Layers), len(img.Config.RootFS.DiffIDs); layers != diffIDs {
		return nil, damaged(fmt.Errorf("image %s: its manifest has %d layers and its configuration %d; pull it again", name, layers, diffIDs))
	}
	if n := len(img.Manifest.Layers); n > maxLayers {
		return nil, damaged(fmt.Errorf("image %s has %d layers; no more than %d are read", name, n, maxLayers))
	}
	for i := range img.Config.History {
		if !img.Config.History[i].EmptyLayer {
			img.history = append(img.history, &img.Config.History[i])
		}
	}
	for i := range img.Manifest.Layers {
		if img.isCheckpoint(i) {
			img.Checkpoint = i
		}
	}
	return img, nil
}

// ManifestOf is the manifest for a platform that an image's target is, or lists.
func ManifestOf(ctx context.Context, store content.Provider, target ocispec.Descriptor, platform platforms.MatchComparer) (ocispec.Descriptor, error) {
	var found []ocispec.Descriptor
	handler := coreimages.HandlerFunc(func(ctx context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		switch {
		case coreimages.IsManifestType(desc.MediaType):
			found = append(found, desc)
		case coreimages.IsIndexType(desc.MediaType):
			return coreimages.Children(ctx, blob.Small{Provider: store}, desc)
		}
		return nil, nil
	})
	h := coreimages.LimitManifests(coreimages.FilterPlatforms(handler, platform), platform, 1)
	if err := coreimages.Walk(ctx, h, target); err != nil {
		return ocispec.Descriptor{}, err
	}
	if len(found) == 0 {
		return ocispec.Descriptor{}, fmt.Errorf("no manifest for this platform in %s: %w", target.Digest, errdefs.ErrNotFound)
	}
	return found[0], nil
}

// Kind says what a layer is: base, changes or checkpoint.
func (i *Image) Kind(layer int) string {
	switch by := i.createdBy(layer); {
	case i.isCheckpoint(layer):
		return "checkpoint"
	case by == oci.CreatedByChanges:
		return "changes"
	}
	return "base"
}

// isCheckpoint knows a checkpoint layer by its descriptor, and where a tool lost
// the annotations by the history.
func (i *Image) isCheckpoint(layer int) bool {
	return i.Manifest.Layers[layer].Annotations[oci.LayerAnnotation] == oci.LayerCheckpoint || i.createdBy(layer) == oci.CreatedByCheckpoint
}

func (i *Image) createdBy(layer int) string {
	if h := i.History(layer); h != nil {
		return h.CreatedBy
	}
	return ""
}

// History is what the configuration says of a layer; nil if it does not.
func (i *Image) History(layer int) *ocispec.History {
	if layer < len(i.history) {
		return i.history[layer]
	}
	return nil
}

// Size is the sum of all that a registry stores for the image.
func (i *Image) Size() int64 {
	size := i.Desc.Size + i.Manifest.Config.Size
	for _, l := range i.Manifest.Layers {
		size += l.Size
	}
	return size
}

// Covered tells that layers were put above the checkpoint, so that it is not
// restored.
func (i *Image) Covered() bool {
	return i.Checkpoint >= 0 && i.Checkpoint < len(i.Manifest.Layers)-1
}

// Read reads the image's checkpoint layer. With o.Digests it also checks the
// layer's own digests, as stored and as unpacked.
func (i *Image) Read(ctx context.Context, store content.Provider, o Options) (*Layer, error) {
	if i.Checkpoint < 0 {
		return nil, fmt.Errorf("%s: %w", i.Name, ErrNoCheckpoint)
	}
	// Of the dumps that it continues nothing says how large they are.
	o.most, _ = strconv.ParseInt(i.Manifest.Annotations[oci.AnnotationDumpBytes], 10, 64)
	return i.read(ctx, store, i.Checkpoint, o)
}

// read reads one of the checkpoint layers.
func (i *Image) read(ctx context.Context, store content.Provider, layer int, o Options) (*Layer, error) {
	desc := i.Manifest.Layers[layer]
	l, err := readBlob(ctx, store, desc, i.Config.RootFS.DiffIDs[layer], o)
	if err != nil {
		if errdefs.IsNotFound(err) {
			return nil, fmt.Errorf("%s: checkpoint layer %s is not in the content store, which was told to discard what is unpacked; fetch the image again (ctr content fetch): %w", i.Name, desc.Digest, err)
		}
		return nil, fmt.Errorf("%s: checkpoint layer %s: %w", i.Name, desc.Digest, err)
	}
	return l, nil
}

func readBlob(ctx context.Context, store content.Provider, desc ocispec.Descriptor, diffID digest.Digest, o Options) (*Layer, error) {
	ra, err := store.ReaderAt(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer ra.Close()
	var r io.Reader = &blob.Reader{Ctx: ctx, R: content.NewReader(ra), Tell: o.Progress}
	stored, plain := digest.SHA256.Digester(), digest.SHA256.Digester()
	if o.Digests {
		r = io.TeeReader(r, stored.Hash())
	}
	packed := r
	if crypt.IsEncrypted(desc.MediaType) {
		if packed, err = o.Keys.Decrypt(r, desc); err != nil {
			return nil, err
		}
	}
	unpacked, err := compress.NewReader(packed, crypt.PlainType(desc.MediaType))
	if err != nil {
		return nil, damaged(err)
	}
	defer unpacked.Close()
	var in io.Reader = &blob.Reader{Ctx: ctx, R: unpacked}
	if o.Digests {
		in = io.TeeReader(in, plain.Hash())
	}
	l, err := readLayer(in, o)
	if err != nil {
		return nil, err
	}
	// Only its end tells whether an encrypted layer is the one that was encrypted.
	if !o.Digests && !crypt.IsEncrypted(desc.MediaType) {
		return l, nil
	}
	// What follows the last entry counts, too.
	if _, err := io.Copy(io.Discard, in); err != nil {
		return nil, damaged(err)
	}
	if _, err := io.Copy(io.Discard, packed); err != nil {
		return nil, damaged(err)
	}
	if !o.Digests {
		return l, nil
	}
	if _, err := io.Copy(io.Discard, r); err != nil {
		return nil, err
	}
	for _, d := range []struct {
		what      string
		want, got digest.Digest
	}{{"digest", desc.Digest, stored.Digest()}, {"diff ID", diffID, plain.Digest()}} {
		if d.want != d.got {
			return nil, damaged(fmt.Errorf("it has the %s %s and should have %s; pull the image again", d.what, d.got, d.want))
		}
	}
	return l, nil
}
