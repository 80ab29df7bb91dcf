package integration

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/runtime/v2/logging"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"

	"github.com/crac-shim/crac/integration/harness"
)

// output collects what a process writes, and may be read meanwhile.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// config is a container to be made. The zero value is a busybox shell.
type config struct {
	id             string
	image          string // of integration/apps; default busybox
	args           []string
	spec           []oci.SpecOpts
	container      []containerd.NewContainerOpts // replace the snapshot when not empty
	runtime        string
	runtimeOptions any
	stdin          io.Reader
	terminal       bool
	io             cio.Creator
	task           []containerd.NewTaskOpts
}

// ctn is a container of a test, and its task.
type ctn struct {
	*harness.T
	containerd.Container
	task     containerd.Task
	exit     <-chan containerd.ExitStatus
	out, err *output
	io       cio.Creator
	taskOpts []containerd.NewTaskOpts
}

// sh is a container that runs a shell script.
func sh(script string, spec ...oci.SpecOpts) config {
	return config{args: []string{"sh", "-c", script}, spec: spec}
}

// newContainer makes the record of a container. Whatever becomes of it, it is deleted with its
// task when the test ends, and the test fails if anything of it is left then.
func newContainer(t *harness.T, c config) *ctn {
	t.Helper()
	if c.image == "" {
		c.image = "busybox"
	}
	img, err := t.ImportImage(t.Ctx, c.image)
	if err != nil {
		t.Fatal(err)
	}
	if c.id == "" {
		c.id = newID(t)
	}
	if c.runtime == "" {
		c.runtime = testRuntime
	}
	spec := []oci.SpecOpts{oci.WithDefaultSpec(), oci.WithDefaultUnixDevices, oci.WithImageConfig(img)}
	if len(c.args) > 0 {
		spec = append(spec, oci.WithProcessArgs(c.args...))
	}
	if c.terminal {
		spec = append(spec, oci.WithTTY)
	}
	opts := []containerd.NewContainerOpts{
		containerd.WithImage(img),
		containerd.WithRuntime(c.runtime, c.runtimeOptions),
	}
	if len(c.container) == 0 {
		c.container = []containerd.NewContainerOpts{containerd.WithNewSnapshot(c.id, img)}
	}
	opts = append(append(opts, c.container...), containerd.WithNewSpec(append(spec, c.spec...)...))
	made, err := t.Client.NewContainer(t.Ctx, c.id, opts...)
	if err != nil {
		t.Fatal(err)
	}
	n := &ctn{T: t, Container: made, out: &output{}, err: &output{}, taskOpts: c.task, io: c.io}
	if n.io == nil {
		n.io = n.streams(c.stdin, n.out, n.err, c.terminal)
	}
	t.Cleanup(n.remove)
	return n
}

func (c *ctn) streams(in io.Reader, out, err io.Writer, terminal bool) cio.Creator {
	opts := []cio.Opt{cio.WithStreams(in, out, err), cio.WithFIFODir(c.FIFODir())}
	if terminal {
		opts = append(opts, cio.WithTerminal)
	}
	return cio.NewCreator(opts...)
}

// remove deletes the container with its task, unless the test did it.
func (c *ctn) remove() {
	c.Helper()
	ctx := c.Daemon.Context(context.Background()) // the test's own context has ended
	if task, err := c.Task(ctx, nil); err == nil {
		if _, err := task.Delete(ctx, containerd.WithProcessKill); err != nil && !errdefs.IsNotFound(err) {
			c.Errorf("delete the task of %s: %v", c.ID(), err)
		}
	}
	if err := c.Delete(ctx, containerd.WithSnapshotCleanup); err != nil && !errdefs.IsNotFound(err) {
		c.Errorf("delete %s: %v", c.ID(), err)
	}
	c.NoLeftovers(c.ID())
}

// create makes the task.
func (c *ctn) create() *ctn {
	c.Helper()
	if err := c.tryCreate(); err != nil {
		c.Fatalf("create the task of %s: %v", c.ID(), err)
	}
	return c
}

func (c *ctn) tryCreate() (err error) {
	if c.task, err = c.NewTask(c.Ctx, c.io, c.taskOpts...); err != nil {
		return err
	}
	c.exit, err = c.task.Wait(c.Ctx)
	return err
}

// start makes the task and starts it.
func (c *ctn) start() *ctn {
	c.Helper()
	c.create()
	if err := c.task.Start(c.Ctx); err != nil {
		c.Fatalf("start %s: %v", c.ID(), err)
	}
	return c
}

// wait waits for the task's exit and returns its code. All output has arrived then.
func (c *ctn) wait() uint32 {
	c.Helper()
	code := exitCode(c.T, c.exit)
	if err := harness.WaitIO(c.Ctx, c.task.IO()); err != nil {
		c.Fatal(err)
	}
	return code
}

