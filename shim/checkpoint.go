package shim

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/runtime"
)

// builder is the program that packs an image. It is not part of the shim, which
// would carry containerd's client in memory for as long as the container lives.
const builder = "cracctl"

// diffTimeout bounds how long a workload stands still for its layer of changes
// to be taken; for a checkpoint that ends it, for the whole image.
const diffTimeout = 10 * time.Minute

const (
	// prepareTimeout bounds how long a builder may look for what stands in the way: it asks
	// containerd for a few small files, and perhaps a key service.
	prepareTimeout = time.Minute
	// endTimeout is how long a builder may take to end that is not needed, and the end of the
	// container to be announced.
	endTimeout = 10 * time.Second
)

// checkpointRequest is what a checkpoint call asks for, whoever makes it.
type checkpointRequest struct {
	id   string // of this checkpoint, as participants are told
	dir  string // where the dump goes; empty: nowhere but into the image
	kept bool   // dir is the client's, and stays
	ref  string // of the image to build; empty: none
	push bool   // the image
	exit bool
	// index lists the image beside those of other platforms.
	index bool
	// compression of the image's new layers
	compression oci.Compression
	encryptTo   []string // whom they are encrypted for
	parent      string   // an image that this one continues
	keys        []string // that decrypt the parent
	preDump     oci.PreDumpMode
	preDumped   string // the directory of a pre-dump; empty: there was none
	criu        runtime.CRIUOptions
}

// ownCheckpoint is the checkpoint that the container's options alone ask for.
func (c *container) ownCheckpoint() *checkpointRequest {
	return &checkpointRequest{
		id:          c.hooks.newID(),
		ref:         c.options.CheckpointImage,
		push:        c.options.CheckpointPush,
		exit:        c.options.CheckpointExit,
		index:       c.options.CheckpointIndex,
		compression: c.options.CheckpointCompression,
		encryptTo:   c.options.CheckpointEncryptTo,
		preDump:     c.options.CheckpointPreDump,
		criu:        c.criuOptions(tcpMode(c.options.TCP)),
	}
}

// checkpointOptions reads the options of a checkpoint call: runc's, ours, or
// none, which is all that clients send to a runtime that they do not know.
func (c *container) checkpointOptions(path string, opts *anypb.Any) (*checkpointRequest, error) {
	r := c.ownCheckpoint()
	r.dir = path
	if len(opts.GetValue()) == 0 {
		return r, nil
	}
	if opts.TypeUrl == oci.CheckpointOptionsType {
		o, err := oci.ParseCheckpointOptions(opts.Value)
		if err != nil {
			return nil, classified{err, errdefs.ErrInvalidArgument}
		}
		if o.Ref != "" {
			r.ref = o.Ref
		}
		if o.Compression != "" {
			r.compression = o.Compression
		}
		if o.TCP != "" {
			r.criu.TCP = tcpMode(o.TCP)
		}
		if len(o.EncryptTo) > 0 {
			r.encryptTo = o.EncryptTo
		}
		if o.PreDump != "" {
			r.preDump = o.PreDump
		}
		r.parent, r.keys = o.Parent, o.Keys
		r.exit = r.exit || o.Exit
		r.index = r.index || o.Index
		return r, nil
	}
	var o runcoptions.CheckpointOptions
	if err := typeurl.UnmarshalTo(opts, &o); err != nil {
		return nil, fmt.Errorf("checkpoint options of type %q are not known to this runtime; it takes runc's: %w", opts.TypeUrl, errdefs.ErrInvalidArgument)
	}
	r.exit = r.exit || o.Exit
	r.criu.EmptyNamespaces = o.EmptyNamespaces
	r.criu.ShellJob = o.Terminal
	if o.OpenTcp {
		r.criu.TCP = runtime.TCPEstablished
	}
	if o.WorkPath != "" {
		r.criu.WorkDir = o.WorkPath
	}
	if r.dir == "" {
		r.dir = o.ImagePath
	}
	if o.ParentPath != "" {
		return nil, fmt.Errorf("checkpoint option ParentPath: a dump into a directory is a whole one; cracctl checkpoint --parent makes an image of what changed: %w", errdefs.ErrInvalidArgument)
	}
	return r, nil
}

