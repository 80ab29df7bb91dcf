package pager

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// Everything in a cgroup and below it dies, frozen or not, in both versions.
func TestKillCgroup(t *testing.T) {
	needPrograms(t)
	groups := map[string]string{"the host's": newCgroup(t)}
	if _, err := os.Stat("/sys/fs/cgroup/freezer/cgroup.procs"); err == nil {
		frozen := newCgroupIn(t, "/sys/fs/cgroup/freezer")
		groups["version 1, frozen"] = frozen
	}
	for name, dir := range groups {
		t.Run(name, func(t *testing.T) {
			below := filepath.Join(dir, "below")
			if err := os.Mkdir(below, 0o755); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { removed(t, below) })
			var all []*exec.Cmd
			for _, group := range []string{dir, below} {
				cmd := exec.Command("sleep", "1000")
				if err := cmd.Start(); err != nil {
					t.Fatal(err)
				}
				all = append(all, cmd)
				if err := os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0); err != nil {
					t.Fatal(err)
				}
			}
			for _, freeze := range []struct{ file, value string }{{"freezer.state", "FROZEN"}, {"cgroup.freeze", "1"}} {
				if f := filepath.Join(dir, freeze.file); exists(f) {
					if err := os.WriteFile(f, []byte(freeze.value), 0); err != nil {
						t.Fatal(err)
					}
				}
			}
			cgroups{dir}.kill()
			for _, cmd := range all {
				if err := cmd.Wait(); err == nil || cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
					t.Errorf("it ended with %v", err)
				}
			}
			if left := processes(dir); len(left) != 0 {
				t.Errorf("%v are left", left)
			}
		})
	}
}

// A cgroup that is gone has nobody to kill.
func TestKillNobody(t *testing.T) {
	cgroups{filepath.Join(t.TempDir(), "gone")}.kill()
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// removed removes a cgroup, which a zombie keeps busy for a moment.
func removed(t testing.TB, dir string) {
	t.Helper()
	for start := time.Now(); os.Remove(dir) != nil; time.Sleep(time.Millisecond) {
		if time.Since(start) > 5*time.Second {
			t.Errorf("cgroup %s cannot be removed", dir)
			return
		}
	}
}
