package convert

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	metadata "github.com/checkpoint-restore/checkpointctl/lib"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/mount"
	tararchive "github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/blob"
	"github.com/crac-shim/crac/images/build"
	"github.com/crac-shim/crac/oci"
)

// openBundle makes a source of what criu dump or runc checkpoint left, and the bundle
// that the container was run from. Neither is changed.
func (r *ImportRequest) openBundle(ctx context.Context, client *containerd.Client, work string, emit func(build.Event)) (*source, error) {
	if r.Images == "" || r.Bundle == "" {
		return nil, errors.New("name an archive or an image, or the directories of a dump (--images) and of its bundle (--bundle)")
	}
	if r.Base == "" {
		return nil, errors.New("a bundle does not say which image it was made of; name that image with --base")
	}
	s := &source{report: &Report{From: "a dump with its bundle"}, dump: dump{filepath.Join(work, metadata.CheckpointDirectory)}, id: filepath.Base(filepath.Clean(r.Bundle))}
	if err := os.Mkdir(s.dump.dir, 0o700); err != nil {
		return nil, err
	}
	files, err := images.DumpFiles(r.Images)
	if err != nil {
		return nil, err
	}
	if len(files) > oci.MaxFiles {
		return nil, fmt.Errorf("%w: the dump has %d files", ErrSource, len(files))
	}
	total := int64(0)
	for _, f := range files {
		total += f.Size
	}
	tell := build.Telling(build.Event{Event: images.EventReading, Name: r.Images, Total: total}, emit)
	for _, f := range files {
		if err := link(ctx, filepath.Join(r.Images, f.Name), filepath.Join(s.dump.dir, f.Name), tell); err != nil {
			return nil, err
		}
	}
	st, err := os.Stat(filepath.Join(r.Images, inventoryName))
	if err != nil {
		return nil, err
	}
	s.created = st.ModTime()
	if s.spec, err = readSpec(filepath.Join(r.Bundle, "config.json")); err != nil {
		return nil, err
	}
	if s.spec.Root == nil {
		return nil, fmt.Errorf("%w: config.json of the bundle names no root file system", ErrSource)
	}
	rootfs := s.spec.Root.Path
	if !filepath.IsAbs(rootfs) {
		rootfs = filepath.Join(r.Bundle, rootfs)
	}
	if _, err := os.Stat(filepath.Join(s.dump.dir, oci.DescriptorsName)); errors.Is(err, os.ErrNotExist) {
		// criu by itself keeps no note of the standard streams: they stay what they were.
		if err := s.dump.write(oci.DescriptorsName, []byte("[]")); err != nil {
			return nil, err
		}
	}
	s.changes = r.rootfsChanges(ctx, client, rootfs, emit)
	s.report.take("the differences of %s to %s", rootfs, r.Base)
	return s, nil
}

func readSpec(path string) (*specs.Spec, error) {
	f, err := openRegular(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := readAll(f, path, maxJSON)
	if err != nil {
		return nil, err
	}
	spec := new(specs.Spec)
	if err := json.Unmarshal(data, spec); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrSource, path, err)
	}
	return spec, nil
}

// rootfsChanges compares a root file system with the image that it was made of.
func (r *ImportRequest) rootfsChanges(ctx context.Context, client *containerd.Client, rootfs string, emit func(build.Event)) func(io.Writer) error {
	return func(w io.Writer) error {
		return withImage(ctx, client, r.Snapshotter, r.Base, func(lower string) error {
			c := newChanges(w, r.MaxSize)
			tell := build.Telling(build.Event{Event: images.EventReading, Name: "what differs in " + rootfs}, emit)
			err := piped(func(w io.Writer) error { return tararchive.WriteDiff(ctx, w, lower, rootfs) },
				func(r io.Reader) error { return c.copy(ctx, &blob.Reader{Ctx: ctx, R: r, Tell: tell}, true) })
			if err != nil {
				return fmt.Errorf("compare %s with %s: %w", rootfs, r.Base, err)
			}
			return c.close()
		})
	}
}

// withImage shows the root file system of an image, read-only, for as long as do
// takes.
func withImage(ctx context.Context, client *containerd.Client, snapshotter, ref string, do func(root string) error) (err error) {
	// Without it, containerd collects a snapshot that nobody's container uses.
	ctx, release, err := client.WithLease(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, release(context.WithoutCancel(ctx))) }()
	img, err := client.GetImage(ctx, ref)
	if errdefs.IsNotFound(err) {
		return fmt.Errorf("image %s is not there; pull it: %w", ref, err)
	}
	if err != nil {
		return err
	}
	if unpacked, err := img.IsUnpacked(ctx, snapshotter); err != nil {
		return err
	} else if !unpacked {
		if err := img.Unpack(ctx, snapshotter); err != nil {
			return fmt.Errorf("unpack image %s: %w", ref, err)
		}
	}
	diffIDs, err := img.RootFS(ctx)
	if err != nil {
		return err
	}
	sn := client.SnapshotService(snapshotter)
	key := fmt.Sprintf("crac-convert-%d-%s", os.Getpid(), filepath.Base(ref))
	mounts, err := sn.View(ctx, key, identity.ChainID(diffIDs).String())
	if err != nil {
		return err
	}
	defer func() {
		if rerr := sn.Remove(context.WithoutCancel(ctx), key); rerr != nil && !errdefs.IsNotFound(rerr) {
			err = errors.Join(err, rerr)
		}
	}()
	return mount.WithReadonlyTempMount(ctx, mounts, do)
}

func copyFile(ctx context.Context, from, to string, tell func(n int64)) (err error) {
	in, err := openRegular(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, &blob.Reader{Ctx: ctx, R: in, Tell: tell})
	return errors.Join(err, out.Close())
}
