package shim

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	securejoin "github.com/cyphar/filepath-securejoin"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/runtime"
	"github.com/crac-shim/crac/runtime/trace"
)

// create makes a container ready for Start: what is asked (oci), what there is
// and whether it fits (images), and then the container itself (runtime).
//
// On an error nothing is left.
func (s *service) create(ctx context.Context, r *taskapi.CreateTaskRequest) (_ *container, err error) {
	runtime.ExpectCgroupMove()
	steps := s.beginTrace(r.ID)
	defer steps.Step("create")()
	read := steps.Step("read the bundle")
	opts, err := runtimeOptions(r.Options)
	if err != nil {
		return nil, err
	}
	spec, err := runtime.LoadSpec(r.Bundle)
	if err != nil {
		return nil, err
	}
	asked, err := askedOf(spec)
	if err != nil {
		return nil, err
	}
	s.adapt(spec, r.ID)
	if err := writeOptions(r.Bundle, opts); err != nil {
		return nil, err
	}
	c := &container{
		id:      r.ID,
		bundle:  r.Bundle,
		work:    workDir(r.Bundle),
		options: asked,
		trace:   steps,
		dumping: make(chan struct{}, 1),
		probing: newProbing(),
		execs:   make(map[string]*process),
		init:    newProcess("", stdioConfig{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal}, nil),
	}
	c.criu = criuPaths{work: opts.CriuWorkPath, config: spec.Annotations[criuConfigAnnotation]}
	if c.criu.work == "" {
		c.criu.work = filepath.Join(c.work, "criu")
	}
	s.firstNode.Do(func() { s.node = nodeDir(c.work, c.bundle) })
	if c.ready, err = c.readyProbe(); err != nil {
		return nil, err
	}
	if err := s.reserve(c.id); err != nil {
		return nil, err
	}
	defer func() { s.publish(c, err == nil) }()
	defer func() { c.createdAt = time.Now() }()

	if err := os.Remove(c.keptLog()); err != nil && !errors.Is(err, os.ErrNotExist) {
		log.G(ctx).WithError(err).Warn("failed to remove the log of an earlier restore")
	}
	read()
	found := s.find(c, r, opts, spec)
	looked := false
	defer func() {
		if found.warm != nil && !looked { // nobody will look at it
			found.warm.dump.Close()
		}
	}()
	if err := c.mountRootfs(found.mounts, r.Bundle); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.unmount(s.ctx))
		}
	}()
	if found.masked {
		spec.Mounts = append(spec.Mounts, maskMount)
	}
	hooks := steps.Step("make the directory of hooks")
	err = s.addHooks(c, spec, found.hooked)
	hooks()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.removeHooks())
		}
	}()
	if found.warm == nil && found.why != nil {
		if err := s.cold(c, found.why); err != nil {
			return nil, err
		}
	}
	if found.warm != nil {
		if err := makeMountPoints(spec, c.rootfs, found.warm.manifest); err != nil {
			return nil, err
		}
		found.warm.mounts = mountsBeyond(spec, found.warm.manifest)
		if found.path {
			ownCgroup(spec, c.id)
		}
	}
	prepare := steps.Step("prepare the container")
	c.rt, err = runtime.New(runtime.Config{
		ID:            r.ID,
		Bundle:        r.Bundle,
		Root:          stateRoot(opts, s.namespace, r.Bundle),
		Rootfs:        c.rootfs,
		SystemdCgroup: opts.SystemdCgroup,
		NoPivotRoot:   opts.NoPivotRoot,
		NoNewKeyring:  opts.NoNewKeyring,
		Reaper:        s.reaper,
		Warn:          func(err error) { log.G(s.ctx).WithError(err).WithField("id", r.ID).Warn("go on all the same") },
		Trace:         steps,
	}, spec)
	prepare()
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.rt.Delete())
		}
	}()
	owner := s.owner(c, "")
	owner.uid, owner.gid = int(opts.IoUid), int(opts.IoGid)
	streams := steps.Step("open the streams")
	io, err := newProcessIO(ctx, c.init.config, owner)
	streams()
	if err != nil {
		return nil, err
	}
	c.init.io = io
	defer func() {
		if err != nil {
			io.afterStart()
			io.close()
		}
	}()
	if c.warm = found.warm; c.warm != nil {
		looked = true
		c.warm.images = sync.OnceValues(func() (map[string][]byte, error) {
			return s.ownImages(c, found.warm, spec)
		})
		go func(w *restore) {
			_, _ = w.images() // Start asks for the error
			defer steps.On(trace.Background, "read the memory ahead")()
			runtime.Prefetch(append([]string{w.dir}, w.parents...)...)
		}(c.warm)
		end := steps.Step("make the namespaces")
		c.init.pid, err = c.rt.PrepareRestore(ctx, io.child)
		end()
		if err != nil || !c.rt.Begins() {
			return c, err
		}
		return c, s.beginRestore(ctx, c)
	}
	return c, s.createInit(ctx, c)
}

