package inspect

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/opencontainers/cgroups"
)

func TestPids(t *testing.T) {
	needRoot(t)
	root := "/sys/fs/cgroup"
	if !cgroups.IsCgroup2UnifiedMode() {
		mount, err := cgroups.FindCgroupMountpoint("", "freezer")
		if err != nil {
			t.Skipf("no freezer hierarchy: %v", err)
		}
		root = mount
	}
	dir := filepath.Join(root, fmt.Sprintf("crac-test-inspect-%d", os.Getpid()))
	nested := filepath.Join(dir, "nested")
	for _, d := range []string{dir, nested} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Skipf("cgroups cannot be made here: %v", err)
		}
		t.Cleanup(func() {
			if err := os.Remove(d); err != nil {
				t.Error(err)
			}
		})
	}
	var want []int
	for _, d := range []string{dir, nested} {
		cmd := exec.Command("sleep", "60")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		})
		if err := os.WriteFile(filepath.Join(d, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0o600); err != nil {
			t.Fatal(err)
		}
		want = append(want, cmd.Process.Pid)
	}
	got, err := Pids(want[0])
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if _, err := Pids(1 << 22); err == nil || !strings.Contains(err.Error(), "find the cgroup of process 4194304") {
		t.Errorf("a process that is not there: %v", err)
	}
}
