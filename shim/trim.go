package shim

import (
	"bufio"
	"bytes"
	"context"
	"math"
	"os"
	"path"
	goruntime "runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/runtime/load"
)

// trimDelay is how long a shim is idle before it gives memory back. Shims do
// nothing for nearly all of their lives, and a node has hundreds of them.
const trimDelay = 150 * time.Millisecond

// trimPatience is how long a trim waits, besides, while more threads want to run than
// there are CPUs: others may be starting, and this shim has not finished if the client
// or the workload has to wait for them. What a trim takes, and to get back what it gives
// away, is a tenth of a start's CPU time.
const trimPatience = 2 * time.Second

// idleGC is how much garbage the heap of an idle shim may hold, in percent of what it needs: as
// containerd's shim package has it. A busy one collects none until it takes busyLimit bytes: what a
// start leaves fits in there, and to collect it takes a tenth of the start's CPU time.
const (
	idleGC    = 40
	busyLimit = 48 << 20
)

// dontCollect is for a process that ends soon.
func dontCollect() { debug.SetGCPercent(-1) }

// trimmer gives memory back when the shim has been idle for a moment.
type trimmer struct {
	timer   *time.Timer
	text    func() [][]byte
	crowded func() bool

	mu    sync.Mutex
	calls int       // under way
	due   time.Time // the trim is, but for others that want to run; zero: not yet
}

func newTrimmer() *trimmer {
	t := &trimmer{text: sync.OnceValue(ownText), crowded: crowded}
	t.timer = time.AfterFunc(trimDelay, t.trim)
	return t
}

// busy puts the trim off until some time after done was called.
func (t *trimmer) busy() (done func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.calls++; t.calls == 1 {
		dontCollect()
		debug.SetMemoryLimit(busyLimit)
	}
	t.timer.Stop()
	t.due = time.Time{}
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if t.calls--; t.calls == 0 {
			t.timer.Reset(trimDelay)
		}
	}
}

// trim returns free heap to the kernel, and unmaps the program's own pages:
// they are clean copies of its file, stay in the page cache, and come back when
// they are needed.
func (t *trimmer) trim() {
	t.mu.Lock()
	if t.calls == 0 && t.letOthersRun() {
		t.timer.Reset(trimDelay)
		t.mu.Unlock()
		return
	}
	if t.calls == 0 {
		debug.SetGCPercent(idleGC)
		debug.SetMemoryLimit(math.MaxInt64)
	}
	t.mu.Unlock()
	debug.FreeOSMemory()
	for _, pages := range t.text() {
		if err := unix.Madvise(pages, unix.MADV_DONTNEED); err != nil {
			log.L.WithError(err).Debug("failed to give the program's pages back")
		}
	}
}

// UnaryServerInterceptor implements shim.TTRPCServerUnaryOptioner: every call of
// the task API is activity, but for those that wait for what the workload does.
func (s *service) UnaryServerInterceptor() ttrpc.UnaryServerInterceptor {
	return func(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
		if done := s.trimmer.busy(); path.Base(info.FullMethod) == "Wait" {
			done()
		} else {
			defer done()
		}
		return method(ctx, unmarshal)
	}
}

// letOthersRun tells whether to put the trim off once more. t.mu is held.
func (t *trimmer) letOthersRun() bool {
	if t.due.IsZero() {
		t.due = time.Now()
	}
	return time.Since(t.due) < trimPatience && t.crowded()
}

// crowded tells whether more threads want to run than there are CPUs.
func crowded() bool {
	f, err := load.Open()
	if err != nil {
		return false
	}
	defer f.Close()
	return load.Runnable(f) > goruntime.NumCPU()
}

// ownText finds the mappings of this program's file that nobody can write and
// nobody has: dropping a page that differs from the file (relocations, a
// debugger's breakpoints) would change the program.
func ownText() [][]byte {
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return nil
	}
	data, err := os.ReadFile("/proc/self/smaps")
	if err != nil {
		return nil
	}
	var text [][]byte
	var current []byte
	for lines := bufio.NewScanner(bytes.NewReader(data)); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		switch {
		case len(fields) >= 5 && strings.Contains(fields[0], "-"): // proc(5): address perms offset dev inode path
			current = nil
			if len(fields) == 6 && fields[5] == exe && !strings.Contains(fields[1], "w") {
				current = addressRange(fields[0])
			}
		case len(fields) == 3 && fields[0] == "Anonymous:" && fields[1] == "0" && current != nil:
			text = append(text, current)
		}
	}
	return text
}

func addressRange(s string) []byte {
	from, to, _ := strings.Cut(s, "-")
	start, err := strconv.ParseUint(from, 16, 64)
	if err != nil {
		return nil
	}
	end, err := strconv.ParseUint(to, 16, 64)
	if err != nil || end <= start {
		return nil
	}
	return unsafe.Slice((*byte)(unsafe.Add(unsafe.Pointer(nil), start)), end-start)
}
