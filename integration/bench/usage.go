package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/integration/harness"
)

// usage is memory in bytes.
type usage struct {
	pss    int64 // of the workload's processes and of those that bring their memory
	cgroup int64 // of the container's memory cgroup
	shim   int64 // PSS of the shim
}

// pss is the proportional set size of a process: what it shares counts in parts.
func pss(pid int) (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "Pss:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 10, 64)
			return kib << 10, err
		}
	}
	return 0, fmt.Errorf("no Pss in smaps_rollup of process %d", pid)
}

// pssOf sums up. A process that ends meanwhile takes none.
func pssOf(pids []int) (sum int64, err error) {
	for _, pid := range pids {
		n, err := pss(pid)
		switch {
		case errors.Is(err, os.ErrNotExist), errors.Is(err, unix.ESRCH):
		case err != nil:
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

// cgroupUsage is what the kernel has charged a container's memory cgroup with.
func cgroupUsage(id string) (int64, error) {
	paths, err := harness.Cgroups(func(p string) bool { return filepath.Base(p) == id })
	if err != nil {
		return 0, err
	}
	for _, p := range paths {
		for _, file := range []string{"memory.current", "memory.usage_in_bytes"} {
			b, err := os.ReadFile(filepath.Join(p, file))
			if err == nil {
				return strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
			}
		}
	}
	return 0, fmt.Errorf("no memory cgroup of %s", id)
}

// pagers are the processes that bring a container of this project its memory: children of its shim.
func pagers(shim int) (pids []int) {
	for _, pid := range children(shim) {
		comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		if err == nil && strings.HasPrefix(string(comm), "crac-pager") {
			pids = append(pids, pid)
		}
	}
	return pids
}

func children(pid int) (pids []int) {
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		return nil
	}
	for _, list := range lists {
		b, err := os.ReadFile(list)
		if err != nil {
			continue
		}
		for field := range strings.FieldsSeq(string(b)) {
			if n, err := strconv.Atoi(field); err == nil {
				pids = append(pids, n)
			}
		}
	}
	return pids
}

// waitEnd waits for the end of a process that is not our child.
func waitEnd(ctx context.Context, pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return os.NewSyscallError("pidfd_open", err)
	}
	defer func() { _ = unix.Close(fd) }()
	for ctx.Err() == nil {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("poll", err)
		}
		if n > 0 {
			return nil
		}
	}
	return context.Cause(ctx)
}
