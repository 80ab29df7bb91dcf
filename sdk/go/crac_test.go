package crac_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	crac "github.com/crac-shim/crac/sdk/go"
)

// The contract is tested for all languages by sdk/conformance_test.go; here is what is
// Go's own.

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "crac")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		if err := os.Setenv("CRAC_DIR", dir); err != nil {
			panic(err)
		}
		slog.SetDefault(slog.New(slog.NewTextHandler(new(strings.Builder), nil)))
		return m.Run()
	}())
}

// tell plays the runtime's part.
func tell(t *testing.T, format string, args ...any) (answer string) {
	t.Helper()
	if err := crac.Start(); err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("unix", filepath.Join(os.Getenv("CRAC_DIR"), fmt.Sprintf("go-%d.sock", os.Getpid())))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprintf(c, format+"\n", args...)
	line, err := io.ReadAll(c)
	if err != nil {
		t.Fatal(err)
	}
	var a struct{ Error string }
	if err := json.Unmarshal(line, &a); err != nil {
		t.Fatal(err)
	}
	return a.Error
}

func TestUnregister(t *testing.T) {
	var calls atomic.Int32
	h := crac.Hooks{Check: func(context.Context) error { calls.Add(1); return nil }}
	first, second := crac.Register(h), crac.Register(h)
	defer second()
	first()
	first()
	tell(t, `{"event":"check"}`)
	if n := calls.Load(); n != 1 {
		t.Errorf("%d calls of a hook that is registered once", n)
	}
}

func closePool(ctx context.Context) error { select {} }

func TestNames(t *testing.T) {
	broken := errors.New("broken")
	defer crac.Register(crac.Hooks{Name: "cache", Check: func(context.Context) error { return broken }})()
	defer crac.Register(crac.Hooks{Check: closePool})()
	defer crac.Register(crac.Hooks{Name: "slow", Check: func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }})()
	got := tell(t, `{"event":"check","deadline_ms":200}`)
	want := "slow: context deadline exceeded; github.com/crac-shim/crac/sdk/go_test.closePool: has not ended in time; cache: broken"
	if got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestWhatHooksAreTold(t *testing.T) {
	var outcome crac.Outcome
	var restore crac.Restore
	defer crac.Register(crac.Hooks{
		AfterResume:  func(_ context.Context, o crac.Outcome) error { outcome = o; return nil },
		AfterRestore: func(_ context.Context, r crac.Restore) error { restore = r; return nil },
	})()
	tell(t, `{"event":"after-resume","outcome":"failed","error":"busy"}`)
	if outcome != (crac.Outcome{Result: crac.Failed, Error: "busy"}) {
		t.Errorf("after-resume: %+v", outcome)
	}
	tell(t, `{"event":"after-restore","generation":"g","frozen_ns":2000000000}`)
	if restore.Generation != "g" || restore.Frozen != 2*time.Second {
		t.Errorf("after-restore: %+v", restore)
	}
}

// What was drawn before a restore says nothing about what comes after it.
func TestRand(t *testing.T) {
	r := crac.Rand()
	seen := map[uint64]bool{}
	for range 3 {
		for _, n := range []uint64{r.Uint64(), crac.Rand().Uint64()} {
			if seen[n] {
				t.Errorf("%d is drawn twice", n)
			}
			seen[n] = true
		}
	}
	crac.SetSeed([32]byte{1})
	first := r.Uint64()
	crac.SetSeed([32]byte{1})
	if again := r.Uint64(); again != first {
		t.Fatalf("one seed gives %d and %d: this test can see nothing", first, again)
	}
	crac.SetSeed([32]byte{1})
	tell(t, `{"event":"after-restore"}`)
	if again := r.Uint64(); again == first {
		t.Error("the generator has its seed still")
	}
}

func TestCheckpointEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := crac.Checkpoint(ctx); !errors.Is(err, context.DeadlineExceeded) { // there is no control.sock
		t.Errorf("got %v", err)
	}
}

func ExampleRegister() {
	var db *pool
	open := func(context.Context) (err error) { db, err = connect(os.Getenv("DB")); return err }
	crac.Register(crac.Hooks{
		BeforeCheckpoint: func(context.Context) error { return db.Close() },
		AfterResume:      func(ctx context.Context, _ crac.Outcome) error { return open(ctx) },
		AfterRestore:     func(ctx context.Context, _ crac.Restore) error { return open(ctx) },
	})
}

type pool struct{}

func (*pool) Close() error          { return nil }
func connect(string) (*pool, error) { return new(pool), nil }
