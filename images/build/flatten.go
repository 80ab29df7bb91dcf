package build

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/crypt"
	"github.com/crac-shim/crac/images/inspect"
	"github.com/crac-shim/crac/images/workdir"
	"github.com/crac-shim/crac/oci"
)

// FlattenRequest says what to flatten.
type FlattenRequest struct {
	// From is a checkpoint image, Ref the name of the one to make of it.
	From, Ref string
	// WorkDir is where the dumps are unpacked for as long as it takes; empty is the
	// system's temporary directory.
	WorkDir     string
	Compression oci.Compression
	// EncryptTo are whom the container's own layers are encrypted for. Keys decrypt From;
	// without any, those of the node are tried.
	EncryptTo, Keys []string
}

// Flatten makes a checkpoint image with a whole dump of one that continues others.
// Memory and files are the same, the manifest says the same but for the parent; the
// same image gives the same bytes. Of an index the result is one, with the images of other
// platforms as they were. ctx must carry the namespace.
func Flatten(ctx context.Context, client *containerd.Client, r FlattenRequest, emit func(Event)) (ocispec.Descriptor, error) {
	return flatten(ctx, servicesOf(client), r, emit)
}

func flatten(ctx context.Context, s services, r FlattenRequest, emit func(Event)) (ocispec.Descriptor, error) {
	return flattenAnd(ctx, s, r, func([]*inspect.Layer, string) error { return nil }, emit)
}

// flattenAnd calls change with the layers that it has read and the directory of the one
// dump that it makes of them, before that is packed.
func flattenAnd(ctx context.Context, s services, r FlattenRequest, change func(chain []*inspect.Layer, dir string) error, emit func(Event)) (_ ocispec.Descriptor, err error) {
	none := ocispec.Descriptor{}
	comp, err := newCompression(r.Compression, r.EncryptTo)
	if err != nil {
		return none, err
	}
	keys, err := ReadKeys(r.Keys)
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
	img, err := s.open(ctx, r.From)
	if err != nil {
		return none, err
	}
	if err := mustEncrypt(r.From, img.Manifest.Layers, r.EncryptTo); err != nil {
		return none, err
	}
	b, err := baseOf(ctx, s, img)
	if err != nil {
		return none, err
	}
	b.dropCheckpoints()
	if err := b.canReseal(comp, keys); err != nil {
		return none, err
	}
	work, err := workdir.New(r.WorkDir)
	if err != nil {
		return none, err
	}
	defer RemoveWork(work, &err, emit)
	chain, dump, err := img.ReadWhole(ctx, s.content, work.Path, Reading(img, keys, emit))
	if err != nil {
		return none, err
	}
	if err := change(chain, dump); err != nil {
		return none, err
	}
	m := *chain[0].Manifest
	m.Parent = nil
	// Under a name that no other build has: another image may be flattened.
	return s.wrap(ctx, b, &m, wrapping{
		id: fmt.Sprintf("flatten-%d-%d", os.Getpid(), time.Now().UnixNano()), ref: r.Ref, dir: dump, spec: chain[0].Spec, comp: comp, keys: keys, from: img,
	}, emit)
}

// RemoveWork removes a directory that was worked in. What is made is made, whether that fails
// or not: it is a warning then, and a part of the error only if there is one.
func RemoveWork(work *workdir.Dir, failed *error, emit func(Event)) {
	err := work.Remove()
	switch {
	case err == nil:
	case *failed != nil:
		*failed = errors.Join(*failed, err)
	default:
		emit(Event{Event: images.EventWarning, Error: fmt.Sprintf("what was unpacked, memory in the open, is still in %s: %v; remove it", work.Path, err)})
	}
}

// Reading are options for reading an image's dumps that tell how it gets on.
func Reading(img *inspect.Image, keys *crypt.Keys, emit func(Event)) inspect.Options {
	return inspect.Options{Keys: keys, Progress: Telling(Event{Event: images.EventReading, Name: img.Name, Total: img.CheckpointSize()}, emit)}
}