// reserve takes a container's id.
func (s *service) reserve(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, made := s.containers[id]
	if _, making := s.creating[id]; made || making {
		return fmt.Errorf("container %s: %w", id, errdefs.ErrAlreadyExists)
	}
	s.creating[id] = struct{}{}
	return nil
}

// publish ends what reserve began: the container can be seen now that it is
// whole, or its id is free again.
func (s *service) publish(c *container, whole bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.creating, c.id)
	if whole {
		s.containers[c.id] = c
	}
}

// askedOf reads our annotations and environment.
func askedOf(spec *specs.Spec) (oci.Options, error) {
	var env []string
	if spec.Process != nil {
		env = spec.Process.Env
	}
	asked, err := oci.ParseOptions(spec.Annotations, env)
	if err != nil {
		return asked, classified{err, errdefs.ErrInvalidArgument}
	}
	return asked, nil
}

// adapt changes a spec where this host or a later dump asks for it.
func (s *service) adapt(spec *specs.Spec, id string) {
	if p := spec.Process; p != nil && p.OOMScoreAdj != nil {
		if least, ok := leastOOMScore(); ok && *p.OOMScoreAdj < least {
			log.G(s.ctx).WithFields(log.Fields{"id": id, "asked": *p.OOMScoreAdj, "given": least}).Warn("cannot lower oom_score_adj without CAP_SYS_RESOURCE")
			p.OOMScoreAdj = &least
		}
	}
	// CRIU cannot dump Multipath TCP sockets, which Go's servers listen on by
	// default; where there is no MPTCP they listen on TCP.
	if runtime.OwnNetwork(spec) {
		if _, asked := spec.Linux.Sysctl[mptcpSysctl]; !asked {
			if _, err := os.Stat("/proc/sys/net/mptcp/enabled"); err == nil {
				if spec.Linux.Sysctl == nil {
					spec.Linux.Sysctl = make(map[string]string, 1)
				}
				spec.Linux.Sysctl[mptcpSysctl] = "0"
			}
		}
	}
}

const mptcpSysctl = "net.mptcp.enabled"

// leastOOMScore is the lowest oom_score_adj that this process can give to a
// child (proc(5)); ok is false if there is no such bound.
func leastOOMScore() (score int, ok bool) {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil || data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0 {
		return 0, false
	}
	text, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		return 0, false
	}
	score, err = strconv.Atoi(strings.TrimSpace(string(text)))
	return score, err == nil
}

func (s *service) owner(c *container, exec string) stdioOwner {
	id := c.id
	if exec != "" {
		id = exec
	}
	return stdioOwner{namespace: s.namespace, id: id, reaper: s.reaper}
}

// mountRootfs mounts the container's root file system in the bundle, unless the
// spec names one that exists.
func (c *container) mountRootfs(mounts []images.Mount, bundle string) error {
	if len(mounts) == 0 {
		return nil
	}
	defer c.trace.Step("mount the root file system")()
	c.rootfs = filepath.Join(bundle, "rootfs")
	if err := os.Mkdir(c.rootfs, 0o711); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	all := make([]mount.Mount, len(mounts))
	for i, m := range mounts {
		all[i] = mount.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options}
	}
	if err := mount.All(all, c.rootfs); err != nil {
		return errors.Join(fmt.Errorf("mount the root file system: %w", err), mount.UnmountMounts(all, c.rootfs, 0))
	}
	return nil
}

// createInit starts the process that waits to become the workload.
func (s *service) createInit(ctx context.Context, c *container) error {
	defer c.trace.Step("start the container's init")()
	if err := s.adaptJava(c); err != nil {
		return err
	}
	proc, err := c.rt.Create(c.init.io.child)
	if err != nil {
		return err
	}
	c.init.io.afterStart()
	c.init.started(proc)
	if c.init.config.Terminal {
		if err := c.init.io.attachConsole(ctx, s.owner(c, "")); err != nil {
			return err
		}
	}
	s.watchOOM(c)
	return nil
}

// watchOOM announces when the kernel kills for want of memory. The watch ends
// with the container's cgroup.
func (s *service) watchOOM(c *container) {
	oom, err := c.rt.OOM()
	if err != nil {
		log.G(s.ctx).WithError(err).WithField("id", c.id).Warn("cannot watch for OOM kills")
		return
	}
	go func() {
		for range oom {
			c.oomed.Store(true)
			s.events.send(&eventstypes.TaskOOM{ContainerID: c.id})
		}
	}()
}

// lastOOM announces the kill that has ended the container, if the watch has
// announced none.
func (s *service) lastOOM(c *container) {
	if c.rt.OOMKilled() && !c.oomed.Swap(true) {
		s.events.send(&eventstypes.TaskOOM{ContainerID: c.id})
	}
}

// startedError is a failure of a start after which there is a process: it is
// watched, and its end will be announced. It is no reason to start cold.
type startedError struct{ err error }

func (e *startedError) Error() string { return e.err.Error() }
func (e *startedError) Unwrap() error { return e.err }

