package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/containerd/api/types/runc/options"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/integration/harness"
)

const (
	cracRuntime = "io.containerd.crac.v2"
	runcRuntime = "io.containerd.runc.v2"
)

// task is a container of containerd's.
type task struct {
	b     *bench
	c     containerd.Container
	opts  []containerd.NewTaskOpts
	task  containerd.Task
	exits <-chan containerd.ExitStatus
}

// create makes the container's record and its snapshot.
func (b *bench) create(ctx context.Context, runtime string, ropts any, img containerd.Image, w *workload, n *network, annotations map[string]string) (*task, error) {
	id := b.id()
	c, err := b.d.Client.NewContainer(
		ctx, id,
		containerd.WithRuntime(runtime, ropts),
		containerd.WithImage(img),
		containerd.WithNewSnapshot(id, img),
		containerd.WithNewSpec(specOf(img, w, n, annotations)...),
	)
	if err != nil {
		return nil, err
	}
	return &task{b: b, c: c}, nil
}

func specOf(img containerd.Image, w *workload, n *network, annotations map[string]string) []oci.SpecOpts {
	opts := []oci.SpecOpts{
		oci.WithDefaultUnixDevices,
		imageConfig(img, w),
		oci.WithLinuxNamespace(specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: n.path}),
		oci.WithAnnotations(annotations),
		oci.WithEnv(w.env),
	}
	for _, m := range w.mounts {
		opts = append(opts, oci.WithMounts([]specs.Mount{{
			Source: m.host, Destination: m.container, Type: "bind", Options: []string{"rbind", "rw"},
		}}))
	}
	return opts
}

func imageConfig(img containerd.Image, w *workload) oci.SpecOpts {
	if w.command == nil {
		return oci.WithImageConfig(img)
	}
	return oci.Compose(oci.WithImageConfig(img), oci.WithProcessArgs(w.command...))
}

func (t *task) run(ctx context.Context) (err error) {
	if t.task, err = t.c.NewTask(ctx, cio.NullIO, t.opts...); err != nil {
		return fmt.Errorf("create: %w", err)
	}
	if t.exits, err = t.task.Wait(ctx); err != nil {
		return err
	}
	if err := t.task.Start(ctx); err != nil {
		t.exits = nil // what has not started does not end
		return errors.Join(fmt.Errorf("start: %w", err), t.restoreLog())
	}
	return nil
}

// restoreLog is the end of what CRIU says of a restore under runc.
func (t *task) restoreLog() error {
	logs, err := filepath.Glob(filepath.Join(t.b.d.Dir, "*", "io.containerd.runtime.v2.task", t.b.d.Namespace, t.c.ID(), "work", "restore.log"))
	for _, log := range logs {
		err = errors.Join(err, lastLines(log))
	}
	return err
}

// lazy tells whether it ran before it had its memory: then there is a log of who brought it.
func (t *task) lazy() bool {
	_, err := os.Stat(filepath.Join(t.b.d.Dir, "root/io.containerd.runtime.v2.task", t.b.d.Namespace, t.c.ID(), "criu/pager.log"))
	return err == nil
}

func (t *task) filled(ctx context.Context) error {
	shim, err := t.b.d.ShimPID(t.c.ID())
	if err != nil {
		return err
	}
	for _, pid := range pagers(shim) {
		if err := waitEnd(ctx, pid); err != nil {
			return err
		}
	}
	return nil
}

func (t *task) use(context.Context) (u usage, err error) {
	shim, err := t.b.d.ShimPID(t.c.ID())
	if err != nil {
		return u, err
	}
	pids, err := t.b.d.CgroupProcs(t.c.ID())
	if err != nil {
		return u, err
	}
	if u.shim, err = pssOf([]int{shim}); err != nil {
		return u, err
	}
	if u.pss, err = pssOf(without(append(pids, pagers(shim)...), shim)); err != nil {
		return u, err
	}
	u.cgroup, err = cgroupUsage(t.c.ID())
	return u, err
}

// without returns every number once, but for one.
func without(pids []int, one int) (rest []int) {
	seen := map[int]bool{one: true}
	for _, p := range pids {
		if !seen[p] {
			seen[p] = true
			rest = append(rest, p)
		}
	}
	return rest
}

func (t *task) remove(ctx context.Context) (took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	if t.task != nil {
		// It may have ended by itself, with its checkpoint.
		if err := t.task.Kill(ctx, unix.SIGKILL); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
			return 0, fmt.Errorf("kill %s: %w", t.c.ID(), err)
		}
		if t.exits != nil {
			select {
			case <-t.exits:
			case <-ctx.Done():
				return 0, fmt.Errorf("%s does not end: %w", t.c.ID(), ctx.Err())
			}
		}
		begin := time.Now()
		if _, err := t.task.Delete(ctx, containerd.WithProcessKill); err != nil && !errdefs.IsNotFound(err) {
			return 0, fmt.Errorf("delete %s: %w", t.c.ID(), err)
		}
		took = time.Since(begin)
	}
	err = t.c.Delete(ctx, containerd.WithSnapshotCleanup)
	// containerd forgets what it unpacks for a restore.
	dirs, _ := filepath.Glob(filepath.Join(t.b.d.Dir, "tmp", "ctrd-checkpoint*"))
	for _, d := range dirs {
		err = errors.Join(err, os.RemoveAll(d))
	}
	return took, err
}

