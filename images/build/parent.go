package build

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/crypt"
	"github.com/crac-shim/crac/images/inspect"
	"github.com/crac-shim/crac/oci"
)

// parent is the checkpoint that a new one continues.
type parent struct {
	memory *inspect.Memory
	layers []newLayer // its checkpoint layers, lowest first
}

// memoryOrNil may be called on nil, which is no parent.
func (p *parent) memoryOrNil() images.ParentMemory {
	if p == nil {
		return nil
	}
	return p.memory
}

func (p *parent) layersOrNil() []newLayer {
	if p == nil {
		return nil
	}
	return p.layers
}

// openParent finds the image to continue, and refuses what readParent would, as far as
// that can be told without reading its memory. It need not be unpacked, nor be where the
// container came from.
func openParent(ctx context.Context, s services, r Request, keys *crypt.Keys) (*inspect.Image, error) {
	ref := r.Parent
	if ref == "" {
		return nil, nil
	}
	img, err := s.open(ctx, ref)
	if errdefs.IsNotFound(err) {
		return nil, fmt.Errorf("parent %w; pull it, or make a whole checkpoint (without --parent)", err)
	}
	if err != nil {
		return nil, fmt.Errorf("parent %w", err)
	}
	if img.Checkpoint < 0 {
		return nil, fmt.Errorf("parent image %s: %w; make a whole checkpoint (without --parent)", ref, inspect.ErrNoCheckpoint)
	}
	if err := mustEncrypt(img.Name, img.Manifest.Layers, r.EncryptTo); err != nil {
		return nil, err
	}
	gone, err := s.absentOf(ctx, img.Manifest)
	if err != nil {
		return nil, err
	}
	for n, l := range img.Manifest.Layers {
		if img.Kind(n) != "checkpoint" {
			continue
		}
		if gone[l.Digest] {
			return nil, fmt.Errorf("parent image %s: checkpoint layer %s is not in the content store, which was told to discard what is unpacked; fetch the image again (ctr content fetch), or make a whole checkpoint (without --parent)", ref, l.Digest)
		}
		if crypt.IsEncrypted(l.MediaType) {
			if err := keys.Fit(l); err != nil {
				return nil, fmt.Errorf("parent image %s: checkpoint layer %s: %w", ref, l.Digest, err)
			}
		}
	}
	// A tool may have lost them; the layer says the same.
	if facts, ok := oci.FactsOf(img.Manifest.Annotations); ok && facts.Platform.Architecture != "" && facts.Host.PageSize != 0 {
		return img, canContinue(ref, facts, &r.Manifest)
	}
	return img, nil
}

// canContinue tells whether a dump can continue that of an image.
func canContinue(ref string, a, b *oci.Manifest) error {
	switch {
	case depthOn(a) > oci.MaxDepth:
		return fmt.Errorf("parent image %s continues %d others already, which is as many as there may be; flatten it first (cracctl flatten), or make a whole checkpoint (without --parent)", ref, a.Parent.Depth)
	case a.Platform.OS != b.Platform.OS || a.Platform.Architecture != b.Platform.Architecture || a.Host.PageSize != b.Host.PageSize:
		return fmt.Errorf("parent image %s was made on %s/%s with pages of %d bytes, and this is %s/%s with %d; make a whole checkpoint (without --parent)",
			ref, a.Platform.OS, a.Platform.Architecture, a.Host.PageSize, b.Platform.OS, b.Platform.Architecture, b.Host.PageSize)
	case (a.CRIU.Minimum >= wideMaps) && b.CRIU.Version < wideMaps:
		return fmt.Errorf("parent image %s can be read by CRIU %s and newer only, and this is %s; make a whole checkpoint (without --parent)",
			ref, oci.VersionString(a.CRIU.Minimum), oci.VersionString(b.CRIU.Version))
	}
	return nil
}

// depthOn is the depth of a dump that continues this one.
func depthOn(m *oci.Manifest) int {
	if m.Parent == nil {
		return 1
	}
	return m.Parent.Depth + 1
}

// readParent reads the parent's memory out of its layers, as hashes, and notes it in the
// manifest.
func (p *Prepared) readParent(ctx context.Context, m *oci.Manifest) (*parent, error) {
	if p.parent == nil {
		return nil, nil
	}
	img, ref := p.parent, p.r.Parent
	chain, err := img.ReadChain(ctx, p.content, inspect.Options{Pages: true, Keys: p.keys})
	if err != nil {
		return nil, fmt.Errorf("parent image %w", err)
	}
	top := chain[0]
	if err := canContinue(ref, top.Manifest, m); err != nil {
		return nil, err
	}
	// Whoever restores the new one reads the parent as well.
	m.CRIU.Minimum = max(m.CRIU.Minimum, top.Manifest.CRIU.Minimum)
	m.Parent = &oci.Parent{Manifest: top.ManifestDigest, Depth: depthOn(top.Manifest)}
	own := new(parent)
	if own.memory, err = inspect.NewMemory(chain); err != nil {
		return nil, fmt.Errorf("parent image %s: %w", ref, err)
	}
	for _, n := range slices.Backward(img.CheckpointLayers(len(chain))) {
		l := newLayer{desc: img.Manifest.Layers[n], diffID: img.Config.RootFS.DiffIDs[n]}
		if l, err = p.comp.reseal(ctx, p.content, l, "checkpoint", p.keys, quietly); err != nil {
			return nil, fmt.Errorf("parent image %s: %w", ref, err)
		}
		own.layers = append(own.layers, l.asCheckpoint())
	}
	return own, nil
}

// wideMaps is the first CRIU whose page maps earlier ones cannot read.
const wideMaps = 40200

// Reused reads LabelReused of an image's record: how many bytes of the memory the parent
// has, of how many that a whole image would store. Without a parent ok is false.
func Reused(labels map[string]string) (reused, memory int64, ok bool) {
	n, _ := fmt.Sscanf(labels[LabelReused], "%d/%d", &reused, &memory)
	return reused, memory, n == 2
}

// ReusedWarning says what is wrong with a parent that has next to nothing of the memory;
// empty if it has enough.
func ReusedWarning(parent string, reused, memory int64) string {
	if memory == 0 || reused >= memory/50 {
		return ""
	}
	return fmt.Sprintf("parent image %s has %.1f %% of this container's memory: the image is as large as a whole one, and a restore needs both; make it without --parent, or name the image that the container was started from or checkpointed into last", parent, 100*float64(reused)/float64(memory))
}
