package harness

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"syscall"

	"github.com/moby/sys/mountinfo"
)

// CgroupRoots returns the mount points of all cgroup hierarchies of this host: one on cgroup v2,
// one a controller on v1.
func CgroupRoots() ([]string, error) {
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.FSType != "cgroup" && m.FSType != "cgroup2", false
	})
	if err != nil {
		return nil, err
	}
	var roots []string
	for _, m := range mounts {
		if strings.HasPrefix(m.Mountpoint, "/sys/fs/cgroup") {
			roots = append(roots, m.Mountpoint)
		}
	}
	if len(roots) == 0 {
		return nil, errors.New("no cgroup file system is mounted below /sys/fs/cgroup")
	}
	return roots, nil
}

// CgroupV2 tells whether the host has the unified hierarchy with its controllers.
func CgroupV2() bool {
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return err == nil
}

// Cgroups returns the paths of all cgroups in all hierarchies for which keep says yes.
func Cgroups(keep func(path string) bool) ([]string, error) {
	roots, err := CgroupRoots()
	if err != nil {
		return nil, err
	}
	var found []string
	for _, root := range roots {
		err := filepath.WalkDir(root, func(p string, e fs.DirEntry, err error) error {
			switch {
			case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENODEV):
				return nil // removed while we look
			case err != nil:
				return err
			case e.IsDir() && keep(p):
				found = append(found, p)
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("walk cgroups: %w", err)
		}
	}
	sort.Strings(found)
	return found, nil
}

// cgroupsOf returns the cgroups whose path has this name in it.
func cgroupsOf(name string) ([]string, error) {
	return Cgroups(func(p string) bool { return strings.Contains(p, name) })
}

func removeCgroups(name string) error {
	_, err := waitGone(WaitLimit, func() ([]string, error) {
		all, err := cgroupsOf(name)
		for i := len(all) - 1; i >= 0; i-- { // children sort after their parents
			_ = os.Remove(all[i])
		}
		if err != nil {
			return nil, err
		}
		return cgroupsOf(name)
	})
	return err
}

// CgroupProcs returns the processes that are in a container's cgroup.
func (d *Daemon) CgroupProcs(id string) ([]int, error) {
	paths, err := cgroupsOf("/" + d.Namespace + "/" + id)
	if err != nil {
		return nil, err
	}
	seen := map[int]bool{}
	var pids []int
	for _, p := range paths {
		b, err := os.ReadFile(filepath.Join(p, "cgroup.procs"))
		if err != nil {
			continue // removed, or a threaded cgroup
		}
		for _, f := range strings.Fields(string(b)) {
			var pid int
			if _, err := fmt.Sscan(f, &pid); err == nil && !seen[pid] {
				seen[pid] = true
				pids = append(pids, pid)
			}
		}
	}
	return pids, nil
}
