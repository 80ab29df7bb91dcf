package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/console"
	"github.com/containerd/fifo"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/runtime"
)

// stdioConfig is what a client asked for: paths of FIFOs, or URIs of loggers.
type stdioConfig struct {
	Stdin, Stdout, Stderr string
	Terminal              bool
}

const (
	// openTimeout bounds the wait for a client to open its end of a FIFO.
	openTimeout = 30 * time.Second
	// drainTimeout bounds the wait for output after a process has ended: what
	// it left running may hold the other end for ever.
	drainTimeout = 10 * time.Second
	// loggerEnd is what a logging program gets to end by itself, when it has read its
	// input to the end, and loggerTimeout what it gets after SIGTERM.
	loggerEnd     = 2 * time.Second
	loggerTimeout = 12 * time.Second
	// copyBuffer is the size of one read from a process's output, in bytes.
	copyBuffer = 32 << 10
)

var copyBuffers = sync.Pool{New: func() any {
	b := make([]byte, copyBuffer)
	return &b
}}

// processIO connects one process to where its client wants its streams.
//
// The process's ends are in child, and closed by afterStart. Output is copied
// until every writer of it is gone; wait waits for that.
type processIO struct {
	config stdioConfig
	child  runtime.Stdio

	stdin  io.Closer // the FIFO, held open for writing, or nil
	copies sync.WaitGroup

	console *os.File // our end of the socket that the terminal comes through

	// mu guards master: a client may ask for a size while the start that brings
	// the terminal is under way.
	mu     sync.Mutex
	master console.Console

	logger  *logger
	closers []io.Closer
}

// newProcessIO opens what the config names, and starts the copying. Close must
// be called.
func newProcessIO(ctx context.Context, c stdioConfig, owner stdioOwner) (_ *processIO, err error) {
	p := &processIO{config: c}
	defer func() {
		if err != nil {
			p.afterStart()
			p.close()
		}
	}()
	if c.Terminal {
		return p, p.openConsole()
	}
	if c.Stdin == "" && c.Stdout == "" && c.Stderr == "" {
		return p, p.null()
	}
	u, err := url.Parse(c.Stdout)
	if err != nil {
		return nil, fmt.Errorf("stdout %q: %w", c.Stdout, err)
	}
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	switch u.Scheme {
	case "", "fifo":
		err = p.pipes(ctx, owner, c)
	case "file":
		if err := os.MkdirAll(filepath.Dir(u.Path), 0o755); err != nil {
			return nil, err
		}
		err = p.pipes(ctx, owner, stdioConfig{Stdin: c.Stdin, Stdout: u.Path, Stderr: u.Path})
	case "binary", "binary-v2":
		err = p.startLogger(u, owner)
	default:
		err = fmt.Errorf("stdout %q: unknown scheme %q; known are fifo, file, binary and binary-v2", c.Stdout, u.Scheme)
	}
	return p, err
}

// stdioOwner is who owns and who names a process's streams.
type stdioOwner struct {
	namespace, id string
	uid, gid      int
	reaper        *runtime.Subreaper
}

// null gives the process /dev/null three times.
func (p *processIO) null() (err error) {
	for _, f := range []**os.File{&p.child.Stdin, &p.child.Stdout, &p.child.Stderr} {
		if *f, err = os.OpenFile(os.DevNull, os.O_RDWR, 0); err != nil {
			return err
		}
	}
	return nil
}

// pipes puts a pipe between the process and each FIFO or file. The process must
// not have the FIFO itself: a dump could not tell it from one inside.
func (p *processIO) pipes(ctx context.Context, owner stdioOwner, c stdioConfig) error {
	if err := p.null(); err != nil {
		return err
	}
	var shared *sharedSink // of stdout, for a stderr that goes to the same file
	for _, out := range []struct {
		name  string
		child **os.File
	}{{c.Stdout, &p.child.Stdout}, {c.Stderr, &p.child.Stderr}} {
		if out.name == "" {
			continue
		}
		r, w, err := owner.pipe()
		if err != nil {
			return err
		}
		(*out.child).Close()
		*out.child = w
		isFIFO, err := fifo.IsFifo(out.name)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			r.Close()
			return fmt.Errorf("output %s: %w", out.name, err)
		}
		var sink io.WriteCloser
		switch {
		case isFIFO:
			sink, err = openOutput(ctx, out.name)
		case shared == nil || c.Stdout != c.Stderr:
			sink, err = os.OpenFile(out.name, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
			shared = &sharedSink{WriteCloser: sink}
			sink = shared
		default:
			sink = shared
		}
		if err != nil {
			r.Close()
			return fmt.Errorf("output %s: %w", out.name, err)
		}
		if s, ok := sink.(*sharedSink); ok {
			s.users.Add(1)
		}
		// The sink too: a copy may be stuck in a write that nobody reads.
		p.closers = append(p.closers, r, sink)
		p.copyOut(sink, r)
	}
	if c.Stdin == "" {
		return nil
	}
	r, w, err := owner.pipe()
	if err != nil {
		return err
	}
	p.child.Stdin.Close()
	p.child.Stdin = r
	in, err := p.openInput(c.Stdin)
	if err != nil {
		w.Close()
		return err
	}
	go func() {
		_ = copyAll(w, in) // what is not read is nobody's loss
		w.Close()
		in.Close()
	}()
	return nil
}

