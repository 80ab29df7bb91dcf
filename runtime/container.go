package runtime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/runtime/pager"
	"github.com/crac-shim/crac/runtime/trace"
)

// Errors that callers tell apart.
var (
	// ErrNotRunning is returned when there is no process to act on.
	ErrNotRunning = errors.New("container is not running")
	// ErrExists is returned when the state directory has this container already.
	ErrExists = errors.New("container already exists")
	// ErrNotUndone is returned when a restore has failed and something of it is left: nothing
	// may be started in its place.
	ErrNotUndone = errors.New("the failed restore could not be undone")
)

// Config is what a container is made from. ID, Bundle, Root and Reaper are
// required.
type Config struct {
	ID     string
	Bundle string // the directory with config.json; ours to write in
	Root   string // libcontainer keeps its state in Root/ID
	Rootfs string // overrides the spec's root.path unless empty

	SystemdCgroup bool // cgroupsPath is slice:prefix:name, and systemd makes the cgroup
	NoPivotRoot   bool
	NoNewKeyring  bool

	Reaper *Subreaper

	// Warn, unless nil, is told what the container goes on in spite of.
	Warn func(error)

	// Trace, unless nil, gets the steps of the start.
	Trace *trace.Recorder
}

// Container is one container. It is safe for concurrent use.
type Container struct {
	cfg  Config
	spec *specs.Spec

	// userNetwork: it gets a new network namespace, and a user namespace that this belongs to.
	userNetwork bool

	// mu guards what follows, and orders the operations that change it. It may be
	// held for as long as a dump or a hook takes.
	mu      sync.Mutex
	machine machine
	config  *configs.Config
	held    *heldNetwork  // a restore's, as long as the container needs it
	tmpfs   readyTmpfs    // for a restore
	begun   *begunRestore // from BeginRestore to Restore

	// look guards what follows for those who do not wait for mu: it is written with
	// both held, and read with either. What is read is as safe to use as Container.
	look sync.Mutex
	lc   *libcontainer.Container
	init *Process
	criu *readyCRIU // from PrepareRestore to the end of Restore

	// starting is held for reading while a process is being started in the container,
	// and for writing while it is dumped: half a process cannot be.
	starting sync.RWMutex
	// killed: a client has, whatever was under way. deleted: it is being deleted.
	killed, deleted atomic.Bool

	// memory is the pager of a restored container, also when it has ended; nil
	// if the memory came before it ran.
	memory atomic.Pointer[pager.Process]
}

// New makes a container and no process yet. Delete removes it. The spec is the
// container's from now on.
func New(cfg Config, spec *specs.Spec) (*Container, error) {
	if err := anchor(spec, cfg.Bundle, cfg.Rootfs); err != nil {
		return nil, err
	}
	if err := checkProcess(spec.Process); err != nil {
		return nil, err
	}
	c := &Container{cfg: cfg, spec: spec, machine: machine{id: cfg.ID}}
	c.userNetwork = private(spec, specs.NetworkNamespace) && private(spec, specs.UserNamespace)
	if err := c.make(); err != nil {
		return nil, err
	}
	return c, nil
}

// make builds the libcontainer container from c.spec.
func (c *Container) make() error {
	config, err := newConfig(c.spec, c.cfg)
	if err != nil {
		return err
	}
	lc, err := libcontainer.Create(c.cfg.Root, c.cfg.ID, config)
	if errors.Is(err, libcontainer.ErrExist) {
		return fmt.Errorf("%w: %s in %s", ErrExists, c.cfg.ID, c.cfg.Root)
	}
	if err != nil {
		return fmt.Errorf("create container %s: %w", c.cfg.ID, err)
	}
	c.config = config
	c.setLC(lc)
	return nil
}

func (c *Container) setLC(lc *libcontainer.Container) {
	c.look.Lock()
	defer c.look.Unlock()
	c.lc = lc
}

func (c *Container) setInit(p *Process) {
	c.look.Lock()
	defer c.look.Unlock()
	c.init = p
}

func (c *Container) setCRIU(r *readyCRIU) {
	c.look.Lock()
	defer c.look.Unlock()
	c.criu = r
}

