package hook

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fakeHandler is a shim that knows one checkpoint.
type fakeHandler struct {
	mu      sync.Mutex
	started int
	done    chan struct{} // closed when the checkpoint has ended
	waiting chan struct{} // is sent to by who waits for it, unless nil
	onStart func()
}

func (h *fakeHandler) Status(context.Context) Status {
	return Status{
		Container: "c", Hostname: "h", Start: "cold", Image: "img:1", Reason: "no checkpoint <here>", Code: "none", Generation: "g",
		Checkpoint: CheckpointStatus{Allowed: true, Last: &LastCheckpoint{ID: "i", Outcome: OutcomeFailed, Error: "e"}},
	}
}

func (h *fakeHandler) Checkpoint(ctx context.Context) (string, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.started++; h.started > 1 {
		return "", errors.New("a checkpoint is under way")
	}
	if h.onStart != nil {
		h.onStart()
	}
	return "i", nil
}

func (h *fakeHandler) Outcome(ctx context.Context, id string) (Outcome, string) {
	if id != "i" {
		return "", ""
	}
	if h.waiting != nil {
		h.waiting <- struct{}{}
	}
	select {
	case <-h.done:
		return OutcomeFailed, "veto"
	case <-ctx.Done():
		return OutcomePending, ""
	}
}

func listenControl(t *testing.T, dir string, h Handler) *Control {
	t.Helper()
	c, err := ListenControl(dir, h)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func dialControl(dir string) (*net.UnixConn, error) {
	d, err := openDirectory(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Net: "unix", Name: d.path(ControlName)})
	if err == nil {
		_ = conn.SetDeadline(time.Now().Add(long))
	}
	return conn, err
}

