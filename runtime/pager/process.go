package pager

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	goruntime "runtime"
	"slices"
	"sync"

	"golang.org/x/sys/unix"
)

// What the first argument of this program is when it is to be a pager or its
// guardian (see Main), and what the processes call themselves: not by the name of
// the program, for those who kill by name.
const (
	pagerCommand    = "pager"
	guardianCommand = "pager-guardian"
	pagerName       = "crac-pager"
	guardianName    = "crac-guardian"
)

// File descriptors of a pager process.
const (
	controlFD = 3 + iota
	imagesFD
	listenerFD
)

var errPagerDied = errors.New("the pager has died: its guardian has killed the workload, whose memory was not complete")

// processConfig goes to a pager process.
type processConfig struct {
	ImagesName      string   `json:"images"` // for errors
	Cgroups         []string `json:"cgroups"`
	GuardianCgroups []string `json:"guardian_cgroups"`
	WorkingSet      string   `json:"working_set"`
	Record          string   `json:"record"`
	Threads         int      `json:"threads"`
}

// message goes over the control socket, one JSON value to a line.
type message struct {
	Event string `json:"event,omitempty"` // to the parent: what has happened
	Error string `json:"error,omitempty"`
	Stats Stats  `json:"stats,omitzero"`

	Command string         `json:"command,omitempty"` // to the pager
	Config  *processConfig `json:"config,omitempty"`
}

const (
	eventReady    = "ready"
	eventRestored = "restored"
	eventDrained  = "drained"
	eventFailed   = "failed"

	commandServe  = "serve"
	commandFinish = "finish"
	commandStop   = "stop"
)

// Process is a pager in a process of its own, with a guardian. It is safe for
// concurrent use.
type Process struct {
	cmd     *exec.Cmd
	control *reporter
	cgroups cgroups

	warning error // before it is ready

	mu    sync.Mutex
	stats Stats
	err   error

	restored chan struct{}
	drained  chan struct{}
	done     chan struct{}
}

// ProcessConfig says what Start starts.
type ProcessConfig struct {
	Config
	// GuardianCgroups are the directories of cgroups to move the guardian to, so
	// that nothing that kills the pager by its cgroup kills the guardian too.
	// Empty: it stays with the pager.
	GuardianCgroups []string
	// Program and its arguments end in a call of Main; empty: this program.
	Program string
	Args    []string
	// Stderr gets the pager's log; nil: nowhere.
	Stderr *os.File
}

// Start starts a pager and returns when CRIU may be started. The caller must wait
// for it: nothing else may be put into the cgroups before Done is closed.
//
// The pager is a child of the calling process, which has to leave its exit status
// to Start. It goes on when the calling process dies.
func Start(ctx context.Context, cfg ProcessConfig) (*Process, error) {
	defer cfg.Images.Close()
	defer cfg.Listener.Close()
	listener, err := cfg.Listener.File()
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	ours, theirs, err := controlPair()
	if err != nil {
		return nil, err
	}
	if cfg.Program == "" {
		cfg.Program = "/proc/self/exe"
	}
	cmd := exec.Command(cfg.Program)
	cmd.Args = append([]string{pagerName, pagerCommand}, cfg.Args...)
	cmd.ExtraFiles = []*os.File{theirs, cfg.Images, listener}
	if cfg.Stderr != nil {
		cmd.Stderr = cfg.Stderr
	}
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	err = cmd.Start()
	theirs.Close() // so that the pager's end is the end
	if err != nil {
		ours.Close()
		return nil, fmt.Errorf("start the pager: %w", err)
	}
	p := &Process{
		cmd:      cmd,
		control:  newReporter(ours),
		cgroups:  cfg.Cgroups,
		restored: make(chan struct{}),
		drained:  make(chan struct{}),
		done:     make(chan struct{}),
	}
	return p, p.begin(ctx, cfg)
}

