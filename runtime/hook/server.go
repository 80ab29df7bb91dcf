package hook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxClients bounds the connections on control.sock; more are closed.
	maxClients = 16
	// defaultRequestWait is how long a client may take to send its request.
	defaultRequestWait = 10 * time.Second
	// replyWait is how long it may take to take the reply, which is short.
	replyWait = time.Second
	// maxOutcomeWait is the longest wait for an outcome.
	maxOutcomeWait = 60 * time.Second
	// hangUpEvery is how often a client that waits is looked at.
	hangUpEvery = 200 * time.Millisecond
)

// server is the service between two dumps.
type server struct {
	listener *net.UnixListener
	handler  Handler
	wait     time.Duration   // for a request
	ctx      context.Context // ends with the service
	cancel   context.CancelFunc
	wg       sync.WaitGroup

	mu    sync.Mutex
	conns map[*net.UnixConn]struct{}
}

func serve(l *net.UnixListener, h Handler, wait time.Duration) *server {
	s := &server{listener: l, handler: h, wait: wait, conns: make(map[*net.UnixConn]struct{})}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.wg.Go(s.accept)
	return s
}

// stop returns when nothing of the service is left.
func (s *server) stop() {
	s.cancel()
	s.listener.Close()
	s.mu.Lock()
	for conn := range s.conns {
		_ = conn.SetReadDeadline(time.Unix(1, 0))
	}
	s.mu.Unlock()
	s.wg.Wait()
}

func (s *server) accept() {
	for {
		conn, err := s.listener.AcceptUnix()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			// Out of file descriptors, most likely: others may give some back.
			if sleep(s.ctx, hangUpEvery) != nil {
				return
			}
			continue
		}
		if !s.admit(conn) {
			conn.Close()
			continue
		}
		s.wg.Go(func() {
			defer s.dismiss(conn)
			s.serve(conn)
		})
	}
}

func (s *server) admit(conn *net.UnixConn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ctx.Err() != nil || len(s.conns) == maxClients {
		return false
	}
	// Before stop can set another: that one is to last.
	_ = conn.SetReadDeadline(time.Now().Add(s.wait))
	s.conns[conn] = struct{}{}
	return true
}

func (s *server) dismiss(conn *net.UnixConn) {
	s.mu.Lock()
	delete(s.conns, conn)
	s.mu.Unlock()
	// The client closes first, if it can: one that still holds its end when it is
	// dumped would wait on it in every clone.
	_ = conn.CloseWrite()
	_ = conn.SetReadDeadline(time.Now().Add(closeWait))
	_, _ = io.Copy(io.Discard, io.LimitReader(conn, maxAnswer))
	conn.Close()
}

// serve answers one request.
func (s *server) serve(conn *net.UnixConn) {
	line, err := readLine(conn)
	switch {
	case s.ctx.Err() != nil:
		return // the client comes again
	case errors.Is(err, errTooLong):
		err = fmt.Errorf("the request is longer than %d bytes", maxAnswer)
	case isTimeout(err):
		err = fmt.Errorf("no request within %v", s.wait)
	case err != nil:
		return // the client has gone
	}
	var reply any
	if err == nil {
		reply, err = s.answer(conn, line)
	}
	if err != nil {
		reply = refused{Error: err.Error()}
	}
	text, err := encode(reply)
	if err != nil {
		return
	}
	_ = conn.SetWriteDeadline(time.Now().Add(replyWait))
	_, _ = conn.Write(text)
}

// request is what the workload asks.
type request struct {
	V      int    `json:"v"` // 0 if it does not say
	Op     string `json:"op"`
	ID     string `json:"id"`
	WaitMS int64  `json:"wait_ms"`
}

func (r request) wait() time.Duration { return time.Duration(r.WaitMS) * time.Millisecond }

// The replies.
type (
	refused struct {
		OK    bool   `json:"ok"` // false
		Error string `json:"error"`
	}
	statusReply struct {
		OK bool `json:"ok"`
		V  int  `json:"v"`
		Status
	}
	checkpointReply struct {
		OK bool   `json:"ok"`
		ID string `json:"id"`
	}
	outcomeReply struct {
		OK      bool    `json:"ok"`
		Outcome Outcome `json:"outcome"`
		Error   string  `json:"error,omitempty"`
	}
)

// parseRequest reads a request and says what is wrong with it.
func parseRequest(line []byte) (request, error) {
	var r request
	if err := json.Unmarshal(line, &r); err != nil {
		return request{}, fmt.Errorf("the request is not as it should be: %s", clean(err.Error()))
	}
	switch {
	case r.V != 0 && r.V != Version:
		return request{}, fmt.Errorf("version %d of the contract is not known here, only %d", r.V, Version)
	case r.Op == "status" || r.Op == "checkpoint":
	case r.Op != "outcome":
		return request{}, fmt.Errorf("op %q is not known: there are status, checkpoint and outcome", clean(r.Op))
	case r.ID == "":
		return request{}, errors.New("outcome needs the id of a checkpoint")
	case r.WaitMS < 0 || r.WaitMS > maxOutcomeWait.Milliseconds():
		return request{}, fmt.Errorf("wait_ms is %d and may be 0 to %d", r.WaitMS, maxOutcomeWait.Milliseconds())
	}
	return r, nil
}

func (s *server) answer(conn *net.UnixConn, line []byte) (any, error) {
	r, err := parseRequest(line)
	if err != nil {
		return nil, err
	}
	switch r.Op {
	case "status":
		return statusReply{OK: true, V: Version, Status: s.handler.Status(s.ctx)}, nil
	case "checkpoint":
		id, err := s.handler.Checkpoint(s.ctx)
		return checkpointReply{OK: true, ID: id}, err
	}
	ctx, cancel := context.WithTimeout(s.ctx, r.wait())
	defer cancel()
	s.wg.Go(func() { cancelOnHangUp(ctx, cancel, conn) })
	outcome, text := s.handler.Outcome(ctx, r.ID)
	if outcome == "" {
		return nil, fmt.Errorf("no checkpoint %s is known", printable(clean(r.ID)))
	}
	return outcomeReply{OK: true, Outcome: outcome, Error: strings.TrimSpace(text)}, nil
}

// cancelOnHangUp ends a wait whose client has gone, so that it takes up no place.
// Reading would not tell: a client may close its sending side and wait.
func cancelOnHangUp(ctx context.Context, cancel context.CancelFunc, conn *net.UnixConn) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return
	}
	for sleep(ctx, hangUpEvery) == nil {
		fds := []unix.PollFd{{}}
		err := raw.Control(func(fd uintptr) {
			fds[0].Fd = int32(fd)
			_, _ = unix.Poll(fds, 0)
		})
		if err != nil || fds[0].Revents&unix.POLLHUP != 0 {
			cancel()
			return
		}
	}
}
