package runtime

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"unsafe"

	criurpc "github.com/checkpoint-restore/go-criu/v7/rpc"
	"github.com/opencontainers/runc/libcontainer"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// PreDump copies the workload's memory into dir, which it makes, while the workload
// runs on: CRIU stops it only to see what there is. From then on the kernel notes
// which pages change, and a Dump with DumpOptions.PreDump writes those alone. That
// is a shorter freeze for twice the work, so it pays for much memory.
//
// The container must be Running, and stays so. It needs TracksMemory, and a workload
// without OwnMarks.
func (c *Container) PreDump(dir string, o CRIUOptions) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refresh()
	if state := c.machine.state; state != Running {
		return fmt.Errorf("pre-dump of container %s: it is %s, and memory is copied ahead only while it changes", c.cfg.ID, state)
	}
	release, err := c.wholeProcesses()
	if err != nil {
		return err
	}
	defer release()
	if err := c.finishMemory(); err != nil {
		return err
	}
	defer expectBreakpoints()()
	call, err := c.newDump(dir, o)
	if err != nil {
		return err
	}
	defer call.close()
	call.opts.LeaveRunning, call.inside = proto.Bool(true), false
	err = call.call(criurpc.CriuReqType_PRE_DUMP)
	if err != nil && !c.stopped() {
		// A CRIU that was killed leaves frozen what it had frozen.
		if thaw := c.lc.Resume(); !errors.Is(thaw, libcontainer.ErrNotPaused) {
			err = errors.Join(err, thaw)
		}
	}
	return err
}

// MemorySize is about how much memory a dump of the workload would hold: what its
// processes have of their own. What forks still share counts for each of them.
func (c *Container) MemorySize() (bytes uint64, err error) {
	err = c.eachProcess(func(pid int) error {
		path := fmt.Sprintf("/proc/%d/statm", pid)
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		// size resident shared …, in pages; shared is what files hold.
		var size, resident, shared uint64
		if _, err := fmt.Sscan(string(data), &size, &resident, &shared); err != nil {
			return fmt.Errorf("%s: %q: %w", path, strings.TrimSpace(string(data)), err)
		}
		if resident > shared {
			bytes += (resident - shared) * uint64(os.Getpagesize())
		}
		return nil
	})
	return bytes, err
}

// OwnMarks tells whether a process of the workload takes off the kernel's marks of
// changed pages by itself, as some garbage collectors do. It and a PreDump would each
// miss what changed before the other took the marks off.
func (c *Container) OwnMarks() (own bool, err error) {
	err = c.eachProcess(func(pid int) error {
		dir := fmt.Sprintf("/proc/%d/fd", pid)
		open, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		for _, fd := range open {
			if to, err := os.Readlink(filepath.Join(dir, fd.Name())); err == nil && filepath.Base(to) == "clear_refs" {
				own = true
			}
		}
		return nil
	})
	return own, err
}

// eachProcess calls f with the ids of the workload's processes. That one has ended
// meanwhile is no error.
func (c *Container) eachProcess(f func(pid int) error) error {
	lc, _, _ := c.now()
	pids, err := lc.Processes()
	if err != nil {
		return err
	}
	for _, pid := range pids {
		if err := f(pid); err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
	return nil
}

// TracksMemory tells whether the kernel notes which pages change
// (CONFIG_MEM_SOFT_DIRTY).
var TracksMemory = sync.OnceValue(func() bool {
	// A page that was just written is marked, if there is a mark.
	page, err := unix.Mmap(-1, 0, os.Getpagesize(), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return false
	}
	defer func() { _ = unix.Munmap(page) }()
	page[0] = 1
	f, err := os.Open("/proc/self/pagemap")
	if err != nil {
		return false
	}
	defer f.Close()
	entry := make([]byte, 8)
	if _, err := f.ReadAt(entry, int64(uintptr(unsafe.Pointer(&page[0]))/uintptr(os.Getpagesize()))*8); err != nil {
		return false
	}
	const softDirty = 1 << 55 // Documentation/admin-guide/mm/soft-dirty.rst
	return binary.NativeEndian.Uint64(entry)&softDirty != 0
})