// checkpoint does what a client's call asks for.
func (s *service) checkpoint(ctx context.Context, c *container, call *taskapi.CheckpointTaskRequest) error {
	r, err := c.checkpointOptions(call.Path, call.Options)
	if err != nil {
		return err
	}
	if !c.checkpointing.TryLock() {
		return errBusy
	}
	defer c.checkpointing.Unlock()
	return s.makeCheckpoint(ctx, c, r)
}

// makeCheckpoint tells the workload, dumps it, and builds an image of it, if one
// is asked for. A failure leaves the container as it was, and no image. The
// caller holds c.checkpointing.
func (s *service) makeCheckpoint(ctx context.Context, c *container, r *checkpointRequest) (err error) {
	end := c.hooks.begin(r.id)
	defer func() { end(err) }()
	version, err := s.criu()
	if err != nil {
		return classified{err, errdefs.ErrFailedPrecondition}
	}
	r.criu.CanSkipNetworkLock = version >= 40200
	if need := images.ThisHost(version).MinimumCRIU(); version < need {
		return fmt.Errorf("CRIU %s is too old, %s is needed on this kernel; see `cracctl doctor`: %w", oci.VersionString(version), oci.VersionString(need), errdefs.ErrFailedPrecondition)
	}
	if r.ref != "" {
		// Before anything stands still for it.
		check := oci.CheckRef
		if r.push {
			check = oci.CheckPushRef
		}
		if err := check(r.ref); err != nil {
			return classified{err, errdefs.ErrInvalidArgument}
		}
	}
	if r.ref == "" && r.dir == "" {
		return fmt.Errorf("neither a directory nor an image to put it in; set the annotation %scheckpoint.image: %w", oci.AnnotationPrefix, errdefs.ErrInvalidArgument)
	}
	r.criu.Warn = func(err error) { log.G(ctx).WithError(err).WithField("id", c.id).Warn("checkpoint") }
	if err := os.MkdirAll(r.criu.WorkDir, 0o700); err != nil {
		return err
	}
	if err := c.rt.Dumpable(); err != nil {
		return err
	}
	build, err := s.startBuild(ctx, c, r, version)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			build.abort()
		}
	}()
	// Of a container that a client has paused the answer is waited for when it runs, or is
	// dumped: it stands still already.
	if c.rt.State() != runtime.Paused {
		if err := build.ready(ctx); err != nil {
			return fmt.Errorf("build image %s: %w", r.ref, err)
		}
	}
	// Before the workload is told: what it closes for the checkpoint stays so until
	// that is over.
	if r.preDumped, err = c.preDump(ctx, r); err != nil {
		return err
	}
	if r.preDumped != "" {
		defer os.RemoveAll(r.preDumped)
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("nobody waits for the checkpoint any more: %w", err)
	}
	if r.kept = r.dir != ""; !r.kept {
		// On disk, not in the bundle: that is in memory on most hosts.
		if r.dir, err = os.MkdirTemp(c.work, "dump-"); err != nil {
			return err
		}
		defer os.RemoveAll(r.dir)
	} else if err := os.MkdirAll(r.dir, 0o700); err != nil {
		return err
	}
	if err := clearDump(r.dir); err != nil {
		return err
	}
	frozen, manifest, err := s.dump(ctx, c, r, version, build)
	if err != nil {
		return err
	}
	if r.exit {
		// Another announces its end: who has asked for that is to find it stopped.
		select {
		case <-c.init.done:
		case <-time.After(endTimeout):
		}
	} else if err := r.describe(manifest); err != nil {
		return err
	}
	done, err := build.wait()
	if err != nil {
		return fmt.Errorf("build image %s: %w", r.ref, err)
	}
	name := r.dir
	var notPushed error
	if done != nil {
		name = done.Name
		notPushed = build.end()
		facts := map[string]any{
			"container_id": c.id,
			"image":        done.Name,
			"digest":       done.Digest,
			"size":         done.Size,
			"frozen_ms":    frozen.Milliseconds(),
			"dumped":       done.MemorySize - done.PreDumpedSize,
			"pre_dumped":   done.PreDumpedSize,
		}
		if r.push {
			facts["pushed"] = notPushed == nil
		}
		s.events.sendFacts(CheckpointImageTopic, fmt.Sprintf("container %s was checkpointed into %s", c.id, done.Name), facts)
	}
	s.events.send(&eventstypes.TaskCheckpointed{ContainerID: c.id, Checkpoint: name})
	log.G(ctx).WithFields(log.Fields{"id": c.id, "checkpoint": name, "frozen_ms": frozen.Milliseconds()}).Info("checkpointed")
	return notPushed
}

