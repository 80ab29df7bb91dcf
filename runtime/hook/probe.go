package hook

import (
	"bufio"
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

// Ask asks once: a GET that is answered with a status below 400, or a command that
// exits with 0, is nil. When it returns, no connection is open.
func (p *Probe) Ask(ctx context.Context, c Container) error {
	switch a := p.adapter.(type) {
	case httpAdapter:
		return a.get(ctx, c)
	case execAdapter:
		return a.run(ctx, c, nil, nil)
	}
	return errors.ErrUnsupported
}

// get makes one request, and reads the answer to its end: one that breaks off is no
// good sign.
func (a httpAdapter) get(ctx context.Context, c Container) error {
	conn, err := a.dial(ctx, c)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer endWith(ctx, conn)()
	req, err := http.NewRequest(http.MethodGet, a.url.String(), nil)
	if err != nil {
		return err
	}
	req.Header.Set("User-Agent", "crac")
	req.Close = true
	if err := req.Write(conn); err != nil {
		return err
	}
	resp, err := readResponse(bufio.NewReader(conn), req) //nolint:bodyclose // the connection is closed
	if err != nil {
		return err
	}
	if resp.StatusCode >= http.StatusBadRequest {
		return fmt.Errorf("HTTP status %s", clean(resp.Status))
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return err
}
