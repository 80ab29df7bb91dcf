package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"

	"github.com/crac-shim/crac/integration/harness"
)

// looker is a workload that looks once for a file, with its first instructions as the clone that
// is called so, and says what it sees.
const looker = `echo ready
while read -r name </proc/sys/kernel/hostname; [ "$name" != clone ]; do :; done
if [ -e /extra/marker ]; then echo at first: there; else echo at first: missing; fi
while :; do sleep 1; done`

// What a request mounts and the dump does not have is there before the clone's first instruction.
func TestCloneFindsItsMounts(tb *testing.T) {
	onlyCrac(tb)
	for name, flags := range map[string][]string{"host's users": nil, "user namespace": ownMaps} {
		tb.Run(name, func(tb *testing.T) {
			t := setup(tb)
			image := ref(t)
			b := start(t, how{args: []string{"sh", "-c", looker}, flags: append([]string{option("checkpoint.image", image)}, flags...)})
			t.Eventually("the workload runs", func() bool { return strings.Contains(b.log(), "ready") })
			b.checkpoint("--exit")
			b.remove()

			dir, err := t.Path("extra")
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "marker"), nil, 0o644); err != nil {
				t.Fatal(err)
			}
			clone := start(t, how{image: image, args: []string{"sh", "-c", looker}, flags: append([]string{
				option("restore", "require"), "--hostname", "clone", "--mount", "type=bind,src=" + dir + ",dst=/extra,options=rbind:ro",
			}, flags...)})
			t.Eventually("the clone looks", func() bool { return strings.Contains(clone.log(), "at first:") })
			if !strings.Contains(clone.log(), "at first: there") {
				t.Errorf("the clone ran before its mount was there:\n%s", clone.log())
			}
			clone.wantStatus(containerd.Running)
		})
	}
}

// trier is a ticker that makes a user namespace when it is asked to, which the clients' seccomp
// profiles forbid.
const trier = `i=0; while :; do i=$((i+1)); echo tick $i; sleep 0.05
if [ -e /try ]; then rm /try; if unshare -U true; then echo unshared; else echo refused; fi; fi; done`

// tries asks a trier, and returns what came of it.
func (b *box) tries() string {
	b.Helper()
	answers := func() []string { return regexp.MustCompile(`(?m)^(unshared|refused)$`).FindAllString(b.log(), -1) }
	before := len(answers())
	b.exec("touch", "/try")
	b.Eventually("an answer", func() bool { return len(answers()) > before })
	return answers()[before]
}

// filters are how many seccomp filters each thread of the container's first process has.
func (b *box) filters() (counts []string) {
	b.Helper()
	statuses, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", b.task().Pid()))
	if err != nil || len(statuses) == 0 {
		b.Fatalf("no threads of %s: %v", b.id, err)
	}
	for _, name := range statuses {
		data, err := os.ReadFile(name)
		if err != nil {
			b.Fatal(err)
		}
		counts = append(counts, string(regexp.MustCompile(`Seccomp_filters:\s*(\d+)`).FindSubmatch(data)[1]))
	}
	return counts
}

// The filter of a request is on every process of its clone, whatever the dump had.
func TestCloneIsUnderTheRequestsFilter(tb *testing.T) {
	onlyCrac(tb)
	for name, flags := range map[string][]string{"host's users": nil, "user namespace": ownMaps} {
		tb.Run(name, func(tb *testing.T) { filterOfClones(setup(tb), flags) })
	}
}

