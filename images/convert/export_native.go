package convert

import (
	"archive/tar"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	goruntime "runtime"

	coreimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/crac-shim/crac/images/blob"
	"github.com/crac-shim/crac/images/compress"
	"github.com/crac-shim/crac/oci"
)

const (
	// specType is containerd's name for the type of a spec.
	specType = "types.containerd.io/opencontainers/runtime-spec/1/Spec"
	// runcRuntime is what an index is restored under: our shim has no need of it.
	runcRuntime = "io.containerd.runc.v2"
)

// native writes an index into containerd that ctr containers restore takes.
func (e *export) native(ctx context.Context) error {
	e.report.From = "an image for ctr containers restore --live --rw"
	name, target, base, err := e.base(ctx)
	if err != nil {
		return err
	}
	e.spec.Linux.CgroupsPath = "" // each container that is restored gets one of its own name
	ctx, release, err := e.client.WithLease(ctx)
	if err != nil {
		return err
	}
	defer func() { _ = release(context.WithoutCancel(ctx)) }() // it expires

	criu, err := e.blob(ctx, coreimages.MediaTypeContainerd1Checkpoint, func(w io.Writer) error {
		tw := tar.NewWriter(w)
		return errors.Join(e.packDump(ctx, tw, "", e.packing()), tw.Close())
	})
	if err != nil {
		return err
	}
	spec, err := json.Marshal(e.spec)
	if err != nil {
		return err
	}
	stored, err := proto.Marshal(&anypb.Any{TypeUrl: specType, Value: spec})
	if err != nil {
		return err
	}
	config, err := e.blob(ctx, coreimages.MediaTypeContainerd1CheckpointConfig, func(w io.Writer) error {
		_, err := w.Write(stored)
		return err
	})
	if err != nil {
		return err
	}
	deleted := 0
	// gzip is the one that containerd looks for.
	format, err := compress.Of(oci.CompressionGzip)
	if err != nil {
		return err
	}
	rw, err := e.blob(ctx, format.MediaType, func(w io.Writer) error {
		z, err := format.NewWriter(w)
		if err != nil {
			return err
		}
		deleted, err = e.layer(ctx, z, e.changed(base), base.Manifest.Layers)
		return errors.Join(err, z.Close())
	})
	if err != nil {
		return err
	}
	e.report.take("memory, and changes of the root file system with %d deleted files, for the image %s", deleted, name)
	platform := &ocispec.Platform{OS: goruntime.GOOS, Architecture: goruntime.GOARCH}
	criu.Platform, config.Platform, rw.Platform = platform, platform, platform
	return e.index(ctx, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{target, criu, config, rw},
		Annotations: map[string]string{
			indexImage: name, indexRuntime: runcRuntime, indexSnapshotter: cmp.Or(e.r.Snapshotter, defaults.DefaultSnapshotter),
		},
	})
}

// layer writes the changes as one layer.
func (e *export) layer(ctx context.Context, w io.Writer, changed, base []ocispec.Descriptor) (int, error) {
	var deleted []string
	c := newChanges(w, math.MaxInt64) // flatten makes them
	err := piped(func(w io.Writer) (err error) {
		deleted, err = e.flatten(ctx, w, changed, base)
		return err
	}, func(r io.Reader) error { return c.copy(ctx, r, true) })
	if err != nil {
		return 0, err
	}
	for _, name := range deleted {
		if err := c.delete(name); err != nil {
			return 0, err
		}
	}
	return len(deleted), c.close()
}

// blob stores what write produces.
func (e *export) blob(ctx context.Context, mediaType string, write func(io.Writer) error) (ocispec.Descriptor, error) {
	ref := fmt.Sprintf("crac-export-%s-%s", e.r.Dest, mediaType)
	return blob.Store(ctx, e.client.ContentStore(), ref, mediaType, func(w io.Writer) (labels map[string]string, err error) {
		return nil, write(w)
	})
}

// index stores the index, and last names it.
func (e *export) index(ctx context.Context, index ocispec.Index) error {
	data, err := json.Marshal(index)
	if err != nil {
		return err
	}
	desc := ocispec.Descriptor{MediaType: index.MediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	keep := make(map[string]string)
	for i, m := range index.Manifests {
		keep[fmt.Sprintf("containerd.io/gc.ref.content.%d", i)] = m.Digest.String()
	}
	if err := blob.Write(ctx, e.client.ContentStore(), desc, data, keep); err != nil {
		return err
	}
	_, err = e.client.ImageService().Create(ctx, coreimages.Image{
		Name: e.r.Dest, Target: desc, Labels: map[string]string{"containerd.io/checkpoint": "true"},
	})
	if errdefs.IsAlreadyExists(err) {
		return errTaken(e.r.Dest)
	}
	return err
}
