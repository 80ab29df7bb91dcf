package build

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images/converter"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/crac-shim/crac/images/inspect"
	"github.com/crac-shim/crac/oci"
)

// base is the image a container was made from, without what an earlier
// checkpoint added on top and without what its name was moved to since.
type base struct {
	name     string
	desc     ocispec.Descriptor // of the manifest
	manifest ocispec.Manifest   // with layers as kept
	// config is the image's configuration as found: a field that this code
	// does not know (Docker's Healthcheck) stays.
	config  map[string]json.RawMessage
	args    []string             // what the image runs when nothing else is asked for
	made    []ocispec.Descriptor // what the container was made from, earlier checkpoints included
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
		return nil, fmt.Errorf("read its image %s: %w", image, err)
	}
	if err := b.cut(parent); err != nil {
		return nil, err
	}
	b.made = b.manifest.Layers
	b.dropCheckpoints()
	return b, nil
}

// readBase reads an image as it is.
func readBase(ctx context.Context, s services, name string, target ocispec.Descriptor) (*base, error) {
	b := &base{name: name}
	var err error
	if b.desc, err = inspect.ManifestOf(ctx, s.content, target, s.platform); err != nil {
		return nil, err
	}
	// The digest that the image is named by is worth more than its parts.
	data, err := content.ReadBlob(ctx, s.content, b.desc)
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(data, &b.manifest); err != nil {
		return nil, fmt.Errorf("manifest %s: %w", b.desc.Digest, err)
	}
	return b, b.readConfig(ctx, s.content)
}

func (b *base) readConfig(ctx context.Context, cs content.Store) error {
	data, err := content.ReadBlob(ctx, cs, b.manifest.Config)
	if err != nil {
		return err
	}
	var known struct {
		Config  ocispec.ImageConfig `json:"config"`
		RootFS  ocispec.RootFS      `json:"rootfs"`
		History []ocispec.History   `json:"history"`
	}
	if err := json.Unmarshal(data, &b.config); err != nil {
		return fmt.Errorf("configuration %s: %w", b.manifest.Config.Digest, err)
	}
	if err := json.Unmarshal(data, &known); err != nil {
		return fmt.Errorf("configuration %s: %w", b.manifest.Config.Digest, err)
	}
	b.diffIDs, b.history = known.RootFS.DiffIDs, known.History
	b.args = slices.Concat(known.Config.Entrypoint, known.Config.Cmd)
	if len(b.diffIDs) != len(b.manifest.Layers) {
		return fmt.Errorf("manifest %s has %d layers and its configuration %d", b.desc.Digest, len(b.manifest.Layers), len(b.diffIDs))
	}
	if layers := layersOf(b.history); layers != len(b.diffIDs) {
		// Tools reject a history that does not fit; one that tells nothing is fine,
		// and lets the new layers be told apart.
		b.history = make([]ocispec.History, len(b.diffIDs))
	}
	return nil
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
	return fmt.Errorf("its root file system was not made from what the name %s means now (it was made from %s); tag the image it was made from with this name again", b.name, parent)
}

// dropCheckpoints leaves out the checkpoint layers: a new checkpoint replaces
// them.
func (b *base) dropCheckpoints() {
	b.keep(func(i int) bool { return !b.isCheckpoint(i) })
}

// isCheckpoint knows a checkpoint layer by its descriptor, and where a tool lost
// the annotations by the history.
func (b *base) isCheckpoint(i int) bool {
	if b.manifest.Layers[i].Annotations[oci.LayerAnnotation] == oci.LayerCheckpoint {
		return true
	}
	n := 0
	for _, h := range b.history {
		if h.EmptyLayer {
			continue
		}
		if n == i {
			return h.CreatedBy == oci.CreatedByCheckpoint
		}
		n++
	}
	return false
}

// keep drops layers from everything that lists them.
func (b *base) keep(want func(i int) bool) {
	var (
		layers  []ocispec.Descriptor
		diffIDs []digest.Digest
		history []ocispec.History
		kept    = make([]bool, len(b.diffIDs))
	)
	for i := range b.diffIDs {
		if kept[i] = want(i); kept[i] {
			layers = append(layers, b.manifest.Layers[i])
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
	b.manifest.Layers, b.diffIDs, b.history = layers, diffIDs, history
}

// identity is what the manifest says about the base. An image that is a
// checkpoint already passes its own base on.
func (b *base) identity() oci.Base {
	if d := b.manifest.Annotations[oci.AnnotationBaseDigest]; d != "" {
		return oci.Base{Name: b.manifest.Annotations[oci.AnnotationBaseName], Digest: d, Args: b.args}
	}
	return oci.Base{Name: b.name, Digest: b.desc.Digest.String(), Args: b.args}
}

// missing names a layer whose content is not stored (containerd can be told to
// discard it once unpacked).
func (b *base) missing(ctx context.Context, cs content.Store) string {
	for _, l := range b.manifest.Layers {
		if _, err := cs.Info(ctx, l.Digest); errdefs.IsNotFound(err) {
			return l.Digest.String()
		}
	}
	return ""
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
