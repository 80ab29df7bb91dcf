package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/crac-shim/crac/integration/harness"
	"github.com/crac-shim/crac/oci"
)

// Images that travel between two machines, in directories below $CRAC_EXCHANGE: what a machine
// leaves for the other one lies in out there, and what it is brought in in. integration/vm/run.sh
// carries it between the host and the guest, which differ in CPU, kernel, CRIU and cgroup version.
const (
	exchangeEnv     = "CRAC_EXCHANGE"
	exchangeArchive = "images.tar"
	exchangeFacts   = "facts.json"
)

// leftBehind is what a test on the one machine tells the test on the other.
type leftBehind struct {
	CPUFlags []string // all that the kernel lists, not only what our code looks at
	CgroupV2 bool
	Plain    travelling // as stock ctr starts a container
	Cgroups  travelling // with its cgroups mounted, as other clients do
}

type travelling struct {
	Image string
	Last  int // what its workload has counted to
}

// withCgroups are flags for a container with a mount of its cgroups.
func withCgroups() []string {
	return []string{"--mount=type=cgroup,src=cgroup,dst=/sys/fs/cgroup,options=ro:nosuid:noexec:nodev"}
}

func exchange(tb testing.TB, direction string) string {
	tb.Helper()
	dir := os.Getenv(exchangeEnv)
	if dir == "" {
		tb.Skipf("this needs two machines, and %s to name a directory that goes between them: make test-vm does it", exchangeEnv)
	}
	dir = filepath.Join(dir, direction)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		tb.Fatal(err)
	}
	return dir
}

func cpuFlags(tb testing.TB) []string {
	tb.Helper()
	data, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		tb.Fatal(err)
	}
	for line := range strings.SplitSeq(string(data), "\n") {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "flags" {
			return strings.Fields(value)
		}
	}
	tb.Fatal("/proc/cpuinfo lists no flags")
	return nil
}

func cgroupV2() bool {
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return err == nil
}

// TestLeaveForAnotherHost makes the images that TestTakeFromAnotherHost runs on the other machine.
func TestLeaveForAnotherHost(tb *testing.T) {
	onlyCrac(tb)
	dir := exchange(tb, "out")
	t := setup(tb)
	left := leftBehind{CPUFlags: cpuFlags(t), CgroupV2: cgroupV2()}
	left.Plain.Image, left.Plain.Last = checkpointed(t)
	left.Cgroups.Image, left.Cgroups.Last = checkpointed(t, withCgroups()...)
	t.CtrOK("images", "export", filepath.Join(dir, exchangeArchive), left.Plain.Image, left.Cgroups.Image)
	data, err := json.Marshal(left)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, exchangeFacts), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestTakeFromAnotherHost runs what another machine has left: warm where this one has all that the
