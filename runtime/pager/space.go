package pager

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// A space is the address space of one restored process, as long as some of its
// memory is missing.
//
// The kernel lets a process that unmaps, moves or gives up memory, or forks, go on
// as soon as the event of it is read: from then on a copy to where memory was
// would bring back what is gone. So events are read, and applied to the layout,
// under the lock for writing, and every copy looks up where it goes and is done
// under the lock for reading. Until an event is read, copies fail with EAGAIN, so
// what was looked up while holding the lock is true.
type space struct {
	id    int32 // of our own
	pid   int   // as numbered in the dump
	child bool  // forked since

	changing sync.RWMutex // see above
	fd       uffd         // closed if negative
	layout   *layout      // its pieces: changing; its marks: mu

	mu       sync.Mutex
	cursor   uint64 // where the drain goes on
	copying  int    // batches of the drain that are under way
	zeroNext uint64 // where the last run of zeroes ended, and its length
	zeroLen  uint64
}

const closed uffd = -1

var (
	// errAgain: an event must be read first.
	errAgain = errors.New("the address space is changing")
	// errGone: the process has exited, or executed another program.
	errGone = errors.New("the process is gone")
	// errNoMemory: the workload has reached its limit of memory.
	errNoMemory = errors.New("no memory for the workload's pages: it has reached its limit, or the host is out of memory")
)

// fill copies a batch that is marked in the layout, under the lock for reading.
// What could not be copied loses its mark.
func (s *space) fill(b batch) error {
	limit := uint64(len(b.data))
	for len(b.data) > 0 {
		n, err := s.fd.copy(b.addr, b.data[:min(limit, uint64(len(b.data)))])
		if n > 0 {
			b = b.from(n)
			continue
		}
		if err == nil {
			err = unix.EIO // nothing done, for no reason
		}
		switch {
		case errors.Is(err, unix.EEXIST):
			// The workload has written it, or somebody has just copied it.
			s.fd.wake(b.addr, b.addr+pageSize)
			b = b.from(pageSize)
			continue
		case errors.Is(err, unix.ENOENT) && limit > pageSize:
			// Areas were split meanwhile (mprotect, madvise), and a copy goes to one.
			limit = max(pageSize, limit/2/pageSize*pageSize)
			continue
		case errors.Is(err, unix.ENOENT) && s.child:
			// MADV_DONTFORK: the child has no such memory.
			b = b.from(pageSize)
			continue
		}
		s.mu.Lock()
		s.layout.mark(b.first, b.first+b.pages(), false)
		s.mu.Unlock()
		return s.explain(err, b)
	}
	return nil
}

func (s *space) explain(err error, b batch) error {
	switch {
	case errors.Is(err, unix.EAGAIN):
		return errAgain
	case errors.Is(err, unix.ESRCH):
		return errGone
	case errors.Is(err, unix.ENOMEM):
		return errNoMemory
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("process %d: the memory at %#x is not registered with the pager and would read as zeroes", s.pid, b.addr)
	case errors.Is(err, unix.EFAULT):
		return &unreadableError{data: b.data}
	default:
		return fmt.Errorf("process %d: copy %d bytes to %#x: %w", s.pid, len(b.data), b.addr, err)
	}
}

// unreadableError: a file of pages could not be read, or has become shorter.
type unreadableError struct{ data []byte }

func (*unreadableError) Error() string { return "the pages cannot be read" }

// Around a page that is asked for come its neighbours, in the same aligned block
// of this many pages: whoever asks for one soon asks for the next.
const aroundPages = 16

// Runs of zeroes start with one page and grow as long as they are asked for in
// order, to this many pages.
const maxZeroPages = 256

