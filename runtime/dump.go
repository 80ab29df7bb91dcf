package runtime

import (
	"cmp"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// DumpOptions say what happens around a dump. The zero value works.
type DumpOptions struct {
	// Exit ends the workload after a dump that went well, Pause leaves it
	// paused; otherwise it is as it came.
	Exit, Pause bool
	// PreDump is the directory of a PreDump of this workload, or empty. The dump then
	// leaves out what it has, and continues it: dir has a link named parent. If that
	// goes wrong, the dump is a whole one, without that link, and the pre-dump is
	// removed.
	PreDump string
	// BeforeDump, unless nil, runs when the workload is frozen and before it is
	// dumped, with the ids of its processes. It must not call the Container.
	BeforeDump func(pids []int) error
	// WhileFrozen, unless nil, runs after the dump and before the workload does:
	// what it sees of the files agrees with the memory, if the container is Untouched
	// then. It must not call anything else of the Container.
	WhileFrozen func() error
}

// Dump writes the workload's memory and kernel state into dir, which it makes
// if need be. From a Running or Paused container it goes to Quiesced and back,
// or to what the options ask for.
//
// On any error the container is as it was, but for what BeforeDump has changed. A
// SIGKILL by Signal ends the dump, which fails.
func (c *Container) Dump(dir string, o CRIUOptions, d DumpOptions) (err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.dumpable(); err != nil {
		return err
	}
	came := c.machine.state
	release, err := c.wholeProcesses()
	if err != nil {
		return err
	}
	defer release()
	// It runs on meanwhile.
	if err := c.finishMemory(); err != nil {
		return err
	}
	defer expectBreakpoints()()
	dump, err := c.newDump(dir, o)
	if err != nil {
		return err
	}
	defer dump.close()
	if o.ConfigFile == "" { // which may have a word for the same mounts
		dump.leaveOutTmpfs()
	}
	// Established connections outlive a killed process only if CRIU kills it
	// while they are locked.
	dump.opts.LeaveRunning = proto.Bool(!d.Exit || o.TCP != TCPEstablished)
	if err := c.machine.to(Quiesced); err != nil {
		return err
	}
	frozen := came == Paused
	defer func() {
		next := came
		if err == nil && d.Pause {
			next = Paused
		}
		switch {
		case c.stopped():
			next = Stopped
		case err == nil && d.Exit:
			if err = c.lc.Signal(unix.SIGKILL); err == nil {
				<-c.init.Done()
				next = Stopped
			}
		case next == Running && frozen:
			err = errors.Join(err, c.lc.Resume())
		}
		_ = c.machine.to(next)
	}()
	// CRIU has much to do before it looks at the workload, which runs on meanwhile.
	dump.begin = sync.OnceValue(func() error {
		// Freeze it ourselves: CRIU leaves frozen what it found frozen, and so
		// nothing runs between the dump and WhileFrozen.
		if !frozen {
			if err := c.freeze(); err != nil {
				return fmt.Errorf("freeze container %s: %w", c.cfg.ID, err)
			}
			frozen = true
		}
		if d.BeforeDump == nil {
			return nil
		}
		pids, err := c.lc.Processes()
		if err != nil {
			return err
		}
		return d.BeforeDump(pids)
	})
	if err := dump.since(d.PreDump); err != nil {
		return cmp.Or(c.Untouched(), err)
	}
	if err := dump.complete(); err != nil {
		return err
	}
	if err := c.Untouched(); err != nil || d.WhileFrozen == nil {
		return err
	}
	return d.WhileFrozen()
}

// Dumpable is an error that says why the container cannot be dumped in its state.
func (c *Container) Dumpable() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.dumpable()
}

func (c *Container) dumpable() error {
	c.refresh()
	if c.machine.state == Created {
		return fmt.Errorf("container %s was not started yet: %w", c.cfg.ID, ErrNotRunning)
	}
	return c.machine.can(Quiesced)
}

// Untouched is an error if a client has killed the container: what is killed while
// it is frozen is thawed for that, and not all of it ends at once.
func (c *Container) Untouched() error {
	if c.killed.Load() {
		return fmt.Errorf("container %s was killed while it was checkpointed", c.cfg.ID)
	}
	return nil
}

func (c *Container) stopped() bool {
	select {
	case <-c.init.Done():
		return true
	default:
		return false
	}
}
