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

// loadParent reads a parent's memory out of its layers, as hashes, and notes it in
// the manifest. It need not be unpacked, nor be where the container came from.
func loadParent(ctx context.Context, s services, r Request, m *oci.Manifest) (*parent, error) {
	ref := r.Parent
	if ref == "" {
		return nil, nil
	}
	record, err := s.images.Get(ctx, ref)
	if err != nil {
		if errdefs.IsNotFound(err) {
			return nil, fmt.Errorf("parent image %s is not there; pull it, or make a whole checkpoint (without --parent): %w", ref, err)
		}
		return nil, err
	}
	img, err := inspect.Open(ctx, s.content, ref, record.Target, s.platform)
	if err != nil {
		return nil, fmt.Errorf("parent %w", err)
	}
	if err := parentFits(img, r.EncryptTo); err != nil {
		return nil, err
	}
	keys, err := crypt.ParseKeys(r.Keys)
	if err != nil {
		return nil, err
	}
	chain, err := img.ReadChain(ctx, s.content, inspect.Options{Pages: true, Keys: keys})
	if err != nil {
		return nil, fmt.Errorf("parent image %w", err)
	}
	top := chain[0]
	depth := 1
	if top.Manifest.Parent != nil {
		depth += top.Manifest.Parent.Depth
	}
	switch a, b := top.Manifest, m; {
	case depth > oci.MaxDepth:
		return nil, fmt.Errorf("parent image %s continues %d others already, which is as many as there may be; flatten it first (cracctl flatten), or make a whole checkpoint (without --parent)", ref, depth-1)
	case a.Platform != b.Platform || a.Host.PageSize != b.Host.PageSize:
		return nil, fmt.Errorf("parent image %s was made on %s/%s with pages of %d bytes, and this is %s/%s with %d; make a whole checkpoint (without --parent)",
			ref, a.Platform.OS, a.Platform.Architecture, a.Host.PageSize, b.Platform.OS, b.Platform.Architecture, b.Host.PageSize)
	case (a.CRIU.Minimum >= wideMaps) && b.CRIU.Version < wideMaps:
		return nil, fmt.Errorf("parent image %s can be read by CRIU %s and newer only, and this is %s; make a whole checkpoint (without --parent)",
			ref, oci.VersionString(a.CRIU.Minimum), oci.VersionString(b.CRIU.Version))
	}
	// Whoever restores the new one reads the parent as well.
	m.CRIU.Minimum = max(m.CRIU.Minimum, top.Manifest.CRIU.Minimum)
	m.Parent = &oci.Parent{Manifest: top.ManifestDigest, Depth: depth}
	p := new(parent)
	if p.memory, err = inspect.NewMemory(chain); err != nil {
		return nil, fmt.Errorf("parent image %s: %w", ref, err)
	}
	for _, n := range slices.Backward(img.CheckpointLayers(len(chain))) {
		l := newLayer{desc: img.Manifest.Layers[n], diffID: img.Config.RootFS.DiffIDs[n]}
		p.layers = append(p.layers, l.asCheckpoint())
	}
	return p, nil
}

// wideMaps is the first CRIU whose page maps earlier ones cannot read.
const wideMaps = 40200

// parentFits refuses a parent in the open below an encrypted checkpoint: the parent's
// layers become the new image's, and hold most of its memory. The other way round is
// for mustEncrypt to judge.
func parentFits(img *inspect.Image, encryptTo []string) error {
	if err := mustEncrypt(img.Name, img.Manifest.Layers, encryptTo); err != nil || !encrypts(encryptTo) {
		return err
	}
	for n, l := range img.Manifest.Layers {
		if img.Kind(n) == "checkpoint" && !crypt.IsEncrypted(l.MediaType) {
			return fmt.Errorf("parent image %s is not encrypted, and its memory would be in the new image as it is: encrypt it first (cracctl encrypt), or make a whole checkpoint (without --parent)", img.Name)
		}
	}
	return nil
}