// begin hands the configuration over and waits until the pager is ready.
func (p *Process) begin(ctx context.Context, cfg ProcessConfig) error {
	err := p.control.send(message{Command: commandServe, Config: &processConfig{
		ImagesName:      cfg.Images.Name(),
		Cgroups:         cfg.Cgroups,
		GuardianCgroups: cfg.GuardianCgroups,
		WorkingSet:      cfg.WorkingSet,
		Record:          cfg.Record,
		Threads:         cfg.Threads,
	}})
	ready := make(chan struct{})
	go p.follow(ready)
	if err == nil {
		select {
		case <-ready:
			return nil
		case <-p.done:
			err = p.Wait()
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	p.kill()
	return fmt.Errorf("start the pager: %w", err)
}

func (p *Process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.done
}

// follow takes messages until both pager and guardian have ended.
func (p *Process) follow(ready chan struct{}) {
	var once sync.Once
	var drained bool
	var failure error
	lines := json.NewDecoder(bufio.NewReader(p.control.file))
	var end error
	for {
		var m message
		if end = lines.Decode(&m); end != nil {
			break
		}
		p.mu.Lock()
		if m.Stats != (Stats{}) {
			p.stats = m.Stats
		}
		p.mu.Unlock()
		switch m.Event {
		case eventReady:
			if m.Error != "" {
				p.warning = errors.New(m.Error)
			}
			once.Do(func() { close(ready) })
		case eventRestored:
			close(p.restored)
		case eventDrained:
			drained = true
		case eventFailed:
			failure = errors.New(m.Error)
		}
	}
	if !drained && failure == nil && (errors.Is(end, io.EOF) || errors.Is(end, io.ErrUnexpectedEOF) || errors.Is(end, unix.ECONNRESET)) {
		// The last who had the other end has died without a word.
		failure = p.avengeBoth()
	}
	err := p.cmd.Wait()
	if !drained && failure == nil {
		failure = fmt.Errorf("the pager has died: %w", errOr(err, io.ErrUnexpectedEOF))
	}
	p.mu.Lock()
	p.err = failure
	p.mu.Unlock()
	if drained {
		close(p.drained)
	}
	p.control.file.Close()
	close(p.done)
}

var errBothDied = errors.New("the pager and its guardian have died: the workload, whose memory was not complete, was killed")

// avengeBoth kills the workload when pager and guardian are dead, both so fast that
// none has killed it. What was missing has read as zeroes since, for the moment that
// it took to get here; nothing goes on with them. It gives no error if there was
// nobody to kill.
func (p *Process) avengeBoth() error {
	// The pager may have died before it could look at them.
	if p.cgroups.check() != nil || !slices.ContainsFunc(p.cgroups, func(dir string) bool { return len(processes(dir)) > 0 }) {
		return nil
	}
	p.cgroups.kill()
	return errBothDied
}

func errOr(err, other error) error {
	if err != nil {
		return err
	}
	return other
}

// Pid gives the pager's process id.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Warning says what Start has gone on without; nil if there was nothing.
func (p *Process) Warning() error { return p.warning }

// Restored, Drained and Done are as those of a Server. Done is closed when the
// guardian has ended as well.
func (p *Process) Restored() <-chan struct{} { return p.restored }

// Drained is closed when all memory is there.
func (p *Process) Drained() <-chan struct{} { return p.drained }

// Done is closed when nothing is left of the pager.
func (p *Process) Done() <-chan struct{} { return p.done }

// Wait waits for the end and gives its reason, as Server.Wait does.
func (p *Process) Wait() error {
	<-p.done
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.err
}

// Stats are as of the last event.
func (p *Process) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stats
}

// Finish is as that of a Server.
func (p *Process) Finish(ctx context.Context) error {
	return p.command(ctx, commandFinish)
}

// Stop ends the pager now. It kills what is still in the cgroups, unless all
// memory is there already.
func (p *Process) Stop(ctx context.Context) error {
	if err := p.command(ctx, commandStop); err != nil && !errors.Is(err, errStopped) && ctx.Err() != nil {
		return err
	}
	return nil
}

func (p *Process) command(ctx context.Context, name string) error {
	_ = p.control.send(message{Command: name}) // it may have ended meanwhile
	select {
	case <-p.done:
		return p.Wait()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// controlPair makes the control socket.
func controlPair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	// Not blocking, so that a close ends a read.
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		unix.Close(fds[1])
		return nil, nil, os.NewSyscallError("fcntl", err)
	}
	return os.NewFile(uintptr(fds[0]), "pager"), os.NewFile(uintptr(fds[1]), "pager"), nil
}

// reporter sends messages, one after the other.
type reporter struct {
	mu   sync.Mutex
	file *os.File
}

func newReporter(f *os.File) *reporter { return &reporter{file: f} }

func (r *reporter) send(m message) error {
	line, err := json.Marshal(m)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	_, err = r.file.Write(append(line, '\n'))
	return err
}

// Main is to be called at the beginning of a program that Start may start: it
// returns at once, unless this process is to be a pager or its guardian. Then it
// never returns.
func Main() {
	if len(os.Args) < 2 {
		return
	}
	var err error
	switch os.Args[1] {
	case pagerCommand:
		err = servePager()
	case guardianCommand:
		err = avenge()
	default:
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "pager:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

var errStopped = errors.New("the pager was stopped")

// servePager is the pager process.
func servePager() error {
	_ = setName(pagerName)
	// Whoever wants it to end must mean it: the workload ends too.
	signal.Ignore(unix.SIGTERM, unix.SIGINT, unix.SIGHUP, unix.SIGQUIT, unix.SIGPIPE)
	file := os.NewFile(controlFD, "control")
	control := newReporter(file)
	commands := json.NewDecoder(file)
	var m message
	if err := commands.Decode(&m); err != nil || m.Config == nil {
		return fmt.Errorf("no configuration: %w", err)
	}
	if err := runPager(m.Config, control, commands); err != nil {
		return errors.Join(err, control.send(message{Event: eventFailed, Error: err.Error()}))
	}
	return nil
}

func runPager(cfg *processConfig, control *reporter, commands *json.Decoder) error {
	listener, err := inheritedListener()
	if err != nil {
		return err
	}
	if err := limitFDs(); err != nil {
		return err
	}
	// A thread that comes back from epoll_wait(2) with a fault must not wait until
	// one of the drain's gives up its place.
	goruntime.GOMAXPROCS(faultThreads + maxThreads + 2)
	// The last to be killed for memory, and the guardian with it.
	_ = tell("/proc/self/oom_score_adj", "-1000")
	ctx, stop := context.WithCancelCause(context.Background())
	defer stop(nil)
	g, err := guard(guardianConfig{Cgroups: cfg.Cgroups, Control: controlFD}, cfg.GuardianCgroups, stop)
	if err != nil {
		return err
	}
	s, err := serve(ctx, Config{
		Images:     os.NewFile(imagesFD, cfg.ImagesName),
		Listener:   listener,
		Cgroups:    cfg.Cgroups,
		WorkingSet: cfg.WorkingSet,
		Record:     cfg.Record,
		Threads:    cfg.Threads,
		Log:        slog.New(slog.NewTextHandler(os.Stderr, nil)),
		realtime:   true,
	}, g.stop)
	if err != nil {
		g.stop()
		return err
	}
	go obey(s, commands, stop)
	go func() {
		<-s.Restored()
		_ = control.send(message{Event: eventRestored, Stats: s.Stats()})
	}()
	ready := message{Event: eventReady}
	if s.warning != nil {
		ready.Error = s.warning.Error()
	}
	if err := control.send(ready); err != nil {
		stop(err)
	}
	if err := s.Wait(); err != nil {
		return err
	}
	_ = control.send(message{Event: eventDrained, Stats: s.Stats()}) // the parent may be gone
	return nil
}

// obey does what the parent says. When that is gone the pager brings all memory
// without delay, and ends.
func obey(s *Server, commands *json.Decoder, stop context.CancelCauseFunc) {
	for {
		var m message
		if err := commands.Decode(&m); err != nil {
			s.pace.hurry()
			return
		}
		switch m.Command {
		case commandFinish:
			s.pace.hurry()
		case commandStop:
			stop(errStopped)
		}
	}
}

func inheritedListener() (*net.UnixListener, error) {
	f := os.NewFile(listenerFD, SocketName)
	defer f.Close()
	l, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	unixListener, ok := l.(*net.UnixListener)
	if !ok {
		l.Close()
		return nil, errors.New("not a unix socket")
	}
	unixListener.SetUnlinkOnClose(false)
	return unixListener, nil
}
