package harness

import (
	"context"
	"os"
	"testing"
	"time"
)

// TestLimit is what one test may take, and WaitLimit what it waits for one thing. In a guest, whose
// processors are emulated, everything takes several times as long.
var TestLimit, WaitLimit = 3 * time.Minute, 30 * time.Second

func init() {
	if os.Getenv("CRAC_VM") != "" {
		TestLimit, WaitLimit = 4*TestLimit, 4*WaitLimit
	}
}

// T is a Daemon in a test: what fails, fails the test.
type T struct {
	testing.TB
	*Daemon
	Ctx context.Context
}

// For binds the daemon to a test. The context ends, with the daemon's namespace in it, before
// the test would be killed for taking too long.
func (d *Daemon) For(tb testing.TB, limit time.Duration) *T {
	tb.Helper()
	ctx, cancel := context.WithTimeout(d.Context(context.Background()), limit)
	tb.Cleanup(cancel)
	return &T{tb, d, ctx}
}

// CtrOK runs ctr, which has to succeed.
func (t *T) CtrOK(args ...string) string {
	t.Helper()
	out, err := t.Ctr(t.Ctx, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// NerdctlOK runs nerdctl, which has to succeed.
func (t *T) NerdctlOK(args ...string) string {
	t.Helper()
	out, err := t.Nerdctl(t.Ctx, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// CracctlOK runs cracctl, which has to succeed.
func (t *T) CracctlOK(args ...string) string {
	t.Helper()
	out, err := t.Cracctl(t.Ctx, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// NoLeftovers fails the test when anything of a deleted container is still there.
func (t *T) NoLeftovers(id string) {
	t.Helper()
	for _, l := range t.Leftovers(id) {
		t.Errorf("left behind by container %s: %s", id, l)
	}
}

// Eventually waits until cond holds; what says what is waited for.
func (t *T) Eventually(what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(WaitLimit); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) || t.Ctx.Err() != nil {
			t.Fatalf("waited in vain for: %s", what)
		}
	}
}

// Context is the test's: Daemon.Context gives one with the namespace, and so does T.Ctx.
func (t *T) Context() context.Context { return t.Ctx }

// Log logs to the test; Daemon.Log is containerd's.
func (t *T) Log(args ...any) {
	t.Helper()
	t.TB.Log(args...)
}