// openInput opens a client's stdin. It returns the reading end, and keeps a
// writing end for CloseIO: the process sees the end of its input when both the
// client and CloseIO have closed theirs.
func (p *processIO) openInput(name string) (io.ReadCloser, error) {
	in, err := fifo.OpenFifo(context.Background(), name, unix.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("stdin %s: %w", name, err)
	}
	hold, err := fifo.OpenFifo(context.Background(), name, unix.O_WRONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		in.Close()
		return nil, fmt.Errorf("stdin %s: %w", name, err)
	}
	p.stdin = hold
	p.closers = append(p.closers, hold, in)
	return in, nil
}

// sharedSink is a file that stdout and stderr both go to. Opened once, in append
// mode, it keeps the two in the order in which they come.
type sharedSink struct {
	io.WriteCloser
	users atomic.Int32
}

// Close closes the file for its last user.
func (s *sharedSink) Close() error {
	if s.users.Add(-1) > 0 {
		return nil
	}
	return s.WriteCloser.Close()
}

// copyOut copies until the last writer is gone, and closes the sink then: the
// client waits for the end of its FIFO before it deletes the process.
func (p *processIO) copyOut(sink io.WriteCloser, r io.Reader) {
	p.copies.Add(1)
	go func() {
		defer p.copies.Done()
		defer sink.Close()
		// A terminal whose process has ended reads as EIO.
		if err := copyAll(&lossy{w: sink}, r); err != nil && !errors.Is(err, os.ErrClosed) && !errors.Is(err, unix.EIO) {
			log.L.WithError(err).Warn("failed to copy output")
		}
	}()
}

// lossy loses what cannot be written, as on a full disk, and says so: a process must
// not stand still for ever because its output does.
type lossy struct {
	w    io.Writer
	lost int // bytes since the last that was written
}

func (l *lossy) Write(p []byte) (int, error) {
	n, err := l.w.Write(p)
	switch {
	case err == nil && l.lost > 0:
		log.L.Warnf("output is written again; %d bytes of it are lost", l.lost)
		l.lost = 0
	case errors.Is(err, os.ErrClosed): // by us: nobody wants it any more
		return n, err
	case err != nil:
		if l.lost == 0 {
			log.L.WithError(err).Warn("output is lost until it can be written again")
		}
		l.lost += len(p) - n
	}
	return len(p), nil
}

func copyAll(w io.Writer, r io.Reader) error {
	buf := copyBuffers.Get().(*[]byte)
	defer copyBuffers.Put(buf)
	// Only Read and Write: the buffer is bounded, whatever else they can do.
	_, err := io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{r}, *buf)
	return err
}

// pipe is a pipe whose process may have another user.
func (o stdioOwner) pipe() (r, w *os.File, err error) {
	if r, w, err = os.Pipe(); err != nil {
		return nil, nil, err
	}
	if o.uid != 0 || o.gid != 0 {
		for _, f := range []*os.File{r, w} {
			if err = f.Chown(o.uid, o.gid); err != nil {
				r.Close()
				w.Close()
				return nil, nil, fmt.Errorf("give stdio to %d:%d: %w", o.uid, o.gid, err)
			}
		}
	}
	return r, w, nil
}

// fifoOutput is the writing end of a FIFO, and a reading end that nobody reads:
// a client may go and come back without the process being killed by SIGPIPE.
type fifoOutput struct {
	io.WriteCloser
	keep io.Closer
}

func (f fifoOutput) Close() error {
	return errors.Join(f.WriteCloser.Close(), f.keep.Close())
}

