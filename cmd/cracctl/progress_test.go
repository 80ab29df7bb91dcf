package main

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"
)

// publicKey writes the public half of a key.
func publicKey(t *testing.T) string {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "pub.pem")
	if err := os.WriteFile(name, pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// onTerminal gives what do writes to a terminal.
func onTerminal(t *testing.T, do func(*os.File)) string {
	t.Helper()
	master, name, err := console.NewPty()
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	slave, err := os.OpenFile(name, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	var shown bytes.Buffer
	read := make(chan struct{})
	go func() {
		defer close(read)
		_, _ = io.Copy(&shown, master) // ends with EIO when nobody has the terminal open any more
	}()
	do(slave)
	if err := slave.Close(); err != nil {
		t.Error(err)
	}
	<-read
	return shown.String()
}

// All that takes long shows how it gets on: a bar to somebody who looks, else plain lines, and
// nothing with --quiet.
func TestProgress(t *testing.T) {
	before := patience
	patience = 0
	t.Cleanup(func() { patience = before })
	w := newWorld(t)
	w.image("base:1", "base")
	w.checkpoint("app:1", 2<<20, nil)
	dir, to := t.TempDir(), "jwe:"+publicKey(t)
	archive := filepath.Join(dir, "archive")
	if _, err := w.cracctl(io.Discard, "export", "--to", "podman", "app:1", archive); err != nil {
		t.Fatal(err)
	}
	if _, err := w.cracctl(io.Discard, "export", "--to", "containerd", "app:1", "native:1"); err != nil {
		t.Fatal(err)
	}
	const packs = "packing the image"
	for i, tt := range []struct {
		args   []string
		phases []string
		loud   bool // has no --quiet
	}{
		{args: []string{"encrypt", "app:1", "NEW", "--encrypt-to", to}, phases: []string{packs}},
		{args: []string{"encrypt", "app:1", "NEW", "--to", to}, phases: []string{packs}},
		{args: []string{"flatten", "app:1", "NEW"}, phases: []string{"reading app:1", packs}},
		{args: []string{"export", "--to", "podman", "app:1", filepath.Join(dir, "NEW")}, phases: []string{"reading app:1", packs}},
		{args: []string{"export", "--format", "podman", "app:1", filepath.Join(dir, "NEW")}, phases: []string{"reading app:1", packs}},
		{args: []string{"export", "--to", "containerd", "app:1", "NEW"}, phases: []string{"reading app:1", packs}},
		{args: []string{"import", archive, "NEW"}, phases: []string{"reading " + archive, packs}},
		{args: []string{"import", "native:1", "NEW"}, phases: []string{"reading native:1", packs}},
		{args: []string{"diff", "app:1", "app:1"}, phases: []string{"reading app:1"}, loud: true},
		{args: []string{"inspect", "app:1"}, phases: []string{"reading app:1"}, loud: true},
		{args: []string{"verify", "app:1"}, phases: []string{"reading app:1"}, loud: true},
	} {
		run := func(errOut io.Writer, n string, more ...string) {
			t.Helper()
			args := append(strings.Split(strings.ReplaceAll(strings.Join(tt.args, "\x00"), "NEW", fmt.Sprintf("new-%d-%s:1", i, n)), "\x00"), more...)
			if _, err := w.cracctl(errOut, args...); err != nil && tt.args[0] != "verify" { // no CRIU need be here
				t.Errorf("%q: %v", args, err)
			}
		}
		var plain bytes.Buffer
		run(&plain, "plain")
		shown := onTerminal(t, func(tty *os.File) { run(tty, "shown") })
		for _, phase := range tt.phases {
			if !strings.Contains(plain.String(), phase+"\n") || strings.ContainsAny(plain.String(), "\r\x1b") {
				t.Errorf("%q in a log: %q", tt.args, plain.String())
			}
			if !strings.Contains(shown, phase) || !strings.Contains(shown, "\r") || strings.Contains(shown, phase+"\r\n") {
				t.Errorf("%q on a terminal: %q", tt.args, shown)
			}
		}
		if tt.loud {
			continue
		}
		var quiet bytes.Buffer
		run(&quiet, "quiet", "--quiet")
		if quiet.Len() > 0 {
			t.Errorf("%q with --quiet: %q", tt.args, quiet.String())
		}
	}
}
