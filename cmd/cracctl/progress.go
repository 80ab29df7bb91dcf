package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"regexp"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"

	"github.com/crac-shim/crac/cmd/cracctl/plain"
	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/build"
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
	show := newDisplay(out)
	var wg sync.WaitGroup
	wg.Go(func() {
		defer show.end()
		phase := dumping
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			// A failed poll is no reason to disturb a checkpoint. The layer's
			// ingest is gone again while the image gets its name.
			var written int64
			if list, err := store.ListStatuses(ctx, "ref~="+quote("^"+regexp.QuoteMeta(ref)+"(@|$)")); err == nil && len(list) > 0 {
				phase, written = packing, list[0].Offset
			}
			if phase == dumping || written > 0 {
				show.at(phase, written, -1)
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

// What a display may be told.
const (
	dumping = "dumping the container"
	packing = "packing the image"
	pushing = "pushing the image"
)

// quote writes a value for containerd's filter language.
func quote(s string) string { return fmt.Sprintf("%q", s) }

// display is one way to show progress. It is used by one goroutine.
type display struct {
	// at tells what is done at the moment, and how many bytes of how many; total
	// is negative when nobody knows.
	at  func(phase string, done, total int64)
	end func()
}

// newDisplay is a bar for somebody who looks, else plain lines.
func newDisplay(out io.Writer) display {
	d := lines(out)
	if f, ok := out.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		d = bar(out)
	}
	at := d.at
	d.at = func(phase string, done, total int64) { at(plain.Line(phase), done, total) }
	return d
}

// follow shows what a library tells of its work, until stop is called.
func follow(errOut io.Writer, quiet bool) (emit func(build.Event), stop func()) {
	d := display{at: func(string, int64, int64) {}, end: func() {}}
	if !quiet {
		d = newDisplay(errOut)
	}
	return func(e build.Event) {
		total := e.Total
		if total == 0 {
			total = -1
		}
		switch e.Event {
		case images.EventReading:
			d.at("reading "+e.Name, e.Done, total)
		case images.EventProgress:
			d.at(packing, e.Done, total)
		case images.EventWarning:
			fmt.Fprintln(errOut, "cracctl: warning:", plain.Line(e.Error))
		}
	}, d.end
}

func bar(out io.Writer) display {
	var (
		p     *progressbar.ProgressBar
		shown string
	)
	// Errors of a terminal that goes away are not those of the work.
	end := func() {
		if p != nil {
			_ = p.Finish()
		}
	}
	return display{
		at: func(phase string, done, total int64) {
			if phase != shown {
				end()
				shown, p = phase, progressbar.NewOptions64(total,
					progressbar.OptionSetWriter(out),
					progressbar.OptionSetDescription(phase),
					progressbar.OptionShowBytes(true),
					progressbar.OptionShowCount(),
					progressbar.OptionSpinnerType(14),
					progressbar.OptionClearOnFinish(),
					progressbar.OptionThrottle(65*time.Millisecond),
				)
			}
			if done == 0 {
				_ = p.RenderBlank()
				return
			}
			_ = p.Set64(done)
		},
		end: end,
	}
}

// lines suits logs: what is done at the moment, and a sign of life now and then.
func lines(out io.Writer) display {
	var (
		shown string
		last  time.Time
	)
	return display{
		at: func(phase string, done, total int64) {
			if phase == shown && time.Since(last) < 5*time.Second {
				return
			}
			begins := phase != shown
			shown, last = phase, time.Now()
			switch {
			case begins:
				fmt.Fprintln(out, phase)
			case done > 0 && total > 0:
				fmt.Fprintf(out, "%s: %s of %s\n", phase, size(done), size(total))
			case done > 0:
				fmt.Fprintf(out, "%s: %s\n", phase, size(done))
			default:
				fmt.Fprintln(out, phase)
			}
		},
		end: func() {},
	}
}