// now is what there is at this moment, without waiting for an operation that is
// under way.
func (c *Container) now() (lc *libcontainer.Container, init *Process, criu *readyCRIU) {
	c.look.Lock()
	defer c.look.Unlock()
	return c.lc, c.init, c.criu
}

// Spec is the OCI spec that the container was made from, with absolute paths.
// It must not be changed.
func (c *Container) Spec() *specs.Spec { return c.spec }

// Bundle is the container's bundle directory.
func (c *Container) Bundle() string { return c.cfg.Bundle }

// State is where the container is in its life. It never waits for an operation
// that is under way, which may take as long as a hook or a dump does.
func (c *Container) State() State {
	if !c.mu.TryLock() {
		return State(c.machine.seen.Load())
	}
	defer c.mu.Unlock()
	c.refresh()
	return c.machine.state
}

// refresh notices that the workload has ended. c.mu is held.
func (c *Container) refresh() {
	if c.init == nil || c.machine.state == Stopped {
		return
	}
	select {
	case <-c.init.Done():
		c.machine.set(Stopped)
	default:
	}
}

// Init is the container's first process; nil before Create, and before Start
// in a restored container.
func (c *Container) Init() *Process {
	_, init, _ := c.now()
	return init
}

// SharesPIDs tells whether the container's processes live in a pid namespace
// that is not the container's own, so that they outlive its init.
func (c *Container) SharesPIDs() bool {
	return !private(c.spec, specs.PIDNamespace)
}

// Create starts the container's init, which sets everything up and then waits
// for Start.
func (c *Container) Create(io Stdio) (*Process, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.machine.state != Created || c.init != nil {
		return nil, &StateError{ID: c.cfg.ID, From: c.machine.state, To: Created}
	}
	// A CRIU that nobody asks any more would keep the streams open, and be in the cgroup.
	c.giveUpRestore()
	return c.create(io)
}

func (c *Container) create(io Stdio) (*Process, error) {
	lp, err := processConfig(c.spec.Process, io)
	if err != nil {
		return nil, err
	}
	lp.Init = true
	defer c.cfg.Reaper.Hold()()
	if err := c.lc.Start(lp); err != nil {
		return nil, fmt.Errorf("create container %s: %w", c.cfg.ID, err)
	}
	p, err := c.started(lp)
	c.setInit(p)
	return p, err
}

// started makes a Process of what libcontainer has just started, and waits for
// it. The subreaper is held.
func (c *Container) started(lp *libcontainer.Process) (*Process, error) {
	pid, err := lp.Pid()
	if err != nil {
		return nil, err
	}
	return newProcess(pid, lp.Wait, c.cfg.Reaper), nil
}

// Start lets the workload of a created container run.
func (c *Container) Start() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refresh()
	if err := c.machine.can(Running); err != nil || c.init == nil {
		return errors.Join(err, c.needInit())
	}
	if err := c.lc.Exec(); err != nil {
		return fmt.Errorf("start container %s: %w", c.cfg.ID, err)
	}
	return c.machine.to(Running)
}

func (c *Container) needInit() error {
	if c.init == nil {
		return fmt.Errorf("container %s: %w", c.cfg.ID, ErrNotStarted)
	}
	return nil
}

// Exec starts another process in the running container. While that is under way
// the container can be looked at, signalled and deleted.
func (c *Container) Exec(p *specs.Process, io Stdio) (*Process, error) {
	c.mu.Lock()
	err := c.canExec()
	if err == nil {
		c.starting.RLock() // it never blocks: who holds it for writing holds mu
		defer c.starting.RUnlock()
	}
	c.mu.Unlock()
	if err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", c.cfg.ID, err)
	}
	lp, err := processConfig(p, io)
	if err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", c.cfg.ID, err)
	}
	// Of its own, as `runc exec` has it: libcontainer holds its lock until the new
	// process has got through the container's namespaces, where others can stop it.
	lc, err := libcontainer.Load(c.cfg.Root, c.cfg.ID)
	if err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", c.cfg.ID, err)
	}
	defer c.cfg.Reaper.Hold()()
	if err := lc.Run(lp); err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", c.cfg.ID, err)
	}
	return c.started(lp)
}

