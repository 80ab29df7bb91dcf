package hook

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestOrder(t *testing.T) {
	down := []string{"p9", "p8", "p7", "p6", "p5", "p4", "p3", "p2", "p1", "p0"}
	up := slices.Clone(down)
	slices.Reverse(up)
	for _, c := range []struct {
		event Event
		want  []string
	}{
		{BeforeCheckpoint, append(slices.Clone(down), "adapter")},
		{Check, append(slices.Clone(down), "adapter")},
		{AfterResume, append([]string{"adapter"}, up...)},
		{AfterRestore, append([]string{"adapter"}, up...)},
	} {
		t.Run(string(c.event), func(t *testing.T) {
			noLeaks(t)
			var told recorder
			n := Notifier{
				Dir: t.TempDir(), Timeout: long,
				Adapters: map[Event]Adapter{c.event: execAdapter{"adapter"}},
				Container: &fakeContainer{exec: func(_ context.Context, args, _ []string, _ []byte) ([]byte, int, error) {
					told.add(args[0])
					return nil, 0, nil
				}},
			}
			for _, i := range []int{3, 1, 4, 5, 9, 2, 6, 8, 7, 0} {
				name := fmt.Sprintf("p%d", i)
				participant(t, n.Dir, name, told.as(name))
			}
			r := n.Notify(t.Context(), Message{Event: c.event})
			wantErr(t, r.Err())
			if got := told.all(); !slices.Equal(got, c.want) {
				t.Errorf("told %v, want %v", got, c.want)
			}
			if r.Told() != 11 {
				t.Errorf("%d are reported", r.Told())
			}
		})
	}
}

// TestAdapterOfAnotherEvent: an adapter is told its own event only.
func TestAdapterOfAnotherEvent(t *testing.T) {
	n := Notifier{Adapters: map[Event]Adapter{AfterRestore: execAdapter{"x"}}}
	if r := n.Notify(t.Context(), Message{Event: BeforeCheckpoint}); r.Told() != 0 || r.Err() != nil {
		t.Errorf("%+v", r)
	}
	wantErr(t, n.Notify(t.Context(), Message{Event: AfterRestore}).Err(), `adapter ["x"]: there is no container`)
}

