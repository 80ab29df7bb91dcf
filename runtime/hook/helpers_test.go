package hook

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// long is a time-out that a test does not want to meet.
	long = 20 * time.Second
	// short is one that it waits for, and common one that it waits for while others,
	// on a busy machine, have to answer in time.
	short  = 250 * time.Millisecond
	common = time.Second
)

// noLeaks fails the test if it ends with more open files than it began with.
func noLeaks(t *testing.T) {
	t.Helper()
	before := openFiles(t)
	t.Cleanup(func() {
		var after []string
		for range 200 {
			if after = openFiles(t); len(after) <= len(before) {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		t.Errorf("open files before: %v\nafter: %v", before, after)
	})
}

func openFiles(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, e := range entries {
		// The poller's, which come with the first connection; the directory being read is gone.
		if name, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && !strings.HasPrefix(name, "anon_inode:") {
			files = append(files, name)
		}
	}
	return files
}

// listenAt listens at a name in a directory whose path may be too long for a
// socket's address.
func listenAt(t *testing.T, dir, name string) *net.UnixListener {
	t.Helper()
	d, err := openDirectory(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: d.path(name)})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	t.Cleanup(func() { l.Close() })
	return l
}

// behaviour is what a participant does with a connection, which is closed after
// it. The context ends with the test.
type behaviour func(ctx context.Context, conn *net.UnixConn)

// participant starts one, and ends it with the test.
func participant(t *testing.T, dir, name string, do behaviour) {
	t.Helper()
	l := listenAt(t, dir, name)
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				do(ctx, conn)
			})
		}
	})
	t.Cleanup(func() {
		cancel()
		l.Close()
		wg.Wait()
	})
}

// answer is a participant that reads its message and sends just that.
func answer(text string) behaviour {
	return func(_ context.Context, conn *net.UnixConn) {
		if _, err := bufio.NewReader(conn).ReadBytes('\n'); err == nil {
			_, _ = io.WriteString(conn, text)
		}
	}
}

// silent is one that reads its message and says nothing while the test runs.
func silent(ctx context.Context, conn *net.UnixConn) {
	_, _ = bufio.NewReader(conn).ReadBytes('\n')
	<-ctx.Done()
}

const ack = `{"ok":true}` + "\n"

// recorder notes in which order things were told.
type recorder struct {
	mu    sync.Mutex
	names []string
}

func (r *recorder) add(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.names = append(r.names, name)
}

func (r *recorder) all() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string(nil), r.names...)
}

// as is an acking participant whose name is noted.
func (r *recorder) as(name string) behaviour {
	return func(ctx context.Context, conn *net.UnixConn) {
		r.add(name)
		answer(ack)(ctx, conn)
	}
}

// fakeContainer is a Container made of functions.
type fakeContainer struct {
	exec   func(ctx context.Context, args, env []string, stdin []byte) ([]byte, int, error)
	signal func(sig unix.Signal) error
	uid    int           // of the init, if it is not ours
	done   chan struct{} // the init's end; nil: it runs

	mu     sync.Mutex
	dialed []string
}

func (c *fakeContainer) Exec(ctx context.Context, args, env []string, stdin []byte) ([]byte, int, error) {
	return c.exec(ctx, args, env, stdin)
}

func (c *fakeContainer) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	c.mu.Lock()
	c.dialed = append(c.dialed, address)
	c.mu.Unlock()
	return new(net.Dialer).DialContext(ctx, network, address)
}

func (c *fakeContainer) Signal(sig unix.Signal) error { return c.signal(sig) }

func (c *fakeContainer) User() (uid, gid int, err error) {
	return cmp.Or(c.uid, os.Getuid()), os.Getgid(), nil
}

func (c *fakeContainer) Done() <-chan struct{} { return c.done }

func adapter(t *testing.T, value string) Adapter {
	t.Helper()
	a, err := ParseAdapter(value)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// wantErr checks that an error's text has all the parts; "" is no error.
func wantErr(t *testing.T, err error, parts ...string) {
	t.Helper()
	if len(parts) == 0 || parts[0] == "" {
		if err != nil {
			t.Errorf("error %v, want none", err)
		}
		return
	}
	if err == nil {
		t.Errorf("no error, want one with %q", parts)
		return
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %q lacks %q", err, part)
		}
	}
	if strings.ContainsAny(err.Error(), "\n\r\x00") {
		t.Errorf("error %q is not one line", err)
	}
}

func wantLate(t *testing.T, r Result, timeout time.Duration) {
	t.Helper()
	wantErr(t, r.Err, fmt.Sprintf("no answer within %v", timeout))
	if !errors.Is(r.Err, context.DeadlineExceeded) {
		t.Errorf("%v is not context.DeadlineExceeded", r.Err)
	}
	if r.Took < timeout {
		t.Errorf("%s was waited for %v, less than %v", r.Name, r.Took, timeout)
	}
}

func mustWrite(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func mustRead(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// nothingIn checks that a directory holds just these names.
func nothingIn(t *testing.T, dir string, but ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if fmt.Sprint(names) != fmt.Sprint(but) {
		t.Errorf("%s holds %q, want %q", filepath.Base(dir), names, but)
	}
}
