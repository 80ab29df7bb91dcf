package pager

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	goruntime "runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Config says what to serve, and to whom.
type Config struct {
	// Images is the directory of the dump. Serve closes it.
	Images *os.File
	// Listener is the listening unix socket that CRIU connects to, which it knows
	// as lazy-pages.socket in its working directory (see Listen). Serve closes it.
	Listener *net.UnixListener
	// Cgroups are the directories of the cgroups that hold the restored processes
	// and nothing else, in one hierarchy or more. What is in them, and below, is
	// killed when its memory cannot be served.
	Cgroups []string
	// WorkingSet, if not empty, is a file that another restore of the same dump
	// has recorded: the background drain begins with it.
	WorkingSet string
	// Record, if not empty, is where to write the working set of this restore: with
	// a WorkingSet what that lacked behind it, if it was much. Without one the drain
	// waits until the workload asks for little more.
	Record string
	// Threads is the number of threads of the drain; 0: as many as CPUs, at most 4.
	Threads int
	// Log gets what an operator may want to know; nil: nothing.
	Log *slog.Logger

	realtime bool            // faults are served by real-time threads, where that is allowed
	hold     <-chan struct{} // for tests: the drain waits for it
}

// Stats tell what a server has done. Bytes are of contents, without zeroes.
type Stats struct {
	Tasks      int           `json:"tasks"`              // processes of the dump that came
	Forks      int           `json:"forks"`              // processes forked while memory was missing
	Total      int64         `json:"total"`              // bytes of the dump that are lazy
	Faults     int64         `json:"faults"`             // faults answered, with contents or zeroes
	FaultBytes int64         `json:"fault_bytes"`        // bytes that faults brought, with neighbours
	WorkingSet int64         `json:"working_set"`        // bytes that the drain brought first, as others had asked for them
	DrainBytes int64         `json:"drain_bytes"`        // bytes that the drain brought
	Connected  time.Time     `json:"connected,omitzero"` // CRIU has
	Restored   time.Duration `json:"restored_ns"`        // from then to the end of the restore
	FirstFault time.Duration `json:"first_fault_ns"`     // from then until a page was asked for; 0 if none was
	Drained    time.Duration `json:"drained_ns"`         // from then until all memory was there
}

// Server serves the memory of one restore. It is safe for concurrent use.
//
// The process that it runs in must not die before the server is done: see the
// package's comment, and Start, which takes care of that.
type Server struct {
	cfg  Config
	log  *slog.Logger
	dump *dump

	epoll int
	stop  int // an event descriptor: everybody is to stop

	mu        sync.Mutex
	spaces    map[int32]*space // those with missing memory, by a number of our own
	lastSpace int32
	order     workingSet // what is to come first
	warning   error      // why there is no order, though there is a file for it
	recorded  workingSet
	known     int // the part of it that was there before
	stats     Stats
	err       error

	pace    pace
	faults  atomic.Int64
	byFault atomic.Int64
	byDrain atomic.Int64
	byOrder atomic.Int64

	failing  chan struct{} // closed at the beginning of the end
	restored chan struct{}
	drained  chan struct{}
	done     chan struct{}
	end      sync.Once
	running  sync.WaitGroup
	letGo    func()
}

// Listen makes the socket that CRIU looks for in its working directory.
func Listen(workDir string) (*net.UnixListener, error) {
	dir, err := os.Open(workDir)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	// The path of a socket may not be longer than 107 bytes; this one never is.
	path := fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), SocketName)
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen on %s/%s: %w", workDir, SocketName, err)
	}
	l.SetUnlinkOnClose(false) // by then the path means something else
	return l, nil
}

// SocketName is the name of the socket in CRIU's working directory.
const SocketName = "lazy-pages.socket"

// Serve waits for CRIU and serves the memory of what it restores. It returns as
// soon as the dump is open; CRIU may be started then. When ctx ends before all
// memory is there, the workload is killed.
func Serve(ctx context.Context, cfg Config) (*Server, error) {
	return serve(ctx, cfg, func() {})
}

