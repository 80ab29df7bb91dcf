package crac

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// tries is how often a request is made, a little later each time: during a dump there is
// no control.sock. Tries are counted, not seconds: frozen, a process has none.
const tries = 500

// ask sends one request to the runtime and returns the answer, which is {"ok":true,…}.
func ask(ctx context.Context, request map[string]any) ([]byte, error) {
	if _, err := os.Stat(directory()); err != nil {
		return nil, fmt.Errorf("%w: %s does not exist: this container does not run under io.containerd.crac.v2, or with hooks=off", ErrUnavailable, directory())
	}
	request["v"] = 1
	line, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	name := filepath.Join(directory(), "control.sock")
	for i := 0; ; i++ {
		var reply []byte
		reply, err = exchange(ctx, name, append(line, '\n'))
		if err == nil {
			return checkReply(name, reply)
		}
		again := errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, io.EOF) ||
			errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE)
		if !again || i+1 >= tries {
			break
		}
		if err := sleep(ctx, 20*time.Millisecond); err != nil {
			return nil, err
		}
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return nil, fmt.Errorf("%w: %s does not answer: %w", ErrUnavailable, name, err)
}

func checkReply(name string, reply []byte) ([]byte, error) {
	var r struct {
		OK    bool   `json:"ok"`
		Error string `json:"error"`
	}
	switch err := json.Unmarshal(reply, &r); {
	case err != nil:
		return nil, fmt.Errorf("%s: the answer: %w", name, err)
	case r.OK:
		return reply, nil
	case r.Error == "":
		r.Error = name + ": the runtime refused without a reason"
	}
	return nil, &CheckpointError{Reason: r.Error}
}

func exchange(ctx context.Context, name string, line []byte) ([]byte, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", name)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.Close() })()
	if _, err := c.Write(line); err != nil {
		return nil, err
	}
	return readLine(c)
}

// readLine reads up to a newline, which it leaves out. A connection that ends without
// one is io.EOF.
func readLine(r io.Reader) ([]byte, error) {
	lines := bufio.NewReader(io.LimitReader(r, 1<<20))
	line, err := lines.ReadBytes('\n')
	return bytes.TrimSuffix(line, []byte("\n")), err
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
