package pager

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cgroups are the directories of the cgroups that hold a workload, in whatever
// hierarchies; all processes in them and below are the workload's.
type cgroups []string

// check refuses what would kill more than a workload.
func (c cgroups) check() error {
	if len(c) == 0 {
		return errors.New("no cgroup is named: a pager must be able to kill the workload whose memory it cannot serve")
	}
	for _, dir := range c {
		if !filepath.IsAbs(dir) {
			return fmt.Errorf("cgroup %s: not an absolute path", dir)
		}
		var here, above unix.Stat_t
		if err := unix.Stat(dir, &here); err != nil {
			return &os.PathError{Op: "stat", Path: dir, Err: err}
		}
		if err := unix.Stat(filepath.Dir(dir), &above); err != nil {
			return &os.PathError{Op: "stat", Path: filepath.Dir(dir), Err: err}
		}
		if _, err := os.Stat(filepath.Join(dir, "cgroup.procs")); err != nil || here.Dev != above.Dev {
			return fmt.Errorf("%s is not a cgroup below the root of its hierarchy", dir)
		}
		for _, pid := range processes(dir) {
			if pid == os.Getpid() {
				return fmt.Errorf("cgroup %s has the pager itself: put the pager elsewhere, or name the workload's own cgroup", dir)
			}
		}
	}
	return nil
}

// kill kills everything in the cgroups, and returns when nothing is left. It
// does not give up: who holds a workload's memory may let go of it only then.
func (c cgroups) kill() {
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		left := false
		for _, dir := range c {
			if killAll(dir) {
				left = true
			}
		}
		if !left {
			return
		}
		time.Sleep(wait)
	}
}

// killAll signals everything in one cgroup and below, and tells whether there
// was anything.
func killAll(dir string) (found bool) {
	pids := processes(dir)
	if len(pids) == 0 {
		return false
	}
	// cgroup v2, Linux 5.14: all at once, whoever forks meanwhile.
	if err := tell(filepath.Join(dir, "cgroup.kill"), "1"); err == nil {
		return true
	}
	for _, pid := range pids {
		_ = unix.Kill(pid, unix.SIGKILL)
	}
	// cgroup v1: what is frozen does not die.
	thaw(dir)
	return true
}

func thaw(dir string) {
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Name() == "freezer.state" {
			_ = tell(path, "THAWED")
		}
		return nil
	})
}

// processes lists the processes in a cgroup and below. A cgroup that is gone has
// none.
func processes(dir string) []int {
	var pids []int
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.Name() != "cgroup.procs" {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return nil
		}
		for _, field := range strings.Fields(string(data)) {
			// 0 stands for a process of a pid namespace that we do not see.
			if pid, err := strconv.Atoi(field); err == nil && pid > 0 {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	return pids
}

// tell writes to a file of the kernel's, and makes none.
func tell(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(value)
	return err
}
