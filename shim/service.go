package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	eventstypes "github.com/containerd/containerd/api/events"
	taskapi "github.com/containerd/containerd/api/runtime/task/v3"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/protobuf"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/crac-shim/crac/runtime"
	"github.com/crac-shim/crac/runtime/trace"
)

var (
	_ taskapi.TTRPCTaskService = (*service)(nil)
	_ shim.TTRPCService        = (*service)(nil)

	_ shim.TTRPCServerUnaryOptioner = (*service)(nil)

	empty = &emptypb.Empty{}
)

// service is the task API of one shim process. It may serve several containers,
// those of a pod.
type service struct {
	// ctx lives as long as the shim, and carries its namespace and logger.
	ctx        context.Context
	namespace  string
	containerd string // the address of containerd's gRPC socket

	events   *eventSender
	shutdown shutdown.Service
	reaper   *runtime.Subreaper
	trimmer  *trimmer

	mu         sync.Mutex
	containers map[string]*container
	creating   map[string]struct{} // ids that are taken, but not to be seen yet

	firstTrace sync.Once
	firstNode  sync.Once
	node       string // what shims share, from the first container on; or none
	kerndat    sync.Once

	criuMu      sync.Mutex
	criuVersion int // 0 until a CRIU was found
}

// NewService starts the task service. containerd is the address of containerd's
// gRPC socket, which building a checkpoint image needs.
func NewService(ctx context.Context, containerd string, publisher events.Publisher, sd shutdown.Service) (shim.TTRPCService, error) {
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return nil, err
	}
	reaper, err := runtime.NewSubreaper()
	if err != nil {
		return nil, err
	}
	s := &service{
		ctx:        ctx,
		namespace:  ns,
		containerd: containerd,
		shutdown:   sd,
		reaper:     reaper,
		trimmer:    newTrimmer(),
		containers: make(map[string]*container),
		creating:   make(map[string]struct{}),
	}
	// The service's Done is closed when the callbacks have returned, so it cannot
	// tell the sender, for which a callback waits, to finish.
	stop, published := make(chan struct{}), make(chan struct{})
	s.events = newEventSender(publisher, stop)
	go func() {
		defer close(published)
		s.events.run(ctx)
	}()
	sd.RegisterCallback(func(ctx context.Context) error {
		close(stop)
		select {
		case <-published:
		case <-ctx.Done():
		}
		if c, ok := publisher.(shim.Publisher); ok {
			return c.Close()
		}
		return nil
	})
	if address, err := shim.ReadAddress("address"); err == nil {
		sd.RegisterCallback(func(context.Context) error {
			err := shim.RemoveSocket(address)
			if errors.Is(err, os.ErrNotExist) {
				return nil
			}
			return err
		})
	}
	return s, nil
}

// RegisterTTRPC implements shim.TTRPCService.
func (s *service) RegisterTTRPC(server *ttrpc.Server) error {
	taskapi.RegisterTTRPCTaskService(server, s)
	return nil
}

func (s *service) container(id string) (*container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c := s.containers[id]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("container %s was not created: %w", id, errdefs.ErrNotFound)
}

func (s *service) process(id, exec string) (*container, *process, error) {
	c, err := s.container(id)
	if err != nil {
		return nil, nil, err
	}
	p, err := c.process(exec)
	return c, p, err
}

// Create makes a container and, unless it is to be restored, its first process.
func (s *service) Create(ctx context.Context, r *taskapi.CreateTaskRequest) (*taskapi.CreateTaskResponse, error) {
	c, err := s.create(ctx, r)
	if err != nil {
		return nil, toGRPC(err)
	}
	pid := uint32(c.init.getPid())
	s.events.send(&eventstypes.TaskCreate{
		ContainerID: r.ID,
		Bundle:      r.Bundle,
		Rootfs:      r.Rootfs,
		IO: &eventstypes.TaskIO{
			Stdin:    r.Stdin,
			Stdout:   r.Stdout,
			Stderr:   r.Stderr,
			Terminal: r.Terminal,
		},
		Checkpoint: r.Checkpoint,
		Pid:        pid,
	})
	if proc := c.init.running(); proc != nil {
		s.watchInit(c, proc)
	}
	return &taskapi.CreateTaskResponse{Pid: pid}, nil
}