func mustDial(t *testing.T, dir string) *net.UnixConn {
	t.Helper()
	conn, err := dialControl(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// ask sends a request and gives all that comes back, until the connection's end.
func ask(t *testing.T, dir, text string) string {
	t.Helper()
	conn := mustDial(t, dir)
	defer conn.Close()
	// The rest of a line that is too long may not be taken any more.
	if _, err := io.WriteString(conn, text); err != nil && !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
		t.Error(err)
	}
	data, err := io.ReadAll(conn)
	if err != nil && !errors.Is(err, unix.ECONNRESET) {
		t.Error(err)
	}
	return string(data)
}

func TestControl(t *testing.T) {
	noLeaks(t)
	dir := t.TempDir()
	h := &fakeHandler{done: make(chan struct{})}
	defer unix.Umask(unix.Umask(0o077)) // the socket is everyone's all the same
	c := listenControl(t, dir, h)
	if info, err := os.Lstat(filepath.Join(dir, ControlName)); err != nil || info.Mode() != fs.ModeSocket|0o666 {
		t.Errorf("the socket: %v, %v", info, err)
	}
	nothingIn(t, dir, ControlName)
	for _, x := range []struct{ request, want string }{
		{
			`{"v":1,"op":"status"}`,
			`{"ok":true,"v":1,"container":"c","hostname":"h","start":"cold","image":"img:1","reason":"no checkpoint <here>","code":"none",` +
				`"generation":"g","checkpoint":{"allowed":true,"last":{"id":"i","outcome":"failed","error":"e"}}}`,
		},
		{`{"op":"checkpoint"}`, `{"ok":true,"id":"i"}`},
		{`{"v":1,"op":"checkpoint","more":1}`, `{"ok":false,"error":"a checkpoint is under way"}`},
		{`{"v":1,"op":"outcome","id":"i"}`, `{"ok":true,"outcome":"pending"}`},
		{`{"v":1,"op":"outcome","id":"i","wait_ms":30}`, `{"ok":true,"outcome":"pending"}`},
		{`{"v":1,"op":"outcome","id":"j","wait_ms":30}`, `{"ok":false,"error":"no checkpoint j is known"}`},
	} {
		if got := ask(t, dir, x.request+"\n"); got != x.want+"\n" {
			t.Errorf("%s\n got %s\nwant %s", x.request, got, x.want)
		}
	}
	time.AfterFunc(50*time.Millisecond, func() { close(h.done) })
	if got, want := ask(t, dir, `{"v":1,"op":"outcome","id":"i","wait_ms":20000}`+"\n"), `{"ok":true,"outcome":"failed","error":"veto"}`+"\n"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	nothingIn(t, dir)
	if err := c.Close(); err != nil {
		t.Errorf("closed twice: %v", err)
	}
	wantErr(t, c.Resume(), "use of closed")
}

func TestBadRequests(t *testing.T) {
	noLeaks(t)
	dir := t.TempDir()
	h := &fakeHandler{}
	listenControl(t, dir, h)
	for _, x := range []struct{ request, want string }{
		{"\n", "the request is not as it should be"},
		{"hello\n", "the request is not as it should be"},
		{"\xff\x00\n", "the request is not as it should be"},
		{"[]\n", "the request is not as it should be"},
		{`{"op":1}` + "\n", "the request is not as it should be"},
		{`{"op":"outcome","id":"i","wait_ms":1.5}` + "\n", "the request is not as it should be"},
		{strings.Repeat("[", 50000) + "\n", "the request is not as it should be"},
		{"null\n", `op \"\" is not known`},
		{"{}\n", `op \"\" is not known`},
		{`{"v":2,"op":"checkpoint"}` + "\n", "version 2 of the contract is not known here, only 1"},
		{`{"op":"reboot\u001b[2J"}` + "\n", `op \"reboot [2J\" is not known: there are status, checkpoint and outcome`},
		{`{"op":"outcome"}` + "\n", "needs the id"},
		{`{"op":"outcome","id":"i","wait_ms":-1}` + "\n", "wait_ms is -1 and may be 0 to 60000"},
		{`{"op":"outcome","id":"i","wait_ms":60001}` + "\n", "wait_ms is 60001"},
		{`{"op":"outcome","id":"i","wait_ms":9223372036854775807}` + "\n", "wait_ms is 9223372036854775807"},
		{`{"op":"outcome","id":"` + strings.Repeat("x", 60000) + `"}` + "\n", "no checkpoint " + strings.Repeat("x", maxText) + "… is known"},
		{strings.Repeat(" ", maxAnswer+1), "the request is longer than 65536 bytes"},
		{strings.Repeat("x", 4*maxAnswer), "the request is longer than 65536 bytes"},
	} {
		got := ask(t, dir, x.request)
		var reply struct {
			OK    *bool
			Error string
		}
		if err := json.Unmarshal([]byte(got), &reply); err != nil || reply.OK == nil || *reply.OK || strings.Count(got, "\n") != 1 {
			t.Errorf("%.50q: got %q", x.request, got)
		}
		if !strings.Contains(got, x.want) {
			t.Errorf("%.50q: got %q, want %q", x.request, got, x.want)
		}
	}
	if h.started != 0 {
		t.Error("a bad request started a checkpoint")
	}
	// A client that sends nothing more and waits is one that has said all.
	conn := mustDial(t, dir)
	if _, err := io.WriteString(conn, `{"op":"status"}`); err != nil {
		t.Fatal(err)
	}
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if data, err := io.ReadAll(conn); err != nil || !strings.HasPrefix(string(data), `{"ok":true,`) {
		t.Errorf("got %q, %v", data, err)
	}
}

func TestControlSlowRequest(t *testing.T) {
	noLeaks(t)
	dir := t.TempDir()
	d, err := openDirectory(dir)
	if err != nil {
		t.Fatal(err)
	}
	c := &Control{handler: &fakeHandler{}, dir: d, wait: short}
	defer c.Close()
	if err := c.Resume(); err != nil {
		t.Fatal(err)
	}
	conn := mustDial(t, dir)
	go func() {
		for {
			if _, err := io.WriteString(conn, "{"); err != nil {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	}()
	data, _ := io.ReadAll(conn)
	if want := `{"ok":false,"error":"no request within 250ms"}` + "\n"; string(data) != want {
		t.Errorf("got %s, want %s", data, want)
	}
}

// TestControlManyClients: those that there is no room for are closed, and there is
// room again when one goes.
func TestControlManyClients(t *testing.T) {
	noLeaks(t)
	dir := t.TempDir()
	h := &fakeHandler{done: make(chan struct{}), waiting: make(chan struct{})}
	c := listenControl(t, dir, h)
	conns := make([]*net.UnixConn, maxClients)
	for i := range conns {
		conns[i] = mustDial(t, dir)
		fmt.Fprintln(conns[i], `{"op":"outcome","id":"i","wait_ms":60000}`)
		<-h.waiting
	}
	for range 3 * maxClients {
		conn := mustDial(t, dir)
		if n, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Fatalf("one more client: %d, %v", n, err)
		}
		conn.Close()
	}
	// One that waits goes away; another waits still though it has sent all it will.
	if err := conns[2].CloseWrite(); err != nil {
		t.Fatal(err)
	}
	conns[0].Close()
	for started := time.Now(); ; {
		if time.Since(started) > long {
			t.Fatal("the place of a client that has gone is not given to another")
		}
		conn := mustDial(t, dir)
		fmt.Fprintln(conn, `{"op":"status"}`)
		line, _ := bufio.NewReader(conn).ReadString('\n')
		conn.Close()
		if strings.HasPrefix(line, `{"ok":true`) {
			break
		}
		time.Sleep(pollEvery)
	}
	time.Sleep(2 * hangUpEvery)
	close(h.done)
	if line, err := bufio.NewReader(conns[2]).ReadString('\n'); !strings.Contains(line, "failed") {
		t.Errorf("who waited got %q, %v", line, err)
	}
	c.Suspend()
}

func TestSuspend(t *testing.T) {
	noLeaks(t)
	dir := t.TempDir()
	h := &fakeHandler{done: make(chan struct{}), waiting: make(chan struct{})}
	c := listenControl(t, dir, h)

	idle := mustDial(t, dir)
	fmt.Fprint(idle, `{"op":"sta`)
	waits := mustDial(t, dir)
	fmt.Fprintln(waits, `{"op":"outcome","id":"i","wait_ms":60000}`)
	<-h.waiting
	started := time.Now()
	c.Suspend()
	c.Suspend()
	if took := time.Since(started); took > long/2 {
		t.Errorf("took %v", took)
	}
	nothingIn(t, dir)
	if _, err := dialControl(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("connecting gives %v", err)
	}
	if data, err := io.ReadAll(idle); len(data) != 0 || err != nil && !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("who had asked nothing yet got %q, %v", data, err)
	}
	if data, err := io.ReadAll(waits); string(data) != `{"ok":true,"outcome":"pending"}`+"\n" || err != nil {
		t.Errorf("who waited got %q, %v", data, err)
	}

	for range 2 {
		if err := c.Resume(); err != nil {
			t.Fatal(err)
		}
	}
	if got := ask(t, dir, `{"op":"status"}`+"\n"); !strings.HasPrefix(got, `{"ok":true,`) {
		t.Errorf("after Resume: %s", got)
	}
	c.Suspend()
	if err := c.Close(); err != nil {
		t.Errorf("closed while suspended: %v", err)
	}
	nothingIn(t, dir)
}

// TestSuspendForOwnCheckpoint: who asks for a checkpoint hears its identifier,
// however soon the checkpoint suspends the service.
func TestSuspendForOwnCheckpoint(t *testing.T) {
	noLeaks(t)
	for range 50 {
		dir := t.TempDir()
		var c *Control
		suspended := make(chan struct{})
		h := &fakeHandler{}
		h.onStart = func() {
			go func() {
				defer close(suspended)
				c.Suspend()
			}()
			time.Sleep(time.Millisecond)
		}
		c = listenControl(t, dir, h)
		if got, want := ask(t, dir, `{"op":"checkpoint"}`+"\n"), `{"ok":true,"id":"i"}`+"\n"; got != want {
			t.Fatalf("got %q, want %q", got, want)
		}
		<-suspended
		c.Close()
	}
}

// TestSuspendAmidRequests: clients that come at any moment get an answer or the
// end of their connection, and never a wrong one.
func TestSuspendAmidRequests(t *testing.T) {
	noLeaks(t)
	dir := t.TempDir()
	c := listenControl(t, dir, &fakeHandler{})
	var clients sync.WaitGroup
	stop := make(chan struct{})
	answered := make(chan struct{}, 1)
	for range 4 {
		clients.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				conn, err := dialControl(dir)
				if err != nil {
					if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ECONNREFUSED) {
						t.Error(err)
					}
					continue
				}
				fmt.Fprintln(conn, `{"op":"status"}`)
				data, err := io.ReadAll(conn)
				conn.Close()
				switch {
				case strings.HasPrefix(string(data), `{"ok":true,`) && strings.HasSuffix(string(data), "}}\n"):
					select {
					case answered <- struct{}{}:
					default:
					}
				case len(data) > 0 || err != nil && !errors.Is(err, unix.ECONNRESET):
					t.Errorf("got %q, %v", data, err)
				}
			}
		})
	}
	for range 50 {
		<-answered
		c.Suspend()
		nothingIn(t, dir)
		if err := c.Resume(); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	clients.Wait()
}

