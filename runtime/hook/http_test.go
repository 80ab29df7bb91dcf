package hook

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// rawServer answers each connection by a function, which may do to HTTP what it
// likes.
func rawServer(t *testing.T, address string, do func(conn net.Conn)) (url string) {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				_ = conn.SetDeadline(time.Now().Add(long))
				do(conn)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return "http://" + l.Addr().String()
}

// untilEnd reads to the connection's end.
func untilEnd(conn net.Conn) error {
	_, err := io.Copy(io.Discard, conn)
	return err
}

// request reads a request, and with it its body.
func readRequest(t *testing.T, conn net.Conn) (head []string, body string) {
	req, err := http.ReadRequest(bufio.NewReader(conn))
	if err != nil {
		t.Error(err)
		return nil, ""
	}
	data, err := io.ReadAll(req.Body)
	if err != nil {
		t.Error(err)
	}
	return []string{req.Method, req.RequestURI, req.Host, req.Header.Get("Content-Type"), fmt.Sprint(req.ContentLength == int64(len(data))), fmt.Sprint(req.Close)}, string(data)
}

// TestHTTPRequest: what a server gets.
func TestHTTPRequest(t *testing.T) {
	noLeaks(t)
	heads, bodies := make(chan []string, 1), make(chan string, 1)
	url := rawServer(t, "127.0.0.1:0", func(conn net.Conn) {
		head, body := readRequest(t, conn)
		_, _ = io.WriteString(conn, "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 202 Accepted\r\n\r\n")
		heads <- head
		bodies <- body
	})
	n := Notifier{Timeout: long, Container: &fakeContainer{}, Adapters: map[Event]Adapter{AfterResume: adapter(t, url+"/a%20b?c=d#e")}}
	m := Message{Event: AfterResume, ID: "i", Outcome: OutcomeCheckpointed}
	wantErr(t, n.Notify(t.Context(), m).Err())
	if got, want := <-heads, []string{"POST", "/a%20b?c=d", strings.TrimPrefix(url, "http://"), "application/json", "true", "true"}; !slices.Equal(got, want) {
		t.Errorf("requested %q, want %q", got, want)
	}
	if got, want := <-bodies, `{"v":1,"event":"after-resume","id":"i","deadline_ms":20000,"outcome":"checkpointed"}`+"\n"; got != want {
		t.Errorf("the body is %s, want %s", got, want)
	}
}

// TestHTTPLocalhost: the name is resolved by nobody, and means either family.
func TestHTTPLocalhost(t *testing.T) {
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} {
		t.Run(address, func(t *testing.T) {
			noLeaks(t)
			if l, err := net.Listen("tcp", address); err != nil {
				t.Skipf("this machine has no %s: %v", address, err)
			} else {
				l.Close()
			}
			url := rawServer(t, address, func(conn net.Conn) {
				readRequest(t, conn)
				_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			})
			port := url[strings.LastIndexByte(url, ':')+1:]
			c := &fakeContainer{}
			n := Notifier{Timeout: long, Container: c, Adapters: map[Event]Adapter{Check: adapter(t, "http://LocalHost:"+port)}}
			wantErr(t, n.Notify(t.Context(), Message{Event: Check}).Err())
			for _, dialed := range c.dialed {
				if dialed != "127.0.0.1:"+port && dialed != "[::1]:"+port {
					t.Errorf("dialed %s", dialed)
				}
			}
		})
	}
	c := &fakeContainer{}
	n := Notifier{Timeout: long, Container: c, Adapters: map[Event]Adapter{Check: adapter(t, "http://127.77.0.1/")}}
	wantErr(t, n.Notify(t.Context(), Message{Event: Check}).Err(), "adapter http://127.77.0.1/: dial tcp 127.77.0.1:80")
	if !slices.Equal(c.dialed, []string{"127.77.0.1:80"}) {
		t.Errorf("dialed %v", c.dialed)
	}
}

func TestHTTPRedirect(t *testing.T) {
	noLeaks(t)
	var told recorder
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { told.add("other") }))
	t.Cleanup(other.Close)
	for _, code := range []int{301, 302, 307, 308} {
		server := httptest.NewServer(http.RedirectHandler(other.URL, code))
		n := Notifier{Timeout: long, Container: &fakeContainer{}, Adapters: map[Event]Adapter{Check: adapter(t, server.URL)}}
		wantErr(t, n.Notify(t.Context(), Message{Event: Check}).Err(), fmt.Sprintf("HTTP status %d", code))
		server.Close()
	}
	if got := told.all(); got != nil {
		t.Error("a redirect was followed")
	}
}

