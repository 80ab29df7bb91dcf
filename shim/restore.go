package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/runtime"
)

// criuConfigAnnotation names a CRIU configuration file of the user's, as for runc.
const criuConfigAnnotation = "org.criu.config"

// manifestInDump is the manifest's name in a dump that is not in an image.
const manifestInDump = "crac-manifest.json"

// criuPaths are what a container's dumps and restores have in common.
type criuPaths struct {
	work   string // of CRIU's logs
	config string // of the user's CRIU configuration file
}

// restore is a restore that fits.
type restore struct {
	dir      string       // of the dump
	dump     *images.Dump // to look at, until images are made
	memory   int64        // in the dump, in bytes
	parents  []string     // of those that it continues
	manifest *oci.Manifest
	mounts   []specs.Mount // to attach afterwards
	tcp      runtime.TCPMode
	required bool // a cold start is not what was asked for

	// digest names a dump that is in an image, and workingSet is a file that came
	// with it; or empty.
	digest, workingSet string

	// images are what the restore reads instead of the dump's files. They are
	// made in the background, from Create on.
	images func() (map[string][]byte, error)
}

// coldReason is why a checkpoint that is there is not used.
type coldReason struct {
	code string
	err  error
	// required says that a cold start is not what was asked for.
	required bool
}

func (r *coldReason) Error() string { return r.err.Error() }
func (r *coldReason) Unwrap() error { return r.err }

// reasonOf makes a reason of any error, and keeps the code of one that has it.
func reasonOf(err error, required bool) *coldReason {
	why := &coldReason{err: err}
	switch {
	case errors.As(err, &why):
	case errors.Is(err, images.ErrDamaged):
		why.code = "damaged"
	case errors.Is(err, images.ErrCovered):
		why.code = "covered"
	}
	why.required = required
	return why
}

// findings are what create knows after it has looked for a checkpoint.
type findings struct {
	mounts []images.Mount // for the root file system
	masked bool           // the container would see the dump
	hooked bool           // the dump has a directory of hooks, so the clone must
	path   bool           // the request named the dump
	warm   *restore
	why    *coldReason // why there is no restore though there is a checkpoint
}

// find looks for a checkpoint: a path in the request, or a layer in the mounts.
func (s *service) find(c *container, r *taskapi.CreateTaskRequest, opts *runcoptions.Options, spec *specs.Spec) findings {
	defer c.trace.Step("find a checkpoint that fits")()
	mounts := make([]images.Mount, len(r.Rootfs))
	for i, m := range r.Rootfs {
		mounts[i] = images.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options}
	}
	look := c.trace.Step("look into the layers")
	checkpoint, rest, err := images.Find(mounts)
	look()
	f := findings{mounts: rest, masked: images.Visible(rest)}

	path := r.Checkpoint
	if path == "" {
		path = opts.CriuImagePath
	}
	// What the shim itself mounts in every container is no question.
	offered := *spec
	offered.Mounts = append(slices.Clone(spec.Mounts), hooksMount(c.bundle))
	required := c.options.Restore == oci.RestoreRequire
	if path != "" {
		// Named by the client for this start alone: a cold start is not it,
		// unless the container says so.
		f.path = true
		_, said := spec.Annotations[oci.AnnotationPrefix+"restore"]
		required = required || !said
	}
	switch {
	case c.options.Restore == oci.RestoreNever && (path != "" || checkpoint != nil || err != nil):
		f.why = &coldReason{code: "restore-never", err: errors.New("the option restore=never asks for it")}
	case path != "":
		f.warm, err = s.fitPath(path, &offered, c)
	case err != nil:
	case checkpoint != nil:
		f.warm, err = s.fitImage(checkpoint, mounts, &offered, c)
	}
	if err != nil && f.why == nil {
		f.why = reasonOf(err, required)
	}
	if f.warm != nil {
		f.warm.required = required
		s.keepKerndat()
	}
	if f.warm != nil && f.warm.manifest != nil {
		f.masked = f.masked || hasMount(f.warm.manifest, maskMount.Destination) // the dump has the mask, so the clone must
		f.hooked = hasMount(f.warm.manifest, oci.HooksDir)
	}
	return f
}

func hasMount(m *oci.Manifest, destination string) bool {
	return slices.ContainsFunc(m.Mounts, func(d oci.Mount) bool { return d.Destination == destination })
}

