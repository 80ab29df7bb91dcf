package integration

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/crac-shim/crac/integration/harness"
)

// The benchmark measures who it says, finds everything right, and leaves nothing behind.
func TestBenchmark(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	t := setup(tb)
	if err := t.Tools.BuildImages(t.Ctx, "memory"); err != nil {
		t.Fatal(err)
	}
	dir := tb.TempDir()
	program, out := filepath.Join(dir, "bench"), filepath.Join(dir, "result")
	if text, err := exec.CommandContext(t.Ctx, "go", "build", "-tags", "seccomp", "-o", program, "./bench").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, text)
	}
	cmd := exec.CommandContext(t.Ctx, program, "-workloads", "mem-10m", "-contenders", "crac,containerd-runc,runc,criu,copy",
		"-parts", "restore,checkpoint", "-runs", "1", "-checkpoints", "1", "-out", out)
	cmd.Env = append(os.Environ(), "CRAC_BUILD="+t.Tools.Build)
	tables, err := harness.Run(t.Ctx, cmd)
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(out + ".json")
	if err != nil {
		t.Fatal(err)
	}
	var results []struct {
		Workload, Contender, Metric string
		N                           int
		Median                      float64
		OK                          bool
	}
	if err := json.Unmarshal(data, &results); err != nil {
		t.Fatal(err)
	}
	measured := map[string]bool{}
	for _, r := range results {
		if r.Workload != "mem-10m" || !r.OK || r.N != 1 || r.Median <= 0 {
			t.Errorf("%+v", r)
		}
		measured[r.Contender+" "+r.Metric] = true
	}
	for _, want := range []string{
		"crac restore.answer", "containerd-runc restore.answer", "runc restore.answer", "criu restore.answer", "copy restore.memory",
		"crac checkpoint.frozen", "containerd-runc checkpoint.frozen", "runc checkpoint.frozen", "criu checkpoint.frozen",
	} {
		if !measured[want] {
			t.Errorf("nobody has measured %s: %v", want, measured)
		}
	}
	for _, want := range []string{"mem-10m restore", "10 MB: first answer, to bare runc"} {
		if !strings.Contains(tables, want) {
			t.Errorf("the tables have no %q:\n%s", want, tables)
		}
	}
	if _, err := os.Stat(out + ".svg"); err != nil {
		t.Error(err)
	}
}
