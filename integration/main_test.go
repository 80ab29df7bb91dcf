// Package integration proves the runtime against real containerd, CRIU, registry and clients.
package integration

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/crac-shim/crac/integration/harness"
)

const (
	cracRuntime = "io.containerd.crac.v2"
	runcRuntime = "io.containerd.runc.v2"
)

// testRuntime is what the tests of the task API run on. $CRAC_TEST_RUNTIME names another one:
// on containerd's own shim they check the tests.
var testRuntime = cracRuntime

// shared is the one containerd of all tests. A test that needs a daemon with something special
// starts its own.
var shared *harness.Daemon

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == loggerArg {
		runLogger()
		return
	}
	flag.Parse()
	os.Exit(runTests(m))
}

func runTests(m *testing.M) (code int) {
	fail := func(format string, args ...any) {
		fmt.Fprintf(os.Stderr, "FAIL: "+format+"\n", args...)
		code = 1
	}
	need := []harness.Tool{harness.Shim, harness.RuncShim, harness.Runc}
	if r := os.Getenv("CRAC_TEST_RUNTIME"); r != "" {
		testRuntime = r
		if r != cracRuntime {
			need = need[1:]
		}
	}
	ctx := context.Background()
	before, err := harness.TakeHostSnapshot()
	if err != nil {
		fail("%v", err)
		return
	}
	if shared, err = harness.StartContainerd(ctx, harness.Options{Need: need, Debug: os.Getenv("CRAC_DEBUG") != ""}); err != nil {
		fail("%v", err)
		return
	}
	// go test kills a process that takes too long, and nobody would clean up after it.
	if limit := flag.Lookup("test.timeout"); limit != nil {
		if d, err := time.ParseDuration(limit.Value.String()); err == nil && d > 0 {
			time.AfterFunc(max(d*9/10, d-time.Minute), func() { abandon("the tests take too long") })
		}
	}
	sigs := make(chan os.Signal, 1)
	signal.Notify(sigs, syscall.SIGINT, syscall.SIGTERM)
	go func() { abandon((<-sigs).String()) }()

	code = m.Run()
	log := shared.Log()
	if err := shared.Stop(ctx); err != nil {
		fail("%v", err)
	}
	if path := os.Getenv("CRAC_LOG"); path != "" {
		if err := os.WriteFile(path, []byte(log), 0o600); err != nil {
			fail("%v", err)
		}
	}
	// On a machine that only runs these tests, nothing new may be there at all, once its own services
	// had time to end. Elsewhere it may be somebody else's: the daemon and each test look after their
	// own parts.
	added := func() []string {
		after, err := harness.TakeHostSnapshot()
		if err != nil {
			return []string{err.Error()}
		}
		return after.NewSince(before)
	}
	if quietHost() {
		for _, n := range waitEmpty(added) {
			fail("the host has something new after the tests: %s", n)
		}
		return code
	}
	for _, n := range added() {
		fmt.Fprintf(os.Stderr, "new on the host since the tests began (set CRAC_QUIET_HOST=1 to make this an error): %s\n", n)
	}
	return code
}

// quietHost tells whether this machine does nothing but run the tests.
func quietHost() bool { return os.Getenv("CRAC_VM") != "" || os.Getenv("CRAC_QUIET_HOST") != "" }

func abandon(reason string) {
	fmt.Fprintf(os.Stderr, "FAIL: %s: stopping\n", reason)
	if err := shared.Stop(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, err)
	}
	os.Exit(1)
}

// setup gives a test the shared daemon. What the test may take is bounded.
func setup(tb testing.TB) *harness.T {
	tb.Helper()
	t := shared.For(tb, harness.TestLimit)
	mark := len(shared.Log())
	tb.Cleanup(func() {
		if !tb.Failed() {
			return
		}
		var lines []string
		for line := range strings.SplitSeq(shared.Log()[mark:], "\n") {
			if os.Getenv("CRAC_DEBUG") != "" || !strings.Contains(line, "level=debug") && !strings.Contains(line, "loading plugin") {
				lines = append(lines, line)
			}
		}
		if len(lines) > 60 {
			lines = append([]string{"…"}, lines[len(lines)-60:]...)
		}
		tb.Logf("containerd's log during this test:\n%s", strings.Join(lines, "\n"))
	})
	return t
}