// canExec tells whether a process may be started now. c.mu is held.
func (c *Container) canExec() error {
	c.refresh()
	switch c.machine.state {
	case Running, Created:
		return c.needInit()
	case Stopped:
		return ErrNotRunning
	}
	return fmt.Errorf("it is %s; resume it first", c.machine.state)
}

// startingTimeout bounds the wait for processes that are being started. It takes
// some milliseconds each; one that is stopped half-way by another never gets on.
const startingTimeout = 10 * time.Second

// wholeProcesses waits until no process is being started in the container. None is
// before release is called.
func (c *Container) wholeProcesses() (release func(), err error) {
	for deadline := time.Now().Add(startingTimeout); !c.starting.TryLock(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("an exec in container %s has been starting for more than %s; end it, or what has stopped it", c.cfg.ID, startingTimeout)
		}
	}
	return c.starting.Unlock, nil
}

// Signal sends a signal to the container's init, or to all of its processes.
// There being nobody to signal is ErrNotRunning.
//
// It waits for no operation that is under way, but for libcontainer's own changes of the
// container. SIGKILL reaches a paused container too, and ends such an operation with the
// workload. Any other signal comes after a dump, if there is one under way: it would be
// part of it, and so reach every clone.
func (c *Container) Signal(sig unix.Signal, all bool) error {
	lc, init, _ := c.now()
	if init == nil {
		return fmt.Errorf("signal container %s: %w", c.cfg.ID, ErrNotRunning)
	}
	reached := false
	if sig == unix.SIGKILL {
		c.killed.Store(true)
		reached = init.Signal(sig) == nil // at once, unless it is frozen; what it leaves comes next
	} else if c.afterDump(func() { _ = c.signal(c.lc, sig, all) }) {
		return nil
	}
	err := c.signal(lc, sig, all)
	if err == nil || reached && errors.Is(err, ErrNotRunning) {
		return nil
	}
	return fmt.Errorf("signal container %s: %w", c.cfg.ID, err)
}

// SignalProcess sends a signal to a process that Exec has started, as Signal does.
func (c *Container) SignalProcess(p *Process, sig unix.Signal) error {
	if sig != unix.SIGKILL && c.afterDump(func() { _ = p.Signal(sig) }) {
		return nil
	}
	return p.Signal(sig)
}

// afterDump has something done after the dump that is under way, with c.mu held. It
// returns false if there is none.
func (c *Container) afterDump(do func()) bool {
	if State(c.machine.seen.Load()) != Quiesced {
		return false
	}
	go func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		do() // whoever it is for may have ended
	}()
	return true
}

func (c *Container) signal(lc *libcontainer.Container, sig unix.Signal, all bool) error {
	if all && sig != unix.SIGKILL {
		return signalAll(lc, sig)
	}
	err := lc.Signal(sig) // SIGKILL ends all the others with the init
	if errors.Is(err, libcontainer.ErrNotRunning) || errors.Is(err, os.ErrProcessDone) {
		if all {
			return nil
		}
		return ErrNotRunning
	}
	return err
}

func signalAll(lc *libcontainer.Container, sig unix.Signal) error {
	pids, err := lc.Processes()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("process %d: %w", pid, err)
		}
	}
	return nil
}

// KillOrphans ends what outlived the init of a container that shares its pid
// namespace.
func (c *Container) KillOrphans() error {
	lc, _, _ := c.now()
	return c.signal(lc, unix.SIGKILL, true)
}

// Pids lists the processes in the container's cgroup, in this process's pid
// namespace. A container that waits to be restored has the one that stands for it.
func (c *Container) Pids() ([]int, error) {
	lc, init, criu := c.now()
	pids, err := lc.Processes()
	if err != nil || criu == nil {
		return pids, err
	}
	// What restores the workload is no part of it.
	ready, err := criu.get()
	if err != nil {
		return pids, nil
	}
	pids = slices.DeleteFunc(pids, func(pid int) bool { return pid == ready.pid() })
	if len(pids) == 0 && init == nil {
		// A containerd that starts anew takes a shim with no process for one that was
		// left behind.
		pids = []int{ready.pid()}
	}
	return pids, nil
}