// serve calls letGo when the workload's memory is not in the server's hands any
// more, and before it lets go of what it holds.
func serve(ctx context.Context, cfg Config, letGo func()) (*Server, error) {
	s := &Server{
		cfg:      cfg,
		log:      cfg.Log,
		spaces:   make(map[int32]*space),
		failing:  make(chan struct{}),
		restored: make(chan struct{}),
		drained:  make(chan struct{}),
		done:     make(chan struct{}),
		letGo:    letGo,
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if err := s.open(); err != nil {
		cfg.Listener.Close()
		return nil, err
	}
	s.run(ctx)
	return s, nil
}

func (s *Server) open() (err error) {
	s.dump, err = openDump(s.cfg.Images)
	if err != nil {
		return err
	}
	if err := cgroups(s.cfg.Cgroups).check(); err != nil {
		return err
	}
	if s.cfg.WorkingSet != "" {
		// It makes a restore faster, and is not worth to fail for.
		if s.order, err = loadWorkingSet(s.cfg.WorkingSet); err != nil {
			s.warning = fmt.Errorf("the working set is ignored: %w", err)
			s.log.Warn(s.warning.Error())
		}
		s.recorded, s.known = slices.Clone(s.order), len(s.order)
	}
	if s.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return os.NewSyscallError("epoll_create1", err)
	}
	if s.stop, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
		unix.Close(s.epoll)
		return os.NewSyscallError("eventfd", err)
	}
	s.pace.open(s.cfg.Threads, s.failing)
	return s.watch(s.stop, stopID, unix.EPOLLIN)
}

// stopID is the number of the event descriptor, which is no space.
const stopID = 0

// watch asks for the next event of a descriptor; of a space only one, so that
// one thread alone serves it.
func (s *Server) watch(fd int, id int32, events uint32) error {
	event := unix.EpollEvent{Events: events, Fd: id}
	return os.NewSyscallError("epoll_ctl", unix.EpollCtl(s.epoll, unix.EPOLL_CTL_ADD, fd, &event))
}

func (s *Server) run(ctx context.Context) {
	for range faultThreads {
		s.running.Go(s.serveFaults)
	}
	for range s.pace.threads {
		s.running.Go(s.drain)
	}
	s.running.Go(s.accept)
	go func() {
		select {
		case <-ctx.Done():
			s.fail(context.Cause(ctx))
		case <-s.done:
		}
	}()
}

// Restored is closed when CRIU has finished and the workload runs.
func (s *Server) Restored() <-chan struct{} { return s.restored }

// Drained is closed when all memory is there: from then on the server is of no
// importance.
func (s *Server) Drained() <-chan struct{} { return s.drained }

// Done is closed when the server has ended, for whatever reason.
func (s *Server) Done() <-chan struct{} { return s.done }

// Wait waits for the end and gives the reason, if that is not that all memory is
// there. The workload is dead then, unless the restore itself has failed.
func (s *Server) Wait() error {
	<-s.done
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

// Finish brings the rest of the memory at full speed, whatever else needs the
// CPU, and waits for it: before a checkpoint of a container that still drains.
func (s *Server) Finish(ctx context.Context) error {
	s.pace.hurry()
	select {
	case <-s.done:
		return s.Wait()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Stats tells what has been done until now.
func (s *Server) Stats() Stats {
	s.mu.Lock()
	defer s.mu.Unlock()
	stats := s.stats
	stats.Faults, stats.FaultBytes, stats.DrainBytes = s.faults.Load(), s.byFault.Load(), s.byDrain.Load()
	stats.WorkingSet = s.byOrder.Load()
	return stats
}

// fail kills the workload, and lets go of its memory when it is dead.
func (s *Server) fail(reason error) {
	s.finish(reason, true)
}

// finish ends the server, once.
func (s *Server) finish(reason error, kill bool) {
	s.end.Do(func() {
		s.mu.Lock()
		s.err = reason
		s.stats.Drained = time.Since(s.stats.Connected)
		s.mu.Unlock()
		close(s.failing)
		go func() {
			if kill {
				s.log.Error("the workload is killed: its memory cannot be served", "error", reason)
				cgroups(s.cfg.Cgroups).kill()
			}
			s.close()
			if reason == nil {
				close(s.drained)
			}
			close(s.done)
		}()
	})
}

// close lets go of everything.
func (s *Server) close() {
	s.letGo()
	s.cfg.Listener.Close()
	one := [8]byte{1}
	_, _ = unix.Write(s.stop, one[:])
	s.running.Wait()
	for _, sp := range s.all() {
		sp.release()
	}
	unix.Close(s.stop)
	unix.Close(s.epoll)
	s.pace.close()
	s.dump.close()
	if s.cfg.Record != "" && s.err == nil && len(s.recorded) > s.known+s.known/8 {
		if err := s.recorded.save(s.cfg.Record); err != nil {
			s.log.Warn("the working set is lost", "error", err)
		}
	}
}

// all gives the spaces with missing memory.
func (s *Server) all() []*space {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]*space, 0, len(s.spaces))
	for _, sp := range s.spaces {
		all = append(all, sp)
	}
	return all
}

func (s *Server) space(id int32) *space {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.spaces[id]
}

// add begins to serve a process.
func (s *Server) add(sp *space) error {
	// As soon as others know of it, it may turn out to be complete, or gone.
	sp.changing.RLock()
	defer sp.changing.RUnlock()
	s.mu.Lock()
	s.lastSpace++
	sp.id = s.lastSpace
	s.spaces[sp.id] = sp
	if sp.child {
		s.stats.Forks++
	} else {
		s.stats.Tasks++
		s.stats.Total += int64(sp.layout.task.pages) * int64(pageSize)
	}
	s.mu.Unlock()
	return s.watch(int(sp.fd), sp.id, unix.EPOLLIN|unix.EPOLLONESHOT)
}

// remove stops serving a process that misses nothing any more, or is gone.
func (s *Server) remove(sp *space) {
	sp.release()
	s.mu.Lock()
	delete(s.spaces, sp.id)
	s.mu.Unlock()
}

const (
	// faultThreads serve faults: one process's by one thread at a time.
	faultThreads = 2
	// schedRR is SCHED_RR of sched(7).
	schedRR = 2
	// maxMessages are read at once.
	maxMessages = 32
	// againPause is how long it takes a process to go on after its event was read.
	againPause = 20 * time.Microsecond
	// memoryPause is how long a process at its limit gets to free some memory, and
	// memoryPatience how often.
	memoryPause    = 10 * time.Millisecond
	memoryPatience = 500
)

// serveFaults answers whatever the processes ask for.
func (s *Server) serveFaults() {
	if s.cfg.realtime {
		// Whoever waits for a page has had its turn to run; it is not to wait for
		// ours on top of that. There is as much to do as it asks for.
		goruntime.LockOSThread()
		_ = unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: schedRR, Priority: 1}, 0)
	}
	buffer := make([]uffdMessage, maxMessages)
	events := make([]unix.EpollEvent, 1)
	for {
		n, err := unix.EpollWait(s.epoll, events, -1)
		if errors.Is(err, unix.EINTR) || n == 0 {
			continue
		}
		if err != nil {
			s.fail(os.NewSyscallError("epoll_wait", err))
			return
		}
		id := events[0].Fd
		if id == stopID {
			return
		}
		sp := s.space(id)
		if sp == nil {
			continue
		}
		if err := s.serve(sp, buffer); err != nil {
			s.fail(err)
			continue
		}
		s.again(sp)
	}
}

