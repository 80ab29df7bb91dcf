package build

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	coreimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/crypt"
	"github.com/crac-shim/crac/images/inspect"
	"github.com/crac-shim/crac/oci"
)

// AdoptRequest says what to make an image of that comes from no container of this
// containerd.
type AdoptRequest struct {
	// Ref names the image to make. An existing name is moved.
	Ref string
	// Base names the image that the container came from. With a BaseTarget it is only
	// a name.
	Base       string
	BaseTarget *ocispec.Descriptor
	// DumpDir is CRIU's directory, Spec the runtime spec that a restore is to have.
	DumpDir string
	Spec    []byte
	// Manifest is complete but for Files and Base.
	Manifest oci.Manifest
	// Changes writes what the container changed in its files, as the tar of an OCI
	// layer; nil for nothing.
	Changes     func(io.Writer) error
	Compression oci.Compression
	// EncryptTo are the recipients of the container's own layers: see oci.CheckRecipients.
	EncryptTo []string
	// Keys decrypt what the base has of an earlier checkpoint; without any, those of the
	// node are tried.
	Keys []string
}

// Adopt makes a checkpoint image of a dump that another tool made. An error leaves no
// image and moves no name. ctx must carry the namespace.
func Adopt(ctx context.Context, client *containerd.Client, r AdoptRequest, emit func(Event)) (ocispec.Descriptor, error) {
	return adopt(ctx, servicesOf(client), r, emit)
}

func adopt(ctx context.Context, s services, r AdoptRequest, emit func(Event)) (_ ocispec.Descriptor, err error) {
	none := ocispec.Descriptor{}
	comp, err := newCompression(r.Compression, r.EncryptTo)
	if err != nil {
		return none, err
	}
	if err := oci.CheckRef(r.Ref); err != nil {
		return none, err
	}
	ctx, release, err := s.hold(ctx, emit)
	if err != nil {
		return none, err
	}
	defer release(&err)
	b, err := s.adoptedBase(ctx, r)
	if err != nil {
		return none, err
	}
	for missing := range b.absent {
		return none, fmt.Errorf("layer %s of the base image %s is not in the content store; fetch the image again (ctr content fetch)", missing, b.Name)
	}
	if err := mustEncrypt(b.Name, b.manifest.Layers, r.EncryptTo); err != nil {
		return none, err
	}
	keys, err := ReadKeys(r.Keys)
	if err != nil {
		return none, err
	}
	if err := b.canReseal(comp, keys); err != nil {
		return none, err
	}
	w := wrapping{id: fmt.Sprintf("import-%d-%d", os.Getpid(), time.Now().UnixNano()), ref: r.Ref, dir: r.DumpDir, spec: r.Spec, comp: comp, keys: keys}
	if r.Changes != nil {
		if w.changes, err = writeLayer(ctx, s.content, "crac-changes-"+w.id, comp, r.Changes); err != nil {
			return none, fmt.Errorf("write the layer of changes: %w", err)
		}
		if w.changes.diffID == emptyTar {
			w.changes = newLayer{}
		}
	}
	m := r.Manifest
	m.Base = b.identity()
	return s.wrap(ctx, b, &m, w, emit)
}

// adoptedBase reads the base image by its name, or by what an index says of it.
func (s services) adoptedBase(ctx context.Context, r AdoptRequest) (*base, error) {
	target := r.BaseTarget
	if target == nil {
		found, err := s.findBase(ctx, r.Base)
		if err != nil {
			return nil, err
		}
		target = &found
	}
	b, err := readBase(ctx, s, r.Base, *target)
	if err != nil {
		return nil, fmt.Errorf("base %w", err)
	}
	b.dropCheckpoints()
	return b, nil
}

// CheckBase tells why an image cannot be a base: it is not there.
func CheckBase(ctx context.Context, client *containerd.Client, name string) error {
	_, err := servicesOf(client).findBase(ctx, name)
	return err
}

func (s services) findBase(ctx context.Context, name string) (ocispec.Descriptor, error) {
	record, err := s.images.Get(ctx, name)
	if errdefs.IsNotFound(err) {
		return ocispec.Descriptor{}, fmt.Errorf("its base image %s is not there; pull it, or name another with the same layers (cracctl import --base): %w", name, err)
	}
	return record.Target, err
}

// wrapping is what goes around a base image's layers.
type wrapping struct {
	id      string // that no other build has
	ref     string
	changes newLayer
	dir     string // of the dump
	spec    []byte
	comp    compression
	keys    *crypt.Keys    // of what the base has of an earlier checkpoint
	from    *inspect.Image // whose place in its index the new one takes, if it is in one; or nil
}

// wrap writes an image with a whole dump on top of a base, and names it.
func (s services) wrap(ctx context.Context, b *base, m *oci.Manifest, w wrapping, emit func(Event)) (ocispec.Descriptor, error) {
	none := ocispec.Descriptor{}
	files, err := images.DumpFiles(w.dir)
	if err != nil {
		return none, err
	}
	total := int64(0)
	for _, f := range files {
		total += f.Size
	}
	dump, _, err := s.writeDump(ctx, IngestRef(w.id), w.dir, w.spec, m, nil, w.comp, total, emit)
	if err != nil {
		return none, fmt.Errorf("pack the dump: %w", err)
	}
	if err := b.reseal(ctx, s.content, w.comp, w.keys, quietly); err != nil {
		return none, err
	}
	own, size, err := writeImage(ctx, s.content, b, w.changes, nil, dump, m)
	if err != nil {
		return none, fmt.Errorf("write image %s: %w", w.ref, err)
	}
	target, err := s.replaced(ctx, w.from, own)
	if err != nil {
		return none, fmt.Errorf("write index %s: %w", w.ref, err)
	}
	if err := s.publish(ctx, coreimages.Image{Name: w.ref, Target: target}, own, b.absent); err != nil {
		return none, err
	}
	s.warnInTheOpen(ctx, target, own, emit)
	emit(Event{
		Event: images.EventDone, Name: w.ref, Digest: target.Digest.String(), Size: size,
		LayerSize: dump.desc.Size, DumpSize: total, ChangesSize: w.changes.size(),
	})
	return target, nil
}
