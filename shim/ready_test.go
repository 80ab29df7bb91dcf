package shim

import (
	"context"
	"errors"
	"testing"
)

// Questions and what makes a workload stand still keep out of each other's way.
func TestProbing(t *testing.T) {
	p := newProbing()
	runs, stands := func() bool { return false }, func() bool { return true }
	asked := 0
	answered := func(context.Context) error { asked++; return nil }
	if err := p.ask(t.Context(), runs, answered); err != nil || asked != 1 {
		t.Errorf("asked %d times, %v", asked, err)
	}
	if err := p.ask(t.Context(), stands, answered); !errors.Is(err, errNotAsked) || asked != 1 {
		t.Errorf("what stands still is asked %d times, %v", asked, err)
	}
	no := errors.New("no")
	if err := p.ask(t.Context(), runs, func(context.Context) error { return no }); !errors.Is(err, no) || errors.Is(err, errNotAsked) {
		t.Errorf("an answer: %v", err)
	}

	// A question that nobody answers ends for who has the workload stand still.
	begun, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- p.ask(t.Context(), runs, func(ctx context.Context) error {
			close(begun)
			<-ctx.Done()
			return ctx.Err()
		})
	}()
	<-begun
	release, err := p.hold(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := <-ended; !errors.Is(err, errNotAsked) {
		t.Errorf("the question ends with %v", err)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.ask(gone, runs, answered); !errors.Is(err, context.Canceled) || asked != 1 {
		t.Errorf("meanwhile it is asked: %v", err)
	}
	if _, err := p.hold(gone); !errors.Is(err, context.Canceled) {
		t.Errorf("two hold it: %v", err)
	}
	release()
	if err := p.ask(t.Context(), runs, answered); err != nil || asked != 2 {
		t.Errorf("afterwards: %v", err)
	}
}
