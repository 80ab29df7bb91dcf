package runtime

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crac-shim/crac/runtime/pager"
	"github.com/crac-shim/crac/runtime/trace"
)

// pagerLog is the pager's log in the work directory.
const pagerLog = "pager.log"

// pagerStart bounds the start of a pager, and its end when it is of no use.
const pagerStart = 30 * time.Second

// CanBeLazy tells whether a container of this spec can get its memory while it
// runs: the descriptor through which it comes is made by the process itself, and
// the kernel gives root of a user namespace one only where the administrator lets
// everybody have it (userfaultfd(2), vm.unprivileged_userfaultfd).
func CanBeLazy(spec *specs.Spec) bool {
	if !private(spec, specs.UserNamespace) {
		return true
	}
	value, err := os.ReadFile(userfaultfdSysctl)
	return err == nil && strings.TrimSpace(string(value)) == "1"
}

const userfaultfdSysctl = "/proc/sys/vm/unprivileged_userfaultfd"

// beginPager begins to start what serves the memory to a restore, for the processes
// in these cgroups. CRIU may be started meanwhile: it connects to a socket that is
// open already, sends what it has to send, and waits for no answer. Before anything
// runs that could ask for memory, pagerStarted has to be heard.
func (r *criuRestore) beginPager(cgroupDirs map[string]string) error {
	images, err := os.Open(r.dir)
	if err != nil {
		return err
	}
	listener, err := pager.Listen(r.o.WorkDir)
	if err != nil {
		images.Close()
		return err
	}
	r.paging = make(chan struct{})
	go func() {
		defer close(r.paging)
		defer r.c.cfg.Trace.On(trace.Background, "start the pager")()
		r.pageErr = r.startPager(images, listener, cgroupDirs)
	}()
	return nil
}

// pagerStarted waits for the pager, if there is to be one, and says why it has not
// started.
func (r *criuRestore) pagerStarted() error {
	if r.paging == nil {
		return nil
	}
	<-r.paging
	return r.pageErr
}

func (r *criuRestore) startPager(images *os.File, listener *net.UnixListener, cgroupDirs map[string]string) error {
	log, err := os.OpenFile(filepath.Join(r.o.WorkDir, pagerLog), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		images.Close()
		listener.Close()
		return err
	}
	defer log.Close()
	var dirs []string
	for _, d := range cgroupDirs {
		if !slices.Contains(dirs, d) {
			dirs = append(dirs, d)
		}
	}
	slices.Sort(dirs)
	ctx, cancel := context.WithTimeout(context.Background(), pagerStart)
	defer cancel()
	p, err := pager.Start(ctx, pager.ProcessConfig{
		Config: pager.Config{
			Images: images, Listener: listener, Cgroups: dirs,
			WorkingSet: r.o.WorkingSet, Record: r.o.Record,
		},
		Stderr: log,
	})
	if err != nil {
		return fmt.Errorf("%w (log: %s)", err, log.Name())
	}
	r.pager = p
	if w := p.Warning(); w != nil && r.o.Warn != nil {
		r.o.Warn(w)
	}
	// Its exit status is the pager package's.
	reaper, pid := r.c.cfg.Reaper, p.Pid()
	reaper.Own(pid)
	go func() {
		<-p.Done()
		reaper.Disown(pid)
	}()
	return nil
}

// stopPager ends the pager of a restore that has failed.
func (r *criuRestore) stopPager() {
	if r.pagerStarted() == nil && r.pager != nil {
		stopPager(r.pager)
	}
}

func stopPager(p *pager.Process) {
	ctx, cancel := context.WithTimeout(context.Background(), pagerStart)
	defer cancel()
	_ = p.Stop(ctx) // it kills what it serves, which is over
}

// MemoryError waits until all memory of a restored container is there, or the container
// is deleted, or ctx ends. An error says why it will never be: the container has been
// killed then.
func (c *Container) MemoryError(ctx context.Context) error {
	p := c.memory.Load()
	if p == nil {
		return nil
	}
	select {
	case <-p.Done():
		c.traceMemory(p.Stats())
		if c.deleted.Load() {
			return nil // what it was to have is of no use any more
		}
		return p.Wait()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// traceMemory adds what the pager tells of its work.
func (c *Container) traceMemory(s pager.Stats) {
	if s.Connected.IsZero() {
		return
	}
	at := s.Connected.Add
	add := func(name string, from, to time.Duration) { c.cfg.Trace.Add(trace.Pager, name, at(from), at(to)) }
	add("takes the processes", 0, s.Restored)
	if s.FirstFault != 0 {
		add("first page asked for", s.FirstFault, s.FirstFault)
	}
	add(fmt.Sprintf("brings %d MiB, %d KiB of them as asked for before; %d faults answered", (s.FaultBytes+s.DrainBytes)>>20, s.WorkingSet>>10, s.Faults), s.Restored, s.Drained)
}

// finishMemory brings the rest of the memory at once: a dump needs all of it.
func (c *Container) finishMemory() error {
	p := c.memory.Load()
	if p == nil {
		return nil
	}
	if err := p.Finish(context.Background()); err != nil {
		return fmt.Errorf("memory of container %s: %w", c.cfg.ID, err)
	}
	return nil
}
