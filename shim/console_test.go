package shim

import (
	"context"
	"sync"
	"testing"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"
)

// A client sets the terminal's size as soon as it knows the process, which may
// be before its start, or the restore, has brought the terminal. The race
// detector watches.
func TestResizeDuringStart(t *testing.T) {
	p, err := newProcessIO(context.Background(), stdioConfig{Terminal: true}, owner(t))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		p.hangUp() // ends the copying
		p.wait()
		p.close()
	}()
	master, path, err := console.NewPty()
	if err != nil {
		t.Fatal(err)
	}

	started := make(chan struct{})
	var client sync.WaitGroup
	client.Go(func() {
		for {
			if err := p.resize(120, 40); err != nil {
				t.Errorf("resize: %v", err)
			}
			select {
			case <-started:
				return
			default:
			}
		}
	})
	if err := unix.Sendmsg(int(p.child.Console.Fd()), []byte(path), unix.UnixRights(int(master.Fd())), nil, 0); err != nil {
		t.Fatal(err)
	}
	p.afterStart()
	master.Close() // the copy in the message is the shim's own
	err = p.attachConsole(context.Background(), owner(t))
	close(started)
	client.Wait()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.resize(121, 41); err != nil {
		t.Fatal(err)
	}
	if size, err := p.terminal().Size(); err != nil || size.Width != 121 || size.Height != 41 {
		t.Errorf("the terminal has %dx%d after the start, want 121x41: %v", size.Width, size.Height, err)
	}
}

// After a restore that has failed the terminal is that of the cold start, although one
// has come for the restore.
func TestConsoleOfTheNextStart(t *testing.T) {
	noMoreFiles(t)
	p, err := newProcessIO(context.Background(), stdioConfig{Terminal: true}, owner(t))
	if err != nil {
		t.Fatal(err)
	}
	send := func() (path string) {
		t.Helper()
		master, path, err := console.NewPty()
		if err != nil {
			t.Fatal(err)
		}
		defer master.Close()
		if err := unix.Sendmsg(int(p.child.Console.Fd()), []byte(path), unix.UnixRights(int(master.Fd())), nil, 0); err != nil {
			t.Fatal(err)
		}
		return path
	}
	send()
	if err := p.openConsole(); err != nil {
		t.Fatal(err)
	}
	want := send()
	p.afterStart()
	got, err := receiveFile(p.console)
	if err != nil {
		t.Fatal(err)
	}
	if got.Name() != want {
		t.Errorf("the terminal of %s came, want that of %s", got.Name(), want)
	}
	got.Close()
	p.close()
}
