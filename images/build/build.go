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
	"slices"
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
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/blob"
	"github.com/crac-shim/crac/images/crypt"
	"github.com/crac-shim/crac/images/inspect"
	"github.com/crac-shim/crac/images/registry"
	"github.com/crac-shim/crac/oci"
)

// Request, Dump and Event are a build's protocol. They are defined in images, for the
// shim, which cannot link this package.
type (
	Request = images.BuildRequest
	Dump    = images.BuildDump
	Event   = images.BuildEvent
)

// LabelFrozen is a label of the image's record in containerd, which is not
// published with the image: how long the container stood still.
const LabelFrozen = oci.ImagePrefix + "frozen"

// LabelPreDumped is another: how many bytes of the memory were copied before that.
const LabelPreDumped = oci.ImagePrefix + "pre-dumped"

// LabelReused is another: how many bytes of the memory the parent has, of how many that a
// whole image would store, with a slash between; without a parent there is none.
const LabelReused = oci.ImagePrefix + "reused"

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

// Prepared is a checkpoint image that can be made as soon as there is a dump.
type Prepared struct {
	services
	r     Request
	emit  func(Event)
	lease leases.Lease

	comp      compression
	keys      *crypt.Keys
	spec      []byte
	own       *owners
	container containers.Container
	sn        snapshots.Snapshotter
	info      snapshots.Info // of the container's root file system
	base      *base
	parent    *inspect.Image // to continue; nil for none
}

// Prepare looks at everything that an image needs but the dump, and refuses what would be
// refused once the container stands still for it. ctx must carry the namespace. What is
// there is held until Close, which must be called. emit is called by one goroutine at a
// time.
func Prepare(ctx context.Context, client *containerd.Client, r Request, emit func(Event)) (*Prepared, error) {
	return prepare(ctx, servicesOf(client), r, emit)
}

func prepare(ctx context.Context, s services, r Request, emit func(Event)) (_ *Prepared, err error) {
	check := oci.CheckRef
	if r.Push {
		check = oci.CheckPushRef
	}
	if err := check(r.Ref); err != nil {
		return nil, err
	}
	p := &Prepared{services: s, r: r, emit: emit}
	if p.comp, err = newCompression(r.Compression, r.EncryptTo); err != nil {
		return nil, err
	}
	if p.keys, err = ReadKeys(r.Keys); err != nil {
		return nil, err
	}
	if p.spec, p.own, err = readSpec(r.SpecPath); err != nil {
		return nil, err
	}
	if p.lease, err = newLease(ctx, s.leases); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			p.Close(ctx, err)
		}
	}()
	ctx = leases.WithLease(ctx, p.lease.ID)
	if p.container, err = s.containers.Get(ctx, r.Container); err != nil {
		return nil, fmt.Errorf("find container %s: %w", r.Container, err)
	}
	if err := p.readImages(ctx); err != nil {
		return nil, fmt.Errorf("container %s: %w", r.Container, err)
	}
	m := r.Manifest
	m.Base = p.base.identity()
	m.Files = []oci.File{{Name: "inventory.img", Digest: emptyTar.String()}} // whatever they will be
	if err := m.Validate(); err != nil {
		return nil, err
	}
	return p, nil
}

// readImages reads the image that the container came from, and the one to continue.
func (p *Prepared) readImages(ctx context.Context) error {
	c := p.container
	if c.Image == "" || c.SnapshotKey == "" {
		return errors.New("it was not made from an image, so there is none to put a checkpoint on; make a plain checkpoint (ctr tasks checkpoint --image-path)")
	}
	p.sn = p.snapshots(c.Snapshotter)
	var err error
	if p.info, err = p.sn.Stat(ctx, c.SnapshotKey); err != nil {
		return fmt.Errorf("find its root file system: %w", err)
	}
	unpacked, err := p.own.unpacked(ctx, p.sn, p.info.Parent)
	if err != nil {
		return err
	}
	if p.base, err = loadBase(ctx, p.services, c.Image, unpacked); err != nil {
		return err
	}
	if err := mustEncrypt(c.Image, p.base.made, p.r.EncryptTo); err != nil {
		return err
	}
	if err := p.base.canReseal(p.comp, p.keys); err != nil {
		return err
	}
	for missing := range p.base.absent {
		p.emit(Event{Event: images.EventWarning, Error: fmt.Sprintf("layer %s of %s is not in the content store: the checkpoint image works on this host but cannot be pushed; fetch the base image again first (ctr content fetch)",
			missing, c.Image)})
		break
	}
	p.parent, err = openParent(ctx, p.services, p.r, p.keys)
	return err
}

// Close lets go what was held. failed is why there is no image, if there is none.
func (p *Prepared) Close(ctx context.Context, failed error) {
	if err := endLease(ctx, p.leases, p.lease); err != nil && failed == nil {
		// The image is there; the lease only keeps content that it refers to
		// anyway, until it expires.
		p.emit(Event{Event: images.EventWarning, Error: err.Error()})
	}
}

