package main

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"time"

	"github.com/crac-shim/crac/integration/harness"
)

// podman is Debian's, with storage and configuration of its own, on the same runc and CRIU as the
// others. With export it saves into an archive and restores from that, else in its own storage.
type podman struct {
	b      *bench
	title  string
	export bool
	host   *podmanHost // shared by both ways
}

// podmanHost is podman's storage and configuration.
type podmanHost struct {
	b      *bench
	home   *harness.PodmanHome // nil: not yet made
	loaded map[string]bool
}

func (p *podman) name() string { return p.title }

func (p *podman) can(*workload) error {
	if _, err := p.b.d.Tools.Path(harness.Podman); err != nil {
		return cannot("%w", err)
	}
	return nil
}

// load brings a workload's image into podman's storage, once.
func (h *podmanHost) load(ctx context.Context, image string) error {
	if h.home == nil {
		home, err := h.b.d.NewPodmanHome("podman")
		if err != nil {
			return err
		}
		h.home, h.loaded = home, map[string]bool{}
	}
	if h.loaded[image] {
		return nil
	}
	h.loaded[image] = true
	return h.home.Load(ctx, image)
}

// close removes all that podman has made, on its mounts and cgroups too.
func (h *podmanHost) close(ctx context.Context) error {
	if h.home == nil {
		return nil
	}
	err := h.home.Remove(ctx)
	// conmon's own cgroup stays when it has ended.
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		left, cerr := harness.Cgroups(func(path string) bool { return strings.HasSuffix(path, "/"+h.b.d.Namespace+"/conmon") })
		for _, path := range left {
			_ = os.Remove(path)
		}
		if cerr != nil || len(left) == 0 || time.Now().After(deadline) {
			return errors.Join(err, cerr)
		}
	}
}

// pod is a container of podman's.
type pod struct {
	h       *podmanHost
	name    string
	command []string // what run does
	keep    bool     // it is needed again, so that remove only stops it
}

func (p *podman) stageCold(ctx context.Context, w *workload, n *network) (instance, error) {
	if err := p.host.load(ctx, w.image); err != nil {
		return nil, err
	}
	c := &pod{h: p.host, name: p.b.id()}
	c.command = []string{"run", "--detach", "--name", c.name, "--cgroup-parent", "/" + p.b.d.Namespace, "--network", "ns:" + n.path, "--log-driver", "none"}
	for _, e := range w.env {
		c.command = append(c.command, "--env", e)
	}
	for _, m := range w.mounts {
		c.command = append(c.command, "--volume", m.host+":"+m.container)
	}
	if w.command != nil {
		entrypoint, err := json.Marshal(w.command[:1])
		if err != nil {
			return nil, err
		}
		c.command = append(c.command, "--entrypoint", string(entrypoint))
	}
	c.command = append(c.command, harness.ImageRef(w.image))
	if w.command != nil {
		c.command = append(c.command, w.command[1:]...)
	}
	return c, nil
}

// prepare keeps the network of the original: podman restores into that, and into no other.
func (p *podman) prepare(ctx context.Context, w *workload) (_ saved, err error) {
	n, err := p.b.nets.take(ctx)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.b.nets.drop(context.WithoutCancel(ctx), n))
		}
	}()
	i, err := p.stageCold(ctx, w, n)
	if err != nil {
		return nil, err
	}
	c := i.(*pod)
	c.keep = !p.export
	defer func() {
		if err != nil || p.export {
			c.keep = false
			_, rerr := c.remove(ctx)
			err = errors.Join(err, rerr)
		}
	}()
	if err := c.run(ctx); err != nil {
		return nil, err
	}
	t, err := w.warm(ctx, n)
	if err != nil {
		return nil, err
	}
	s, err := p.save(ctx, w, c, true)
	if err != nil {
		return nil, err
	}
	s.(*podCheckpoint).net = n
	return &remembered{s, t}, nil
}

func (p *podman) save(ctx context.Context, _ *workload, i instance, exit bool) (saved, error) {
	c := i.(*pod)
	s := &podCheckpoint{p: p, pod: c}
	args := []string{"container", "checkpoint"}
	if p.export {
		s.file = p.host.home.Path(p.b.id() + ".tar.zst")
		args = append(args, "--export", s.file)
	} else {
		args = append(args, "--keep")
	}
	if !exit {
		args = append(args, "--leave-running")
	}
	_, err := p.host.home.Run(ctx, append(args, c.name)...)
	return s, err
}

// podCheckpoint is a checkpoint of podman's.
type podCheckpoint struct {
	p    *podman
	pod  *pod   // the original, whose storage has the checkpoint
	file string // the archive, if there is one
	net  *network
}

func (s *podCheckpoint) was() *testimony { return nil }

func (s *podCheckpoint) stage(_ context.Context, n *network) (instance, error) {
	n.real = s.net
	if s.file == "" {
		return &pod{h: s.p.host, name: s.pod.name, command: []string{"container", "restore", "--keep", s.pod.name}, keep: true}, nil
	}
	name := s.p.b.id()
	return &pod{h: s.p.host, name: name, command: []string{"container", "restore", "--import", s.file, "--name", name}}, nil
}

func (s *podCheckpoint) size(context.Context) (int64, error) {
	if s.file == "" {
		return 0, cannot("it lies among podman's own files")
	}
	info, err := os.Stat(s.file)
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

func (s *podCheckpoint) remove(ctx context.Context) error {
	var err error
	if s.file != "" {
		err = os.Remove(s.file)
	}
	if s.net == nil { // of a container that runs on
		return err
	}
	if s.file == "" {
		s.pod.keep = false
		_, rerr := s.pod.remove(ctx)
		err = errors.Join(err, rerr)
	}
	return errors.Join(err, s.p.b.nets.drop(ctx, s.net))
}

func (c *pod) run(ctx context.Context) error {
	_, err := c.h.home.Run(ctx, c.command...)
	return err
}

func (c *pod) filled(context.Context) error { return nil }

func (c *pod) use(context.Context) (usage, error) { return usage{}, nil }

func (c *pod) remove(ctx context.Context) (took time.Duration, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	if c.keep {
		_, err := c.h.home.Run(ctx, "stop", "--ignore", "--time", "0", c.name)
		return 0, err
	}
	_, err = c.h.home.Run(ctx, "rm", "--force", "--ignore", "--time", "0", c.name)
	return 0, err
}

// takesPart: it restores into the network of the original alone, so that clones would be in each
// other's way; and to save into an archive is to save.
func (p *podman) takesPart(part string) bool { return p.export && part != "clones" }
