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
// this as a child. One images.BuildRequest on standard input, events as lines on
// standard output.
func newBuildImage(t *target) *cobra.Command {
	return &cobra.Command{
		Use:    "build-image",
		Short:  "Build a checkpoint image for the shim (JSON request on standard input)",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// A shim that dies must not take a half-made image's clean-up along.
			signal.Ignore(unix.SIGPIPE)
			e := &events{enc: json.NewEncoder(cmd.OutOrStdout())}
			err := buildImage(cmd.Context(), t, cmd.Flags().Changed("address"), cmd.InOrStdin(), e.emit)
			if err != nil {
				e.emit(images.BuildEvent{Event: images.EventError, Error: err.Error()})
				fmt.Fprintln(os.Stderr, "cracctl build-image:", err)
				return errReported
			}
			return nil
		},
	}
}

// buildImage takes one request. Started with an address, it connects before the
// request is there: the shim starts it before the dump, so that a frozen
// container waits for neither.
func buildImage(ctx context.Context, t *target, early bool, in io.Reader, emit func(images.BuildEvent)) error {
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
	_, err := build.Build(namespaces.WithNamespace(ctx, r.Namespace), client, r, emit)
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
	mu  sync.Mutex
	enc *json.Encoder
}

// emit does not fail: a shim that no longer listens changes nothing about the
// image.
func (e *events) emit(ev images.BuildEvent) {
	e.mu.Lock()
	defer e.mu.Unlock()
	_ = e.enc.Encode(ev)
}