// startInit lets the workload run, from the dump if there is one.
func (s *service) startInit(ctx context.Context, c *container) error {
	if _, ended := c.init.ended(); ended {
		return fmt.Errorf("start container %s: it was killed before: %w", c.id, errdefs.ErrFailedPrecondition)
	}
	warm := c.warm
	c.warm = nil
	if warm == nil {
		return s.startCold(c)
	}
	err := s.restore(ctx, c, warm)
	if err == nil {
		return nil
	}
	var started *startedError
	if errors.As(err, &started) {
		return err
	}
	if final(err) {
		c.init.abandon(255)
		return err
	}
	if err := s.cold(c, reasonOf(err, warm.required)); err != nil {
		// Nothing will run in it any more.
		c.init.abandon(255)
		return err
	}
	if err := s.createInstead(ctx, c); err != nil {
		if proc := c.init.running(); proc != nil {
			_ = c.rt.Signal(unix.SIGKILL, true)
			s.watchInit(c, proc)
		} else {
			c.init.abandon(255)
		}
		return err
	}
	defer s.watchInit(c, c.init.running()) // whatever becomes of it
	return s.startCold(c)
}

// createInstead starts the init of a container whose restore has failed.
func (s *service) createInstead(ctx context.Context, c *container) error {
	if c.init.config.Terminal {
		if err := c.init.io.openConsole(); err != nil {
			return err
		}
	}
	return s.createInit(ctx, c)
}

// startCold lets a workload run that createInit has made.
func (s *service) startCold(c *container) error {
	c.trace.Facts(false, false, 0)
	defer c.trace.Step("let the workload run")()
	if err := c.rt.Start(); err != nil {
		return err
	}
	if c.ready != nil {
		go s.checkpointWhenReady(c)
	}
	return nil
}

// killInit signals a container's init, or all of its processes.
func (s *service) killInit(c *container, sig unix.Signal, all bool) error {
	if c.init.running() != nil {
		return c.rt.Signal(sig, all)
	}
	// It waits to be restored, or is being restored: a start that is under way
	// decides first what there is to kill.
	c.init.announce.Lock()
	defer c.init.announce.Unlock()
	if c.init.running() != nil {
		return c.rt.Signal(sig, all)
	}
	if _, ended := c.init.ended(); ended || (sig != unix.SIGKILL && sig != unix.SIGTERM) {
		return fmt.Errorf("signal container %s: %w", c.id, runtime.ErrNotRunning)
	}
	c.endExecs()
	s.exited(c, c.init, runtime.Exit{Status: 128 + int(sig), At: time.Now()})
	return nil
}

// maskMount hides a dump that is part of the container's root file system.
var maskMount = specs.Mount{
	Destination: "/" + oci.Root,
	Type:        "tmpfs",
	Source:      "tmpfs",
	Options:     []string{"ro", "nosuid", "nodev", "noexec", "size=4k", "mode=0"},
}

// ownCgroup gives a container that is restored from another's spec a cgroup of
// its own: the other one may still be running in its.
func ownCgroup(spec *specs.Spec, id string) {
	path := spec.Linux.CgroupsPath
	if path == "" {
		return
	}
	if parts := strings.Split(path, ":"); len(parts) == 3 { // systemd's slice:prefix:name
		parts[2] = id
		spec.Linux.CgroupsPath = strings.Join(parts, ":")
		return
	}
	spec.Linux.CgroupsPath = filepath.Join(filepath.Dir(path), id)
}

// makeMountPoints makes the mount points of mounts that are in the dump and not
// in the request. For those in the request libcontainer does it.
func makeMountPoints(spec *specs.Spec, rootfs string, m *oci.Manifest) error {
	if m == nil || rootfs == "" {
		return nil
	}
	for _, d := range m.Mounts {
		if !images.InDump(d) || slices.ContainsFunc(spec.Mounts, func(sm specs.Mount) bool { return filepath.Clean("/"+sm.Destination) == d.Destination }) {
			continue
		}
		// Nothing runs in the root file system yet, but its links are hostile.
		path, err := securejoin.SecureJoin(rootfs, d.Destination)
		if err != nil {
			return fmt.Errorf("mount point %s: %w", d.Destination, err)
		}
		if err := os.MkdirAll(path, 0o755); err != nil && !errors.Is(err, unix.EROFS) {
			return fmt.Errorf("mount point %s: %w", d.Destination, err)
		}
	}
	return nil
}

// mountsBeyond lists the mounts of the spec that the dump does not have: they
// are attached after the restore.
func mountsBeyond(spec *specs.Spec, m *oci.Manifest) []specs.Mount {
	if m == nil {
		return nil
	}
	var more []specs.Mount
	for _, sm := range spec.Mounts {
		dest := filepath.Clean("/" + sm.Destination)
		if sm.Type == "cgroup" {
			continue // a set of mounts that only a container's start can make
		}
		if !hasMount(m, dest) {
			more = append(more, sm)
		}
	}
	return more
}
