package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Step is one thing that the demo did and how long it took.
type Step struct {
	Name string  `json:"name"`
	MS   float64 `json:"ms"`
}

// progress runs the steps one after another and shows them: on a terminal as a line whose clock
// moves, elsewhere as a line when a step starts to take long and one when it is done.
type progress struct {
	out   io.Writer
	tty   bool
	steps []Step

	mu      sync.Mutex // guards what the ticking goroutine reads
	current string
	note    string
}

// quiet is how long a step may take on something that is not a terminal before it is announced.
const quiet = 3 * time.Second

func newProgress(out *os.File) *progress {
	_, err := unix.IoctlGetTermios(int(out.Fd()), unix.TCGETS)
	return &progress{out: out, tty: err == nil}
}

// do runs f as a step and records its time.
func (p *progress) do(ctx context.Context, name string, f func(context.Context) error) error {
	_, err := p.timed(ctx, name, func(ctx context.Context) (time.Duration, error) {
		start := time.Now()
		err := f(ctx)
		return time.Since(start), err
	})
	return err
}

// timed is do for a step that measures itself: what it prepares or cleans up does not count.
func (p *progress) timed(ctx context.Context, name string, f func(context.Context) (time.Duration, error)) (time.Duration, error) {
	if err := ctx.Err(); err != nil {
		return 0, fmt.Errorf("%s: %w", name, context.Cause(ctx))
	}
	p.set(name, "")
	stop, stopped := make(chan struct{}), make(chan struct{})
	go p.tick(stop, stopped)
	took, err := f(ctx)
	close(stop)
	<-stopped
	p.steps = append(p.steps, Step{name, milliseconds(took)})
	mark, clear := "✓", ""
	if err != nil {
		mark = "✗"
	}
	if p.tty {
		clear = "\r\x1b[K"
	}
	_, _ = fmt.Fprintf(p.out, "%s %s %-58s %10s\n", clear, mark, name, human(took))
	if err != nil {
		// The cause of a cancelled context says more than "signal: killed".
		if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
			err = fmt.Errorf("%w (%w)", cause, err)
		}
		return took, fmt.Errorf("%s: %w", name, err)
	}
	return took, nil
}

// say shows how far the current step is.
func (p *progress) say(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.note = ": " + fmt.Sprintf(format, args...)
}

func (p *progress) set(name, note string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.current, p.note = name, note
}

func (p *progress) line() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.current + p.note
}

func (p *progress) tick(stop <-chan struct{}, stopped chan<- struct{}) {
	defer close(stopped)
	interval := quiet
	if p.tty {
		interval = 100 * time.Millisecond
	}
	t := time.NewTicker(interval)
	defer t.Stop()
	for start := time.Now(); ; {
		select {
		case <-stop:
			return
		case <-t.C:
			elapsed := time.Since(start).Round(100 * time.Millisecond)
			if p.tty {
				_, _ = fmt.Fprintf(p.out, "\r\x1b[K   %s … %s", p.line(), elapsed)
			} else {
				_, _ = fmt.Fprintf(p.out, "   %s … %s\n", p.line(), elapsed)
			}
		}
	}
}

func milliseconds(d time.Duration) float64 {
	return float64(d.Microseconds()) / 1000
}

func human(d time.Duration) string {
	if d < 10*time.Second {
		return fmt.Sprintf("%.0f ms", milliseconds(d))
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}
