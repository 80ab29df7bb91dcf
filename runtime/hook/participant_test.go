package hook

import (
	"io"
	"net"
	"path/filepath"
	"testing"
)

// connected makes the two ends of a connection.
func connected(t *testing.T) (ours, theirs *net.UnixConn) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: filepath.Join(t.TempDir(), "s")})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if ours, err = net.DialUnix("unix", nil, l.Addr().(*net.UnixAddr)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ours.Close() })
	if theirs, err = l.AcceptUnix(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { theirs.Close() })
	return ours, theirs
}

func TestHungUp(t *testing.T) {
	ours, theirs := connected(t)
	if hungUp(ours) {
		t.Error("an open connection counts as closed")
	}
	if err := theirs.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if hungUp(ours) {
		t.Error("a connection that is closed by half counts as closed")
	}
	theirs.Close()
	if !hungUp(ours) {
		t.Error("a closed connection counts as open")
	}
}

// A participant that ends its writing first waits for our end of it.
func TestAwaitCloseOfHalf(t *testing.T) {
	ours, theirs := connected(t)
	heard := make(chan error, 1)
	go func() {
		err := theirs.CloseWrite()
		if err == nil {
			_, err = io.Copy(io.Discard, theirs)
		}
		theirs.Close()
		heard <- err
	}()
	if !awaitClose(ours) {
		t.Error("it was not ended")
	}
	// Our end is open still: this would wait for ever had it not heard of its end.
	if err := <-heard; err != nil {
		t.Error(err)
	}
}