// TestControlPlanted: what the workload has under the socket's name gives way, and
// nothing it points to is touched.
func TestControlPlanted(t *testing.T) {
	outside := filepath.Join(t.TempDir(), "outside")
	mustWrite(t, outside, "precious")
	for name, plant := range map[string]func(path string) error{
		"file":            func(p string) error { return os.WriteFile(p, nil, 0o600) },
		"link":            func(p string) error { return os.Symlink(outside, p) },
		"dangling link":   func(p string) error { return os.Symlink(outside+"-2", p) },
		"FIFO":            func(p string) error { return unix.Mkfifo(p, 0o666) },
		"empty directory": func(p string) error { return os.Mkdir(p, 0o777) },
		"directory":       func(p string) error { return os.MkdirAll(filepath.Join(p, "x", "y"), 0o777) },
	} {
		t.Run(name, func(t *testing.T) {
			noLeaks(t)
			dir := t.TempDir()
			path := filepath.Join(dir, ControlName)
			if err := plant(path); err != nil {
				t.Fatal(err)
			}
			c := listenControl(t, dir, &fakeHandler{})
			if got := ask(t, dir, `{"op":"status"}`+"\n"); !strings.HasPrefix(got, `{"ok":true,`) {
				t.Errorf("got %s", got)
			}
			if info, err := os.Lstat(path); err != nil || info.Mode() != fs.ModeSocket|0o666 {
				t.Errorf("the socket: %v, %v", info, err)
			}
			// Again while it serves: Suspend must not follow, nor fail.
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
			if err := plant(path); err != nil {
				t.Fatal(err)
			}
			c.Suspend()
			if err := c.Resume(); err != nil {
				t.Fatal(err)
			}
			if got := ask(t, dir, `{"op":"status"}`+"\n"); !strings.HasPrefix(got, `{"ok":true,`) {
				t.Errorf("got %s", got)
			}
			if info, err := os.Lstat(outside); err != nil || info.Mode() != 0o600 || mustRead(t, outside) != "precious" {
				t.Errorf("a file outside is now %v, %v", info, err)
			}
			if _, err := os.Lstat(outside + "-2"); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("a link was followed: %v", err)
			}
			if names, err := Participants(dir); err != nil || len(names) != 0 {
				t.Errorf("participants %v, %v", names, err)
			}
		})
	}
}