// Finish makes the image of a dump, and returns its manifest's descriptor, or that of the
// index that lists it, also beside a *PushError, which says that only the push failed.
// The container must stay frozen until emit was called with images.EventDiffed. It may be
// called once.
func (p *Prepared) Finish(ctx context.Context, d Dump) (ocispec.Descriptor, error) {
	none := ocispec.Descriptor{}
	ctx = leases.WithLease(ctx, p.lease.ID)
	r, c := p.r, p.container
	r.BuildDump = d
	continues, err := images.ContinuesPreDump(d.DumpDir, d.PreDumpDir)
	if err != nil {
		return none, err
	}
	changes, err := takeChanges(ctx, p.services, p.sn, c, p.info, p.own, p.comp)
	if err != nil {
		return none, fmt.Errorf("take the changes of container %s: %w", c.ID, err)
	}
	p.emit(Event{Event: images.EventDiffed, ChangesSize: changes.size()})
	// The container has stood still until here.
	labels := make(map[string]string)
	if !d.Frozen.IsZero() {
		labels[LabelFrozen] = time.Since(d.Frozen).Round(time.Millisecond).String()
	}
	preDumped, err := mergePreDump(ctx, r, continues)
	if err != nil {
		return none, fmt.Errorf("put the dump of container %s together: %w", c.ID, err)
	}
	if preDumped > 0 {
		labels[LabelPreDumped] = strconv.FormatInt(preDumped, 10)
	}
	total, memory, err := dumpSize(d.DumpDir)
	if err != nil {
		return none, err
	}
	m := d.Manifest
	m.Base = p.base.identity()
	continued, err := p.readParent(ctx, &m)
	if err != nil {
		return none, err
	}
	dump, reused, err := p.writeDump(ctx, IngestRef(c.ID), d.DumpDir, p.spec, &m, continued.memoryOrNil(), p.comp, total, p.emit)
	if err != nil {
		return none, fmt.Errorf("pack the dump of container %s: %w", c.ID, err)
	}
	if continued != nil {
		// Zeroes, which are most of some workloads' memory, are stored nowhere.
		whole := reused
		for _, f := range m.Files {
			if images.IsPages(f.Name) {
				whole += f.Size
			}
		}
		labels[LabelReused] = fmt.Sprintf("%d/%d", reused, whole)
		if warning := ReusedWarning(r.Parent, reused, whole); warning != "" {
			p.emit(Event{Event: images.EventWarning, Error: warning})
		}
	}
	if err := p.base.reseal(ctx, p.content, p.comp, p.keys, quietly); err != nil {
		return none, fmt.Errorf("container %s: %w", c.ID, err)
	}
	own, size, err := writeImage(ctx, p.content, p.base, changes, continued.layersOrNil(), dump, &m)
	if err != nil {
		return none, fmt.Errorf("write image %s: %w", r.Ref, err)
	}
	target := own
	if r.Index {
		lists, err := p.lists(ctx, c.Image, r.Ref)
		if err == nil {
			target, err = writeIndex(ctx, p.content, own, lists...)
		}
		if err != nil {
			return none, fmt.Errorf("write index %s: %w", r.Ref, err)
		}
	}
	stored := int64(0)
	for _, f := range m.Files {
		stored += f.Size
	}
	if err := p.publish(ctx, coreimages.Image{Name: r.Ref, Target: target, Labels: labels}, own, p.base.absent); err != nil {
		return none, err
	}
	p.warnInTheOpen(ctx, target, own, p.emit)
	p.emit(Event{
		Event: images.EventDone, Name: r.Ref, Digest: target.Digest.String(), Size: size,
		LayerSize: dump.desc.Size, DumpSize: stored, ChangesSize: changes.size(),
		MemorySize: memory, PreDumpedSize: preDumped, ReusedSize: reused,
	})
	if r.Push {
		return push(ctx, p.services, r, target, p.emit)
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

// open reads the metadata of the image that a new one is to be made of, and holds the
// image.
func (s services) open(ctx context.Context, from string) (*inspect.Image, error) {
	record, err := s.images.Get(ctx, from)
	if err != nil {
		if errdefs.IsNotFound(err) {
			return nil, fmt.Errorf("image %s is not there: %w", from, err)
		}
		return nil, err
	}
	return s.openTarget(ctx, from, record.Target)
}

// openTarget is open for what the name of an image means.
func (s services) openTarget(ctx context.Context, name string, target ocispec.Descriptor) (*inspect.Image, error) {
	if err := s.keep(ctx, target); err != nil {
		return nil, err
	}
	img, err := inspect.Open(ctx, s.content, name, target, s.platform)
	if err != nil {
		return nil, err
	}
	if img.Desc.Digest != target.Digest {
		if err := s.keepParts(ctx, target, img.Desc); err != nil {
			return nil, err
		}
	}
	return img, s.keepParts(ctx, img.Desc, append([]ocispec.Descriptor{img.Manifest.Config}, img.Manifest.Layers...)...)
}

// keepParts is keep for what is held with what refers to it, whole, unless that came
// without containerd's labels. To hold more costs containerd a write to its disk each.
func (s services) keepParts(ctx context.Context, whole ocispec.Descriptor, parts ...ocispec.Descriptor) error {
	info, err := s.content.Info(ctx, whole.Digest)
	if err != nil {
		return err
	}
	held := make(map[string]bool)
	for k, v := range info.Labels {
		if strings.HasPrefix(k, gcContent) {
			held[v] = true
		}
	}
	return s.keep(ctx, slices.DeleteFunc(slices.Clone(parts), func(d ocispec.Descriptor) bool { return held[d.Digest.String()] })...)
}

// gcContent begins the labels by which containerd keeps content with what refers to it.
const gcContent = "containerd.io/gc.ref.content"

// keep makes the lease of ctx hold content that is there already, and that only the name
// of an image holds otherwise: somebody may remove that name.
func (s services) keep(ctx context.Context, all ...ocispec.Descriptor) error {
	id, ok := leases.FromContext(ctx)
	if !ok {
		return errors.New("no lease")
	}
	for _, d := range all {
		if err := s.leases.AddResource(ctx, leases.Lease{ID: id}, leases.Resource{ID: d.Digest.String(), Type: "content"}); err != nil {
			return fmt.Errorf("hold %s: %w", d.Digest, err)
		}
	}
	return nil
}

// absent are an image's layers whose content is not stored: containerd can be told to
// discard it once unpacked.
type absent map[digest.Digest]bool

func (s services) absentOf(ctx context.Context, m ocispec.Manifest) (absent, error) {
	gone := make(absent)
	for _, l := range m.Layers {
		_, err := s.content.Info(ctx, l.Digest)
		if err != nil && !errdefs.IsNotFound(err) {
			return nil, err
		}
		if err != nil {
			gone[l.Digest] = true
		}
	}
	return gone, nil
}

// hold is a lease for what has events: unless all has failed anyway, that the lease
// stays is to be known.
func (s services) hold(ctx context.Context, emit func(Event)) (_ context.Context, release func(failed *error), _ error) {
	l, err := newLease(ctx, s.leases)
	if err != nil {
		return nil, nil, err
	}
	return leases.WithLease(ctx, l.ID), func(failed *error) {
		if err := endLease(ctx, s.leases, l); err != nil && *failed == nil {
			emit(Event{Event: images.EventWarning, Error: err.Error()})
		}
	}, nil
}

// newLease holds what is stored under it from now on.
func newLease(ctx context.Context, lm leases.Manager) (leases.Lease, error) {
	l, err := lm.Create(ctx, leases.WithRandomID(), leases.WithExpiration(leaseTime))
	if err != nil {
		return l, fmt.Errorf("get a lease: %w", err)
	}
	return l, nil
}

// endLease gives a lease up, also when ctx was cancelled.
func endLease(ctx context.Context, lm leases.Manager, l leases.Lease) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	if err := lm.Delete(ctx, l); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("give up lease %s: %w; it expires in %s", l.ID, err, leaseTime)
	}
	return nil
}

