package hook

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// httpAdapter posts the message to a server on the container's loopback. A status
// of 2xx agrees; another does not, for the reason on the first line of the body.
type httpAdapter struct{ url *url.URL }

func parseHTTP(value string) (Adapter, error) {
	u, err := url.Parse(value)
	if err != nil {
		return nil, fmt.Errorf("the hook's URL: %w", err)
	}
	port, portErr := strconv.ParseUint(u.Port(), 10, 16)
	ip := net.ParseIP(u.Hostname())
	switch {
	case u.Scheme != "http":
		return nil, fmt.Errorf("the hook's URL %s: only http is spoken: nothing leaves the container's loopback", value)
	case strings.Contains(u.RequestURI(), " "): // net/url lets it through in a query
		return nil, fmt.Errorf("the hook's URL %s: write a space as %%20", value)
	case u.User != nil:
		return nil, errors.New("the hook's URL names a user: that is not supported")
	case !strings.EqualFold(u.Hostname(), "localhost") && (ip == nil || !ip.IsLoopback()):
		return nil, fmt.Errorf("the hook's URL %s: the host must be localhost, 127.0.0.1 or [::1], in the container", value)
	case u.Port() != "" && (portErr != nil || port == 0):
		return nil, fmt.Errorf("the hook's URL %s: the port must be of 1 to 65535", value)
	}
	u.Fragment, u.RawFragment = "", "" // is never sent
	return httpAdapter{u}, nil
}

func (a httpAdapter) String() string { return a.url.String() }

func (a httpAdapter) tell(ctx context.Context, n *Notifier, _ Message, line []byte) error {
	if n.Container == nil {
		return errNoContainer
	}
	return a.exchange(ctx, n.Container, http.MethodPost, line, func(resp *http.Response, _ *io.LimitedReader) error {
		if resp.StatusCode/100 == 2 {
			return nil // the body is of no interest, and may have no end
		}
		text, _ := bufio.NewReader(io.LimitReader(resp.Body, 4*maxText)).ReadString('\n')
		if text = clean(text); text != "" {
			return fmt.Errorf("%s (HTTP status %s)", text, clean(resp.Status))
		}
		return fmt.Errorf("HTTP status %s", clean(resp.Status))
	})
}

// exchange makes one request and has the answer judged. When it returns, neither
// side has anything left of the connection.
func (a httpAdapter) exchange(ctx context.Context, c Container, method string, body []byte, judge judgement) error {
	conn, err := a.dial(ctx, c)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer endWith(ctx, conn)()

	err = a.request(ctx, conn, method, body, judge)
	if !isTimeout(err) && awaitClose(conn) {
		return err
	}
	// A connection that the server keeps is reset, so that neither side has it in
	// a dump: an orderly end would need the server's part.
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	return err
}

// dial resolves localhost itself: what the host or the image says of it is
// nothing to go by.
func (a httpAdapter) dial(ctx context.Context, c Container) (net.Conn, error) {
	port := a.url.Port()
	if port == "" {
		port = "80"
	}
	hosts := []string{a.url.Hostname()}
	if strings.EqualFold(hosts[0], "localhost") {
		hosts = []string{"127.0.0.1", "::1"}
	}
	var errs []error
	for _, host := range hosts {
		conn, err := c.Dial(ctx, "tcp", net.JoinHostPort(host, port))
		if err == nil {
			return conn, nil
		}
		errs = append(errs, err)
	}
	// The first is what is expected to work; the other is most often just absent.
	return nil, errs[0]
}

// judgement is what is made of an answer, of which the head was read; the body
// comes as long as left allows it.
type judgement func(resp *http.Response, left *io.LimitedReader) error

// request makes one request on a connection that is for nothing else. net/http's
// client is for more: it keeps connections, follows redirects and closes first.
func (a httpAdapter) request(ctx context.Context, conn net.Conn, method string, body []byte, judge judgement) error {
	req, err := http.NewRequestWithContext(ctx, method, a.url.String(), bytes.NewReader(body))
	if err != nil {
		return err
	}
	if len(body) > 0 {
		req.Header.Set("Content-Type", "application/json")
	}
	req.Header.Set("User-Agent", "crac")
	req.Close = true

	// A server may refuse before it has read everything.
	writeErr := req.Write(conn)
	limited := &io.LimitedReader{R: conn, N: maxAnswer}
	resp, err := readResponse(bufio.NewReader(limited), req) //nolint:bodyclose // Close would read a body to an end that it need not have
	if err == nil {
		return judge(resp, limited)
	}
	if writeErr != nil {
		err = writeErr
	}
	switch {
	case ctx.Err() != nil:
		return ctx.Err() // net/http takes what came until then for all
	case limited.N == 0:
		return errTooLong
	case errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE):
		return errNoAnswer
	}
	return fmt.Errorf("answered what is not HTTP: %s", clean(err.Error()))
}

// readResponse reads the head of the answer proper, after those that only announce
// one.
func readResponse(r *bufio.Reader, req *http.Request) (*http.Response, error) {
	for {
		resp, err := http.ReadResponse(r, req)
		if err != nil || resp.StatusCode >= 200 || resp.StatusCode == http.StatusSwitchingProtocols {
			return resp, err
		}
	}
}