// again asks for the next event of a space.
func (s *Server) again(sp *space) {
	sp.changing.RLock()
	defer sp.changing.RUnlock()
	if sp.fd != closed {
		event := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLONESHOT, Fd: sp.id}
		_ = unix.EpollCtl(s.epoll, unix.EPOLL_CTL_MOD, int(sp.fd), &event)
	}
}

// serve reads the events of a space and answers its faults.
func (s *Server) serve(sp *space, buffer []uffdMessage) error {
	s.pace.fault()
	patience := memoryPatience
	var waiting []uint64
	for {
		faults, err := sp.read(buffer, s.add)
		if err != nil {
			return err
		}
		if waiting = append(waiting, faults...); len(waiting) == 0 {
			return nil
		}
		retry := waiting[:0]
		pause := time.Duration(0)
		for _, addr := range waiting {
			err := s.answer(sp, addr)
			switch {
			case err == nil:
			case errors.Is(err, errAgain):
				retry = append(retry, addr)
				pause = max(pause, againPause)
			case errors.Is(err, errNoMemory) && patience > 0:
				retry = append(retry, addr)
				pause = memoryPause
			case errors.Is(err, errGone):
				s.remove(sp)
				return nil
			default:
				return s.named(err)
			}
		}
		if waiting = retry; pause > 0 {
			if pause == memoryPause {
				patience--
			}
			select {
			case <-s.failing:
				return nil
			case <-time.After(pause):
			}
		}
	}
}

// answer serves one fault and keeps account of it.
func (s *Server) answer(sp *space, addr uint64) error {
	sp.changing.RLock()
	defer sp.changing.RUnlock()
	bytes, img, err := sp.serve(addr)
	if err != nil {
		return err
	}
	if s.faults.Add(1) == 1 {
		s.mu.Lock()
		s.stats.FirstFault = time.Since(s.stats.Connected)
		s.mu.Unlock()
	}
	s.byFault.Add(int64(bytes))
	if bytes > 0 && s.cfg.Record != "" {
		s.mu.Lock()
		s.recorded.add(sp.pid, img/pageSize)
		s.mu.Unlock()
	}
	return nil
}

// named says which file it was that could not be read.
func (s *Server) named(err error) error {
	var unreadable *unreadableError
	if errors.As(err, &unreadable) {
		return fmt.Errorf("%s is damaged or cannot be read", s.dump.fileOf(unreadable.data))
	}
	return err
}