// dump dumps the workload between the notifications, and has the image built of it while
// it stands still. It returns how long that was.
func (s *service) dump(ctx context.Context, c *container, r *checkpointRequest, version int, build *imageBuild) (frozen time.Duration, m *oci.Manifest, err error) {
	policy, err := c.fdPolicy()
	if err != nil {
		return 0, nil, err
	}
	end, err := c.hooks.turn(ctx)
	if err != nil {
		return 0, nil, err
	}
	defer end()
	dumped, err := hold(ctx, c.dumping)
	if err != nil {
		return 0, nil, err
	}
	defer dumped()
	released, err := c.probing.hold(ctx)
	if err != nil {
		return 0, nil, err
	}
	defer released()
	// Clients pause the workload before they ask; what is frozen answers nobody.
	paused := c.rt.State() == runtime.Paused
	thawed := paused && c.hooks.anybody()
	if thawed {
		if err := c.rt.Resume(); err != nil {
			return 0, nil, err
		}
		c.hooks.clientResumed(ctx) // of an earlier checkpoint, if that waits still
	}
	// CRIU itself ends what nobody else may answer for.
	ends, gone := r.exit && r.criu.TCP == runtime.TCPEstablished, c.gone
	if ends {
		gone = c.rt.Untouched
	}
	told := false
	defer func() {
		switch {
		case err != nil && gone() != nil: // nobody is there any more
		case err != nil && (thawed || !paused):
			if told {
				c.hooks.afterResume(ctx, resumedMessage(r.id, err))
			}
			if thawed {
				err = errors.Join(err, c.rt.Pause())
			}
		case r.exit:
		case paused:
			c.hooks.onResume(resumedMessage(r.id, err))
		default:
			c.hooks.afterResume(ctx, resumedMessage(r.id, nil))
		}
	}()
	if thawed {
		// Before anybody is told.
		if err := build.ready(ctx); err != nil {
			return 0, nil, fmt.Errorf("build image %s: %w", r.ref, err)
		}
	}
	told = true
	if err := c.hooks.before(ctx, r.id); err != nil {
		return 0, nil, err
	}
	defer c.hooks.suspend()()
	manifest := c.manifest(version, r)
	var began time.Time // the freeze
	err = c.rt.Dump(r.dir, r.criu, runtime.DumpOptions{
		Exit:    r.exit,
		Pause:   paused,
		PreDump: r.preDumped,
		BeforeDump: func(pids []int) error {
			began = time.Now()
			return c.enforceFDPolicy(policy, pids)
		},
		WhileFrozen: func() error {
			if r.exit {
				// What fails later would fail without the workload.
				if err := r.describe(manifest); err != nil {
					return err
				}
			}
			if build == nil {
				return nil
			}
			// A client that has gone, or a builder that hangs, must not keep the
			// workload frozen.
			ctx, cancel := context.WithTimeout(ctx, diffTimeout)
			defer cancel()
			defer context.AfterFunc(ctx, build.kill)()
			alive := func() {}
			if !ends {
				alive = killedWith(c.init.running(), build)
			}
			defer alive()
			if err := build.ready(ctx); err != nil {
				return fmt.Errorf("build image %s: %w", r.ref, cmp.Or(gone(), err))
			}
			if err := build.ask(images.BuildDump{DumpDir: r.dir, PreDumpDir: r.preDumped, Manifest: *manifest, Frozen: began}); err != nil {
				return err
			}
			if err := build.untilDiffed(); err != nil {
				return cmp.Or(gone(), err)
			}
			if err := gone(); err != nil || !r.exit {
				return err
			}
			alive() // what ends now, is in the image
			// Nobody waits for the thaw, and without the image the workload would be
			// lost.
			_, err := build.wait()
			return err
		},
	})
	return time.Since(began), manifest, err
}