// TestShareFollowsNothing: the mode is set on the socket alone, also if a link has
// taken its name in between.
func TestShareFollowsNothing(t *testing.T) {
	dir, outside := t.TempDir(), filepath.Join(t.TempDir(), "outside")
	mustWrite(t, outside, "")
	d, err := openDirectory(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := os.Symlink(outside, filepath.Join(dir, "x")); err != nil {
		t.Fatal(err)
	}
	wantErr(t, d.share("x"), "x is a symbolic link now")
	if info, err := os.Lstat(outside); err != nil || info.Mode() != 0o600 {
		t.Errorf("a file outside is now %v, %v", info, err)
	}
}

// FuzzRequest: what is taken for a request is one.
func FuzzRequest(f *testing.F) {
	for _, seed := range []string{
		`{"v":1,"op":"status"}`, `{"op":"checkpoint"}`, `{"op":"outcome","id":"i","wait_ms":5000}`, `{"OP":"status"}`, `null`, `{"op":"outcome","id":"i","wait_ms":-9223372036854775808}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := parseRequest(data)
		if err != nil {
			wantErr(t, err, " ")
			return
		}
		switch {
		case r.Op != "status" && r.Op != "checkpoint" && r.Op != "outcome", r.V != 0 && r.V != Version:
			t.Errorf("%q is %+v", data, r)
		case r.Op == "outcome" && (r.ID == "" || r.wait() < 0 || r.wait() > maxOutcomeWait):
			t.Errorf("%q waits %v for %q", data, r.wait(), r.ID)
		}
	})
}