// TestAnswers: what a participant may do with one connection, and what is made of
// it. In all cases a second one is told all the same.
func TestAnswers(t *testing.T) {
	drip := func(_ context.Context, conn *net.UnixConn) {
		for {
			if _, err := io.WriteString(conn, "{"); err != nil {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	endless := func(prefix string) behaviour {
		return func(_ context.Context, conn *net.UnixConn) {
			text := prefix + strings.Repeat("x", 4096)
			for {
				if _, err := io.WriteString(conn, text); err != nil {
					return
				}
			}
		}
	}
	for _, c := range []struct {
		name string
		do   behaviour
		want string
		late bool
	}{
		{name: "ack", do: answer(ack)},
		{name: "ack without newline", do: answer(`{"ok":true}`)},
		{name: "ack with CRLF and more fields", do: answer(`{"ok":true,"took":[1,{}],"error":""}` + "\r\n")},
		{name: "ack and more lines", do: answer(ack + "{\"ok\":false}\n")},
		{name: "ack unasked", do: func(_ context.Context, conn *net.UnixConn) { _, _ = io.WriteString(conn, ack) }},
		{name: "veto", do: answer(`{"ok":false,"error":"pool busy"}` + "\n"), want: "participant b.sock: pool busy"},
		{name: "veto without reason", do: answer(`{"ok":false}` + "\n"), want: "gave no reason"},
		{name: "veto that would forge a log", do: answer(`{"ok":false,"error":"a\nlevel=info \u001b[2J b"}` + "\n"), want: "b.sock: a level=info  [2J b"},
		{name: "veto of length", do: answer(`{"ok":false,"error":"` + strings.Repeat("é", 30000) + `"}` + "\n"), want: strings.Repeat("é", 500) + "…"},
		{name: "time-out", do: silent, late: true},
		{name: "drip", do: drip, late: true},
		{name: "reads nothing, says nothing", do: func(ctx context.Context, _ *net.UnixConn) { <-ctx.Done() }, late: true},
		{name: "crash before reading", do: func(context.Context, *net.UnixConn) {}, want: "closed the connection without an answer"},
		{name: "crash while answering", do: answer(`{"ok":tr`), want: `answered "{\"ok\":tr"`},
		{name: "no answer", do: answer(""), want: "closed the connection without an answer"},
		{name: "empty line", do: answer("\n"), want: `answered ""`},
		{name: "garbage", do: answer("\xff\x00\x1b[31mEHLO\n"), want: "answered \"\uFFFD  [31mEHLO\", which is neither"},
		{name: "not an object", do: answer("true\n"), want: `answered "true"`},
		{name: "null", do: answer("null\n"), want: `answered "null"`},
		{name: "ok is no bool", do: answer(`{"ok":"yes"}` + "\n"), want: "which is neither"},
		{name: "no ok", do: answer("{}\n"), want: "which is neither"},
		{name: "nested", do: answer(strings.Repeat("[", 60000) + "\n"), want: "which is neither"},
		{name: "line without end", do: endless(""), want: "answered with more than 65536 bytes"},
		{name: "line one byte too long", do: answer(`{"ok":true}` + strings.Repeat(" ", maxAnswer+1-len(`{"ok":true}`)) + "\n"), want: "more than 65536 bytes"},
		{name: "line just not too long", do: answer(`{"ok":true}` + strings.Repeat(" ", maxAnswer-len(`{"ok":true}`)) + "\n")},
		{name: "ack and then no end of talk", do: endless(ack)},
		{name: "ack and never closes", do: func(ctx context.Context, conn *net.UnixConn) {
			answer(ack)(ctx, conn)
			<-ctx.Done()
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			noLeaks(t)
			var told recorder
			n := Notifier{Dir: t.TempDir(), Timeout: long}
			if c.late {
				n.Timeout = common
			}
			participant(t, n.Dir, "b.sock", c.do)
			participant(t, n.Dir, "a.sock", told.as("a"))
			r := n.Notify(t.Context(), Message{Event: BeforeCheckpoint})
			if got := told.all(); !slices.Equal(got, []string{"a"}) || r.Told() != 2 {
				t.Fatalf("told %v, %+v", got, r)
			}
			if r.Results[1].Err != nil || r.Results[0].Name != "b.sock" || r.Results[1].Name != "a.sock" {
				t.Errorf("%+v", r)
			}
			if took := r.Results[0].Took; took > long/2 {
				t.Errorf("took %v", took)
			}
			if c.late {
				wantLate(t, r.Results[0], common)
				return
			}
			wantErr(t, r.Err(), c.want)
		})
	}
}

// TestConnectionsEnd: when Notify returns, the other end of each connection reads
// its end, however its participant behaved.
func TestConnectionsEnd(t *testing.T) {
	for name, text := range map[string]string{"ack": ack, "veto": `{"ok":false}` + "\n", "nothing": ""} {
		t.Run(name, func(t *testing.T) {
			noLeaks(t)
			n := Notifier{Dir: t.TempDir(), Timeout: short}
			conns := make(chan *net.UnixConn, 1)
			participant(t, n.Dir, "a", func(ctx context.Context, conn *net.UnixConn) {
				answer(text)(ctx, conn)
				conns <- conn
				<-ctx.Done()
			})
			n.Notify(t.Context(), Message{Event: Check})
			conn := <-conns
			_ = conn.SetReadDeadline(time.Now().Add(long))
			if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("the participant still has a connection: %v", err)
			}
		})
	}
}

// TestWaitsForClose: a participant that closes soon after its answer has closed
// before Notify returns, so that a dump finds nothing of the connection.
func TestWaitsForClose(t *testing.T) {
	noLeaks(t)
	n := Notifier{Dir: t.TempDir(), Timeout: long}
	closed := make(chan struct{})
	participant(t, n.Dir, "a", func(ctx context.Context, conn *net.UnixConn) {
		answer(ack)(ctx, conn)
		time.Sleep(100 * time.Millisecond)
		close(closed)
		conn.Close()
	})
	wantErr(t, n.Notify(t.Context(), Message{Event: Check}).Err())
	select {
	case <-closed:
	default:
		t.Error("Notify returned before the participant closed")
	}
}

// TestEachHasItsOwnDeadline: two that say nothing take nothing from a third.
func TestEachHasItsOwnDeadline(t *testing.T) {
	noLeaks(t)
	n := Notifier{Dir: t.TempDir(), Timeout: common}
	participant(t, n.Dir, "c", silent)
	participant(t, n.Dir, "b", silent)
	participant(t, n.Dir, "a", func(ctx context.Context, conn *net.UnixConn) {
		time.Sleep(common / 4)
		answer(ack)(ctx, conn)
	})
	r := n.Notify(t.Context(), Message{Event: BeforeCheckpoint})
	if r.Told() != 3 {
		t.Fatalf("%+v", r)
	}
	wantLate(t, r.Results[0], common)
	wantLate(t, r.Results[1], common)
	wantErr(t, r.Results[2].Err)
	wantErr(t, r.Err(), "participant c: no answer within 1s; participant b: no answer within 1s")
	if !errors.Is(r.Err(), context.DeadlineExceeded) {
		t.Error("the report's error hides its causes")
	}
}

func TestGivenUp(t *testing.T) {
	noLeaks(t)
	n := Notifier{Dir: t.TempDir(), Timeout: long}
	ctx, cancel := context.WithCancel(t.Context())
	participant(t, n.Dir, "b", func(ctx context.Context, conn *net.UnixConn) {
		_, _ = bufio.NewReader(conn).ReadBytes('\n')
		cancel()
		<-ctx.Done()
	})
	participant(t, n.Dir, "a", answer(ack))
	started := time.Now()
	r := n.Notify(ctx, Message{Event: BeforeCheckpoint})
	wantErr(t, r.Err(), "participant b: not waited for any longer: context canceled; participant a: not waited")
	if took := time.Since(started); took > long/2 {
		t.Errorf("took %v", took)
	}
}

// TestLargeMessage: one of nearly the permitted size arrives whole, and one that is
// never read does not block for longer than the deadline.
func TestLargeMessage(t *testing.T) {
	noLeaks(t)
	m := Message{Event: AfterRestore, Args: []string{strings.Repeat("x", maxMessage-200)}}
	n := Notifier{Dir: t.TempDir(), Timeout: long}
	length := make(chan int, 1)
	participant(t, n.Dir, "reads", func(_ context.Context, conn *net.UnixConn) {
		line, _ := bufio.NewReader(conn).ReadBytes('\n')
		length <- len(line)
		_, _ = io.WriteString(conn, ack)
	})
	wantErr(t, n.Notify(t.Context(), m).Err())
	if got := <-length; got < maxMessage-200 {
		t.Errorf("%d bytes came", got)
	}

	n = Notifier{Dir: t.TempDir(), Timeout: short}
	participant(t, n.Dir, "does-not", func(ctx context.Context, _ *net.UnixConn) { <-ctx.Done() })
	r := n.Notify(t.Context(), m)
	wantLate(t, r.Results[0], short)

	n = Notifier{Dir: t.TempDir(), Timeout: long}
	participant(t, n.Dir, "knows-already", func(_ context.Context, conn *net.UnixConn) {
		_, _ = io.WriteString(conn, `{"ok":false,"error":"never"}`+"\n")
		_ = conn.CloseRead()
	})
	wantErr(t, n.Notify(t.Context(), m).Err(), "participant knows-already: never")
}

// TestFullBacklog: connecting does not block beyond the deadline, and works when
// there is room again before it.
func TestFullBacklog(t *testing.T) {
	for _, accepts := range []bool{false, true} {
		t.Run(fmt.Sprintf("accepts=%v", accepts), func(t *testing.T) {
			noLeaks(t)
			n := Notifier{Dir: t.TempDir(), Timeout: short}
			if accepts {
				n.Timeout = long
			}
			l := listenAt(t, n.Dir, "a")
			d, err := openDirectory(n.Dir)
			if err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			raw, err := l.SyscallConn()
			if err == nil {
				// Listening again sets the length of the queue anew.
				var listenErr error
				err = errors.Join(raw.Control(func(fd uintptr) { listenErr = unix.Listen(int(fd), 0) }), listenErr)
			}
			if err != nil {
				t.Fatal(err)
			}
			filler, err := net.Dial("unix", d.path("a"))
			if err != nil {
				t.Fatal(err)
			}
			defer filler.Close()
			if c, err := net.Dial("unix", d.path("a")); !errors.Is(err, unix.EAGAIN) {
				if err == nil {
					c.Close()
				}
				t.Fatalf("the queue is not full: %v", err)
			}
			if accepts {
				go func() {
					time.Sleep(short)
					for range 2 {
						conn, err := l.AcceptUnix()
						if err != nil {
							return
						}
						go func() {
							defer conn.Close()
							answer(ack)(t.Context(), conn)
						}()
					}
				}()
			}
			r := n.Notify(t.Context(), Message{Event: Check})
			filler.Close()
			if r.Told() != 1 {
				t.Fatalf("%+v", r)
			}
			if accepts {
				wantErr(t, r.Err())
			} else {
				wantLate(t, r.Results[0], short)
			}
		})
	}
}

// plant fills a directory with what is no participant. Each connection to the
// outside, or to a name that is not to be used, is noted.
func plant(t *testing.T, dir, outside string, told *recorder) {
	t.Helper()
	participant(t, outside, "out.sock", told.as("outside"))
	participant(t, dir, ".hidden", told.as("hidden"))
	participant(t, dir, ControlName, told.as("control"))
	listenAt(t, dir, "left-over").Close()
	d, err := openDirectory(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for name, kind := range map[string]int{"datagram": unix.SOCK_DGRAM, "packets": unix.SOCK_SEQPACKET} {
		fd, err := unix.Socket(unix.AF_UNIX, kind|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fd) })
		if err := unix.Bind(fd, &unix.SockaddrUnix{Name: d.path(name)}); err != nil {
			t.Fatal(err)
		}
		if kind == unix.SOCK_SEQPACKET {
			if err := unix.Listen(fd, 1); err != nil {
				t.Fatal(err)
			}
		}
	}
	mustWrite(t, filepath.Join(dir, "file"), "")
	for _, err := range []error{
		unix.Mkfifo(filepath.Join(dir, "fifo"), 0o666),
		os.Mkdir(filepath.Join(dir, "directory"), 0o777),
		os.Symlink(filepath.Join(outside, "out.sock"), filepath.Join(dir, "link")),
		os.Symlink("loop", filepath.Join(dir, "loop")),
		os.Symlink(outside, filepath.Join(dir, "link-to-directory")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestNoParticipants(t *testing.T) {
	noLeaks(t)
	var told recorder
	n := Notifier{Dir: t.TempDir(), Timeout: short}
	plant(t, n.Dir, t.TempDir(), &told)
	for _, e := range []Event{BeforeCheckpoint, AfterRestore, AfterResume, Check} {
		if r := n.Notify(t.Context(), Message{Event: e}); r.Told() != 0 || r.Err() != nil {
			t.Errorf("%s: %+v", e, r)
		}
	}
	if got := told.all(); got != nil {
		t.Errorf("connected to %v", got)
	}
	names, err := Participants(n.Dir)
	if want := []string{"datagram", "left-over", "packets"}; err != nil || !slices.Equal(names, want) {
		t.Errorf("the sockets are %v, %v", names, err)
	}
	participant(t, n.Dir, "amid-all-that", told.as("real"))
	if r := n.Notify(t.Context(), Message{Event: Check}); r.Told() != 1 || r.Err() != nil {
		t.Errorf("%+v", r)
	}
}

func TestDirectoryIsNone(t *testing.T) {
	noLeaks(t)
	var told recorder
	elsewhere, dir := t.TempDir(), t.TempDir()
	participant(t, elsewhere, "a", told.as("a"))
	link, file, fifo := filepath.Join(dir, "link"), filepath.Join(dir, "file"), filepath.Join(dir, "fifo")
	mustWrite(t, file, "")
	if err := errors.Join(os.Symlink(elsewhere, link), unix.Mkfifo(fifo, 0o666)); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{link, file, fifo, filepath.Join(dir, "absent")} {
		n := Notifier{Dir: path, Timeout: short}
		r := n.Notify(t.Context(), Message{Event: BeforeCheckpoint})
		wantErr(t, r.Err(), "find participants", path)
		if _, err := Participants(path); err == nil {
			t.Errorf("%s has participants", path)
		}
		if c, err := ListenControl(path, nil); err == nil {
			c.Close()
			t.Errorf("%s can be listened in", path)
		}
	}
	if got := told.all(); got != nil {
		t.Errorf("connected to %v", got)
	}
}

// TestSwapped: between two participants the first puts a link in the place of the
// directory, or of a socket in it. Nobody outside hears of it.
func TestSwapped(t *testing.T) {
	for _, c := range []struct {
		name string
		swap func(dir, outside string) error
		want []string
	}{
		{"directory", func(dir, outside string) error {
			return errors.Join(os.Rename(dir, dir+".old"), os.Symlink(outside, dir))
		}, []string{"b", "a"}},
		{"socket", func(dir, outside string) error {
			return errors.Join(os.Remove(filepath.Join(dir, "a")), os.Symlink(filepath.Join(outside, "a"), filepath.Join(dir, "a")))
		}, []string{"b"}},
		{"socket by a FIFO", func(dir, _ string) error {
			return errors.Join(os.Remove(filepath.Join(dir, "a")), unix.Mkfifo(filepath.Join(dir, "a"), 0o666))
		}, []string{"b"}},
		{"socket by nothing", func(dir, _ string) error { return os.Remove(filepath.Join(dir, "a")) }, []string{"b"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			noLeaks(t)
			var told recorder
			dir, outside := filepath.Join(t.TempDir(), "crac"), t.TempDir()
			if err := os.Mkdir(dir, 0o777); err != nil {
				t.Fatal(err)
			}
			participant(t, outside, "a", told.as("outside"))
			participant(t, dir, "a", told.as("a"))
			participant(t, dir, "b", func(ctx context.Context, conn *net.UnixConn) {
				if err := c.swap(dir, outside); err != nil {
					t.Error(err)
				}
				told.as("b")(ctx, conn)
			})
			n := Notifier{Dir: dir, Timeout: long}
			r := n.Notify(t.Context(), Message{Event: BeforeCheckpoint})
			wantErr(t, r.Err())
			if got := told.all(); !slices.Equal(got, c.want) || r.Told() != len(c.want) {
				t.Errorf("told %v, want %v", got, c.want)
			}
		})
	}
}

func TestTooMany(t *testing.T) {
	noLeaks(t)
	n := Notifier{Dir: t.TempDir(), Timeout: long}
	for i := range maxParticipants + 2 {
		participant(t, n.Dir, fmt.Sprintf("p%03d", i), answer(ack))
	}
	r := n.Notify(t.Context(), Message{Event: AfterResume})
	wantErr(t, r.Err(), "more than 256 participants: p256 and those after it were not told")
	if r.Told() != maxParticipants || r.Results[255].Name != "p255" {
		t.Errorf("%d were told", r.Told())
	}

	for i := range maxNames + 1 {
		mustWrite(t, filepath.Join(n.Dir, fmt.Sprintf("f%d", i)), "")
	}
	r = n.Notify(t.Context(), Message{Event: BeforeCheckpoint})
	wantErr(t, r.Err(), "more than 1024 names")
	if r.Told() != 0 {
		t.Errorf("%d were told", r.Told())
	}
}

// TestTooLong: many that do not answer do not add up without end.
func TestTooLong(t *testing.T) {
	noLeaks(t)
	n := Notifier{Dir: t.TempDir(), Timeout: 10 * time.Millisecond}
	for i := range maxTimeouts + 2 {
		participant(t, n.Dir, fmt.Sprintf("p%02d", i), silent)
	}
	r := n.Notify(t.Context(), Message{Event: AfterResume})
	if r.Told() != maxTimeouts+2 {
		t.Errorf("%d are reported", r.Told())
	}
	wantLate(t, r.Results[0], n.Timeout)
	for _, last := range r.Results[maxTimeouts:] {
		wantErr(t, last.Err, "not waited for any longer: all together took 320ms")
	}
}

// TestNames: a name cannot pass for another part of an error.
func TestNames(t *testing.T) {
	for name, want := range map[string]string{
		"java-1.sock":           "java-1.sock",
		"späße.sock":            "späße.sock",
		"a\nb":                  `"a\nb"`,
		"\x1b[2J":               `"\x1b[2J"`,
		"a: ok; participant b":  `"a: ok; participant b"`,
		`q"uote`:                `"q\"uote"`,
		"\xff":                  `"\xff"`,
		strings.Repeat("x", 90): strings.Repeat("x", 90),
	} {
		dir := t.TempDir()
		participant(t, dir, name, answer(`{"ok":false,"error":"no"}`))
		n := Notifier{Dir: dir, Timeout: long}
		r := n.Notify(t.Context(), Message{Event: Check})
		if err := r.Err(); err == nil || err.Error() != "participant "+want+": no" {
			t.Errorf("%q: %v", name, err)
		}
	}
}