// Start starts a container's workload, or an exec.
func (s *service) Start(ctx context.Context, r *taskapi.StartRequest) (*taskapi.StartResponse, error) {
	c, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	p.announce.Lock()
	defer p.announce.Unlock()
	if r.ExecID != "" {
		if err := s.startExec(ctx, c, p); err != nil {
			return nil, toGRPC(err)
		}
		s.events.send(&eventstypes.TaskExecStarted{ContainerID: r.ID, ExecID: r.ExecID, Pid: uint32(p.getPid())})
		return &taskapi.StartResponse{Pid: uint32(p.getPid())}, nil
	}
	c.trace.Add(trace.Shim, "the client's turn", c.createdAt, time.Now())
	end := c.trace.Step("start")
	err = s.startInit(ctx, c)
	end()
	if err != nil {
		return nil, toGRPC(err)
	}
	go c.writeTrace()
	s.events.send(&eventstypes.TaskStart{ContainerID: r.ID, Pid: uint32(p.getPid())})
	return &taskapi.StartResponse{Pid: uint32(p.getPid())}, nil
}

func (s *service) startExec(ctx context.Context, c *container, p *process) (err error) {
	if _, ended := p.ended(); ended || p.running() != nil {
		return fmt.Errorf("process %s was started before: %w", p.id, errdefs.ErrFailedPrecondition)
	}
	release, err := c.beginExec()
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			release()
			p.abandon(255)
		}
	}()
	owner := s.owner(c, p.id)
	io, err := newProcessIO(ctx, p.config, owner)
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.io = io
	p.mu.Unlock()
	proc, err := c.rt.Exec(p.spec, io.child)
	io.afterStart()
	if err != nil {
		return err
	}
	if p.config.Terminal {
		if err := io.attachConsole(ctx, owner); err != nil {
			_ = proc.Signal(unix.SIGKILL)
			<-proc.Done()
			return err
		}
	}
	p.started(proc)
	go func() {
		<-proc.Done()
		p.announce.Lock()
		defer p.announce.Unlock()
		s.exited(c, p, proc.Exit())
		release()
	}()
	return nil
}

// watchInit announces the end of a container's init, after that of its execs.
func (s *service) watchInit(c *container, proc *runtime.Process) {
	go func() {
		<-proc.Done()
		if c.rt.SharesPIDs() {
			// Nothing else ends what the init has left behind.
			if err := c.rt.KillOrphans(); err != nil {
				log.G(s.ctx).WithError(err).WithField("id", c.id).Warn("failed to kill what the init left behind")
			}
		}
		c.endExecs()
		c.init.announce.Lock()
		defer c.init.announce.Unlock()
		s.lastOOM(c)
		e := proc.Exit()
		if err := writeExit(c.bundle, exitRecord{Pid: proc.Pid(), Status: e.Status, At: e.At}); err != nil && !errors.Is(err, os.ErrNotExist) {
			log.G(s.ctx).WithError(err).WithField("id", c.id).Warn("failed to record the exit status")
		}
		s.exited(c, c.init, e)
	}()
}

// exited announces the end of a process, and then lets those know who wait for
// it: what they do next must not be announced first. p.announce is held, or
// nobody else knows of the process.
func (s *service) exited(c *container, p *process, e runtime.Exit) {
	if _, ended := p.ended(); ended {
		return
	}
	id := p.id
	if id == "" {
		id = c.id
	}
	s.events.send(&eventstypes.TaskExit{
		ContainerID: c.id,
		ID:          id,
		Pid:         uint32(p.getPid()),
		ExitStatus:  uint32(e.Status),
		ExitedAt:    protobuf.ToTimestamp(e.At),
	})
	p.setExited(e)
	s.trimmer.busy()()
}

