package inspect

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/opencontainers/cgroups"
)

// Pids lists the processes of the container whose init has this host pid: those
// in its cgroup and below, by their host pids.
func Pids(init int) ([]int, error) {
	dir, err := cgroupOf(init)
	if err != nil {
		return nil, fmt.Errorf("find the cgroup of process %d: %w", init, err)
	}
	pids, err := cgroups.GetAllPids(dir)
	if err != nil {
		return nil, fmt.Errorf("list the processes of cgroup %s: %w", dir, err)
	}
	return pids, nil
}

// cgroupOf is the directory of a process's cgroup: the one of cgroup v2, or of a
// v1 hierarchy in which every container has one of its own.
func cgroupOf(pid int) (string, error) {
	paths, err := cgroups.ParseCgroupFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return "", err
	}
	if cgroups.IsCgroup2UnifiedMode() {
		path, ok := paths[""]
		if !ok || path == "/" { // the root holds the whole machine
			return "", fmt.Errorf("/proc/%d/cgroup names none of cgroup v2 but the root", pid)
		}
		return filepath.Join("/sys/fs/cgroup", path), nil
	}
	for _, subsystem := range []string{"freezer", "devices", "pids"} {
		path, ok := paths[subsystem]
		if !ok || path == "/" {
			continue
		}
		mount, root, err := cgroups.FindCgroupMountpointAndRoot("", subsystem)
		if err != nil {
			continue
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			continue
		}
		dir := filepath.Join(mount, rel)
		if _, err := os.Stat(dir); err == nil {
			return dir, nil
		}
	}
	return "", fmt.Errorf("/proc/%d/cgroup names none of the freezer, devices or pids hierarchy but the root", pid)
}
