package convert

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"path/filepath"

	metadata "github.com/checkpoint-restore/checkpointctl/lib"
	"github.com/containerd/containerd/v2/core/content"
	coreimages "github.com/containerd/containerd/v2/core/images"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/crac-shim/crac/images/blob"
	"github.com/crac-shim/crac/images/build"
)

// Annotations of containerd's index: client.Container.Checkpoint writes the first,
// client.Task.Checkpoint the second.
const (
	indexImage       = ocispec.AnnotationRefName
	indexTaskImage   = "image.name"
	indexRuntime     = "io.containerd.checkpoint.runtime"
	indexSnapshotter = "io.containerd.checkpoint.snapshotter"
)

// nativeIndex is a checkpoint as containerd keeps it in its content store.
type nativeIndex struct{ ocispec.Index }

func readIndex(ctx context.Context, store content.Provider, desc ocispec.Descriptor) (*nativeIndex, error) {
	i := new(nativeIndex)
	if err := blob.ReadJSON(ctx, store, desc, &i.Index); err != nil {
		return nil, fmt.Errorf("%w: its index: %w", ErrSource, err)
	}
	return i, nil
}

// find gives the first blob of a type.
func (i *nativeIndex) find(mediaTypes ...string) *ocispec.Descriptor {
	for n := range i.Manifests {
		for _, t := range mediaTypes {
			if i.Manifests[n].MediaType == t {
				return &i.Manifests[n]
			}
		}
	}
	return nil
}

func (i *nativeIndex) has(mediaType string) bool { return i.find(mediaType) != nil }

// open makes a source of the index.
func (i *nativeIndex) open(ctx context.Context, store content.Provider, name, work string, maxSize int64, emit func(build.Event)) (*source, error) {
	a, err := prepare(work, maxSize)
	if err != nil {
		return nil, err
	}
	defer a.close()
	s := &source{report: &Report{From: "containerd's own checkpoint"}, dump: dump{filepath.Join(work, metadata.CheckpointDirectory)}, id: name}
	criu := *i.find(coreimages.MediaTypeContainerd1Checkpoint)
	if err := readBlob(ctx, store, criu, a, dumpPlace, reading(emit, name, criu)); err != nil {
		return nil, err
	}
	s.created = a.dumped
	config := i.find(coreimages.MediaTypeContainerd1CheckpointConfig)
	if config == nil {
		return nil, fmt.Errorf("%w: its index has no spec of the container", ErrSource)
	}
	if s.spec, err = readConfig(ctx, store, *config); err != nil {
		return nil, err
	}
	s.base = cmp.Or(i.Annotations[indexImage], i.Annotations[indexTaskImage])
	// What the index lists is the very image, whatever its name means by now.
	s.target = i.find(ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex, coreimages.MediaTypeDockerSchema2Manifest, coreimages.MediaTypeDockerSchema2ManifestList)
	if rw := i.find(ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd, ocispec.MediaTypeImageLayer); rw != nil {
		s.report.take("changes of the root file system")
		s.changes = func(w io.Writer) error {
			ra, err := store.ReaderAt(ctx, *rw)
			if err != nil {
				return err
			}
			defer ra.Close()
			c := newChanges(w, maxSize)
			tell := reading(emit, "the changed files", *rw)
			if err := c.copy(ctx, &blob.Reader{Ctx: ctx, R: content.NewReader(ra), Tell: tell}, true); err != nil {
				return err
			}
			return c.close()
		}
	} else {
		s.report.leave("changes of the root file system: the checkpoint was made without them (ctr containers checkpoint --rw)")
	}
	return s, nil
}

// readConfig reads the spec in the form in which containerd stores it.
func readConfig(ctx context.Context, store content.Provider, desc ocispec.Descriptor) (*specs.Spec, error) {
	data, err := content.ReadBlob(ctx, blob.Small{Provider: store}, desc)
	if err != nil {
		return nil, fmt.Errorf("%w: its spec: %w", ErrSource, err)
	}
	var stored anypb.Any
	spec := new(specs.Spec)
	if err := proto.Unmarshal(data, &stored); err != nil {
		return nil, fmt.Errorf("%w: its spec: %w", ErrSource, err)
	}
	if err := json.Unmarshal(stored.GetValue(), spec); err != nil {
		return nil, fmt.Errorf("%w: its spec: %w", ErrSource, err)
	}
	return spec, nil
}
