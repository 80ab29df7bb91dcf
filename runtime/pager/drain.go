package pager

import (
	"errors"
	"os"
	goruntime "runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/runtime/load"
)

// The drain brings all memory in the background, in the order of the working set
// first and then by address. Faults go before it: it copies in small batches
// while there are any, since who serves a fault waits for a copy under way. And
// the workload's CPU goes before it: while more threads want to run than there
// are CPUs, each of the drain's sleeps for a multiple of the time that it has
// worked; a large one at first, when the workload has somebody to answer. While
// many times as many threads want to run, as when a crowd of workloads is started
// at once, it does not begin at all before some time has passed: what they all need
// for their answers goes before what nobody has asked for. What is in the working
// set comes without delay, since somebody will ask for it. (Priorities would not do: they mean nothing between cgroups, and a thread that
// does not get to run must not hold a lock that a fault waits for.)
const (
	batchBytes  = 1 << 20
	faultBytes  = 128 << 10              // while there are faults
	faultQuiet  = 2 * time.Millisecond   // after so long there are none
	recordQuiet = 100 * time.Millisecond // a recording has enough when there are none for so long,
	recordLimit = time.Second            // and in any case then
	earlyRest   = 9                      // times the work, to sleep while CPUs are short,
	earlyTime   = 250 * time.Millisecond // for so long after the restore,
	lateRest    = 1                      // and from then on
	crowdFactor = 3                      // a crowd: more than so many times as many threads want to run as there are CPUs
	crowdTime   = 2 * time.Second        // for so long after the restore nothing is brought then,
	crowdLook   = 20 * time.Millisecond  // but to look again whether it is still there
	maxThreads  = 4
	drainPause  = 100 * time.Microsecond // to look again what other threads have left
)

// pace tells the drain's threads when to work, and how much at once.
type pace struct {
	threads int
	cpus    int
	loadavg *os.File
	stopped <-chan struct{} // there is nothing more to do

	hurried   atomic.Bool
	began     atomic.Int64 // nanoseconds since epoch: the workload runs
	lastFault atomic.Int64
}

var epoch = time.Now()

func (p *pace) open(threads int, stopped <-chan struct{}) {
	p.stopped = stopped
	p.cpus = goruntime.NumCPU()
	if p.threads = threads; threads <= 0 {
		p.threads = min(p.cpus, maxThreads)
	}
	p.loadavg, _ = load.Open() // without it, CPUs are never short
}

func (p *pace) close() { p.loadavg.Close() }

func (p *pace) begin() { p.began.Store(int64(time.Since(epoch))) }
func (p *pace) fault() { p.lastFault.Store(int64(time.Since(epoch))) }
func (p *pace) hurry() { p.hurried.Store(true) }

func (p *pace) quiet() time.Duration {
	return time.Since(epoch) - time.Duration(p.lastFault.Load())
}

// batch is how many bytes to copy at once.
func (p *pace) batch() uint64 {
	if p.quiet() < faultQuiet {
		return faultBytes
	}
	return batchBytes
}

// rest lets others run, after some work.
func (p *pace) rest(worked time.Duration) {
	if p.hurried.Load() || p.wanting() <= p.cpus {
		return
	}
	if p.since() < earlyTime {
		time.Sleep(earlyRest * worked)
	} else {
		time.Sleep(lateRest * worked)
	}
}

// restOfCrowd waits while there is a crowd, for some time after the restore.
func (p *pace) restOfCrowd() {
	for p.since() < crowdTime && !p.hurried.Load() && p.wanting() > crowdFactor*p.cpus {
		select {
		case <-p.stopped:
			return
		case <-time.After(crowdLook):
		}
	}
}

// since is the time since the restore.
func (p *pace) since() time.Duration {
	return time.Since(epoch) - time.Duration(p.began.Load())
}

// threadTime is the CPU time of the calling thread.
func threadTime() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t) // always there
	return time.Duration(t.Nano())
}

// wanting is how many threads want to run.
func (p *pace) wanting() int { return load.Runnable(p.loadavg) }