// Delete removes a container that has stopped, or an exec.
func (s *service) Delete(_ context.Context, r *taskapi.DeleteRequest) (*taskapi.DeleteResponse, error) {
	c, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	if r.ExecID != "" {
		p.announce.Lock() // a start that is under way decides first
		defer p.announce.Unlock()
		if p.execStatus() == task.Status_RUNNING {
			return nil, toGRPC(fmt.Errorf("delete process %s of container %s: it is running: %w", r.ExecID, r.ID, errdefs.ErrFailedPrecondition))
		}
		p.abandon(0) // one that never started has an end now
		p.closeIO()
		c.removeExec(r.ExecID)
	} else {
		p.announce.Lock() // so does this one
		defer p.announce.Unlock()
		if err := c.delete(s.ctx); err != nil {
			return nil, toGRPC(err)
		}
		if proc := p.running(); proc != nil {
			<-proc.Done()
			s.exited(c, p, proc.Exit())
		}
		s.mu.Lock()
		delete(s.containers, r.ID)
		s.mu.Unlock()
	}
	e, _ := p.ended()
	response := &taskapi.DeleteResponse{
		Pid:        uint32(p.getPid()),
		ExitStatus: uint32(e.Status),
		ExitedAt:   protobuf.ToTimestamp(e.At),
	}
	if r.ExecID == "" {
		s.events.send(&eventstypes.TaskDelete{
			ContainerID: r.ID,
			Pid:         response.Pid,
			ExitStatus:  response.ExitStatus,
			ExitedAt:    response.ExitedAt,
		})
	}
	return response, nil
}

// Exec adds a process to a container. Start starts it.
func (s *service) Exec(_ context.Context, r *taskapi.ExecProcessRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, toGRPC(err)
	}
	var spec specs.Process
	if err := json.Unmarshal(r.Spec.GetValue(), &spec); err != nil {
		return nil, toGRPC(fmt.Errorf("process spec of %s: %w: %w", r.ExecID, err, errdefs.ErrInvalidArgument))
	}
	spec.Terminal = r.Terminal
	if c.hooks != nil {
		spec.Env = withHooksEnv(spec.Env)
	}
	config := stdioConfig{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr, Terminal: r.Terminal}
	if err := c.addExec(newProcess(r.ExecID, config, &spec)); err != nil {
		return nil, toGRPC(err)
	}
	s.events.send(&eventstypes.TaskExecAdded{ContainerID: r.ID, ExecID: r.ExecID})
	return empty, nil
}

// ResizePty sets the size of a process's terminal.
func (s *service) ResizePty(_ context.Context, r *taskapi.ResizePtyRequest) (*emptypb.Empty, error) {
	_, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	if io := p.stdio(); io != nil {
		if err := io.resize(uint16(r.Width), uint16(r.Height)); err != nil {
			return nil, toGRPC(err)
		}
	}
	return empty, nil
}

// State describes a process.
func (s *service) State(_ context.Context, r *taskapi.StateRequest) (*taskapi.StateResponse, error) {
	c, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	id, status := r.ExecID, p.execStatus()
	if r.ExecID == "" {
		id, status = r.ID, c.status()
	} else if whole := c.status(); status == task.Status_RUNNING && (whole == task.Status_PAUSED || whole == task.Status_PAUSING) {
		status = whole // it stands still with its container
	}
	e, _ := p.ended()
	return &taskapi.StateResponse{
		ID:         id,
		Bundle:     c.bundle,
		Pid:        uint32(p.getPid()),
		Status:     status,
		Stdin:      p.config.Stdin,
		Stdout:     p.config.Stdout,
		Stderr:     p.config.Stderr,
		Terminal:   p.config.Terminal,
		ExitStatus: uint32(e.Status),
		ExitedAt:   protobuf.ToTimestamp(e.At),
	}, nil
}

// Pause freezes a container.
func (s *service) Pause(ctx context.Context, r *taskapi.PauseRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, toGRPC(err)
	}
	if err := c.pause(ctx); err != nil {
		return nil, toGRPC(err)
	}
	s.events.send(&eventstypes.TaskPaused{ContainerID: r.ID})
	return empty, nil
}

// Resume ends a Pause.
func (s *service) Resume(ctx context.Context, r *taskapi.ResumeRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, toGRPC(err)
	}
	if err := c.rt.Resume(); err != nil {
		return nil, toGRPC(err)
	}
	s.events.send(&eventstypes.TaskResumed{ContainerID: r.ID})
	c.hooks.clientResumed(ctx)
	return empty, nil
}

