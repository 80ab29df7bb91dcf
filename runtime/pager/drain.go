package pager

import (
	"errors"
	"os"
	goruntime "runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// The drain brings all memory in the background, in the order of the working set
// first and then by address. Faults go before it: it copies in small batches
// while there are any, since who serves a fault waits for a copy under way. And
// the workload's CPU goes before it: while more threads want to run than there
// are CPUs, each of the drain's sleeps for a multiple of the time that it has
// worked; a large one at first, when the workload has somebody to answer.
// (Priorities would not do: they mean nothing between cgroups, and a thread that
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
	maxThreads  = 4
	drainPause  = 100 * time.Microsecond // to look again what other threads have left
)

// pace tells the drain's threads when to work, and how much at once.
type pace struct {
	threads int
	cpus    int
	loadavg *os.File

	hurried   atomic.Bool
	began     atomic.Int64 // nanoseconds since epoch: the workload runs
	lastFault atomic.Int64
}

var epoch = time.Now()

func (p *pace) open(threads int) {
	p.cpus = goruntime.NumCPU()
	if p.threads = threads; threads <= 0 {
		p.threads = min(p.cpus, maxThreads)
	}
	p.loadavg, _ = os.Open("/proc/loadavg") // without it, CPUs are never short
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
	if p.hurried.Load() || !p.crowded() {
		return
	}
	if time.Since(epoch)-time.Duration(p.began.Load()) < earlyTime {
		time.Sleep(earlyRest * worked)
	} else {
		time.Sleep(lateRest * worked)
	}
}

// threadTime is the CPU time of the calling thread.
func threadTime() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t) // always there
	return time.Duration(t.Nano())
}

// crowded tells whether more threads want to run than there are CPUs.
func (p *pace) crowded() bool {
	if p.loadavg == nil {
		return false
	}
	var line [64]byte
	n, _ := p.loadavg.ReadAt(line[:], 0)
	return runnable(line[:n]) > p.cpus
}

// runnable reads the number of threads that want to run from /proc/loadavg:
// "0.20 0.18 0.12 1/80 11206" has one.
func runnable(loadavg []byte) int {
	spaces, n := 0, 0
	for _, c := range loadavg {
		switch {
		case c == ' ':
			spaces++
		case spaces == 3 && c >= '0' && c <= '9':
			n = 10*n + int(c-'0')
		case spaces == 3:
			return n
		}
	}
	return 0
}

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

// work copies what is claimed from a space, until that is all, and counts it.
func (s *Server) work(sp *space, next claim, count *atomic.Int64) {
	for !s.ended() {
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
