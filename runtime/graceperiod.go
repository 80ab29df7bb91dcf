package runtime

import (
	"os"
	"path/filepath"
	"unsafe"

	"github.com/opencontainers/cgroups"
	"golang.org/x/sys/unix"
)

// Some of what a start or a dump asks of the kernel is quick but for the first who asks: the kernel
// changes its mode for them, and waits until every CPU has noticed (an RCU grace period, 7 to 12 ms
// where CPUs are idle). The functions here ask for nothing and ask early, so that this time passes
// beside other work. Where the kernel refuses, it is waited for later.

// ExpectCgroupMove prepares the kernel for processes that are about to be moved into cgroups. It
// returns at once. The kernel stays prepared for about as long as it took to prepare.
//
// Moves exclude forks and exits by a lock that is made for those (kernel/cgroup/cgroup.c,
// cgroup_attach_lock; kernel/rcu/sync.c). A move to where a process is already takes it, too.
func ExpectCgroupMove() {
	go func() {
		own, err := cgroups.ParseCgroupFile("/proc/self/cgroup")
		if err != nil {
			return
		}
		for controller, path := range own {
			f, err := os.OpenFile(filepath.Join(cgroupRoot, controller, path, "cgroup.procs"), os.O_WRONLY, 0)
			if err != nil {
				continue
			}
			_, err = f.WriteString("0") // the writer: cgroups(7)
			f.Close()
			if err == nil {
				return
			}
		}
	}()
}

// expectBreakpoints prepares the kernel for the hardware breakpoints at which CRIU stops processes
// that it lets go (compel/src/lib/infect.c, compel_stop_pie). It returns at once. release must be
// called when CRIU has ended.
//
// A breakpoint is an event of perf_event_open(2). The first of all of a host's tasks has the kernel
// watch its task switches (kernel/events/core.c, account_event); an event that counts nothing has
// it, too.
func expectBreakpoints() (release func()) {
	done := make(chan struct{})
	go func() {
		attr := unix.PerfEventAttr{Type: unix.PERF_TYPE_SOFTWARE, Config: unix.PERF_COUNT_SW_DUMMY, Bits: unix.PerfBitDisabled}
		attr.Size = uint32(unsafe.Sizeof(attr))
		fd, err := unix.PerfEventOpen(&attr, 0, -1, -1, unix.PERF_FLAG_FD_CLOEXEC)
		if err != nil {
			return
		}
		<-done
		unix.Close(fd)
	}()
	return func() { close(done) }
}
