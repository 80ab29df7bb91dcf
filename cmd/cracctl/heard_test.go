package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestWhileHeard(t *testing.T) {
	for _, stopped := range []bool{false, true} {
		reader, out, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		defer out.Close()
		ctx, stop, err := whileHeard(t.Context(), out)
		if err != nil {
			t.Fatal(err)
		}
		defer stop()
		if _, err := out.WriteString("said and not yet read\n"); err != nil || ctx.Err() != nil {
			t.Errorf("%v, %v", err, ctx.Err())
		}
		if stopped {
			stop()
		}
		if err := reader.Close(); err != nil {
			t.Fatal(err)
		}
		if stopped {
			if ctx.Err() != nil {
				t.Errorf("after the watch: %v", ctx.Err())
			}
			continue
		}
		<-ctx.Done()
		if !errors.Is(context.Cause(ctx), errUnheard) {
			t.Errorf("it ended with %v", context.Cause(ctx))
		}
	}
}

// A builder whose shim was killed ends, here while it waits for containerd.
func TestBuilderIsHeard(t *testing.T) {
	t.Setenv("NERDCTL_TOML", filepath.Join(t.TempDir(), "none.toml"))
	socket := filepath.Join(t.TempDir(), "containerd.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	reader, out, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	go func() {
		for n := 0; ; n++ { // it answers nobody
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			if n == 0 {
				_ = reader.Close()
			}
		}
	}()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	cmd := newCommand()
	cmd.SetArgs([]string{"build-image"})
	cmd.SetIn(strings.NewReader(fmt.Sprintf(`{"address": %q}`, socket)))
	cmd.SetOut(out)
	var said strings.Builder
	cmd.SetErr(&said)
	// That containerd does not answer, it would find out by itself later. net has a word of its own.
	if err := cmd.ExecuteContext(ctx); !errors.Is(err, errReported) || ctx.Err() != nil || !strings.Contains(said.String(), "canceled") {
		t.Errorf("it goes on: %v, %v, %s", err, ctx.Err(), said.String())
	}
}

// What programs speak to gets what they are given, and not something around it.
func TestProtocolsAreNotWrapped(t *testing.T) {
	t.Setenv("NERDCTL_TOML", filepath.Join(t.TempDir(), "none.toml"))
	root := newCommand()
	for _, c := range root.Commands() {
		c.SetOut(os.Stderr)
		root.PersistentPreRun(c, nil)
		if _, itself := c.OutOrStdout().(*os.File); itself != c.Hidden {
			t.Errorf("%s (hidden: %v) writes to a %T", c.Name(), c.Hidden, c.OutOrStdout())
		}
	}
}