// drain is one thread of the drain.
func (s *Server) drain() {
	goruntime.LockOSThread() // for threadTime
	select {
	case <-s.restored:
	case <-s.failing:
		return
	}
	if s.cfg.hold != nil {
		select {
		case <-s.cfg.hold:
		case <-s.failing:
			return
		}
	}
	if s.cfg.Record != "" && s.known == 0 {
		s.awaitRecording()
	}
	for run, ok := s.nextRun(); ok; run, ok = s.nextRun() {
		for _, sp := range s.all() {
			if sp.pid == run.pid && !sp.child {
				s.work(sp, sp.claimRun(run), &s.byOrder)
			}
		}
	}
	for !s.ended() {
		for _, sp := range s.all() {
			s.work(sp, sp.claimNext, nil)
			if sp.complete() {
				s.remove(sp)
			}
		}
		if len(s.all()) == 0 {
			s.finish(nil, false)
			return
		}
		time.Sleep(drainPause)
	}
}

// awaitRecording gives the workload time to ask for what it needs.
func (s *Server) awaitRecording() {
	for start := time.Now(); time.Since(start) < recordLimit; {
		quiet := min(s.pace.quiet(), time.Since(start))
		if quiet >= recordQuiet || s.pace.hurried.Load() || s.ended() {
			return
		}
		time.Sleep(recordQuiet - quiet)
	}
}

func (s *Server) ended() bool {
	select {
	case <-s.failing:
		return true
	default:
		return false
	}
}

// nextRun gives the next run of the working set to one of the threads.
func (s *Server) nextRun() (pageRun, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.order) == 0 {
		return pageRun{}, false
	}
	run := s.order[0]
	s.order = s.order[1:]
	return run, true
}

// A claim gives the next batch that is to be copied, marked as there. It is
// called with both locks of its space.
type claim func(limit uint64) (batch, bool)

// claimNext goes on by address.
func (s *space) claimNext(limit uint64) (batch, bool) {
	b, ok := s.layout.next(s.cursor, limit)
	if !ok {
		b, ok = s.layout.next(0, limit) // what failed, or was moved
	}
	if ok {
		s.cursor = b.end()
	}
	return b, ok
}

// claimRun goes through a run of the working set, with the neighbours that a
// fault would have brought.
func (s *space) claimRun(run pageRun) claim {
	img := run.page / aroundPages * aroundPages * pageSize
	end := (run.page + run.pages + aroundPages - 1) / aroundPages * aroundPages * pageSize
	return func(limit uint64) (batch, bool) {
		for img < end {
			p, ok := s.layout.current(img)
			if !ok {
				return batch{}, false
			}
			p = p.cut(p.start, p.start+end-img)
			if b, ok := s.layout.inside(p, limit); ok {
				img = p.img + b.end() - p.start
				return b, true
			}
			img = p.img + p.end - p.start
		}
		return batch{}, false
	}
}

// work copies what is claimed from a space, until that is all. What somebody will
// ask for is counted.
func (s *Server) work(sp *space, next claim, count *atomic.Int64) {
	for !s.ended() {
		if count == nil {
			s.pace.restOfCrowd()
		}
		start := threadTime()
		more, err := s.workOnce(sp, next, count)
		switch {
		case err == nil && !more:
			return
		case err == nil:
			s.pace.rest(threadTime() - start)
		case errors.Is(err, errAgain):
			time.Sleep(againPause)
		case errors.Is(err, errNoMemory):
			time.Sleep(memoryPause) // a fault may become impatient
		case errors.Is(err, errGone):
			s.remove(sp)
			return
		default:
			s.fail(s.named(err))
			return
		}
	}
}

// workOnce copies as much as the pace allows at once.
func (s *Server) workOnce(sp *space, next claim, count *atomic.Int64) (more bool, err error) {
	sp.changing.RLock()
	defer sp.changing.RUnlock()
	if sp.fd == closed {
		return false, nil
	}
	for left := int(s.pace.batch()); left > 0; {
		sp.mu.Lock()
		b, ok := next(uint64(left))
		if ok {
			sp.copying++
		}
		sp.mu.Unlock()
		if !ok {
			return false, nil
		}
		err := sp.fill(b)
		sp.mu.Lock()
		sp.copying--
		sp.mu.Unlock()
		if err != nil {
			return true, err
		}
		s.byDrain.Add(int64(len(b.data)))
		if count != nil {
			count.Add(int64(len(b.data)))
		}
		left -= len(b.data)
	}
	return true, nil
}

// complete tells whether nothing is missing.
func (s *space) complete() bool {
	s.changing.RLock()
	defer s.changing.RUnlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.copying == 0 && (s.fd == closed || !s.layout.lacks())
}