func exitCode(t *harness.T, exit <-chan containerd.ExitStatus) uint32 {
	t.Helper()
	select {
	case s := <-exit:
		code, _, err := s.Result()
		if err != nil {
			t.Fatalf("wait: %v", err)
		}
		return code
	case <-t.Ctx.Done():
		t.Fatalf("wait: %v", t.Ctx.Err())
		return 0
	}
}

// deleteTask deletes the stopped task and returns the code that Delete reports.
func (c *ctn) deleteTask() uint32 {
	c.Helper()
	s, err := c.task.Delete(c.Ctx)
	if err != nil {
		c.Fatalf("delete the task of %s: %v", c.ID(), err)
	}
	return s.ExitCode()
}

func (c *ctn) kill(sig syscall.Signal, opts ...containerd.KillOpts) {
	c.Helper()
	if err := c.task.Kill(c.Ctx, sig, opts...); err != nil {
		c.Fatalf("kill %s with %v: %v", c.ID(), sig, err)
	}
}

func (c *ctn) status() containerd.ProcessStatus {
	c.Helper()
	s, err := c.task.Status(c.Ctx)
	if err != nil {
		c.Fatalf("state of %s: %v", c.ID(), err)
	}
	return s.Status
}

// result is a process that has ended.
type result struct {
	code     uint32
	out, err string
}

// runContainer runs a container to its end and deletes its task.
func runContainer(t *harness.T, c config) result {
	t.Helper()
	n := newContainer(t, c).start()
	code := n.wait()
	if again := n.deleteTask(); again != code {
		t.Errorf("Delete reports code %d, Wait %d", again, code)
	}
	return result{code, n.out.String(), n.err.String()}
}

// outputOf runs a shell script in a container, which has to succeed.
func outputOf(t *harness.T, c config) string {
	t.Helper()
	r := runContainer(t, c)
	if r.code != 0 {
		t.Fatalf("%q ended with code %d: %s%s", c.args, r.code, r.out, r.err)
	}
	return r.out
}

// proc is an exec'ed process.
type proc struct {
	containerd.Process
	exit     <-chan containerd.ExitStatus
	out, err *output
}

func (c *ctn) newExec(id string, in io.Reader, terminal bool, args ...string) (*proc, error) {
	spec, err := c.Spec(c.Ctx)
	if err != nil {
		return nil, err
	}
	p := *spec.Process
	p.Args, p.Terminal = args, terminal
	n := &proc{out: &output{}, err: &output{}}
	if n.Process, err = c.task.Exec(c.Ctx, id, &p, c.streams(in, n.out, n.err, terminal)); err != nil {
		return nil, err
	}
	n.exit, err = n.Wait(c.Ctx)
	return n, err
}

func (c *ctn) startExec(id string, args ...string) *proc {
	c.Helper()
	p, err := c.newExec(id, nil, false, args...)
	if err == nil {
		err = p.Start(c.Ctx)
	}
	if err != nil {
		c.Fatalf("exec %s %q: %v", id, args, err)
	}
	return p
}

// end waits for an exec and deletes it.
func (c *ctn) end(p *proc) result {
	c.Helper()
	code := exitCode(c.T, p.exit)
	s, err := p.Delete(c.Ctx)
	if err != nil {
		c.Fatalf("delete exec %s: %v", p.ID(), err)
	}
	if s.ExitCode() != code {
		c.Errorf("exec %s: Delete reports code %d, Wait %d", p.ID(), s.ExitCode(), code)
	}
	return result{code, p.out.String(), p.err.String()}
}

// exec runs a shell script in the running container.
func (c *ctn) exec(script string) result {
	c.Helper()
	return c.end(c.startExec(newID(c), "sh", "-c", script))
}

// loggerArg as the first argument makes the test binary a logger for binary:// URIs.
const loggerArg = "crac-test-logger"

// runLogger writes both streams of the container into the directory that is the argument.
func runLogger() {
	logging.Run(func(_ context.Context, cfg *logging.Config, ready func() error) error {
		dir := os.Args[2]
		if err := os.WriteFile(filepath.Join(dir, "who"), []byte(cfg.Namespace+"/"+cfg.ID), 0o600); err != nil {
			return err
		}
		files := map[string]io.Reader{"stdout": cfg.Stdout, "stderr": cfg.Stderr}
		errs := make(chan error, len(files))
		for name, r := range files {
			f, err := os.Create(filepath.Join(dir, name))
			if err != nil {
				return err
			}
			go func() {
				_, err := io.Copy(f, r)
				if cerr := f.Close(); err == nil {
					err = cerr
				}
				errs <- err
			}()
		}
		if err := ready(); err != nil {
			return err
		}
		for range files {
			if err := <-errs; err != nil {
				return err
			}
		}
		return os.WriteFile(filepath.Join(dir, "done"), nil, 0o600)
	})
}

// waitEmpty calls list until it returns nothing, for as long as one thing may take, and returns the rest.
func waitEmpty(list func() []string) []string {
	for deadline := time.Now().Add(harness.WaitLimit); ; time.Sleep(10 * time.Millisecond) {
		if left := list(); len(left) == 0 || time.Now().After(deadline) {
			return left
		}
	}
}