func filterOfClones(t *harness.T, flags []string) {
	with := func(more ...string) []string { return append(slices.Clip(flags), more...) }
	workload := []string{"sh", "-c", trier}
	image := ref(t)
	original := start(t, how{args: workload, flags: with(option("checkpoint.image", image))})
	original.waitTicks(3)
	if got := original.tries(); got != "unshared" {
		t.Fatalf("without a filter, the original is %s", got)
	}
	original.checkpoint("--exit")
	last := original.lastTick()
	original.remove()

	free := start(t, how{image: image, args: workload, flags: with(option("restore", "require"))})
	free.goesOnFrom(last)
	if got := free.tries(); got != "unshared" {
		t.Errorf("a clone that asks for no filter is %s", got)
	}
	second := ref(t)
	held := start(t, how{image: image, args: workload, flags: with("--seccomp", option("restore", "require"), option("checkpoint.image", second))})
	held.goesOnFrom(last)
	if got := held.tries(); got != "refused" {
		t.Errorf("a clone that asks for a filter is %s", got)
	}
	if got := held.filters(); got[0] != "1" {
		t.Errorf("the clone has %v filters, want 1", got)
	}

	// A filter that is there already is not put there twice.
	held.checkpoint("--exit")
	last = held.lastTick()
	held.remove()
	again := start(t, how{image: second, args: workload, flags: with("--seccomp", option("restore", "require"))})
	again.goesOnFrom(last)
	if got := again.filters(); got[0] != "1" {
		t.Errorf("the clone's clone has %v filters, want 1", got)
	}
	if got := again.tries(); got != "refused" {
		t.Errorf("the clone's clone is %s", got)
	}
	// It stays, whatever a later request asks for: it is part of the workload now.
	after := start(t, how{image: second, args: workload, flags: with(option("restore", "require"))})
	after.goesOnFrom(last)
	if got := after.tries(); got != "refused" {
		t.Errorf("a clone of a workload under a filter is %s", got)
	}
}

// All threads get the filter, where CRIU notes it for the first one only and where it notes none.
func TestCloneWithThreadsUnderAFilter(tb *testing.T) {
	onlyCrac(tb)
	for name, flags := range map[string][]string{"dumped with": {"--seccomp"}, "dumped without": nil} {
		tb.Run(name, func(tb *testing.T) {
			t := setup(tb)
			needImage(t, "goserver")
			image := ref(t)
			b := start(t, how{image: harness.ImageRef("goserver"), cni: true, flags: append([]string{noMPTCP, option("checkpoint.image", image)}, flags...)})
			count(t, b)
			b.checkpoint("--exit")
			b.remove()
			clone := start(t, how{image: image, cni: true, flags: []string{"--seccomp", option("restore", "require")}})
			if got := count(t, clone); got != 2 {
				t.Errorf("the clone counts %d, want 2", got)
			}
			filters := clone.filters()
			if len(filters) < 3 {
				t.Errorf("only %d threads", len(filters))
			}
			for _, n := range filters {
				if n != "1" {
					t.Errorf("the threads have %v filters, want 1 each", filters)
				}
			}
		})
	}
}

// The resource limits of a clone are those that its request names, and it gains no privileges where
// the request forbids it.
func TestCloneHasTheRequestsLimits(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image, last := checkpointed(t, "--rlimit-nofile", "512", "--allow-new-privs")
	for name, tt := range map[string]struct {
		flags []string
		want  map[string]string // of files in /proc/PID
	}{
		"other limits": {[]string{"--rlimit-nofile", "700"}, map[string]string{"limits": `Max open files\s+700\s+700\s`, "status": `NoNewPrivs:\s1`}},
		"the same":     {[]string{"--rlimit-nofile", "512", "--allow-new-privs"}, map[string]string{"limits": `Max open files\s+512\s+512\s`, "status": `NoNewPrivs:\s0`}},
	} {
		clone := start(t, warm(image, tt.flags...))
		clone.goesOnFrom(last)
		for file, want := range tt.want {
			data, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", clone.task().Pid(), file))
			if err != nil {
				t.Fatal(err)
			}
			if !regexp.MustCompile(`(?m)^` + want).Match(data) {
				t.Errorf("%s: no %q in the clone's %s:\n%s", name, want, file, data)
			}
		}
	}
}

// The AppArmor profile of a request is that of every process of its clone.
func TestCloneIsUnderTheRequestsProfile(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	one, other := apparmorProfile(t), apparmorProfile(t)
	for from, flags := range map[string][]string{"unconfined": nil, "confined": {"--apparmor-profile", one}} {
		image, last := checkpointed(t, flags...)
		for _, profile := range []string{one, other} {
			clone := start(t, warm(image, "--apparmor-profile", profile))
			clone.goesOnFrom(last)
			data, err := os.ReadFile(fmt.Sprintf("/proc/%d/attr/current", clone.task().Pid()))
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.TrimSpace(string(data)); got != profile+" (enforce)" {
				t.Errorf("dumped %s, a clone that asks for %s is under %q", from, profile, got)
			}
			if got := clone.exec("cat", "/proc/1/attr/current", "/proc/self/attr/current"); strings.Count(got, profile+" (enforce)") != 2 {
				t.Errorf("dumped %s, a clone that asks for %s says of its processes: %q", from, profile, got)
			}
			clone.remove()
		}
	}
}