// TestHTTPHostile: servers that would hold us. Each sees the connection's end
// before the test's.
func TestHTTPHostile(t *testing.T) {
	forever := func(conn net.Conn, text string) {
		for {
			if _, err := io.WriteString(conn, text); err != nil {
				return
			}
		}
	}
	for _, c := range []struct {
		name string
		do   func(conn net.Conn)
		want string
		late bool
		// asked is what a probe says, if it says something else.
		asked *string
		// A server that writes sees the reset when it does.
		writes bool
	}{
		{name: "keeps the connection", do: func(conn net.Conn) {
			_, _ = io.WriteString(conn, "HTTP/1.1 204 No Content\r\nConnection: keep-alive\r\n\r\n")
		}},
		{name: "body without end, agreeing", do: func(conn net.Conn) {
			_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n")
			forever(conn, strings.Repeat("x", 4096))
		}, writes: true},
		{name: "chunks without end, agreeing", do: func(conn net.Conn) {
			_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
			forever(conn, "1\r\nx\r\n")
		}, writes: true},
		{name: "body without end, against", do: func(conn net.Conn) {
			_, _ = io.WriteString(conn, "HTTP/1.1 500 Oops\r\n\r\n")
			forever(conn, strings.Repeat("x", 4096))
		}, want: strings.Repeat("x", maxText) + "… (HTTP status 500 Oops)", asked: says("HTTP status 500 Oops"), writes: true},
		{name: "body that does not come", do: func(conn net.Conn) {
			_, _ = io.WriteString(conn, "HTTP/1.1 500 Oops\r\nContent-Length: 1000\r\n\r\npool busy\n")
		}, want: "pool busy (HTTP status 500 Oops)", asked: says("HTTP status 500 Oops")},
		{name: "agreeing body that does not come", do: func(conn net.Conn) {
			_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhalf")
		}, asked: says("context deadline exceeded")},
		{name: "agreeing body that breaks off", do: func(conn net.Conn) {
			_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nno chunk\r\n")
		}, asked: says("the answer breaks off")},
		{name: "headers without end", do: func(conn net.Conn) {
			_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\n")
			forever(conn, "X-A: b\r\n")
		}, want: "answered with more than 65536 bytes", writes: true},
		{name: "status line without end", do: func(conn net.Conn) {
			_, _ = io.WriteString(conn, "HTTP/1.1 200 ")
			forever(conn, strings.Repeat("x", 4096))
		}, want: "answered with more than 65536 bytes", writes: true},
		{name: "continue without end", do: func(conn net.Conn) {
			forever(conn, "HTTP/1.1 100 Continue\r\n\r\n")
		}, want: "answered with more than 65536 bytes", writes: true},
		{name: "another protocol", do: func(conn net.Conn) {
			_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n")
		}, want: "HTTP status 101"},
		{name: "not HTTP", do: func(conn net.Conn) { _, _ = io.WriteString(conn, "220 mail \x1b[2J ESMTP\r\n\r\n") }, want: "answered what is not HTTP"},
		{name: "says nothing", do: func(net.Conn) {}, late: true},
		{name: "drips", do: func(conn net.Conn) {
			for {
				if _, err := io.WriteString(conn, "H"); err != nil {
					return
				}
				time.Sleep(10 * time.Millisecond)
			}
		}, late: true, writes: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			noLeaks(t)
			ended := make(chan error, 1)
			url := rawServer(t, "127.0.0.1:0", func(conn net.Conn) {
				readRequest(t, conn)
				c.do(conn)
				ended <- untilEnd(conn)
			})
			// None of these closes by itself, so ours is a reset: nothing is left of
			// the connection on either side.
			reset := func() {
				t.Helper()
				if err := <-ended; err != nil && !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("the server's connection ended with %v", err)
				} else if err == nil && !c.writes {
					t.Error("the connection was closed in a way that leaves the server half of it")
				}
			}
			n := Notifier{Timeout: long, Container: &fakeContainer{}, Adapters: map[Event]Adapter{Check: adapter(t, url)}}
			if c.late {
				n.Timeout = short
			}
			r := n.Notify(t.Context(), Message{Event: Check})
			if c.late {
				wantLate(t, r.Results[0], short)
			} else {
				wantErr(t, r.Err(), c.want)
			}
			reset()

			probe, err := ParseProbe(url)
			if err != nil {
				t.Fatal(err)
			}
			want, timeout := c.want, long
			if c.asked != nil {
				want = *c.asked
			}
			if c.late {
				want = "context deadline exceeded"
			}
			if strings.Contains(want, "deadline") {
				timeout = short
			}
			ctx, cancel := context.WithTimeout(t.Context(), timeout)
			defer cancel()
			wantErr(t, probe.Ask(ctx, n.Container), want)
			reset()
		})
	}
}

func says(text string) *string { return &text }

// TestHTTPAnsweredUnread: a server may answer and close before it has read the
// request.
func TestHTTPAnsweredUnread(t *testing.T) {
	noLeaks(t)
	url := rawServer(t, "127.0.0.1:0", func(conn net.Conn) {
		_, _ = io.WriteString(conn, "HTTP/1.1 413 Too Large\r\n\r\ntoo much\n")
		_ = conn.(*net.TCPConn).CloseWrite()
		_ = untilEnd(conn)
	})
	n := Notifier{Timeout: long, Container: &fakeContainer{}, Adapters: map[Event]Adapter{AfterRestore: adapter(t, url)}}
	m := Message{Event: AfterRestore, Args: []string{strings.Repeat("x", maxMessage/2)}}
	wantErr(t, n.Notify(t.Context(), m).Err(), "too much (HTTP status 413 Too Large)")
}

// TestHTTPWaitsForClose: a server that closes soon after its answer has closed before
// we go on, so that a dump finds nothing of the connection.
func TestHTTPWaitsForClose(t *testing.T) {
	noLeaks(t)
	closed := make(chan struct{}, 1)
	url := rawServer(t, "127.0.0.1:0", func(conn net.Conn) {
		readRequest(t, conn)
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
		time.Sleep(100 * time.Millisecond)
		closed <- struct{}{}
		conn.Close()
	})
	wantClosed := func(by string) {
		t.Helper()
		select {
		case <-closed:
		default:
			t.Errorf("%s returned before the server closed", by)
		}
	}
	n := Notifier{Timeout: long, Container: &fakeContainer{}, Adapters: map[Event]Adapter{Check: adapter(t, url)}}
	wantErr(t, n.Notify(t.Context(), Message{Event: Check}).Err())
	wantClosed("Notify")
	probe, err := ParseProbe(url)
	if err != nil {
		t.Fatal(err)
	}
	wantErr(t, probe.Ask(t.Context(), n.Container))
	wantClosed("Ask")
}
