package main

import (
	"context"
	"fmt"
	"os"

	"github.com/containerd/containerd/api/types/runc/options"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/images"

	"github.com/crac-shim/crac/oci"
)

// requireRestore makes a restore that became a cold start an error, not a slow success.
var requireRestore = map[string]string{oci.AnnotationPrefix + "restore": string(oci.RestoreRequire)}

// fromImage is this project: saved by `cracctl checkpoint` as an image, which is unpacked once.
type fromImage struct{ b *bench }

func (f *fromImage) name() string { return "crac" }

func (f *fromImage) can(*workload) error { return nil }

func (f *fromImage) prepare(ctx context.Context, w *workload) (saved, error) {
	s, err := f.b.prepareRuntime(ctx, f, w)
	if err != nil {
		return nil, err
	}
	img := s.(*remembered).saved.(*checkpointImage).img
	if err := img.Unpack(ctx, ""); err != nil {
		return nil, fmt.Errorf("unpack: %w", err)
	}
	return s, nil
}

func (f *fromImage) stageCold(ctx context.Context, w *workload, n *network) (instance, error) {
	img, err := f.b.image(ctx, w)
	if err != nil {
		return nil, err
	}
	return f.b.create(ctx, cracRuntime, nil, img, w, n, nil)
}

func (f *fromImage) save(ctx context.Context, w *workload, i instance, exit bool) (saved, error) {
	t := i.(*task)
	ref := f.b.checkpointRef(t.c.ID())
	args := []string{"checkpoint", "--quiet", t.c.ID(), ref}
	if exit {
		args = append(args, "--exit")
	}
	if _, err := f.b.d.Cracctl(ctx, args...); err != nil {
		return nil, err
	}
	img, err := f.b.d.Client.GetImage(ctx, ref)
	return &checkpointImage{f.b, w, img}, err
}

// checkpointImage is a checkpoint image in containerd's store.
type checkpointImage struct {
	b   *bench
	w   *workload
	img containerd.Image
}

func (s *checkpointImage) was() *testimony { return nil }

func (s *checkpointImage) stage(ctx context.Context, n *network) (instance, error) {
	return s.b.create(ctx, cracRuntime, nil, s.img, s.w, n, requireRestore)
}

func (s *checkpointImage) size(ctx context.Context) (int64, error) {
	return sizeOf(ctx, s.b.d.Client.ContentStore(), s.img)
}

func (s *checkpointImage) remove(ctx context.Context) error {
	return s.b.d.Client.ImageService().Delete(ctx, s.img.Name(), images.SynchronousDelete())
}

// fromPath is this project with a directory that the create request names, as nerdctl's checkpoints.
type fromPath struct{ fromImage }

func (f *fromPath) name() string { return "crac-path" }

func (f *fromPath) can(w *workload) error { return w.needsNoFiles() }

// takesPart: the rest is as with images.
func (f *fromPath) takesPart(string) bool { return false }

func (f *fromPath) prepare(ctx context.Context, w *workload) (saved, error) {
	return f.b.prepareRuntime(ctx, f, w)
}

func (f *fromPath) save(ctx context.Context, w *workload, i instance, exit bool) (saved, error) {
	t := i.(*task)
	dir, err := f.b.d.Path("dump-" + t.c.ID())
	if err != nil {
		return nil, err
	}
	img, err := t.task.Checkpoint(ctx, func(r *containerd.CheckpointTaskInfo) error {
		r.Options = &options.CheckpointOptions{ImagePath: dir, Exit: exit}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return &checkpointPath{f.b, w, dir}, f.b.d.Client.ImageService().Delete(ctx, img.Name(), images.SynchronousDelete())
}

// checkpointPath is a directory with a dump.
type checkpointPath struct {
	b   *bench
	w   *workload
	dir string
}

func (s *checkpointPath) was() *testimony { return nil }

func (s *checkpointPath) stage(ctx context.Context, n *network) (instance, error) {
	img, err := s.b.image(ctx, s.w)
	if err != nil {
		return nil, err
	}
	t, err := s.b.create(ctx, cracRuntime, nil, img, s.w, n, requireRestore)
	if err == nil {
		t.opts = []containerd.NewTaskOpts{containerd.WithRestoreImagePath(s.dir)}
	}
	return t, err
}

func (s *checkpointPath) remove(context.Context) error { return os.RemoveAll(s.dir) }
