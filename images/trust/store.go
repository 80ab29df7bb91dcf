package trust

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	coreimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/errdef"

	"github.com/crac-shim/crac/images/blob"
)

// referrerLabel, with a signature's digest behind it, is a label of what is signed. It
// finds the signature, and containerd keeps that for as long as the image.
const referrerLabel = "containerd.io/gc.ref.content.crac.referrer."

// store is containerd's content store as the libraries see one, for the signatures of one
// image: what refers to something is found by the labels of that.
type store struct {
	content.Store
	image digest.Digest
}

var _ oras.GraphTarget = store{}

func (s store) Exists(ctx context.Context, desc ocispec.Descriptor) (bool, error) {
	_, err := s.Info(ctx, desc.Digest)
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}

func (s store) Fetch(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	ra, err := s.ReaderAt(ctx, desc)
	if err != nil {
		if errdefs.IsNotFound(err) {
			err = fmt.Errorf("%s: %w", desc.Digest, errdef.ErrNotFound)
		}
		return nil, err
	}
	return readCloser{content.NewReader(ra), ra}, nil
}

type readCloser struct {
	io.Reader
	io.Closer
}

// maxSignature bounds what a registry can have stored as a part of a signature.
const maxSignature = 4 << 20

// Push stores a part of a signature. The caller holds a lease until the signature's
// manifest, which comes last, is there.
func (s store) Push(ctx context.Context, desc ocispec.Descriptor, r io.Reader) error {
	if desc.Size > maxSignature {
		return fmt.Errorf("%s has %d bytes, which no part of a signature has", desc.Digest, desc.Size)
	}
	data, err := io.ReadAll(io.LimitReader(r, desc.Size+1))
	if err != nil {
		return err
	}
	var manifest ocispec.Manifest
	labels := make(map[string]string)
	if desc.MediaType == ocispec.MediaTypeImageManifest {
		if err := json.Unmarshal(data, &manifest); err != nil {
			return err
		}
		if of := manifest.Subject; of != nil && of.Digest != s.image {
			return fmt.Errorf("%s is a signature of %s, and was given for one of %s: the registry is not to be trusted, or damaged", desc.Digest, of.Digest, s.image)
		}
		for i, child := range append([]ocispec.Descriptor{manifest.Config}, manifest.Layers...) {
			labels[fmt.Sprintf("containerd.io/gc.ref.content.%d", i)] = child.Digest.String()
		}
	}
	// Size and digest are checked as it is stored.
	if err := blob.Write(ctx, s.Store, desc, data, labels); err != nil {
		return err
	}
	if manifest.Subject == nil {
		return nil
	}
	key := referrerLabel + desc.Digest.Encoded()
	_, err = s.Update(ctx, content.Info{Digest: manifest.Subject.Digest, Labels: map[string]string{key: desc.Digest.String()}}, "labels."+key)
	return err
}

// Predecessors are the manifests that refer to something.
func (s store) Predecessors(ctx context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	info, err := s.Info(ctx, desc.Digest)
	if err != nil {
		return nil, err
	}
	var all []ocispec.Descriptor
	for _, key := range slices.Sorted(maps.Keys(info.Labels)) {
		if !strings.HasPrefix(key, referrerLabel) {
			continue
		}
		referrer, err := s.Info(ctx, digest.Digest(info.Labels[key]))
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: referrer.Digest, Size: referrer.Size})
	}
	return all, nil
}

// Resolve takes digests only: names are for those who look at what they mean.
func (s store) Resolve(ctx context.Context, reference string) (ocispec.Descriptor, error) {
	d, err := digest.Parse(reference)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("%q is no digest: %w", reference, errdef.ErrInvalidReference)
	}
	info, err := s.Info(ctx, d)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	var manifest struct {
		MediaType string `json:"mediaType"`
	}
	if err := blob.ReadJSON(ctx, s.Store, ocispec.Descriptor{Digest: d, Size: info.Size}, &manifest); err != nil {
		return ocispec.Descriptor{}, err
	}
	if !coreimages.IsManifestType(manifest.MediaType) && !coreimages.IsIndexType(manifest.MediaType) {
		return ocispec.Descriptor{}, fmt.Errorf("%s is of type %q, which is no image's", d, manifest.MediaType)
	}
	return ocispec.Descriptor{MediaType: manifest.MediaType, Digest: d, Size: info.Size}, nil
}

// Tag is not for signatures.
func (s store) Tag(context.Context, ocispec.Descriptor, string) error {
	return errors.ErrUnsupported
}
