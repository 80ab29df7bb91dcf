// Package build makes a checkpoint image of a dump in containerd's content store:
// the base image's layers, one layer of the container's own changes, and the
// checkpoint layer on top.
//
// Nothing gets the image's name before everything it refers to is stored. All
// content is held by a lease until then; when a build fails, containerd collects
// it and no name has changed.
package build

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff"
	coreimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/inspect"
	"github.com/crac-shim/crac/images/registry"
	"github.com/crac-shim/crac/oci"
)

// Request and Event are the two halves of a build's protocol. They are defined
// in images, for the shim, which cannot link this package.
type (
	Request = images.BuildRequest
	Event   = images.BuildEvent
)

// LabelFrozen is a label of the image's record in containerd, which is not
// published with the image: how long the container stood still.
const LabelFrozen = oci.ImagePrefix + "frozen"

// LabelPreDumped is another: how many bytes of the memory were copied before that.
const LabelPreDumped = oci.ImagePrefix + "pre-dumped"

// IngestRef is the name under which the checkpoint layer of a container is
// written to the content store, or, when containerd has that locked, what the
// name begins with up to an "@".
func IngestRef(container string) string { return "crac-checkpoint-" + container }

// leaseTime bounds how long content of a build is held whose builder died.
const leaseTime = 6 * time.Hour

// services are what a build uses of containerd.
type services struct {
	containers containers.Store
	images     coreimages.Store
	content    content.Store
	leases     leases.Manager
	diff       diff.Comparer
	snapshots  func(name string) snapshots.Snapshotter
	platform   platforms.MatchComparer
}

func servicesOf(client *containerd.Client) services {
	return services{
		containers: client.ContainerService(),
		images:     client.ImageService(),
		content:    client.ContentStore(),
		leases:     client.LeasesService(),
		diff:       client.DiffService(),
		snapshots:  client.SnapshotService,
		platform:   platforms.Default(),
	}
}

// Build makes the checkpoint image that r asks for and returns its manifest's
// descriptor, or that of the index that lists it, also beside a *PushError, which says that only the push failed. ctx
// must carry the namespace. The container must stay frozen until emit was called
// with images.EventDiffed; it is called by one goroutine at a time.
func Build(ctx context.Context, client *containerd.Client, r Request, emit func(Event)) (ocispec.Descriptor, error) {
	return build(ctx, servicesOf(client), r, emit)
}

