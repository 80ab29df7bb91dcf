package build

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/containerd/v2/core/images/converter"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/crac-shim/crac/images/blob"
	"github.com/crac-shim/crac/images/inspect"
	"github.com/crac-shim/crac/oci"
)

// base is the image a container was made from, without what an earlier
// checkpoint added on top and without what its name was moved to since.
type base struct {
	*inspect.Image                  // as it is
	manifest       ocispec.Manifest // with layers as kept
	// config is the image's configuration as found: a field that this code
	// does not know (Docker's Healthcheck) stays.
	config  map[string]json.RawMessage
	args    []string             // what the image runs when nothing else is asked for
	made    []ocispec.Descriptor // what the container was made from, earlier checkpoints included
	absent  absent
	kinds   []string // of the layers as kept: see inspect.Image.Kind
	diffIDs []digest.Digest
	history []ocispec.History // empty entries when it did not fit the layers
}

// loadBase reads the image that the snapshot parent was unpacked from.
func loadBase(ctx context.Context, s services, image, parent string) (*base, error) {
	img, err := s.images.Get(ctx, image)
	if err != nil {
		if errdefs.IsNotFound(err) {
			return nil, fmt.Errorf("its image %s is no longer there under this name; pull or tag it again: %w", image, err)
		}
		return nil, err
	}
	b, err := readBase(ctx, s, image, img.Target)
	if err != nil {
		return nil, fmt.Errorf("its %w", err)
	}
	if err := b.cut(parent); err != nil {
		return nil, err
	}
	b.made = b.manifest.Layers
	b.dropCheckpoints()
	return b, nil
}

// readBase reads an image as it is, and holds it.
func readBase(ctx context.Context, s services, name string, target ocispec.Descriptor) (*base, error) {
	img, err := s.openTarget(ctx, name, target)
	if err != nil {
		return nil, err
	}
	return baseOf(ctx, s, img)
}

// baseOf is readBase for an image that is held.
func baseOf(ctx context.Context, s services, img *inspect.Image) (*base, error) {
	b := &base{
		Image: img, manifest: img.Manifest, diffIDs: img.Config.RootFS.DiffIDs, history: img.Config.History,
		args: slices.Concat(img.Config.Config.Entrypoint, img.Config.Config.Cmd),
	}
	for n := range b.manifest.Layers {
		b.kinds = append(b.kinds, b.Kind(n))
	}
	if err := blob.ReadJSON(ctx, s.content, b.manifest.Config, &b.config); err != nil {
		return nil, fmt.Errorf("image %s: %w", b.Name, err)
	}
	if layers := layersOf(b.history); layers != len(b.diffIDs) {
		// Tools reject a history that does not fit; one that tells nothing is fine,
		// and lets the new layers be told apart.
		b.history = make([]ocispec.History, len(b.diffIDs))
	}
	var err error
	b.absent, err = s.absentOf(ctx, b.manifest)
	return b, err
}

func layersOf(history []ocispec.History) (n int) {
	for _, h := range history {
		if !h.EmptyLayer {
			n++
		}
	}
	return n
}

// cut keeps the layers that the snapshot parent was made of. They are fewer than
// the image has when its name was moved to a checkpoint of the same container.
func (b *base) cut(parent string) error {
	if parent == "" && len(b.diffIDs) == 0 {
		return nil
	}
	for n := len(b.diffIDs); n > 0; n-- {
		if identity.ChainID(b.diffIDs[:n]).String() == parent {
			b.keep(func(i int) bool { return i < n })
			return nil
		}
	}
	return fmt.Errorf("its root file system was not made from what the name %s means now (it was made from %s); tag the image it was made from with this name again", b.Name, parent)
}

// dropCheckpoints leaves out the checkpoint layers: a new checkpoint replaces
// them.
func (b *base) dropCheckpoints() {
	b.keep(func(i int) bool { return b.kinds[i] != "checkpoint" })
}

// keep drops layers from everything that lists them.
func (b *base) keep(want func(i int) bool) {
	var (
		layers  []ocispec.Descriptor
		kinds   []string
		diffIDs []digest.Digest
		history []ocispec.History
		kept    = make([]bool, len(b.diffIDs))
	)
	for i := range b.diffIDs {
		if kept[i] = want(i); kept[i] {
			layers = append(layers, b.manifest.Layers[i])
			kinds = append(kinds, b.kinds[i])
			diffIDs = append(diffIDs, b.diffIDs[i])
		}
	}
	n := 0
	for _, h := range b.history {
		if h.EmptyLayer {
			history = append(history, h)
			continue
		}
		if kept[n] {
			history = append(history, h)
		}
		n++
	}
	b.manifest.Layers, b.kinds, b.diffIDs, b.history = layers, kinds, diffIDs, history
}

// identity is what the manifest says about the base. An image that is a
// checkpoint already passes its own base on.
func (b *base) identity() oci.Base {
	if d := b.manifest.Annotations[oci.AnnotationBaseDigest]; d != "" {
		return oci.Base{Name: b.manifest.Annotations[oci.AnnotationBaseName], Digest: d, Args: b.args}
	}
	return oci.Base{Name: b.Name, Digest: b.Desc.Digest.String(), Args: b.args}
}

// annotations of the new manifest: the base's own, without what an earlier
// checkpoint said, and ours.
func (b *base) annotations(m *oci.Manifest) map[string]string {
	all := maps.Clone(b.manifest.Annotations)
	if all == nil {
		all = make(map[string]string)
	}
	maps.DeleteFunc(all, func(k, _ string) bool { return oci.IsAnnotation(k) })
	maps.Copy(all, oci.Annotations(m))
	return all
}

// layers in OCI's types: a Docker image's layers are the same bytes under other
// names.
func (b *base) layers() []ocispec.Descriptor {
	layers := slices.Clone(b.manifest.Layers)
	for i := range layers {
		layers[i].MediaType = converter.ConvertDockerMediaTypeToOCI(layers[i].MediaType)
	}
	return layers
}
