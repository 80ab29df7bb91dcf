package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/pkg/oci"
)

// bareRunc is runc without anything above it: a bundle with a mounted root file system, and runc's
// own commands.
type bareRunc struct{ b *bench }

func (r *bareRunc) name() string { return "runc" }

func (r *bareRunc) can(w *workload) error { return w.needsNoFiles() }

func (r *bareRunc) prepare(ctx context.Context, w *workload) (saved, error) {
	return r.b.prepareRuntime(ctx, r, w)
}

func (r *bareRunc) stageCold(ctx context.Context, w *workload, n *network) (instance, error) {
	c, err := r.bundle(ctx, w, n)
	if err == nil {
		c.command = []string{"run", "--detach", "--bundle", c.dir, c.id}
	}
	return c, err
}

func (r *bareRunc) bundle(ctx context.Context, w *workload, n *network) (*bundle, error) {
	img, err := r.b.image(ctx, w)
	if err != nil {
		return nil, err
	}
	id := r.b.id()
	dir, err := r.b.d.Path(id)
	if err != nil {
		return nil, err
	}
	c := &bundle{b: r.b, id: id, dir: dir}
	if err := os.Mkdir(c.root(), 0o755); err != nil {
		return nil, err
	}
	if err := r.b.mountRoot(ctx, w, id, c.root()); err != nil {
		return nil, err
	}
	opts := append([]oci.SpecOpts{oci.WithRootFSPath(c.root())}, specOf(img, w, n, nil)...)
	spec, err := oci.GenerateSpec(ctx, r.b.d.Client, &containers.Container{ID: id}, opts...)
	if err != nil {
		return nil, err
	}
	data, err := json.Marshal(spec)
	if err != nil {
		return nil, err
	}
	return c, os.WriteFile(filepath.Join(dir, "config.json"), data, 0o600)
}

func (r *bareRunc) save(ctx context.Context, w *workload, i instance, exit bool) (saved, error) {
	c := i.(*bundle)
	dir, err := r.b.d.Path("runc-" + r.b.id())
	if err != nil {
		return nil, err
	}
	args := []string{"checkpoint", "--image-path", dir, "--work-path", c.dir, "--manage-cgroups-mode", "ignore"}
	if !exit {
		args = append(args, "--leave-running")
	}
	return &runcDump{r, w, dir}, c.runc(ctx, append(args, c.id)...)
}

// runcDump is a directory with the files of `runc checkpoint`.
type runcDump struct {
	r   *bareRunc
	w   *workload
	dir string
}

func (s *runcDump) was() *testimony { return nil }

func (s *runcDump) stage(ctx context.Context, n *network) (instance, error) {
	c, err := s.r.bundle(ctx, s.w, n)
	if err == nil {
		c.command = []string{
			"restore", "--detach", "--bundle", c.dir, "--image-path", s.dir, "--work-path", c.dir,
			"--manage-cgroups-mode", "ignore", c.id,
		}
	}
	return c, err
}

func (s *runcDump) size(context.Context) (int64, error) { return directorySize(s.dir) }

func (s *runcDump) remove(context.Context) error { return os.RemoveAll(s.dir) }

// bundle is a container of runc's.
type bundle struct {
	b       *bench
	id, dir string
	command []string
}

func (c *bundle) root() string { return filepath.Join(c.dir, "rootfs") }

// runc executes a command. Its output would be the container's too: it goes nowhere, and errors to a log.
func (c *bundle) runc(ctx context.Context, args ...string) error {
	log := filepath.Join(c.dir, "runc.log")
	cmd := c.b.d.Command(ctx, "runc", append([]string{"--root", c.b.d.StatePath("bench-runc"), "--log", log}, args...)...)
	if err := cmd.Run(); err != nil {
		return errors.Join(fmt.Errorf("runc %s: %w", args[0], err), lastLines(log))
	}
	return nil
}

func (c *bundle) run(ctx context.Context) error { return c.runc(ctx, c.command...) }

func (c *bundle) filled(context.Context) error { return nil }

func (c *bundle) use(context.Context) (u usage, err error) {
	pids, err := c.b.d.CgroupProcs(c.id)
	if err != nil {
		return u, err
	}
	if u.pss, err = pssOf(pids); err != nil {
		return u, err
	}
	u.cgroup, err = cgroupUsage(c.id)
	return u, err
}

func (c *bundle) remove(ctx context.Context) (took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	pids, err := c.b.d.CgroupProcs(c.id)
	if err != nil {
		return 0, err
	}
	if len(pids) > 0 { // it has not ended with its checkpoint
		if err := c.runc(ctx, "kill", c.id, "KILL"); err != nil {
			return 0, err
		}
		for _, pid := range pids {
			if err := waitEnd(ctx, pid); err != nil {
				return 0, err
			}
		}
	}
	begin := time.Now()
	err = c.runc(ctx, "delete", "--force", c.id)
	took = time.Since(begin)
	return took, errors.Join(err, c.b.unmountRoot(ctx, c.id, c.root()), os.RemoveAll(c.dir))
}