// gone is an error if the workload was killed, or has ended otherwise: there is nobody to
// tell anything, and no use for what is being made of it.
func (c *container) gone() error {
	if err := c.rt.Untouched(); err != nil {
		return err
	}
	select {
	case <-c.init.running().Done():
		return fmt.Errorf("container %s ended while it was checkpointed", c.id)
	default:
		return nil
	}
}

// manifest says what a dump of this container needs, but for its files.
func (c *container) manifest(criu int, r *checkpointRequest) *oci.Manifest {
	spec := c.rt.Spec()
	m := &oci.Manifest{
		Name:           r.ref,
		Created:        time.Now().UTC(),
		Container:      oci.ContainerOf(spec),
		Mounts:         oci.MountsOf(spec),
		TCPEstablished: r.criu.TCP == runtime.TCPEstablished,
	}
	images.ThisHost(criu).Describe(m)
	m.Container.ID = c.id
	if c.args != nil {
		m.Container.Args = c.args
	}
	if d := c.dumped; d != nil {
		// A clone runs what the dump ran, whatever its request said.
		m.Container.Args, m.Container.Cwd = d.Container.Args, d.Container.Cwd
	}
	return m
}

// inventory is the file of a dump that CRIU writes last.
const inventory = "inventory.img"

// describe puts a manifest beside the dump, if that stays where it is.
func (r *checkpointRequest) describe(m *oci.Manifest) error {
	if !r.kept {
		return nil
	}
	if err := writeDumpManifest(r.dir, m); err != nil {
		return errors.Join(fmt.Errorf("describe the dump in %s: %w", r.dir, err), clearDump(r.dir))
	}
	return nil
}

// writeDumpManifest puts a manifest beside a dump that a client will keep, so
// that a restore from it is gated like one from an image. Of the files it lists
// the inventory alone: to read all the memory once more while the workload waits
// would buy little for a directory on this host.
func writeDumpManifest(dir string, m *oci.Manifest) error {
	file, err := describeInventory(dir)
	if err != nil {
		return err
	}
	full := *m
	full.Files = []oci.File{file}
	if full.Requires, full.Container.LSM, err = images.Needs(dir); err != nil {
		return err
	}
	data, err := full.Encode()
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, manifestInDump), data, 0o600)
}

func describeInventory(dir string) (oci.File, error) {
	data, err := os.ReadFile(filepath.Join(dir, inventory))
	if err != nil {
		return oci.File{}, err
	}
	return oci.File{Name: inventory, Size: int64(len(data)), Digest: fmt.Sprintf("sha256:%x", sha256.Sum256(data))}, nil
}

// checkInventory tells whether a dump is the one that its manifest describes.
func checkInventory(dir string, m *oci.Manifest) error {
	file, err := describeInventory(dir)
	if err != nil {
		return err
	}
	if !slices.Contains(m.Files, file) {
		return fmt.Errorf("%s is not the dump that its %s describes: %w", dir, manifestInDump, images.ErrDamaged)
	}
	return nil
}

