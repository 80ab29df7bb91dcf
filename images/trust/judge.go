package trust

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/content"
	coreimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/build"
	"github.com/crac-shim/crac/images/inspect"
	"github.com/crac-shim/crac/oci"
)

// services are what a judgement uses of containerd.
type services struct {
	containers containers.Store
	images     coreimages.Store
	content    content.Store
	snapshots  func(name string) snapshots.Snapshotter
	platform   platforms.MatchComparer
	// fetch gets the signatures of an image from its registry.
	fetch func(ctx context.Context, name string, all ...ocispec.Descriptor) error
}

// Judge tells whether a container may be restored from the checkpoint that its root
// file system brings along. An error is for the caller's mistakes; all that is wrong
// with the image is in the verdict. ctx must carry the namespace.
//
// The signature is of the manifest of an image. That what lies in the directories is
// that image, layer by layer, and the checkpoint its topmost, follows from:
//
//	signature → manifest → configuration → diff IDs → chain ID = the snapshot's name
//	manifest → annotation → digest of the checkpoint's manifest.json
//	the container's snapshot → the directories that the shim was given
func Judge(ctx context.Context, client *containerd.Client, r images.PolicyRequest,
	fetch func(ctx context.Context, name string, all ...ocispec.Descriptor) error,
) (images.Verdict, error) {
	return judge(ctx, services{
		containers: client.ContainerService(), images: client.ImageService(), content: client.ContentStore(),
		snapshots: client.SnapshotService, platform: platforms.Default(), fetch: fetch,
	}, r)
}

func judge(ctx context.Context, s services, r images.PolicyRequest) (images.Verdict, error) {
	p, err := images.LoadPolicy(r.Policy)
	if err != nil {
		return images.Verdict{}, err
	}
	if p == nil {
		return images.Verdict{}, fmt.Errorf("there is no policy %s", r.Policy)
	}
	if p.Digest() != r.PolicyDigest {
		return images.Verdict{}, fmt.Errorf("the policy %s was changed meanwhile; start the container again", r.Policy)
	}
	c, err := s.containers.Get(ctx, r.Container)
	if err != nil {
		return images.Verdict{}, fmt.Errorf("find container %s: %w", r.Container, err)
	}
	img, err := s.bound(ctx, c, r)
	if err != nil {
		return images.Verdict{Reason: err.Error(), Image: c.Image}, nil
	}
	return s.verify(ctx, p, img), nil
}

// verify looks for signatures here first.
func (s services) verify(ctx context.Context, p *images.Policy, img *inspect.Image) images.Verdict {
	v := Verify(ctx, s.content, p, img.Name, both(img)...)
	if v.Allowed || s.fetch == nil {
		return v
	}
	if err := s.fetch(ctx, img.Name, both(img)...); err != nil {
		v.Reason += fmt.Sprintf(" (its registry was asked for signatures: %s)", oneLine(err))
		return v
	}
	return Verify(ctx, s.content, p, img.Name, both(img)...)
}

// both are what an image's name means, and its manifest for this host.
func both(img *inspect.Image) []ocispec.Descriptor {
	all := []ocispec.Descriptor{bare(img.Target)}
	if img.Desc.Digest != img.Target.Digest {
		all = append(all, bare(img.Desc))
	}
	return all
}

// bound finds the image whose unpacked layers are what the shim would restore from.
func (s services) bound(ctx context.Context, c containers.Container, r images.PolicyRequest) (*inspect.Image, error) {
	if c.Image == "" || c.SnapshotKey == "" {
		return nil, fmt.Errorf("container %s was not made from an image, so there is no signature of it", c.ID)
	}
	record, err := s.images.Get(ctx, c.Image)
	if err != nil {
		if errdefs.IsNotFound(err) {
			return nil, fmt.Errorf("image %s, which container %s was made from, is no longer there under this name; pull or tag it again", c.Image, c.ID)
		}
		return nil, err
	}
	img, err := inspect.Open(ctx, s.content, c.Image, record.Target, s.platform)
	if err != nil {
		return nil, err
	}
	sn := s.snapshots(c.Snapshotter)
	info, err := sn.Stat(ctx, c.SnapshotKey)
	if err != nil {
		return nil, fmt.Errorf("find the root file system of container %s: %w", c.ID, err)
	}
	var spec specs.Spec
	if c.Spec != nil {
		// A spec of another kind has no user namespace that would matter here.
		_ = json.Unmarshal(c.Spec.GetValue(), &spec)
	}
	parent, err := build.Unpacked(ctx, sn, &spec, info.Parent)
	if err != nil {
		return nil, err
	}
	if chain := identity.ChainID(img.Config.RootFS.DiffIDs).String(); parent != chain {
		return nil, fmt.Errorf("the root file system of container %s was made from %s, and the name %s means %s now: make the container again", c.ID, parent, c.Image, chain)
	}
	mounts, err := sn.Mounts(ctx, c.SnapshotKey)
	if err != nil {
		return nil, err
	}
	own := make([]images.Mount, len(mounts))
	for i, m := range mounts {
		own[i] = images.Mount(m)
	}
	layers, err := images.Layers(own)
	if err != nil {
		return nil, err
	}
	if !slices.Equal(layers, r.Layers) {
		return nil, fmt.Errorf("the root file system that container %s is started with is not that of its snapshot %s", c.ID, c.SnapshotKey)
	}
	switch want := img.Manifest.Annotations[oci.AnnotationManifest]; {
	case want == "":
		return nil, errOlder(c.Image)
	case want != r.Manifest:
		return nil, fmt.Errorf("the checkpoint of container %s is not the one of image %s: its manifest.json has the digest %s, and the image says %s", c.ID, c.Image, r.Manifest, want)
	}
	return img, nil
}

// OfImage tells what a policy says of an image, without a container: in the same
// words.
func OfImage(ctx context.Context, cs content.Store, p *images.Policy, img *inspect.Image,
	fetch func(ctx context.Context, name string, all ...ocispec.Descriptor) error,
) images.Verdict {
	if img.Manifest.Annotations[oci.AnnotationManifest] == "" {
		return images.Verdict{Reason: errOlder(img.Name).Error(), Image: img.Name}
	}
	return services{content: cs, fetch: fetch}.verify(ctx, p, img)
}

func errOlder(name string) error {
	return errors.New("image " + name + " does not say which checkpoint is in it: it was made by an older cracctl; make a new checkpoint and sign that")
}
