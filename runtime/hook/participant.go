package hook

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// closeWait is how long a connection is kept for the other side to close it
	// first, so that a dump finds none of it.
	closeWait = time.Second
	// halfClosedWait is how long one is waited for that has ended its writing, and
	// closes when it hears that we have ended ours: nothing tells when it does.
	halfClosedWait = 30 * time.Millisecond
	// pollEvery is the pause between two looks at what cannot be waited for.
	pollEvery = 10 * time.Millisecond
)

// errNobody is a socket that no participant listens on.
var errNobody = errors.New("nobody listens")

// tell gives a participant the message and waits for its answer until ctx ends.
func (d directory) tell(ctx context.Context, name string, line []byte) error {
	conn, err := d.dial(ctx, name)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer endWith(ctx, conn)()

	// One that does not read its message may have answered all the same.
	_, writeErr := conn.Write(line)
	answer, err := readLine(conn)
	if err != nil {
		if writeErr != nil {
			err = writeErr
		}
		if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.EPIPE) {
			err = errNoAnswer
		}
		return err
	}
	awaitClose(conn)
	return parseAnswer(answer)
}

// dial connects to a socket in the directory: to the very file that was found to
// be one.
func (d directory) dial(ctx context.Context, name string) (net.Conn, error) {
	socket, mode, err := d.find(name)
	if errors.Is(err, fs.ErrNotExist) || err == nil && mode.Type() != fs.ModeSocket {
		err = errNobody
	}
	if socket != nil {
		defer socket.Close()
	}
	if err != nil {
		return nil, err
	}
	for {
		conn, err := new(net.Dialer).DialContext(ctx, "unix", fdPath(socket))
		switch {
		case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.EPROTOTYPE):
			return nil, errNobody
		case !errors.Is(err, unix.EAGAIN):
			return conn, err
		}
		// Its queue of connections is full (connect(2)).
		if err := sleep(ctx, pollEvery); err != nil {
			return nil, err
		}
	}
}

// endWith makes every wait on the connection end when ctx does, until the function
// it returns is called.
func endWith(ctx context.Context, conn net.Conn) func() bool {
	return context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
}

// awaitClose waits a moment for the other side to close the connection, and tells
// whether it did. What else it sends is of no interest, and not read without end.
func awaitClose(conn net.Conn) bool {
	_ = conn.SetReadDeadline(time.Now().Add(closeWait))
	n, err := io.Copy(io.Discard, io.LimitReader(conn, maxAnswer))
	ended := err == nil && n < maxAnswer
	if u, ok := conn.(*net.UnixConn); ok && ended && !hungUp(u) {
		_ = u.CloseWrite()
		time.Sleep(halfClosedWait)
	}
	return ended || errors.Is(err, unix.ECONNRESET)
}

// hungUp tells whether the other side has closed the connection, and not only ended
// its writing (unix(7), poll(2)).
func hungUp(conn *net.UnixConn) (yes bool) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return false
	}
	err = raw.Control(func(fd uintptr) {
		fds := []unix.PollFd{{Fd: int32(fd)}}
		n, err := unix.Poll(fds, 0)
		yes = err == nil && n == 1 && fds[0].Revents&unix.POLLHUP != 0
	})
	return yes && err == nil
}

// sleep pauses until ctx ends.
func sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
