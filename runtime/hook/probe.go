package hook

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
)

// Probe asks a workload whether it is ready. ParseProbe makes them.
type Probe struct{ adapter Adapter }

// ParseProbe reads the value of the option checkpoint.probe: what ParseAdapter
// takes, but for a signal, which has no answer to a question.
func ParseProbe(value string) (*Probe, error) {
	a, err := ParseAdapter(value)
	if err != nil {
		return nil, err
	}
	switch a.(type) {
	case httpAdapter, execAdapter:
		return &Probe{a}, nil
	}
	return nil, fmt.Errorf("%s is no probe: give an http:// URL or a command", a)
}

// String gives a value from which ParseProbe makes the same probe.
func (p *Probe) String() string { return p.adapter.String() }

// Ask asks once: a GET that is answered with a status of 2xx or 3xx, or a command
// that exits with 0, is nil. When it returns, no connection is open.
func (p *Probe) Ask(ctx context.Context, c Container) error {
	switch a := p.adapter.(type) {
	case httpAdapter:
		return a.get(ctx, c)
	case execAdapter:
		return a.run(ctx, c, nil, nil)
	}
	return errors.ErrUnsupported
}

// maxPage is how much is read of a page that a probe asks for, in bytes.
const maxPage = 4 << 20

// get makes one request, and reads the answer to its end, unless that is far off:
// one that breaks off is no good sign.
func (a httpAdapter) get(ctx context.Context, c Container) error {
	return a.exchange(ctx, c, http.MethodGet, nil, func(resp *http.Response, left *io.LimitedReader) error {
		if class := resp.StatusCode / 100; class != 2 && class != 3 {
			return fmt.Errorf("HTTP status %s", clean(resp.Status))
		}
		left.N = maxPage
		_, err := io.Copy(io.Discard, resp.Body)
		switch {
		case err == nil, left.N == 0:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		}
		return fmt.Errorf("the answer breaks off: %s", clean(err.Error()))
	})
}
