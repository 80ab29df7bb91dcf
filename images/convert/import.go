package convert

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	coreimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/blob"
	"github.com/crac-shim/crac/images/build"
	"github.com/crac-shim/crac/images/compress"
	"github.com/crac-shim/crac/images/inspect"
	"github.com/crac-shim/crac/images/workdir"
	"github.com/crac-shim/crac/oci"
)

// ImportRequest says what to import.
type ImportRequest struct {
	// Source is an archive's path or an image's name. Empty: Images and Bundle are
	// the directories of a dump and of the bundle that it was made of.
	Source, Images, Bundle string
	// Ref names the image to make.
	Ref string
	// Base names the image that the container came from, where the source does not
	// or where it has another name here.
	Base string
	// Keep are mount points that stay in the dump though a clone could do without.
	Keep []string
	// WorkDir is where the source is unpacked; empty is the system's temporary
	// directory. MaxSize bounds what it may be then, in bytes.
	WorkDir string
	MaxSize int64
	// Snapshotter shows the base image for a comparison; empty is containerd's default.
	Snapshotter string
	Compression oci.Compression
	// EncryptTo are the recipients of the image's own layers: see oci.CheckRecipients.
	EncryptTo []string
	// Keys decrypt what the base has of an earlier checkpoint; without any, those of the
	// node are tried.
	Keys []string
}

// Import makes a checkpoint image of another tool's checkpoint. The report is there
// beside an error, too, as far as it got. ctx must carry the namespace.
func Import(ctx context.Context, client *containerd.Client, r ImportRequest, emit func(build.Event)) (_ ocispec.Descriptor, _ *Report, err error) {
	none := ocispec.Descriptor{}
	// What is wrong with the request shows before anything is unpacked for it.
	if err := oci.CheckRef(r.Ref); err != nil {
		return none, nil, err
	}
	if _, err := compress.Of(r.Compression); err != nil {
		return none, nil, err
	}
	if r.Base != "" {
		if err := build.CheckBase(ctx, client, r.Base); err != nil {
			return none, nil, err
		}
	}
	work, err := workdir.New(r.WorkDir)
	if err != nil {
		return none, nil, err
	}
	defer build.RemoveWork(work, &err, emit)
	s, err := r.open(ctx, client, work.Path, emit)
	if err != nil {
		return none, nil, err
	}
	if err := s.adapt(ctx, r.Keep, emit); err != nil {
		return none, s.report, err
	}
	m, err := s.manifest(r.Ref)
	if err != nil {
		return none, s.report, err
	}
	spec, err := json.Marshal(s.spec)
	if err != nil {
		return none, s.report, err
	}
	if r.Base != "" {
		s.base, s.target = r.Base, nil
	}
	if s.base == "" && s.target == nil {
		return none, s.report, errors.New("it does not say which image its container came from; name that image with --base")
	}
	desc, err := build.Adopt(ctx, client, build.AdoptRequest{
		Ref: r.Ref, Base: s.base, BaseTarget: s.target, DumpDir: s.dump.dir, Spec: spec, Manifest: m, Changes: s.changes, Compression: r.Compression, EncryptTo: r.EncryptTo, Keys: r.Keys,
	}, emit)
	return desc, s.report, err
}

// open finds out what the source is, and unpacks it.
func (r *ImportRequest) open(ctx context.Context, client *containerd.Client, work string, emit func(build.Event)) (*source, error) {
	if r.Source == "" {
		return r.openBundle(ctx, client, work, emit)
	}
	record, err := client.ImageService().Get(ctx, r.Source)
	switch {
	case err == nil:
		return r.openImage(ctx, client.ContentStore(), record, work, emit)
	case !errdefs.IsNotFound(err):
		return nil, err
	}
	st, err := os.Stat(r.Source)
	switch {
	case err != nil:
		return nil, fmt.Errorf("there is neither an image nor a file %s: see cracctl import --help for what can be imported", r.Source)
	case st.IsDir():
		return nil, fmt.Errorf("%s is a directory: for the dump of criu or runc say --images %s and --bundle", r.Source, r.Source)
	case !st.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a regular file", r.Source)
	}
	return unpackArchive(ctx, r.Source, work, r.MaxSize, emit)
}

// openImage reads an image that holds an archive, or containerd's own index.
func (r *ImportRequest) openImage(ctx context.Context, store content.Store, record coreimages.Image, work string, emit func(build.Event)) (*source, error) {
	if coreimages.IsIndexType(record.Target.MediaType) {
		index, err := readIndex(ctx, store, record.Target)
		if err != nil {
			return nil, err
		}
		if index.has(coreimages.MediaTypeContainerd1Checkpoint) {
			return index.open(ctx, store, record.Name, work, r.MaxSize, emit)
		}
	}
	img, err := inspect.Open(ctx, store, record.Name, record.Target, platforms.Default())
	if err != nil {
		return nil, err
	}
	if img.Checkpoint >= 0 {
		return nil, fmt.Errorf("%s is a checkpoint image of this project's already: run it, or give it another name with ctr images tag", record.Name)
	}
	a, err := prepare(work, r.MaxSize)
	if err != nil {
		return nil, err
	}
	defer a.close()
	tell := reading(emit, record.Name, img.Manifest.Layers...)
	for _, l := range img.Manifest.Layers {
		if err := readBlob(ctx, store, l, a, archivePlace, tell); err != nil {
			return nil, fmt.Errorf("image %s: %w", record.Name, err)
		}
	}
	if len(a.seen) == 0 {
		return nil, fmt.Errorf("image %s: %w: it is an ordinary image; what can be imported says cracctl import --help", record.Name, ErrSource)
	}
	s, err := engineArchive(ctx, a, work, r.MaxSize, img.Manifest.Annotations)
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", record.Name, err)
	}
	s.report.From = cmp.Or(s.report.From, "a checkpoint") + " in an image"
	return s, nil
}

// readBlob unpacks a tar in the content store.
func readBlob(ctx context.Context, store content.Provider, desc ocispec.Descriptor, a *archive, place func(string) string, tell func(n int64)) error {
	ra, err := store.ReaderAt(ctx, desc)
	if err != nil {
		if errdefs.IsNotFound(err) {
			return fmt.Errorf("%s is not in the content store; fetch the image again (ctr content fetch): %w", desc.Digest, err)
		}
		return err
	}
	defer ra.Close()
	return a.read(ctx, &blob.Reader{Ctx: ctx, R: content.NewReader(ra), Tell: tell}, place)
}

// reading tells how much of some blobs was read.
func reading(emit func(build.Event), name string, blobs ...ocispec.Descriptor) (tell func(n int64)) {
	total := int64(0)
	for _, b := range blobs {
		total += b.Size
	}
	return build.Telling(build.Event{Event: images.EventReading, Name: name, Total: total}, emit)
}

// link gives a file a second name, or copies it where that is not possible.
func link(ctx context.Context, from, to string, tell func(n int64)) error {
	if err := os.Link(from, to); err == nil {
		return nil
	}
	return copyFile(ctx, from, to, tell)
}
