package sdk

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// patience bounds every wait for something that has to happen.
const patience = 20 * time.Second

// answer is what a participant says.
type answer struct {
	OK    bool   `json:"ok"`
	Error string `json:"error"`
}

// shim plays the runtime's part for one container.
type shim struct {
	testing.TB
	dir string

	mu       sync.Mutex
	control  net.Listener
	replies  []func(request map[string]any) any // to the requests to come; the last one stays
	requests []map[string]any
}

func newShim(tb testing.TB) *shim {
	tb.Helper()
	// Not tb.TempDir: with the test's name in it, a socket's path may get too long.
	dir, err := os.MkdirTemp("", "crac")
	if err != nil {
		tb.Fatal(err)
	}
	s := &shim{TB: tb, dir: dir}
	tb.Cleanup(func() {
		s.hideControl()
		if err := os.RemoveAll(dir); err != nil {
			tb.Error(err)
		}
	})
	return s
}

// reply sets the answers to the requests on control.sock. After the last one, that is
// repeated. An answer of nil closes the connection.
func (s *shim) reply(replies ...func(map[string]any) any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.replies = replies
}

// say is always the same answer.
func say(line string) func(map[string]any) any {
	return func(map[string]any) any { return json.RawMessage(line) }
}

// byOp answers by a request's op.
func byOp(ops map[string]string) func(map[string]any) any {
	return func(request map[string]any) any {
		if line, ok := ops[request["op"].(string)]; ok {
			return json.RawMessage(line)
		}
		return json.RawMessage(`{"ok":false,"error":"unexpected op"}`)
	}
}

// showControl listens on control.sock.
func (s *shim) showControl() {
	s.Helper()
	l, err := net.Listen("unix", filepath.Join(s.dir, "control.sock"))
	if err != nil {
		s.Fatal(err)
	}
	s.mu.Lock()
	s.control = l
	s.mu.Unlock()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go s.serve(c)
		}
	}()
}

// hideControl removes control.sock, as during a dump.
func (s *shim) hideControl() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.control != nil {
		_ = s.control.Close()
		s.control = nil
	}
}

func (s *shim) serve(c net.Conn) {
	defer c.Close()
	line, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return
	}
	var request map[string]any
	if err := json.Unmarshal([]byte(line), &request); err != nil || request["v"] != 1.0 || request["op"] == nil {
		s.Errorf("bad request on control.sock: %q (%v)", line, err)
		return
	}
	s.mu.Lock()
	s.requests = append(s.requests, request)
	var reply func(map[string]any) any
	if len(s.replies) > 0 {
		reply = s.replies[0]
		if len(s.replies) > 1 {
			s.replies = s.replies[1:]
		}
	}
	s.mu.Unlock()
	if reply == nil {
		s.Errorf("unexpected request on control.sock: %q", line)
		return
	}
	if wait, _ := request["wait_ms"].(float64); wait > 0 {
		time.Sleep(100 * time.Millisecond) // the real one waits for an outcome
	}
	if a := reply(request); a != nil {
		_ = json.NewEncoder(c).Encode(a)
	}
}

// waitRequest waits until n requests with this op have come.
func (s *shim) waitRequest(op string, n int) {
	s.Helper()
	eventually(s, "a request "+op, func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		count := 0
		for _, r := range s.requests {
			if r["op"] == op {
				count++
			}
		}
		return count >= n
	})
}

// participants are the sockets at which somebody listens, sorted.
func (s *shim) participants() []string {
	s.Helper()
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		s.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if e.Type() != fs.ModeSocket || e.Name() == "control.sock" || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		c, err := net.Dial("unix", filepath.Join(s.dir, e.Name()))
		if err == nil {
			_ = c.Close() // an empty connection, to be ignored
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return names
}

// waitParticipants waits until there are n and returns them.
func (s *shim) waitParticipants(n int) (names []string) {
	s.Helper()
	eventually(s, "participants", func() bool {
		names = s.participants()
		return len(names) == n
	})
	return names
}

// dial connects to a participant.
func (s *shim) dial(name string) *net.UnixConn {
	s.Helper()
	c, err := net.Dial("unix", filepath.Join(s.dir, name))
	if err != nil {
		s.Fatal(err)
	}
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		s.Fatal(err)
	}
	return c.(*net.UnixConn)
}

// send sends one line to a participant and returns its answer: one line of JSON, no more than
// 64 KiB, after which it closes the connection.
func (s *shim) send(name, line string) answer {
	s.Helper()
	c := s.dial(name)
	defer c.Close()
	if _, err := io.WriteString(c, line+"\n"); err != nil {
		s.Fatal(err)
	}
	r := bufio.NewReader(c)
	text, err := r.ReadString('\n')
	if err != nil {
		s.Fatalf("%s answers %q: %v", name, text, err)
	}
	var a answer
	if err := json.Unmarshal([]byte(text), &a); err != nil {
		s.Fatalf("%s answers %q: %v", name, text, err)
	}
	if len(text) > 64<<10 {
		s.Errorf("%s answers with %d bytes", name, len(text))
	}
	if a.OK != (a.Error == "") {
		s.Errorf("%s answers %q: either ok or an error", name, text)
	}
	if _, err := r.ReadByte(); !errors.Is(err, io.EOF) {
		s.Errorf("%s does not close the connection after its answer: %v", name, err)
	}
	return a
}

// tell notifies the only participant.
func (s *shim) tell(line string) answer {
	s.Helper()
	return s.send(s.waitParticipants(1)[0], line)
}

// mustTell notifies the only participant, which has to agree.
func (s *shim) mustTell(line string) {
	s.Helper()
	if a := s.tell(line); !a.OK {
		s.Fatalf("%s: %s", line, a.Error)
	}
}

func eventually(tb testing.TB, what string, done func() bool) {
	tb.Helper()
	for end := time.Now().Add(patience); !done(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			tb.Fatalf("%s: not within %v", what, patience)
		}
	}
}