func build(ctx context.Context, s services, r Request, emit func(Event)) (_ ocispec.Descriptor, err error) {
	none := ocispec.Descriptor{}
	comp, err := newCompression(r.Compression, r.EncryptTo)
	if err != nil {
		return none, err
	}
	check := oci.CheckRef
	if r.Push {
		check = oci.CheckPushRef
	}
	if err := check(r.Ref); err != nil {
		return none, err
	}
	spec, own, err := readSpec(r.SpecPath)
	if err != nil {
		return none, err
	}
	continues, err := images.ContinuesPreDump(r.DumpDir, r.PreDumpDir)
	if err != nil {
		return none, err
	}

	ctx, release, err := s.hold(ctx, emit)
	if err != nil {
		return none, err
	}
	defer release(&err)

	c, err := s.containers.Get(ctx, r.Container)
	if err != nil {
		return none, fmt.Errorf("find container %s: %w", r.Container, err)
	}
	if c.Image == "" || c.SnapshotKey == "" {
		return none, fmt.Errorf("container %s was not made from an image, so there is none to put a checkpoint on; make a plain checkpoint (ctr tasks checkpoint --image-path)", c.ID)
	}
	sn := s.snapshots(c.Snapshotter)
	info, err := sn.Stat(ctx, c.SnapshotKey)
	if err != nil {
		return none, fmt.Errorf("find the root file system of container %s: %w", c.ID, err)
	}
	changes, err := takeChanges(ctx, s, sn, c, info, own, comp)
	if err != nil {
		return none, fmt.Errorf("take the changes of container %s: %w", c.ID, err)
	}
	emit(Event{Event: images.EventDiffed, ChangesSize: changes.size()})
	labels := make(map[string]string)
	if !r.Frozen.IsZero() {
		labels[LabelFrozen] = time.Since(r.Frozen).Round(time.Millisecond).String()
	}
	preDumped, err := mergePreDump(ctx, r, continues)
	if err != nil {
		return none, fmt.Errorf("put the dump of container %s together: %w", c.ID, err)
	}
	if preDumped > 0 {
		labels[LabelPreDumped] = strconv.FormatInt(preDumped, 10)
	}
	total, memory, err := dumpSize(r.DumpDir)
	if err != nil {
		return none, err
	}

	// Only now: the container has stood still until here.
	parent, err := own.unpacked(ctx, sn, info.Parent)
	if err != nil {
		return none, fmt.Errorf("container %s: %w", c.ID, err)
	}
	base, err := loadBase(ctx, s, c.Image, parent)
	if err != nil {
		return none, fmt.Errorf("container %s: %w", c.ID, err)
	}
	if missing := base.missing(ctx, s.content); missing != "" {
		emit(Event{Event: images.EventWarning, Error: fmt.Sprintf("layer %s of %s is not in the content store: the checkpoint image works on this host but cannot be pushed; fetch the base image again first (ctr content fetch)",
			missing, c.Image)})
	}

	if err := mustEncrypt(c.Image, base.made, r.EncryptTo); err != nil {
		return none, fmt.Errorf("container %s: %w", c.ID, err)
	}

	m := r.Manifest
	m.Base = base.identity()
	p, err := loadParent(ctx, s, r, &m)
	if err != nil {
		return none, err
	}
	dump, err := writeDump(ctx, s.content, r, spec, &m, p, comp, total, emit)
	if err != nil {
		return none, fmt.Errorf("pack the dump of container %s: %w", c.ID, err)
	}

	target, size, err := writeImage(ctx, s.content, base, changes, p.layersOrNil(), dump, &m)
	if err != nil {
		return none, fmt.Errorf("write image %s: %w", r.Ref, err)
	}
	if r.Index {
		lists, err := s.lists(ctx, c.Image, r.Ref)
		if err == nil {
			target, err = writeIndex(ctx, s.content, target, lists...)
		}
		if err != nil {
			return none, fmt.Errorf("write index %s: %w", r.Ref, err)
		}
	}
	stored := int64(0)
	for _, f := range m.Files {
		stored += f.Size
	}
	if err := name(ctx, s.images, coreimages.Image{Name: r.Ref, Target: target, Labels: labels}); err != nil {
		return none, fmt.Errorf("name image %s: %w", r.Ref, err)
	}
	emit(Event{
		Event: images.EventDone, Name: r.Ref, Digest: target.Digest.String(), Size: size,
		LayerSize: dump.desc.Size, DumpSize: stored, ChangesSize: changes.size(),
		MemorySize: memory, PreDumpedSize: preDumped,
	})
	if r.Push {
		return push(ctx, s, r, target, emit)
	}
	return target, nil
}

// mergePreDump makes a whole dump of one that continues a pre-dump, and tells how many
// bytes of its memory were copied ahead.
func mergePreDump(ctx context.Context, r Request, continues bool) (int64, error) {
	if !continues {
		return 0, nil
	}
	page := uint64(r.Manifest.Host.PageSize)
	pages, err := images.Merge(ctx, []string{r.DumpDir, r.PreDumpDir}, page)
	if err != nil {
		return 0, err
	}
	// Nobody needs it any more, and it is as large as the memory.
	return int64(pages * page), os.RemoveAll(r.PreDumpDir)
}

// dumpSize adds up a dump's files, and those that hold its memory.
func dumpSize(dir string) (total, memory int64, err error) {
	files, err := images.DumpFiles(dir)
	for _, f := range files {
		total += f.Size
		if strings.HasPrefix(f.Name, "pages-") {
			memory += f.Size
		}
	}
	return total, memory, err
}

