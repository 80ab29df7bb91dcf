package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

// watch shows how a checkpoint gets on until the function it returns is called.
// The shim says nothing while it works; the content store tells how much of the
// checkpoint layer was written. How much it will be nobody knows before it is
// compressed, so there is no percentage.
func watch(ctx context.Context, store content.Store, ref string, out io.Writer, quiet bool) (stop func()) {
	if quiet {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	show := lines(out)
	if f, ok := out.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		show = bar(out)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		defer show.end()
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			// A failed poll is no reason to disturb a checkpoint.
			if list, err := store.ListStatuses(ctx, "ref=="+quote(ref)); err == nil && len(list) > 0 {
				show.written(list[0].Offset)
			} else {
				show.waiting()
			}
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
		}
	})
	return func() {
		cancel()
		wg.Wait()
	}
}

// quote writes a value for containerd's filter language.
func quote(s string) string { return fmt.Sprintf("%q", s) }

// display is one way to show progress.
type display struct {
	waiting func()
	written func(n int64)
	end     func()
}

func bar(out io.Writer) display {
	p := progressbar.NewOptions64(-1,
		progressbar.OptionSetWriter(out),
		progressbar.OptionSetDescription("dumping"),
		progressbar.OptionShowBytes(true),
		progressbar.OptionShowCount(),
		progressbar.OptionSpinnerType(14),
		progressbar.OptionClearOnFinish(),
		progressbar.OptionThrottle(65*time.Millisecond),
	)
	// Errors of a terminal that goes away are not the checkpoint's.
	return display{
		waiting: func() { _ = p.RenderBlank() },
		written: func(n int64) {
			p.Describe("packing")
			_ = p.Set64(n)
		},
		end: func() { _ = p.Finish() },
	}
}

// lines suits logs: what is done at the moment, and a sign of life now and then.
func lines(out io.Writer) display {
	var (
		phase string
		last  time.Time
	)
	say := func(now, text string) {
		if phase == now && time.Since(last) < 5*time.Second {
			return
		}
		phase, last = now, time.Now()
		fmt.Fprintln(out, text)
	}
	return display{
		// The layer's ingest is gone again while the image's name is given.
		waiting: func() {
			if phase != "packing" {
				say("dumping", "dumping the container")
			}
		},
		written: func(n int64) { say("packing", fmt.Sprintf("packing the image: %s", size(n))) },
		end:     func() {},
	}
}