// dump needs, and otherwise cold, with every reason named, and by name what this CPU lacks.
func TestTakeFromAnotherHost(tb *testing.T) {
	onlyCrac(tb)
	dir := exchange(tb, "in")
	t := setup(tb)
	data, err := os.ReadFile(filepath.Join(dir, exchangeFacts))
	if err != nil {
		t.Fatal(err)
	}
	var there leftBehind
	if err := json.Unmarshal(data, &there); err != nil {
		t.Fatal(err)
	}
	t.CtrOK("images", "import", filepath.Join(dir, exchangeArchive))
	for _, tt := range []struct {
		travelling
		flags   []string
		cgroups bool
	}{
		{there.Plain, nil, false},
		{there.Cgroups, withCgroups(), true},
	} {
		asBefore := how{image: tt.Image, args: ticker().args, flags: tt.flags}
		lacking := lackingHere(t, there, tt.Image)
		var want []string
		if needed := fromJSON[struct{ Manifest oci.Manifest }](t, "inspect", tt.Image).Manifest.CRIU.Minimum; needed > criuHere(t) {
			want = append(want, "criu-too-old")
		}
		if len(lacking) > 0 {
			want = append(want, "cpu-features")
		}
		if tt.cgroups && there.CgroupV2 != cgroupV2() {
			want = append(want, "cgroup-version")
		}
		t.Logf("%s: %v is expected; the CPU lacks %v", tt.Image, want, lacking)
		if len(want) == 0 {
			if v := fromJSON[verified](t, "verify", tt.Image); !v.OK {
				t.Errorf("cracctl verify says %+v", v)
			}
			clone := start(t, warm(tt.Image, tt.flags...))
			clone.goesOnFrom(tt.Last)
			clone.seesNoDump()
			if got := clone.exec("echo", "alive"); got != "alive" {
				t.Errorf("exec says %q", got)
			}
			// It is a container like any here: it can be checkpointed on this machine, too.
			again := ref(t)
			t.CracctlOK("checkpoint", "--exit", clone.id, again)
			last := clone.lastTick()
			clone.remove()
			start(t, warm(again, tt.flags...)).goesOnFrom(last)
			continue
		}
		// Whoever asks before is told what the start will say, in the same words.
		v := refused(t, tt.Image)
		var codes, texts []string
		for _, r := range v.Here.Reasons {
			codes, texts = append(codes, r.Code), append(texts, r.Text)
		}
		if !slices.Equal(codes, want) || !v.Whole {
			t.Errorf("cracctl verify says %+v, want %v", v, want)
		}
		startsCold(t, asBefore, want[0], strings.Join(texts, "; "))
		refuses(t, asBefore, strings.Join(texts, "; "))
		for _, r := range v.Here.Reasons {
			if r.Code != "cpu-features" {
				continue
			}
			for _, f := range lacking {
				if !slices.Contains(strings.FieldsFunc(r.Text, func(c rune) bool { return strings.ContainsRune(" :;,", c) }), f) {
					t.Errorf("%q does not name the missing feature %s", r.Text, f)
				}
			}
		}
	}
}

// lackingHere are the instruction sets that the other machine has and this one has not. The list is
// the test's own, and short: what a C library or a compiler cares for most.
func lackingHere(t *harness.T, there leftBehind, image string) (lacking []string) {
	t.Helper()
	here := cpuFlags(t)
	for _, f := range there.CPUFlags {
		if slices.Contains([]string{"avx", "avx2", "fma", "f16c", "movbe", "bmi1", "bmi2", "aes", "xsave", "rdrand", "avx512f"}, f) && !slices.Contains(here, f) {
			lacking = append(lacking, f)
		}
	}
	if os.Getenv("CRAC_VM") != "" && !slices.Contains(lacking, "avx") && slices.Contains(there.CPUFlags, "avx") {
		t.Errorf("the guest's CPU has AVX: it should be an old one, which lacks what %s was made with", image)
	}
	return lacking
}

// criuHere is the version of the CRIU that the shim uses here, as a manifest has it.
func criuHere(t *harness.T) int {
	t.Helper()
	out, err := harness.Run(t.Ctx, t.Command(t.Ctx, t.Tools.CRIU, "--version"))
	if err != nil {
		t.Fatal(err)
	}
	var major, minor, patch int
	if n, _ := fmt.Sscanf(out, "Version: %d.%d.%d", &major, &minor, &patch); n >= 2 { // 4.2 has no third
		return major*10000 + minor*100 + patch
	}
	t.Fatalf("criu --version says %q", out)
	return 0
}

// refused is what cracctl verify says to an image that does not fit.
func refused(t *harness.T, image string) (v verified) {
	t.Helper()
	out, err := t.Cracctl(t.Ctx, "verify", "--format", "json", image)
	if code := harness.ExitCode(err); code != 1 {
		t.Fatalf("cracctl verify %s ends with %d: %v", image, code, err)
	}
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatalf("cracctl verify says %q: %v", out, err)
	}
	return v
}