// push sends the finished image to its registry, with the settings of the host
// that it was built on.
func push(ctx context.Context, s services, r Request, target ocispec.Descriptor, emit func(Event)) (ocispec.Descriptor, error) {
	config, err := registry.DefaultConfig()
	if err != nil {
		return target, &PushError{err}
	}
	if r.Index {
		all, err := makeIndex(ctx, s, config, r.Ref)
		if err != nil {
			return target, &PushError{err}
		}
		target = all
	}
	p, err := registry.Push(ctx, config, s.content, r.Ref, target, func(p registry.Progress) {
		emit(Event{Event: images.EventPushing, Done: p.Done, Total: p.Total, Uploaded: p.Uploaded})
	})
	if err != nil {
		return target, &PushError{err}
	}
	emit(Event{Event: images.EventPushed, Name: r.Ref, Digest: target.Digest.String(), Done: p.Done, Total: p.Total, Uploaded: p.Uploaded})
	return target, nil
}

// PushError is a push that failed: the image is there, under its name.
type PushError struct{ Err error }

func (e *PushError) Error() string {
	return fmt.Sprintf("%v (the image is complete in containerd; cracctl push tries again)", e.Err)
}

func (e *PushError) Unwrap() error { return e.Err }

func readSpec(path string) ([]byte, *owners, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, nil, fmt.Errorf("read the container's runtime spec: %w", err)
	}
	var spec specs.Spec
	if err := json.Unmarshal(data, &spec); err != nil {
		return nil, nil, fmt.Errorf("the container's runtime spec %s is not JSON of the kind it should be: %w", path, err)
	}
	return data, ownersOf(&spec), nil
}

// open reads the metadata of the image that a new one is to be made of.
func (s services) open(ctx context.Context, from string) (*inspect.Image, error) {
	record, err := s.images.Get(ctx, from)
	if err != nil {
		if errdefs.IsNotFound(err) {
			return nil, fmt.Errorf("image %s is not there: %w", from, err)
		}
		return nil, err
	}
	return inspect.Open(ctx, s.content, from, record.Target, s.platform)
}

// hold is withLease for what has events: unless all has failed anyway, that the lease
// stays is to be known.
func (s services) hold(ctx context.Context, emit func(Event)) (_ context.Context, release func(failed *error), _ error) {
	ctx, end, err := withLease(ctx, s.leases)
	if err != nil {
		return nil, nil, err
	}
	return ctx, func(failed *error) {
		if err := end(); err != nil && *failed == nil {
			// The image is there; the lease only keeps content that it
			// refers to anyway, until it expires.
			emit(Event{Event: images.EventWarning, Error: err.Error()})
		}
	}, nil
}

// withLease holds what ctx stores from now on. release gives it up, also when
// ctx was cancelled.
func withLease(ctx context.Context, lm leases.Manager) (_ context.Context, release func() error, _ error) {
	l, err := lm.Create(ctx, leases.WithRandomID(), leases.WithExpiration(leaseTime))
	if err != nil {
		return nil, nil, fmt.Errorf("get a lease: %w", err)
	}
	return leases.WithLease(ctx, l.ID), func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		defer cancel()
		if err := lm.Delete(ctx, l); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("give up lease %s: %w; it expires in %s", l.ID, err, leaseTime)
		}
		return nil
	}, nil
}

// name gives the image its name, or moves the name to it.
func name(ctx context.Context, store coreimages.Store, img coreimages.Image) error {
	// Somebody may remove the name between the two calls.
	for range 3 {
		_, err := store.Create(ctx, img)
		if err == nil || !errdefs.IsAlreadyExists(err) {
			return err
		}
		_, err = store.Update(ctx, img, "target", "labels."+LabelFrozen, "labels."+LabelPreDumped)
		if err == nil || !errdefs.IsNotFound(err) {
			return err
		}
	}
	return errors.New("the name keeps being made and removed by others")
}