// Kill sends a signal to a process, or to all of a container's.
func (s *service) Kill(_ context.Context, r *taskapi.KillRequest) (*emptypb.Empty, error) {
	c, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	sig := unix.Signal(r.Signal)
	if r.ExecID != "" {
		return empty, toGRPC(p.signal(c.rt, sig))
	}
	return empty, toGRPC(s.killInit(c, sig, r.All))
}

// Pids lists the processes of a container.
func (s *service) Pids(_ context.Context, r *taskapi.PidsRequest) (*taskapi.PidsResponse, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, toGRPC(err)
	}
	pids, err := c.rt.Pids()
	if err != nil {
		return nil, toGRPC(err)
	}
	execs := c.execsByPid()
	response := &taskapi.PidsResponse{}
	for _, pid := range pids {
		info := &task.ProcessInfo{Pid: uint32(pid)}
		if id, ok := execs[pid]; ok {
			if info.Info, err = typeurl.MarshalAnyToProto(&runcoptions.ProcessDetails{ExecID: id}); err != nil {
				return nil, toGRPC(err)
			}
		}
		response.Processes = append(response.Processes, info)
	}
	return response, nil
}

// CloseIO ends a process's standard input.
func (s *service) CloseIO(_ context.Context, r *taskapi.CloseIORequest) (*emptypb.Empty, error) {
	_, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	if io := p.stdio(); io != nil && r.Stdin {
		if err := io.closeStdin(); err != nil {
			return nil, toGRPC(fmt.Errorf("close stdin: %w", err))
		}
	}
	return empty, nil
}

// Checkpoint dumps a container, and makes an image of it when asked to.
func (s *service) Checkpoint(ctx context.Context, r *taskapi.CheckpointTaskRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, toGRPC(err)
	}
	if err := s.checkpoint(ctx, c, r); err != nil {
		return nil, toGRPC(fmt.Errorf("checkpoint container %s: %w", r.ID, err))
	}
	return empty, nil
}

// Update changes a container's resources.
func (s *service) Update(_ context.Context, r *taskapi.UpdateTaskRequest) (*emptypb.Empty, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, toGRPC(err)
	}
	var resources specs.LinuxResources
	if err := json.Unmarshal(r.Resources.GetValue(), &resources); err != nil {
		return nil, toGRPC(fmt.Errorf("resources of container %s: %w: %w", r.ID, err, errdefs.ErrInvalidArgument))
	}
	return empty, toGRPC(c.rt.Update(&resources))
}

// Wait waits for the end of a process.
func (s *service) Wait(ctx context.Context, r *taskapi.WaitRequest) (*taskapi.WaitResponse, error) {
	_, p, err := s.process(r.ID, r.ExecID)
	if err != nil {
		return nil, toGRPC(err)
	}
	e, err := p.wait(ctx)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &taskapi.WaitResponse{ExitStatus: uint32(e.Status), ExitedAt: protobuf.ToTimestamp(e.At)}, nil
}

// Connect tells the pids of the shim and of a container.
func (s *service) Connect(_ context.Context, r *taskapi.ConnectRequest) (*taskapi.ConnectResponse, error) {
	response := &taskapi.ConnectResponse{ShimPid: uint32(os.Getpid())}
	if c, err := s.container(r.ID); err == nil {
		response.TaskPid = uint32(c.init.getPid())
	}
	return response, nil
}

// Shutdown ends the shim, unless it has containers.
func (s *service) Shutdown(context.Context, *taskapi.ShutdownRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.containers)+len(s.creating) == 0 {
		s.shutdown.Shutdown()
	}
	return empty, nil
}

// Stats reads the counters of a container's cgroup.
func (s *service) Stats(_ context.Context, r *taskapi.StatsRequest) (*taskapi.StatsResponse, error) {
	c, err := s.container(r.ID)
	if err != nil {
		return nil, toGRPC(err)
	}
	stats, err := c.rt.Stats()
	if err != nil {
		return nil, toGRPC(err)
	}
	data, err := typeurl.MarshalAnyToProto(stats)
	if err != nil {
		return nil, toGRPC(err)
	}
	return &taskapi.StatsResponse{Stats: &anypb.Any{TypeUrl: data.TypeUrl, Value: data.Value}}, nil
}