// underRunc is containerd with its own shim, and an OCI runtime below it. It saves and restores
// as `ctr containers checkpoint --rw --task` and `ctr containers restore --rw --live` do, with
// their client.
type underRunc struct {
	b      *bench
	title  string
	binary string // of the OCI runtime; empty: containerd's choice, runc
}

func (r *underRunc) name() string { return r.title }

func (r *underRunc) can(*workload) error {
	if r.binary == "" {
		return nil
	}
	if _, err := exec.LookPath(r.binary); err != nil {
		return cannot("%w: install Debian's package %s", err, r.binary)
	}
	if roots, err := harness.CgroupRoots(); err != nil || harness.CgroupV2() || !slices.ContainsFunc(roots, isV2) {
		return err
	}
	return cannot("%s refuses hosts with cgroups of both versions", r.binary)
}

// isV2 tells whether a cgroup hierarchy is the unified one.
func isV2(root string) bool {
	_, err := os.Stat(filepath.Join(root, "cgroup.subtree_control"))
	return err == nil
}

func (r *underRunc) options() any {
	if r.binary == "" {
		return nil
	}
	// containerd's shim looks for it in its own PATH.
	return &options.Options{BinaryName: r.binary}
}

func (r *underRunc) prepare(ctx context.Context, w *workload) (saved, error) {
	return r.b.prepareRuntime(ctx, r, w)
}

func (r *underRunc) stageCold(ctx context.Context, w *workload, n *network) (instance, error) {
	img, err := r.b.image(ctx, w)
	if err != nil {
		return nil, err
	}
	return r.b.create(ctx, runcRuntime, r.options(), img, w, n, nil)
}

func (r *underRunc) save(ctx context.Context, _ *workload, i instance, exit bool) (_ saved, err error) {
	t := i.(*task)
	if err := t.task.Pause(ctx); err != nil {
		return nil, err
	}
	if !exit {
		defer func() { err = errors.Join(err, t.task.Resume(context.WithoutCancel(ctx))) }()
	}
	opts := []containerd.CheckpointOpts{containerd.WithCheckpointRuntime, containerd.WithCheckpointRW}
	if exit {
		opts = append(opts, containerd.WithCheckpointTaskExit)
	}
	img, err := t.c.Checkpoint(ctx, "bench.test/"+t.c.ID()+":checkpoint", append(opts, containerd.WithCheckpointTask)...)
	if err != nil {
		return nil, err
	}
	return &containerdCheckpoint{r, img}, nil
}

// containerdCheckpoint is containerd's own form of a checkpoint.
type containerdCheckpoint struct {
	r   *underRunc
	img containerd.Image
}

func (s *containerdCheckpoint) was() *testimony { return nil }

// stage is what `ctr containers restore` does. It would give every clone the cgroup and the network
// of the original, so that there could be no second one.
func (s *containerdCheckpoint) stage(ctx context.Context, n *network) (instance, error) {
	id := s.r.b.id()
	c, err := s.r.b.d.Client.Restore(ctx, id, s.img, containerd.WithRestoreImage, containerd.WithRestoreSpec, containerd.WithRestoreRuntime, containerd.WithRestoreRW)
	if err != nil {
		return nil, fmt.Errorf("restore %s: %w", s.img.Name(), err)
	}
	t := &task{b: s.r.b, c: c, opts: []containerd.NewTaskOpts{containerd.WithTaskCheckpoint(s.img)}}
	return t, c.Update(ctx, func(_ context.Context, _ *containerd.Client, record *containers.Container) error {
		var spec specs.Spec
		if err := json.Unmarshal(record.Spec.GetValue(), &spec); err != nil {
			return err
		}
		spec.Linux.CgroupsPath = filepath.Join("/", s.r.b.d.Namespace, id)
		for i := range spec.Linux.Namespaces {
			if spec.Linux.Namespaces[i].Type == specs.NetworkNamespace {
				spec.Linux.Namespaces[i].Path = n.path
			}
		}
		record.Spec, err = typeurl.MarshalAny(&spec)
		return err
	})
}

func (s *containerdCheckpoint) size(ctx context.Context) (int64, error) {
	return sizeOf(ctx, s.r.b.d.Client.ContentStore(), s.img)
}

func (s *containerdCheckpoint) remove(ctx context.Context) error {
	return s.r.b.d.Client.ImageService().Delete(ctx, s.img.Name(), images.SynchronousDelete())
}

// sizeOf is the size of the blobs that an image needs, in bytes.
func sizeOf(ctx context.Context, store content.Provider, img containerd.Image) (size int64, err error) {
	var index struct {
		Config struct {
			Size int64 `json:"size"`
		} `json:"config"`
		Layers    []struct{ Size int64 } `json:"layers"`
		Manifests []struct{ Size int64 } `json:"manifests"`
	}
	data, err := content.ReadBlob(ctx, store, img.Target())
	if err == nil {
		err = json.Unmarshal(data, &index)
	}
	size = index.Config.Size
	for _, l := range append(index.Layers, index.Manifests...) {
		size += l.Size
	}
	return size, err
}
