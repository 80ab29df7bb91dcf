package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"strings"
	"sync"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/build"
)

// newBuildImage is the shim's other half: the shim must stay small, so it runs
// this as a child. One images.BuildRequest on standard input, and an images.BuildDump
// once that is answered; events as lines on standard output.
func newBuildImage(t *target) *cobra.Command {
	return &cobra.Command{
		Use:    "build-image",
		Short:  "Build a checkpoint image for the shim (JSON request on standard input)",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// A shim that dies must not take a half-made image's clean-up along.
			signal.Ignore(unix.SIGPIPE)
			e := &events{enc: json.NewEncoder(cmd.OutOrStdout()), named: func() {}}
			ctx := cmd.Context()
			if out, ok := cmd.OutOrStdout().(*os.File); ok {
				// Nor is an image made that nobody hears of: whose checkpoint it is,
				// will take it for failed.
				heard, stop, err := whileHeard(ctx, out)
				if err != nil {
					return err
				}
				defer stop()
				ctx, e.named = heard, stop
			}
			err := buildImage(ctx, t, cmd.Flags().Changed("address"), cmd.InOrStdin(), e.emit)
			if err != nil {
				e.emit(images.BuildEvent{Event: images.EventError, Error: err.Error()})
				printError(cmd.ErrOrStderr(), fmt.Errorf("build-image: %w", err))
				return errReported
			}
			return nil
		},
	}
}

// buildImage takes one request. Started with an address, it connects before the
// request is there: the shim starts it before the dump, so that a frozen
// container waits for neither.
func buildImage(ctx context.Context, t *target, early bool, in io.Reader, emit func(images.BuildEvent)) (err error) {
	var client *containerd.Client
	if early {
		c, err := connect(ctx, t.address)
		if err != nil {
			return err
		}
		client = c
		defer client.Close()
	}

	var r images.BuildRequest
	dec := json.NewDecoder(in)
	dec.DisallowUnknownFields()
	if err := dec.Decode(&r); err != nil {
		if errors.Is(err, io.EOF) {
			return errors.New("no request on standard input: this command is for the shim; use cracctl checkpoint")
		}
		return fmt.Errorf("read the request on standard input: %w", err)
	}
	if r.Address == "" {
		r.Address = t.address
	}
	if r.Namespace == "" {
		r.Namespace = t.namespace
	}
	if client == nil || r.Address != t.address {
		c, err := connect(ctx, r.Address)
		if err != nil {
			return err
		}
		client = c
		defer c.Close()
	}
	ctx = namespaces.WithNamespace(ctx, r.Namespace)
	p, err := build.Prepare(ctx, client, r, emit)
	if err != nil {
		return err
	}
	defer func() { p.Close(ctx, err) }()
	emit(images.BuildEvent{Event: images.EventReady})
	d := r.BuildDump
	if d.DumpDir == "" { // else it is a shim that runs since before this was installed
		if err := dec.Decode(&d); err != nil {
			if errors.Is(err, io.EOF) {
				return errors.New("there was no dump")
			}
			return fmt.Errorf("read about the dump on standard input: %w", err)
		}
	}
	_, err = p.Finish(ctx, d)
	return err
}

// connect returns a client of a containerd that answers.
func connect(ctx context.Context, address string) (*containerd.Client, error) {
	path, err := socketOf(address)
	if err != nil {
		return nil, err
	}
	// gRPC's own words for what can be wrong here are long, and say it last.
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("containerd's socket: %w; run this as root, or as whoever may use the socket", err)
	case err != nil:
		return nil, fmt.Errorf("containerd's socket: %w; start containerd, or say where it is with --address", err)
	}
	conn.Close()
	client, err := containerd.New(path)
	if err != nil {
		return nil, fmt.Errorf("connect to containerd at %s: %w", address, err)
	}
	if _, err := client.Version(ctx); err != nil {
		client.Close()
		return nil, fmt.Errorf("containerd at %s does not answer: %w; is it containerd that listens there?", address, err)
	}
	return client, nil
}

// socketOf is the path that an address names: nerdctl and Docker write unix:// before it.
func socketOf(address string) (string, error) {
	path := strings.TrimPrefix(address, "unix://")
	if scheme, _, ok := strings.Cut(path, "://"); ok {
		return "", fmt.Errorf("containerd at %s: the socket is a file here, not something of %s; say its path", address, scheme)
	}
	return path, nil
}

// events writes one line for each event.
type events struct {
	mu    sync.Mutex
	enc   *json.Encoder
	named func() // called when the image has its name
}

// emit does not fail: a shim that no longer listens changes nothing about the
// image.
func (e *events) emit(ev images.BuildEvent) {
	if ev.Event == images.EventDone {
		e.named()
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	_ = e.enc.Encode(ev)
}