// Pause freezes the workload.
func (c *Container) Pause() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refresh()
	if err := c.machine.can(Paused); err != nil {
		return err
	}
	// Clients pause a container to have it dumped, and half a process cannot be.
	if release, err := c.wholeProcesses(); err == nil {
		defer release()
	} else if c.cfg.Warn != nil {
		c.cfg.Warn(err)
	}
	if err := c.freeze(); err != nil {
		return fmt.Errorf("pause container %s: %w", c.cfg.ID, err)
	}
	return c.machine.to(Paused)
}

// freezeTimeout bounds the attempts to freeze. A cgroup v1 freezer cannot freeze
// a process in the middle of a fork, and libcontainer tries for some 20 ms only,
// which is not enough on a busy machine.
const freezeTimeout = 5 * time.Second

// freeze freezes the workload. c.mu is held.
func (c *Container) freeze() error {
	deadline := time.Now().Add(freezeTimeout)
	for {
		err := c.lc.Pause()
		if err == nil || errors.Is(err, libcontainer.ErrNotRunning) || time.Now().After(deadline) {
			return err
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// Resume ends a Pause.
func (c *Container) Resume() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refresh()
	if c.machine.state != Paused {
		return &StateError{ID: c.cfg.ID, From: c.machine.state, To: Running}
	}
	if err := c.lc.Resume(); err != nil {
		return fmt.Errorf("resume container %s: %w", c.cfg.ID, err)
	}
	return c.machine.to(Running)
}

// Delete removes the container. Its init must have ended, or never have been
// started.
func (c *Container) Delete() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refresh()
	if c.init != nil && c.machine.state != Stopped {
		if c.machine.state != Created {
			return &StateError{ID: c.cfg.ID, From: c.machine.state, To: Stopped}
		}
		// Nothing of the workload has run: the init may go.
		if err := c.lc.Signal(unix.SIGKILL); err == nil {
			<-c.init.Done()
		}
	}
	c.giveUpRestore()
	c.deleted.Store(true)
	var err error
	if c.init == nil {
		err = c.emptyCgroup()
	}
	err = errors.Join(err, c.destroy())
	if p := c.memory.Load(); p != nil {
		stopPager(p)
	}
	c.held.release()
	c.held = nil
	c.machine.set(Stopped)
	return err
}

// destroy removes libcontainer's part. c.mu is held.
func (c *Container) destroy() error {
	c.tmpfs.detached.Wait()     // they are mounted in the directory that goes
	defer c.cfg.Reaper.Hold()() // for the poststop hooks
	if err := destroy(c.lc, c.cfg.Warn); err != nil {
		return fmt.Errorf("delete container %s: %w", c.cfg.ID, err)
	}
	return nil
}

// discard removes libcontainer's part without running the poststop hooks, so
// that the container can be made again on what its hooks have set up.
func (c *Container) discard() error {
	clear(c.lc.Config().Hooks) // not a copy, nor c.config's when it was loaded
	return c.destroy()
}

// HookError is a hook of the spec that has failed. It is no reason to start in another way.
type HookError struct {
	Name, ID string
	Err      error
}

// Error implements error.
func (e *HookError) Error() string {
	return fmt.Sprintf("%s hook of container %s: %v", e.Name, e.ID, e.Err)
}

// Unwrap returns what the hook has said.
func (e *HookError) Unwrap() error { return e.Err }

// runHooks runs the spec's hooks of these kinds, as libcontainer would, with
// pid as the container's.
func (c *Container) runHooks(ctx context.Context, pid int, status specs.ContainerState, names ...configs.HookName) error {
	if c.config.Hooks == nil || !slices.ContainsFunc(names, func(n configs.HookName) bool { return c.config.HasHook(n) }) {
		return nil
	}
	defer c.cfg.Reaper.Hold()()
	state := &specs.State{
		Version:     specs.Version,
		ID:          c.cfg.ID,
		Status:      status,
		Pid:         pid,
		Bundle:      c.cfg.Bundle,
		Annotations: c.spec.Annotations,
	}
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := c.config.Hooks.Run(name, state); err != nil {
			return &HookError{Name: string(name), ID: c.cfg.ID, Err: err}
		}
	}
	return nil
}
