package runtime

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Subreaper reaps the orphans that the kernel hands to this process, and nobody
// else's children.
//
// A reaper in the usual form, wait4(-1) in a loop, would steal exit statuses
// from libcontainer and os/exec, which wait for their own children by pid. So
// whoever starts children does it between Hold and its release, and names those
// that outlive the release with Own. What is a zombie, is nobody's and appears
// while nobody holds, can only be an orphan.
//
// Orphans reach this process from containers that share the host's pid
// namespace; those of other containers go to the container's own init.
type Subreaper struct {
	spawning sync.RWMutex

	mu    sync.Mutex
	owned map[int]struct{}
}

// NewSubreaper makes the calling process a child subreaper (prctl(2),
// PR_SET_CHILD_SUBREAPER) and starts to reap. It never stops: one for each
// process.
func NewSubreaper() (*Subreaper, error) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("become a child subreaper: %w", err)
	}
	r := &Subreaper{owned: make(map[int]struct{})}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGCHLD)
	go r.run(signals)
	return r, nil
}

// Hold keeps the reaper away until release is called. Children that are still
// running then must have been given to Own.
func (r *Subreaper) Hold() (release func()) {
	r.spawning.RLock()
	return r.spawning.RUnlock
}

// Own leaves the exit status of pid to the caller, who calls Disown after it
// has waited for it.
func (r *Subreaper) Own(pid int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.owned[pid] = struct{}{}
}

// Disown ends what Own began.
func (r *Subreaper) Disown(pid int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.owned, pid)
}

// Start starts a command whose exit status the returned function waits for. It
// must be called.
func (r *Subreaper) Start(cmd *exec.Cmd) (wait func() error, err error) {
	defer r.Hold()()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	pid := cmd.Process.Pid
	r.Own(pid)
	return func() error {
		defer r.Disown(pid)
		return cmd.Wait()
	}, nil
}

func (r *Subreaper) run(signals <-chan os.Signal) {
	for range signals {
		// Owners are quicker than this. What is left after a moment is more
		// likely to be an orphan, and many orphans tend to come at once.
		for {
			time.Sleep(reapDelay)
			if r.reap() {
				break
			}
		}
	}
}

const reapDelay = 20 * time.Millisecond

// reap waits for every zombie child that nobody owns. It returns false if it
// could not look because somebody holds: it must not queue for the lock, or
// every other start would wait behind it for the slowest one.
func (r *Subreaper) reap() bool {
	if !r.spawning.TryLock() {
		return false
	}
	defer r.spawning.Unlock()
	// Nearly always all are owned, and their owners were here first.
	var any unix.Siginfo
	if err := unix.Waitid(unix.P_ALL, 0, &any, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil); err == nil && any.Signo == 0 {
		return true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, pid := range zombieChildren() {
		if _, ok := r.owned[pid]; ok {
			continue
		}
		var status unix.WaitStatus
		// A failure means that somebody was quicker, which is just as well.
		_, _ = unix.Wait4(pid, &status, unix.WNOHANG, nil)
	}
	return true
}

// zombieChildren lists this process's children that wait to be reaped. It reads
// /proc (proc(5), task/[tid]/children) because waitid(2) with WNOWAIT shows
// only the first of them, which may be one that we must leave alone.
func zombieChildren() []int {
	lists, _ := filepath.Glob("/proc/self/task/*/children")
	var zombies []int
	for _, list := range lists {
		data, err := os.ReadFile(list)
		if err != nil {
			continue // the thread is gone; its children moved to another
		}
		for _, field := range strings.Fields(string(data)) {
			pid, err := strconv.Atoi(field)
			if err == nil && isZombie(pid) {
				zombies = append(zombies, pid)
			}
		}
	}
	return zombies
}

func isZombie(pid int) bool {
	fields, err := statOf(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && fields[0] == "Z"
}

// statOf reads what a process's or a thread's stat file has behind the command, which is in
// parentheses and may hold anything: the state comes first, as proc_pid_stat(5) has it.
func statOf(path string) ([]string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	if len(fields) < 40 { // as many as there ever were
		return nil, fmt.Errorf("%s: %q", path, data)
	}
	return fields, nil
}