// clearDump removes what makes an earlier dump in dir look whole, so that one
// that fails half-way cannot pass for it.
func clearDump(dir string) error {
	for _, name := range []string{manifestInDump, inventory} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return nil
}

// imageBuild is a running builder.
type imageBuild struct {
	cmd      *exec.Cmd
	request  io.WriteCloser
	waitCmd  func() error
	events   *bufio.Scanner
	stderr   *bytes.Buffer
	prepared bool // it has said that it is ready
	asked    bool // it makes the image
	done     *images.BuildEvent
	ended    bool // waited for
}

// startBuild starts a builder that finds out what stands in the way of an image, before
// there is a dump; nil if none is asked for. It answers when it is waited for: see ready.
func (s *service) startBuild(ctx context.Context, c *container, r *checkpointRequest, version int) (*imageBuild, error) {
	if r.ref == "" {
		return nil, nil
	}
	b, err := s.startBuilder()
	if err != nil {
		return nil, err
	}
	defer context.AfterFunc(ctx, b.kill)() // it may not even read
	if err := b.say(s.buildRequest(c, r, c.manifest(version, r))); err != nil {
		b.abort()
		return nil, err
	}
	return b, nil
}

// killedWith ends a build with the workload, until stop is called: what it makes would be of
// no use.
func killedWith(proc *runtime.Process, b *imageBuild) (stop func()) {
	stopped := make(chan struct{})
	go func() {
		select {
		case <-proc.Done():
			b.kill()
		case <-stopped:
		}
	}()
	return sync.OnceFunc(func() { close(stopped) })
}

// startBuilder starts a builder, which waits to be asked.
func (s *service) startBuilder() (*imageBuild, error) {
	path, err := findBuilder()
	if err != nil {
		return nil, err
	}
	b := &imageBuild{cmd: exec.Command(path, "build-image", "--address", s.containerd), stderr: &bytes.Buffer{}}
	b.cmd.Stderr = b.stderr
	// What is sent to the shim's group is not for it. If the shim is killed it ends by
	// itself, because nobody hears of its image.
	b.cmd.SysProcAttr = &unix.SysProcAttr{Setpgid: true}
	if b.request, err = b.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := b.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if b.waitCmd, err = s.reaper.Start(b.cmd); err != nil {
		return nil, fmt.Errorf("start %s: %w", path, err)
	}
	b.events = bufio.NewScanner(out)
	b.events.Buffer(nil, 1<<20)
	return b, nil
}

// buildRequest asks for the image of a container, as far as it is known without a dump.
func (s *service) buildRequest(c *container, r *checkpointRequest, m *oci.Manifest) images.BuildRequest {
	return images.BuildRequest{
		Address:     s.containerd,
		Namespace:   s.namespace,
		Container:   c.id,
		Ref:         r.ref,
		SpecPath:    filepath.Join(c.bundle, "config.json"),
		Push:        r.push,
		Index:       r.index,
		Compression: r.compression,
		EncryptTo:   r.encryptTo,
		Parent:      r.parent,
		Keys:        r.keys,
		BuildDump:   images.BuildDump{Manifest: *m},
	}
}

// say sends a line. That the builder has ended meanwhile is no error of it: its events
// tell why.
func (b *imageBuild) say(line any) error {
	data, err := json.Marshal(line)
	if err != nil {
		return err
	}
	if _, err := b.request.Write(append(data, '\n')); err != nil && !errors.Is(err, unix.EPIPE) {
		return fmt.Errorf("ask %s for the image: %w", builder, err)
	}
	return nil
}