// openOutput waits until the client has opened its end.
func openOutput(ctx context.Context, name string) (io.WriteCloser, error) {
	w, err := fifo.OpenFifo(ctx, name, unix.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	r, err := fifo.OpenFifo(ctx, name, unix.O_RDONLY, 0)
	if err != nil {
		w.Close()
		return nil, err
	}
	return fifoOutput{w, r}, nil
}

// afterStart closes the process's ends: the process has its own now, or never
// will.
func (p *processIO) afterStart() {
	for _, f := range []**os.File{&p.child.Stdin, &p.child.Stdout, &p.child.Stderr, &p.child.Console} {
		if *f != nil {
			(*f).Close()
			*f = nil
		}
	}
}

// closeStdin ends the process's input, as CloseIO asks.
func (p *processIO) closeStdin() error {
	if p.stdin == nil {
		return nil
	}
	err := p.stdin.Close()
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

// wait waits until all output has been copied, but not for ever.
func (p *processIO) wait() {
	done := make(chan struct{})
	go func() {
		p.copies.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(drainTimeout):
		log.L.Warn("gave up to wait for the rest of a process's output: something still has it open")
	}
}

// close gives everything up.
func (p *processIO) close() {
	if master := p.terminal(); master != nil {
		master.Close()
	}
	if p.console != nil {
		p.console.Close()
	}
	for _, c := range p.closers {
		c.Close()
	}
	p.logger.stop()
}

// logger is a client's program that gets the output of one process.
type logger struct {
	process *os.Process
	done    chan struct{}
}

// command builds the call of a logging program (containerd, core/runtime/v2
// README, "Logging"): arguments from the URI's query, output on descriptors 3
// and 4, a pipe to report readiness on 5.
func loggerCommand(u *url.URL, owner stdioOwner) *exec.Cmd {
	var args []string
	for k, vs := range u.Query() {
		args = append(args, k)
		if len(vs) > 0 {
			args = append(args, vs[0])
		}
	}
	cmd := exec.Command(u.Path, args...)
	cmd.Env = append(cmd.Env, "CONTAINER_ID="+owner.id, "CONTAINER_NAMESPACE="+owner.namespace)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	return cmd
}

// startLogger gives the process's output straight to a logging program.
func (p *processIO) startLogger(u *url.URL, owner stdioOwner) (err error) {
	if err := p.null(); err != nil {
		return err
	}
	var readers [2]*os.File
	for i, child := range []**os.File{&p.child.Stdout, &p.child.Stderr} {
		r, w, err := owner.pipe()
		if err != nil {
			return err
		}
		defer r.Close()
		(*child).Close()
		*child = w
		readers[i] = r
	}
	p.logger, err = runLogger(u, owner, readers[0], readers[1])
	return err
}

// runLogger starts a logging program and waits until it says it is ready.
func runLogger(u *url.URL, owner stdioOwner, stdout, stderr *os.File) (*logger, error) {
	ready, tell, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer ready.Close()
	cmd := loggerCommand(u, owner)
	cmd.ExtraFiles = []*os.File{stdout, stderr, tell}
	wait, err := owner.reaper.Start(cmd)
	tell.Close()
	if err != nil {
		return nil, fmt.Errorf("start logging program %s: %w", u.Path, err)
	}
	l := &logger{process: cmd.Process, done: make(chan struct{})}
	go func() {
		defer close(l.done)
		_ = wait() // its exit status is nobody's business
	}()
	n, err := ready.Read(make([]byte, 1))
	if err != nil && !errors.Is(err, io.EOF) {
		l.stop()
		return nil, fmt.Errorf("logging program %s: %w", u.Path, err)
	}
	// Readiness is a byte in version 2; in the first one the end of the pipe
	// was enough, and a crash looks the same.
	if u.Scheme == "binary-v2" && n == 0 {
		l.stop()
		return nil, fmt.Errorf("logging program %s ended before it was ready", u.Path)
	}
	return l, nil
}

// stop ends the program, after it has read to the end. It may be called on nil.
func (l *logger) stop() {
	if l == nil {
		return
	}
	// Its input has ended, unless something that outlives the process holds it open: what it
	// has not read yet, or not written, SIGTERM would lose. Some wait for that signal, though.
	select {
	case <-l.done:
		return
	case <-time.After(loggerEnd):
	}
	_ = l.process.Signal(unix.SIGTERM)
	select {
	case <-l.done:
	case <-time.After(loggerTimeout):
		log.L.Warn("logging program ignores SIGTERM; killing it")
		_ = l.process.Kill()
		<-l.done
	}
}