// setupDebug gives a test a daemon of its own at its debug level, at which CRIU logs all it does.
func setupDebug(tb testing.TB) *harness.T {
	tb.Helper()
	return ownDaemon(tb, harness.Options{Need: []harness.Tool{harness.Shim}, Debug: true}).For(tb, harness.TestLimit)
}

// ownDaemon starts a containerd for one test, which stops it after what is registered later has been cleaned up.
func ownDaemon(tb testing.TB, o harness.Options) *harness.Daemon {
	tb.Helper()
	d, err := harness.StartContainerd(context.Background(), o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := d.Stop(context.Background()); err != nil {
			tb.Error(err)
		}
	})
	return d
}

// needImage imports an image, which has to be there.
func needImage(t *harness.T, name string) {
	t.Helper()
	if _, err := t.ImportImage(t.Ctx, name); err != nil {
		t.Fatal(err)
	}
}

// changesHost puts a file of the host back when the test ends, however it does.
func changesHost(t *harness.T, path string) {
	t.Helper()
	if err := t.KeepHostFile(path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := t.RestoreHostFile(path); err != nil {
			t.Error(err)
		}
	})
}

// newID returns an id that nothing else on the host has in its name.
func newID(tb testing.TB) string {
	b := make([]byte, 4)
	if _, err := rand.Read(b); err != nil {
		tb.Fatal(err)
	}
	name := strings.ToLower(filepath.Base(strings.TrimPrefix(tb.Name(), "Test")))
	name = strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' {
			return r
		}
		return -1
	}, name)
	return fmt.Sprintf("%.20s-%s", name, hex.EncodeToString(b))
}

// times is how often a test repeats something: the guest's processors are emulated, and slow.
func times(n int) int {
	if rounds, err := strconv.Atoi(os.Getenv("CRAC_ROUNDS")); err == nil {
		return rounds // make soak
	}
	if os.Getenv("CRAC_VM") != "" {
		return max(n/5, 2)
	}
	return n
}

func onlyCrac(tb testing.TB) {
	tb.Helper()
	if testRuntime != cracRuntime {
		tb.Skipf("this is about %s; the tests run on %s", cracRuntime, testRuntime)
	}
}

// hostLacks skips a test of what this host does not have. The guest of `make test-vm` has it.
func hostLacks(tb testing.TB, format string, args ...any) {
	tb.Helper()
	if os.Getenv("CRAC_VM") != "" {
		tb.Fatalf("the guest has to have this: "+format, args...)
	}
	tb.Skipf(format+"; `make test-vm` runs this test in a guest that has it", args...)
}

// TestHarnessSeesLeaks is the proof of the proof: a daemon that is stopped names what was left.
func TestHarnessSeesLeaks(tb *testing.T) {
	tb.Parallel()
	ctx := context.Background()
	d, err := harness.StartContainerd(ctx, harness.Options{})
	if err != nil {
		tb.Fatal(err)
	}
	stopped := false
	defer func() {
		if !stopped {
			_ = d.Stop(ctx)
		}
	}()
	dir, err := d.Path("mnt")
	if err != nil {
		tb.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		tb.Fatal(err)
	}
	roots, err := harness.CgroupRoots()
	if err != nil {
		tb.Fatal(err)
	}
	cgroup := filepath.Join(roots[0], d.Namespace, "leak")
	if err := os.MkdirAll(cgroup, 0o755); err != nil {
		tb.Fatal(err)
	}
	temp := filepath.Join(d.Dir, "tmp", "leaked-file")
	if err := os.WriteFile(temp, nil, 0o600); err != nil {
		tb.Fatal(err)
	}
	sleeper := exec.Command("sleep", "1234")
	sleeper.Env = append(os.Environ(), "CRAC_HARNESS="+d.Dir)
	if err := sleeper.Start(); err != nil {
		tb.Fatal(err)
	}
	go func() { _ = sleeper.Wait() }()

	err = d.Stop(ctx)
	stopped = true
	for _, want := range []string{"mount " + dir, "cgroup " + cgroup, temp, "sleep 1234"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			tb.Errorf("Stop does not report the leak of %q: %v", want, err)
		}
	}
	for _, gone := range []string{cgroup, temp} {
		if _, err := os.Stat(gone); err == nil {
			tb.Errorf("%s is still there after Stop", gone)
		}
	}
	if m, err := harness.Mounts(dir); err != nil || len(m) > 0 {
		tb.Errorf("%s is still mounted after Stop (%v)", dir, err)
	}
}
