package hook

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// signalled makes a notifier with a signal adapter whose signal does what a
// workload would.
func signalled(t *testing.T, timeout time.Duration, do func(dir string) error) *Notifier {
	t.Helper()
	n := &Notifier{Dir: t.TempDir(), Timeout: timeout, Adapters: map[Event]Adapter{BeforeCheckpoint: adapter(t, "signal:SIGUSR2")}}
	n.Container = &fakeContainer{signal: func(unix.Signal) error { return do(n.Dir) }}
	return n
}

func TestSignal(t *testing.T) {
	noLeaks(t)
	n := signalled(t, long, func(dir string) error {
		file := filepath.Join(dir, "before-checkpoint.json")
		if text, want := mustRead(t, file), `{"v":1,"event":"before-checkpoint","id":"i","deadline_ms":20000}`+"\n"; text != want {
			t.Errorf("the message is %s, want %s", text, want)
		}
		info, err := os.Lstat(file)
		if err != nil || info.Mode() != 0o600 {
			t.Errorf("the message's file: %v, %v", info, err)
		}
		if st := info.Sys().(*syscall.Stat_t); os.Getuid() == 0 && st.Uid != 1000 {
			t.Errorf("the message is of user %d, want the init's", st.Uid)
		}
		time.AfterFunc(50*time.Millisecond, func() { mustWrite(t, filepath.Join(dir, "before-checkpoint.ack"), "") })
		return nil
	})
	if os.Getuid() == 0 {
		n.Container.(*fakeContainer).uid = 1000
	}
	defer unix.Umask(unix.Umask(0o077)) // the workload's user is another
	r := n.Notify(t.Context(), Message{Event: BeforeCheckpoint, ID: "i"})
	wantErr(t, r.Err())
	if r.Told() != 1 || r.Results[0].Name != "signal:SIGUSR2" {
		t.Errorf("%+v", r)
	}
	nothingIn(t, n.Dir) // a dump would hold it
}

// TestSignalAck: what may stand where the acknowledgement should.
func TestSignalAck(t *testing.T) {
	const name = "before-checkpoint.ack"
	outside := filepath.Join(t.TempDir(), "outside")
	mustWrite(t, outside, "")
	for _, c := range []struct {
		name string
		make func(path string) error
		want string
	}{
		{"empty", func(p string) error { return os.WriteFile(p, nil, 0) }, ""},
		{"space", func(p string) error { return os.WriteFile(p, []byte(" \n"), 0o600) }, ""},
		{"ok", func(p string) error { return os.WriteFile(p, []byte(ack), 0o600) }, ""},
		{"veto", func(p string) error { return os.WriteFile(p, []byte(`{"ok":false,"error":"no"}`), 0o600) }, "signal:SIGUSR2: no"},
		{"text", func(p string) error { return os.WriteFile(p, []byte("pool\nbusy\x00"), 0o600) }, "signal:SIGUSR2: pool busy"},
		{"just not too long", func(p string) error {
			return os.WriteFile(p, []byte(ack+strings.Repeat(" ", maxAnswer-len(ack))), 0o600)
		}, ""},
		{"too long", func(p string) error { return os.WriteFile(p, []byte(strings.Repeat(" ", maxAnswer+1)), 0o600) }, name + " is longer than 65536 bytes"},
		{"huge", func(p string) error { return errors.Join(os.WriteFile(p, nil, 0o600), os.Truncate(p, 1<<40)) }, name + " is longer than 65536 bytes"},
		{"FIFO", func(p string) error { return unix.Mkfifo(p, 0o666) }, name + " is a FIFO and must be a regular file"},
		{"link", func(p string) error { return os.Symlink(outside, p) }, name + " is a symbolic link and must be"},
		{"link to nothing", func(p string) error { return os.Symlink("nothing", p) }, name + " is a symbolic link and must be"},
		{"directory", func(p string) error { return os.MkdirAll(p, 0o777) }, name + " is a directory and must be"},
		{"device", func(p string) error { return unix.Mknod(p, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))) }, name + " is a device and must be"},
		{"no way to signal", func(string) error { return unix.ESRCH }, "send SIGUSR2: no such process"},
	} {
		t.Run(c.name, func(t *testing.T) {
			noLeaks(t)
			var skip error
			n := signalled(t, long, func(dir string) error {
				err := c.make(filepath.Join(dir, name))
				if c.name == "device" {
					skip, err = err, nil
				}
				return err
			})
			ctx := t.Context()
			r := n.Notify(ctx, Message{Event: BeforeCheckpoint})
			if skip != nil {
				t.Skipf("making a device needs CAP_MKNOD: %v", skip)
			}
			wantErr(t, r.Err(), c.want)
			nothingIn(t, n.Dir)
		})
	}
}