// serve answers a fault, under the lock for reading. It gives the bytes of
// contents that it has copied, and where the page was at the time of the dump.
func (s *space) serve(addr uint64) (bytes int, img uint64, err error) {
	if s.fd == closed {
		return 0, 0, nil
	}
	s.mu.Lock()
	b, img, ok := s.layout.page(addr)
	if ok {
		s.layout.mark(b.first, b.first+1, true)
	}
	s.mu.Unlock()
	if !ok {
		return 0, 0, s.serveZero(addr)
	}
	// It comes first and alone, even if it was marked: whoever has marked it may
	// fail.
	if err := s.fill(b); err != nil {
		return 0, 0, err
	}
	bytes, err = s.fillAround(addr)
	if errors.Is(err, errAgain) || errors.Is(err, errNoMemory) {
		err = nil // the neighbours can wait
	}
	return int(pageSize) + bytes, img, err
}

func (s *space) fillAround(addr uint64) (bytes int, err error) {
	block := aroundPages * pageSize
	start := addr / block * block
	s.mu.Lock()
	neighbours := s.layout.around(addr, start, start+block)
	s.mu.Unlock()
	for i, b := range neighbours {
		if err := s.fill(b); err != nil {
			s.mu.Lock()
			for _, b := range neighbours[i+1:] {
				s.layout.mark(b.first, b.first+b.pages(), false)
			}
			s.mu.Unlock()
			return bytes, err
		}
		bytes += len(b.data)
	}
	return bytes, nil
}

// serveZero answers a fault where the process finds zeroes.
func (s *space) serveZero(addr uint64) error {
	s.mu.Lock()
	if addr == s.zeroNext {
		s.zeroLen = min(2*s.zeroLen, maxZeroPages*pageSize)
	} else {
		s.zeroLen = pageSize
	}
	_, end := s.layout.hole(addr, addr, addr+s.zeroLen)
	s.zeroNext = end
	s.mu.Unlock()
	n, err := s.fd.zero(addr, end)
	if n == 0 && errors.Is(err, unix.ENOENT) && end > addr+pageSize {
		n, err = s.fd.zero(addr, addr+pageSize)
	}
	switch {
	case n > 0 || err == nil:
		return nil
	case errors.Is(err, unix.EEXIST), errors.Is(err, unix.ENOENT):
		// Somebody else was faster, or has unmapped it: let the workload see.
		s.fd.wake(addr, addr+pageSize)
		return nil
	case errors.Is(err, unix.EAGAIN):
		return errAgain
	case errors.Is(err, unix.ESRCH):
		return errGone
	case errors.Is(err, unix.ENOMEM):
		return errNoMemory
	default:
		return fmt.Errorf("process %d: zeroes to %#x: %w", s.pid, addr, err)
	}
}

// read reads the events that are there and applies all but the faults, which it
// gives. forked gets the space of each process that has been forked, and must
// have it known to everybody when it returns: this one may be complete then.
func (s *space) read(buffer []uffdMessage, forked func(*space) error) (faults []uint64, err error) {
	s.changing.Lock()
	defer s.changing.Unlock()
	if s.fd == closed {
		return nil, nil
	}
	n, err := readMessages(s.fd, buffer)
	// Without anything to read, or after somebody else has read it.
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("process %d: read userfaultfd: %w", s.pid, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range buffer[:n] {
		m := &buffer[i]
		switch m.event() {
		case eventPagefault:
			faults = append(faults, m.address())
		case eventFork:
			child := &space{pid: s.pid, child: true, fd: uffd(m.child()), layout: s.layout.clone()}
			if err := forked(child); err != nil {
				return nil, err
			}
		case eventRemap:
			s.layout.remap(m.word(0), m.word(1), m.word(2))
			s.cursor = 0
		case eventRemove:
			s.layout.remove(m.word(0), m.word(1))
		case eventUnmap:
			s.layout.unmap(m.word(0), m.word(1))
		default:
			return nil, fmt.Errorf("process %d: userfaultfd event %#x is unknown", s.pid, m.event())
		}
	}
	return faults, nil
}

// release gives the memory back to the kernel: whatever is asked for from now on
// and missing reads as zeroes.
func (s *space) release() {
	s.changing.Lock()
	defer s.changing.Unlock()
	if s.fd != closed {
		_ = unix.Close(int(s.fd))
		s.fd = closed
	}
}