// publish gives an image its name once all that it refers to is there, but for what has
// been absent from the start. own is the manifest, which target is or lists.
func (s services) publish(ctx context.Context, img coreimages.Image, own ocispec.Descriptor, gone absent) error {
	var m ocispec.Manifest
	if err := blob.ReadJSON(ctx, s.content, own, &m); err != nil {
		return fmt.Errorf("name image %s: %w", img.Name, err)
	}
	for _, part := range append(m.Layers, m.Config) {
		if _, err := s.content.Info(ctx, part.Digest); err != nil && !gone[part.Digest] {
			return fmt.Errorf("name image %s: its part %s was removed meanwhile: %w; try again, with the images it is made of pulled again", img.Name, part.Digest, err)
		}
	}
	if err := name(ctx, s.images, img); err != nil {
		return fmt.Errorf("name image %s: %w", img.Name, err)
	}
	return nil
}

// name gives the image its name, or moves the name to it.
func name(ctx context.Context, store coreimages.Store, img coreimages.Image) error {
	// Somebody may remove the name between the two calls.
	for range 3 {
		_, err := store.Create(ctx, img)
		if err == nil || !errdefs.IsAlreadyExists(err) {
			return err
		}
		_, err = store.Update(ctx, img, "target", "labels."+LabelFrozen, "labels."+LabelPreDumped, "labels."+LabelReused)
		if err == nil || !errdefs.IsNotFound(err) {
			return err
		}
	}
	return errors.New("the name keeps being made and removed by others")
}