// TestSignalStale: what lay there before the signal is no acknowledgement.
func TestSignalStale(t *testing.T) {
	for name, plant := range map[string]func(path string) error{
		"ack":             func(p string) error { return os.WriteFile(p, nil, 0o600) },
		"link":            func(p string) error { return os.Symlink("/dev/null", p) },
		"empty directory": func(p string) error { return os.Mkdir(p, 0o777) },
	} {
		t.Run(name, func(t *testing.T) {
			noLeaks(t)
			n := signalled(t, short, func(string) error { return nil })
			if err := plant(filepath.Join(n.Dir, "before-checkpoint.ack")); err != nil {
				t.Fatal(err)
			}
			r := n.Notify(t.Context(), Message{Event: BeforeCheckpoint})
			wantLate(t, r.Results[0], short)
			nothingIn(t, n.Dir)
		})
	}
}

// TestSignalPlanted: what is in the way of the message is replaced, and never
// written through; a directory with something in it is said to be in the way.
func TestSignalPlanted(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "outside")
	mustWrite(t, outside, "precious")
	for _, c := range []struct {
		name, at string
		make     func(path string) error
		want     string
	}{
		{"link", "before-checkpoint.json", func(p string) error { return os.Symlink(outside, p) }, ""},
		{"hard link", "before-checkpoint.json", func(p string) error { return os.Link(outside, p) }, ""},
		{"FIFO", "before-checkpoint.json", func(p string) error { return unix.Mkfifo(p, 0o666) }, ""},
		{"directory", "before-checkpoint.json", func(p string) error { return os.MkdirAll(filepath.Join(p, "x"), 0o777) }, "leave the message"},
		{"directory for ack", "before-checkpoint.ack", func(p string) error { return os.MkdirAll(filepath.Join(p, "x"), 0o777) }, "remove before-checkpoint.ack"},
	} {
		t.Run(c.name, func(t *testing.T) {
			noLeaks(t)
			n := signalled(t, long, func(dir string) error {
				if text := mustRead(t, filepath.Join(dir, "before-checkpoint.json")); !strings.Contains(text, `"before-checkpoint"`) {
					t.Errorf("the message is %q", text)
				}
				return os.WriteFile(filepath.Join(dir, "before-checkpoint.ack"), nil, 0o600)
			})
			if err := c.make(filepath.Join(n.Dir, c.at)); err != nil {
				if c.name == "hard link" && errors.Is(err, unix.EXDEV) {
					t.Skip("the test's directories are on two file systems")
				}
				t.Fatal(err)
			}
			wantErr(t, n.Notify(t.Context(), Message{Event: BeforeCheckpoint}).Err(), c.want)
			if text := mustRead(t, outside); text != "precious" {
				t.Errorf("a file outside is now %q", text)
			}
			if c.want != "" {
				nothingIn(t, n.Dir, c.at)
			} else {
				nothingIn(t, n.Dir)
			}
		})
	}
}

// TestSignalLease: a lease on the acknowledgement, which makes an open wait for up
// to 45 s, holds nobody.
func TestSignalLease(t *testing.T) {
	noLeaks(t)
	var held *os.File
	n := signalled(t, short, func(dir string) (err error) {
		held, err = os.Create(filepath.Join(dir, "before-checkpoint.ack"))
		if err != nil {
			return err
		}
		_, err = unix.FcntlInt(held.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
		return err
	})
	started := time.Now()
	r := n.Notify(t.Context(), Message{Event: BeforeCheckpoint})
	if held != nil {
		defer held.Close()
	}
	wantLate(t, r.Results[0], short)
	if took := time.Since(started); took > long/2 {
		t.Errorf("took %v", took)
	}
}

// TestSignalEnds: an init that ends is not waited for, and its last word counts.
func TestSignalEnds(t *testing.T) {
	for name, tt := range map[string]struct {
		last func(dir string) error
		want string
	}{
		"without an answer": {func(string) error { return nil }, "adapter signal:SIGUSR2: the container's init has ended without an answer"},
		"with one":          {func(dir string) error { return os.WriteFile(filepath.Join(dir, "before-checkpoint.ack"), nil, 0o600) }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			noLeaks(t)
			done := make(chan struct{})
			n := signalled(t, time.Hour, func(dir string) error {
				defer close(done)
				return tt.last(dir)
			})
			n.Container.(*fakeContainer).done = done
			wantErr(t, n.Notify(t.Context(), Message{Event: BeforeCheckpoint}).Err(), tt.want)
		})
	}
}

func TestSignalNeedsDirectory(t *testing.T) {
	n := Notifier{Adapters: map[Event]Adapter{Check: adapter(t, "signal:SIGHUP")}, Container: &fakeContainer{}}
	wantErr(t, n.Notify(t.Context(), Message{Event: Check}).Err(), "adapter signal:SIGHUP: there is no /run/crac")
	n.Dir = filepath.Join(t.TempDir(), "absent")
	wantErr(t, n.Notify(t.Context(), Message{Event: Check}).Err(), "adapter signal:SIGHUP: open", "find participants")
}