// fitImage gates and verifies the checkpoint of an image.
func (s *service) fitImage(ck *images.Checkpoint, mounts []images.Mount, spec *specs.Spec, c *container) (r *restore, err error) {
	if err := s.gate(ck.Manifest, spec, c); err != nil {
		return nil, err
	}
	verify := c.trace.Step("verify the dump")
	dump, err := ck.Open()
	verify()
	if err != nil {
		return nil, &coldReason{code: "damaged", err: err}
	}
	defer closeUnless(&r, dump)
	privileges := c.trace.Step("read the dump's privileges")
	err = gatePrivileges(dump, spec)
	privileges()
	if err != nil {
		return nil, err
	}
	layers, err := images.Layers(mounts)
	if err != nil {
		return nil, err
	}
	policy := c.trace.Step("ask the node's policy")
	err = s.allowed(c, ck, layers)
	policy()
	if err != nil {
		return nil, err
	}
	r = c.fitted(ck.CRIUDir(), dump, ck.Manifest)
	r.parents, r.digest = ck.ParentDirs(), ck.Digest()
	if path, ok := ck.WorkingSet(); ok {
		r.workingSet = path
	}
	return r, nil
}

// fitPath gates a dump that the request names. One from another runtime has no
// manifest, and CRIU has the only word.
func (s *service) fitPath(dir string, spec *specs.Spec, c *container) (r *restore, err error) {
	if _, err := os.Stat(filepath.Join(dir, inventory)); err != nil {
		return nil, &coldReason{code: "damaged", err: fmt.Errorf("%s holds no CRIU dump: %w", dir, err)}
	}
	dump, err := images.OpenDump(dir)
	if err != nil {
		return nil, err
	}
	defer closeUnless(&r, dump)
	if err := gatePrivileges(dump, spec); err != nil {
		return nil, err
	}
	if err := allowedPath(); err != nil {
		return nil, err
	}
	f, err := os.Open(filepath.Join(dir, manifestInDump))
	if errors.Is(err, fs.ErrNotExist) {
		if err := s.gate(nil, spec, c); err != nil {
			return nil, err
		}
		return c.fitted(dir, dump, nil), nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	manifest, err := oci.DecodeManifest(f)
	if err != nil {
		return nil, &coldReason{code: "damaged", err: fmt.Errorf("%s: %w", f.Name(), err)}
	}
	if err := checkInventory(dir, manifest); err != nil {
		return nil, &coldReason{code: "damaged", err: err}
	}
	if err := s.gate(manifest, spec, c); err != nil {
		return nil, err
	}
	return c.fitted(dir, dump, manifest), nil
}

// closeUnless lets a dump go that no restore is of.
func closeUnless(r **restore, dump *images.Dump) {
	if *r == nil {
		dump.Close()
	}
}

// gate asks whether this host and this request fit the dump.
func (s *service) gate(m *oci.Manifest, spec *specs.Spec, c *container) error {
	defer c.trace.Step("compare with host and request")()
	ask := c.trace.Step("ask CRIU for its version")
	version, err := s.criu()
	ask()
	if joinsUserNamespace(spec) {
		return &coldReason{code: images.CodeNamespaces, err: errors.New("the request joins a user namespace that exists, as in a pod with one of its own, and CRIU restores into a new one only")}
	}
	if m == nil {
		if err != nil {
			return &coldReason{code: images.CodeNoCRIU, err: err}
		}
		return nil
	}
	asked := *spec
	if hasMount(m, maskMount.Destination) {
		asked.Mounts = append(asked.Mounts[:len(asked.Mounts):len(asked.Mounts)], maskMount)
	}
	request := images.RequestOf(oci.ContainerOf(&asked), oci.MountsOf(&asked))
	// Who insists on the restore passes arguments to the workload that runs.
	request.AnyArgs = c.options.Restore == oci.RestoreRequire && (c.options.Hooks != oci.HooksOff || hasMount(m, oci.HooksDir))
	request.Profile = profileOf(spec.Process)
	return refusal(images.Gate(m, images.ThisHost(version), request))
}

func joinsUserNamespace(spec *specs.Spec) bool {
	return slices.ContainsFunc(spec.Linux.Namespaces, func(ns specs.LinuxNamespace) bool {
		return ns.Type == specs.UserNamespace && ns.Path != ""
	})
}

// gatePrivileges asks whether the dump holds more than the request allows: CRIU
// gives a workload what the dump says, and whoever made the image wrote that.
func gatePrivileges(dump *images.Dump, spec *specs.Spec) error {
	reasons, err := dump.CheckPrivileges(images.PrivilegesOf(spec))
	if err != nil {
		return err
	}
	return refusal(reasons)
}

// refusal makes one reason of all; nil of none.
func refusal(reasons []images.Reason) error {
	if len(reasons) == 0 {
		return nil
	}
	texts := make([]string, len(reasons))
	for i, r := range reasons {
		texts[i] = r.Text
	}
	return &coldReason{code: reasons[0].Code, err: errors.New(strings.Join(texts, "; "))}
}

func (c *container) fitted(dir string, dump *images.Dump, m *oci.Manifest) *restore {
	r := &restore{dir: dir, dump: dump, memory: dump.Memory(), manifest: m}
	// Only the dump decides: one without established connections still has
	// sockets that had one, which CRIU restores closed or not at all.
	if (m != nil && m.TCPEstablished) || (m == nil && c.options.TCP == oci.TCPEstablished) {
		r.tcp = runtime.TCPEstablished
	}
	return r
}

func tcpMode(m oci.TCPMode) runtime.TCPMode {
	switch m {
	case oci.TCPEstablished:
		return runtime.TCPEstablished
	case oci.TCPError:
		return runtime.TCPError
	}
	return runtime.TCPClose
}

// criuOptions are what the container's dumps and restores have in common.
func (c *container) criuOptions(tcp runtime.TCPMode) runtime.CRIUOptions {
	return runtime.CRIUOptions{
		WorkDir:    c.criu.work,
		Debug:      log.GetLevel() >= log.DebugLevel, // as containerd logs
		TCP:        tcp,
		ConfigFile: c.criu.config,
		// What the other end of such a socket thinks is not our business,
		// and a log socket must not stand in the way of a checkpoint.
		ExternalUnixSockets: true,
	}
}

// cold announces a cold start instead of a warm one, or refuses it.
func (s *service) cold(c *container, why *coldReason) error {
	if why.required {
		return fmt.Errorf("container %s cannot be restored: %w", c.id, classified{why.err, errdefs.ErrFailedPrecondition})
	}
	c.hooks.startedCold(why)
	log.G(s.ctx).WithFields(log.Fields{"id": c.id, "code": why.code, "reason": why.Error()}).Warn("starting cold instead of restoring the checkpoint")
	s.events.sendFacts(ColdStartTopic, fmt.Sprintf("container %s starts cold: %s", c.id, why), map[string]any{"container_id": c.id, "code": why.code, "reason": why.Error()})
	return nil
}

// restorePlan is how a restore is to be done.
type restorePlan struct {
	options runtime.CRIUOptions
	order   workingSet // done must be called
}

// planRestore waits for what the restore reads, and decides how it is to be done.
func (s *service) planRestore(c *container, r *restore) (*restorePlan, error) {
	if err := os.MkdirAll(c.criu.work, 0o700); err != nil {
		return nil, err
	}
	if _, err := s.criu(); err != nil {
		return nil, &coldReason{code: images.CodeNoCRIU, err: err}
	}
	wait := c.trace.Step("wait for the images")
	own, err := r.images()
	wait()
	if err != nil {
		return nil, err
	}
	lazy := s.lazy(c, r.memory)
	c.trace.Facts(true, lazy, r.memory)
	order := workingSet{use: r.workingSet}
	if lazy && order.use == "" {
		order = s.ownWorkingSet(r.digest)
	}
	o := c.criuOptions(r.tcp)
	o.Parents, o.Images = r.parents, own
	o.Lazy, o.WorkingSet, o.Record = lazy, order.use, order.record
	o.Warn = func(err error) { log.G(s.ctx).WithError(err).WithField("id", c.id).Warn("restore") }
	return &restorePlan{o, order}, nil
}

// beginRestore begins a restore at Create, for a container whose network is set up
// in namespaces that only CRIU can make. If it fails, the container is created for a cold
// start.
func (s *service) beginRestore(ctx context.Context, c *container) error {
	defer c.trace.Step("begin to restore")()
	p, err := s.planRestore(c, c.warm)
	if err == nil {
		if c.init.pid, err = c.rt.BeginRestore(ctx, c.warm.dir, p.options, c.warm.mounts, c.init.io.child); err == nil {
			c.begun = p
			return nil
		}
		p.order.done()
		if final(err) || ctx.Err() != nil {
			return err
		}
		err = c.restoreFailed(err)
	}
	required := c.warm.required
	c.warm = nil
	if err := s.cold(c, reasonOf(err, required)); err != nil {
		return err
	}
	return s.createInstead(ctx, c)
}

// final tells an error of a restore after which there is no cold start either: a hook would
// fail again, or what there is of the clone stands in the way.
func final(err error) bool {
	var hook *runtime.HookError
	return errors.As(err, &hook) || errors.Is(err, runtime.ErrNotUndone)
}

// restoreFailed is why there is no warm start when the runtime has failed to restore.
func (c *container) restoreFailed(err error) error {
	var failed *runtime.CRIUError
	if !errors.As(err, &failed) {
		return err
	}
	failed.Log = keepLog(failed.Log, c)
	return &coldReason{code: "criu", err: err}
}

// restore starts the workload from the dump, and watches it. A *startedError
// says that it has run.
func (s *service) restore(ctx context.Context, c *container, r *restore) error {
	began := time.Now()
	p := c.begun
	if p == nil {
		var err error
		if p, err = s.planRestore(c, r); err != nil {
			return err
		}
	}
	c.begun = nil
	watched := false
	defer func() {
		if !watched {
			p.order.done()
		}
	}()
	whole := c.hooks.restoring(r.manifest)
	io := c.init.io
	restore := c.trace.Step("restore")
	proc, err := c.rt.Restore(r.dir, p.options, r.mounts, io.child)
	whole()
	restore()
	if proc != nil {
		io.afterStart()
		c.init.started(proc)
		c.dumped = r.manifest
		// After the start was announced, or its failure.
		defer s.watchInit(c, proc)
	}
	if err != nil {
		if proc != nil {
			return &startedError{err}
		}
		return c.restoreFailed(err)
	}
	if c.init.config.Terminal {
		if err := io.attachConsole(ctx, s.owner(c, "")); err != nil {
			_ = c.rt.Signal(unix.SIGKILL, true)
			return &startedError{err}
		}
	}
	s.watchOOM(c)
	watched = true
	go s.watchMemory(c, p.order)
	restored := time.Since(began)
	tell := c.trace.Step("tell after-restore")
	agreed, err := c.hooks.afterRestore(ctx, r.manifest)
	if err == nil && agreed == 0 {
		err = untold(r.manifest, c.rt.Spec())
	}
	tell()
	if err != nil {
		_ = c.rt.Signal(unix.SIGKILL, true)
		return &startedError{err}
	}
	log.G(s.ctx).WithFields(log.Fields{"id": c.id, "ms": restored.Milliseconds(), "hooks_ms": (time.Since(began) - restored).Milliseconds()}).Info("restored from checkpoint")
	return nil
}

// lazyFrom is the size of a dump's memory, in bytes, from which on a workload that
// is started with memory=auto runs before it has all of it. With half of it the first
// answer comes no sooner, and all of the memory a little later, than when it comes
// first: docs/performance.md, "When lazy pays".
const lazyFrom = 64 << 20

// lazy tells whether a restore of so much memory is to run before it is there.
func (s *service) lazy(c *container, memory int64) bool {
	if c.options.Memory == oci.MemoryEager {
		return false
	}
	if c.options.Memory != oci.MemoryLazy && memory < lazyFrom {
		return false
	}
	if !runtime.CanBeLazy(c.rt.Spec()) {
		if c.options.Memory == oci.MemoryLazy {
			log.G(s.ctx).WithField("id", c.id).Warn("memory=lazy is not possible in a user namespace while the sysctl vm.unprivileged_userfaultfd is 0: the memory comes first")
		}
		return false
	}
	return true
}

// watchMemory makes it known when a workload was killed because its memory could
// not be brought.
func (s *service) watchMemory(c *container, order workingSet) {
	defer order.done()
	err := c.rt.MemoryError(s.ctx)
	c.writeTrace()
	if err != nil && s.ctx.Err() == nil {
		log.G(s.ctx).WithError(err).WithField("id", c.id).Error("killed for want of its memory")
		s.events.sendFacts(MemoryFailedTopic, fmt.Sprintf("container %s was killed: %s", c.id, err),
			map[string]any{"container_id": c.id, "reason": err.Error()})
	}
}

// keptLog is where the log of a failed restore outlives its container: beside
// its work directory, which containerd cleans when it starts. The next container
// of the same id removes it.
func (c *container) keptLog() string {
	return filepath.Join(filepath.Dir(c.work), c.id+".restore.log")
}

// keepLog copies CRIU's log to where it outlives the container, and returns the
// place.
func keepLog(path string, c *container) string {
	kept := c.keptLog()
	src, err := os.Open(path)
	if err != nil {
		return path
	}
	defer src.Close()
	dst, err := os.OpenFile(kept, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return path
	}
	defer dst.Close()
	if _, err := io.Copy(dst, src); err != nil {
		return path
	}
	return kept
}
