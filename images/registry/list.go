package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	coreimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/crac-shim/crac/oci"
)

// maxObject bounds what is read of a registry's JSON; registries themselves take
// no larger manifests.
const maxObject = 4 << 20

// List reads what a name means in its registry as a list of images: the index
// there, or one of the only image, or nothing.
func List(ctx context.Context, c Config, ref string) (list ocispec.Index, err error) {
	if err := oci.CheckPushRef(ref); err != nil {
		return list, err
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("read %s in its registry: %w", ref, explain(ctx, nil, nil, hostOf(ref), err))
		}
	}()
	resolver := c.resolver(ctx, docker.NewInMemoryTracker())
	name, target, err := resolver.Resolve(ctx, ref)
	if errdefs.IsNotFound(err) {
		return list, nil
	}
	if err != nil {
		return list, err
	}
	fetcher, err := resolver.Fetcher(ctx, name)
	if err != nil {
		return list, err
	}
	if coreimages.IsIndexType(target.MediaType) {
		return list, fetch(ctx, fetcher, target, &list)
	}
	entry, err := Entry(target, func(desc ocispec.Descriptor, v any) error { return fetch(ctx, fetcher, desc, v) })
	list.Manifests = []ocispec.Descriptor{entry}
	return list, err
}

// Entry is an image as an index lists it: with its platform and, if it is a checkpoint, the
// facts that its own manifest says. read reads JSON.
func Entry(image ocispec.Descriptor, read func(desc ocispec.Descriptor, v any) error) (ocispec.Descriptor, error) {
	entry := ocispec.Descriptor{MediaType: image.MediaType, Digest: image.Digest, Size: image.Size}
	var (
		manifest ocispec.Manifest
		config   struct{ ocispec.Platform }
	)
	if err := read(image, &manifest); err != nil {
		return entry, err
	}
	if err := read(manifest.Config, &config); err != nil {
		return entry, err
	}
	platform := platforms.Normalize(config.Platform)
	entry.Platform = &platform
	entry.Annotations = oci.AnnotationsOf(manifest.Annotations)
	return entry, nil
}

// fetch reads one JSON object, which must have its digest.
func fetch(ctx context.Context, fetcher remotes.Fetcher, desc ocispec.Descriptor, v any) error {
	if err := desc.Digest.Validate(); err != nil {
		return err
	}
	r, err := fetcher.Fetch(ctx, desc)
	if err != nil {
		return err
	}
	defer r.Close()
	data, err := io.ReadAll(io.LimitReader(r, maxObject+1))
	switch {
	case err != nil:
		return err
	case len(data) > maxObject:
		return fmt.Errorf("%s is longer than %d bytes", desc.Digest, maxObject)
	case desc.Digest.Algorithm().FromBytes(data) != desc.Digest:
		return fmt.Errorf("%s is not what the registry sent", desc.Digest)
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("%s: %w", desc.Digest, err)
	}
	return nil
}

// withDigest names content of the repository that an image is in.
func withDigest(ref string, d digest.Digest) (string, error) {
	spec, err := reference.Parse(ref)
	if err != nil {
		return "", errors.Join(fmt.Errorf("image name %q", ref), err)
	}
	return spec.Locator + "@" + d.String(), nil
}