// ready waits until the builder knows of nothing that stands in the way. It may be called
// on nil, and again.
func (b *imageBuild) ready(ctx context.Context) error {
	if b == nil || b.prepared {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, prepareTimeout)
	defer cancel()
	defer context.AfterFunc(ctx, b.kill)()
	if err := b.until(images.EventReady); err != nil {
		return errors.Join(err, ctx.Err())
	}
	b.prepared = true
	return nil
}

// ask begins the build.
func (b *imageBuild) ask(d images.BuildDump) error {
	b.asked = true
	if err := b.say(d); err != nil {
		return err
	}
	return b.request.Close()
}

// findBuilder looks beside the shim first: the two belong together.
func findBuilder() (string, error) {
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), builder)
		if st, err := os.Stat(beside); err == nil && st.Mode().IsRegular() {
			return beside, nil
		}
	}
	path, err := exec.LookPath(builder)
	if err != nil {
		return "", fmt.Errorf("%s, which builds checkpoint images, is neither beside the shim nor in PATH; install it (`make install`): %w", builder, err)
	}
	return path, nil
}

// next reads one event. The end of the events is the end of the builder.
func (b *imageBuild) next() (*images.BuildEvent, error) {
	if !b.events.Scan() {
		err := errors.Join(b.events.Err(), b.drain())
		if words := strings.TrimSpace(b.stderr.String()); words != "" {
			return nil, errors.New(words)
		}
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("%s ended early: %w", builder, err)
	}
	var e images.BuildEvent
	if err := json.Unmarshal(b.events.Bytes(), &e); err != nil {
		return nil, fmt.Errorf("%s said %q: %w", builder, b.events.Text(), err)
	}
	switch e.Event {
	case images.EventError:
		_ = b.drain()
		return nil, errors.New(e.Error)
	case images.EventWarning:
		log.L.Warn(e.Error)
	case images.EventDone:
		b.done = &e
	}
	return &e, nil
}

// untilDiffed waits until the container's changes are taken.
func (b *imageBuild) untilDiffed() error {
	if err := b.until(images.EventDiffed); err != nil {
		return fmt.Errorf("take the layer of changes: %w", err)
	}
	return nil
}

// until waits for an event of a kind.
func (b *imageBuild) until(kind string) error {
	for {
		e, err := b.next()
		if err != nil {
			return err
		}
		if e.Event == kind {
			return nil
		}
	}
}

// wait waits for the image. It may be called on nil.
func (b *imageBuild) wait() (*images.BuildEvent, error) {
	if b == nil {
		return nil, nil
	}
	if b.ended {
		return b.done, nil
	}
	for b.done == nil {
		if _, err := b.next(); err != nil {
			return nil, err
		}
	}
	return b.done, nil
}

// end waits for what comes after the image: its push, if one was asked for, and
// the builder's end. It may be called once the image is there.
func (b *imageBuild) end() error {
	for !b.ended {
		if !b.events.Scan() {
			return errors.Join(b.events.Err(), b.drain())
		}
		var e images.BuildEvent
		if err := json.Unmarshal(b.events.Bytes(), &e); err != nil {
			return fmt.Errorf("%s said %q: %w", builder, b.events.Text(), err)
		}
		switch e.Event {
		case images.EventError:
			_ = b.drain()
			return errors.New(e.Error)
		case images.EventWarning:
			log.L.Warn(e.Error)
		}
	}
	return nil
}

// drain waits for the builder's end, whatever else it says.
func (b *imageBuild) drain() error {
	for b.events.Scan() {
	}
	b.ended = true
	return b.waitCmd()
}

// abort ends a build that is of no use any more. It may be called on nil.
func (b *imageBuild) abort() {
	if b == nil {
		return
	}
	if b.asked {
		b.kill()
	} else {
		// It has something to give back, and nothing else to do.
		_ = b.request.Close()
		defer time.AfterFunc(endTimeout, b.kill).Stop()
	}
	if !b.ended {
		_ = b.drain()
	}
}

func (b *imageBuild) kill() { _ = b.cmd.Process.Kill() }
