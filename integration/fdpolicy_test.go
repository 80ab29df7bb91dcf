package integration

import (
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"

	"github.com/crac-shim/crac/integration/harness"
)

// peer is a server outside of all containers: it answers lines with themselves, and notes how
// connections end.
type peer struct {
	port int
	mu   sync.Mutex
	ends []error
}

func startPeer(t *harness.T) *peer {
	t.Helper()
	l, err := net.Listen("tcp4", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &peer{port: l.Addr().(*net.TCPAddr).Port}
	var conns sync.WaitGroup
	t.Cleanup(func() {
		_ = l.Close()
		conns.Wait()
	})
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { _ = c.Close() })
			conns.Go(func() {
				_, err := io.Copy(c, c)
				p.mu.Lock()
				defer p.mu.Unlock()
				p.ends = append(p.ends, err)
			})
		}
	}()
	return p
}

func (p *peer) ended() []error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.ends)
}

// remote is the rule for connections to the peer.
func (p *peer) remote(action string) string {
	return fmt.Sprintf("type: socket\nfamily: ip\nremotePort: %d\naction: %s", p.port, action)
}

// startConnected starts a program with two connections to the peer: it waits for data on one in
// recv, and on the other in epoll. Both say what they get. When the file /go is there, it sends
// a line on each.
func startConnected(t *harness.T, p *peer, flags ...string) *box {
	t.Helper()
	needImage(t, "python")
	n, err := t.Network()
	if err != nil {
		t.Fatal(err)
	}
	program := fmt.Sprintf(`
import errno, os, select, socket, threading, time
def connect():
    while True:
        try:
            return socket.create_connection(("%s", %d), timeout=None)
        except OSError:
            time.sleep(0.05)
def receive(name, s):
    try:
        data = s.recv(100)
        got = data.decode().strip() or "end"
    except OSError as e:
        got = errno.errorcode[e.errno]
    os.write(1, f"{name} got {got}\n".encode())
def epoll(s):
    p = select.epoll()
    p.register(s.fileno(), select.EPOLLIN)
    p.poll()
    receive("epoll", s)
a, b = connect(), connect()
threading.Thread(target=receive, args=("recv", a), daemon=True).start()
threading.Thread(target=epoll, args=(b,), daemon=True).start()
print("connected", a.fileno(), b.fileno())
while not os.path.exists("/go"):
    time.sleep(0.05)
a.send(b"hello\n")
b.send(b"hello\n")
print("sent")
while True:
    time.sleep(1)
`, n.Gateway, p.port)
	b := start(t, how{image: harness.ImageRef("python"), cni: true, flags: flags, args: []string{"/usr/bin/python3", "-c", program}})
	b.Eventually("the program is connected", func() bool { return strings.Contains(b.log(), "connected") })
	return b
}

func (b *box) says(lines ...string) {
	b.Helper()
	for _, l := range lines {
		b.Eventually(fmt.Sprintf("%s says %q", b.id, l), func() bool { return strings.Contains(b.log(), l+"\n") })
	}
}

// With the action close, the program that was checkpointed and goes on sees an error at once,
// and so does the server; a clone sees that the connections have ended.
func TestFDPolicyClose(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	p, image := startPeer(t), ref(t)
	b := startConnected(t, p, option("fd-policy", p.remote("close")), option("checkpoint.image", image))
	if got := p.ended(); len(got) != 0 {
		t.Fatalf("connections end before the checkpoint: %v", got)
	}
	b.checkpoint()
	b.says("recv got ECONNABORTED", "epoll got ECONNABORTED")
	b.wantStatus(containerd.Running)
	t.Eventually("the server sees two connections reset", func() bool { return len(p.ended()) == 2 })
	for _, err := range p.ended() {
		if !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the server sees %v", err)
		}
	}
	log := shared.Log()
	pid := strconv.Itoa(int(b.task().Pid()))
	for _, part := range []string{"descriptor policy: process " + pid + " (python3, 1 inside)", ":" + strconv.Itoa(p.port) + ": closed by rule 1 (line 1: type: socket"} {
		if !strings.Contains(log, part) {
			t.Errorf("the log lacks %q", part)
		}
	}

	clone := start(t, how{image: image, cni: true, flags: []string{option("restore", "require")}})
	clone.says("recv got end", "epoll got end")
	clone.wantStatus(containerd.Running)
}

// Without a policy nothing is closed: the original keeps its connections.
func TestNoFDPolicyKeepsConnections(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	p, image := startPeer(t), ref(t)
	b := startConnected(t, p, option("checkpoint.image", image))
	b.checkpoint()
	b.exec("touch", "/go")
	b.says("recv got hello", "epoll got hello")
	if got := p.ended(); len(got) != 0 {
		t.Errorf("the server sees connections end: %v", got)
	}
	mustHaveImage(t, image, true)
}

// A policy that refuses names who, which descriptor, which peer and which rule, and changes
// nothing: not even what another rule would have closed.
func TestFDPolicyRefuses(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	p, image := startPeer(t), ref(t)
	b := startConnected(t, p, option("fd-policy", p.remote("close")+"\n---\ntype: filedescriptor\nregex: .*eventpoll.*\naction: error\n"), option("checkpoint.image", image))
	pid := strconv.Itoa(int(b.task().Pid()))

	_, err := t.Ctr(t.Ctx, "tasks", "checkpoint", b.id)
	for _, part := range []string{"refuses the checkpoint", "process " + pid + " (python3, 1 inside)", "descriptor ", "eventpoll", "rule 2 (line 6", "before-checkpoint"} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("the checkpoint gives %v, want an error with %q", err, part)
		}
	}
	mustHaveImage(t, image, false)
	b.wantStatus(containerd.Running)

	b.exec("touch", "/go")
	b.says("recv got hello", "epoll got hello")
	if got := p.ended(); len(got) != 0 {
		t.Errorf("the server sees connections end: %v", got)
	}
}

// The policy may be a file in the container, which may be anything.
func TestFDPolicyInTheImage(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	p, image := startPeer(t), ref(t)
	b := startConnected(t, p, "--env", "CRAC_FD_POLICY=file:/etc/crac/policy.yaml", option("checkpoint.image", image))
	put := func(script string) { b.exec("sh", "-c", "mkdir -p /etc/crac; cd /etc/crac; rm -f *; "+script) }
	refused := func(parts ...string) {
		t.Helper()
		_, err := t.Ctr(t.Ctx, "tasks", "checkpoint", b.id)
		for _, part := range parts {
			if err == nil || !strings.Contains(err.Error(), part) {
				t.Errorf("the checkpoint gives %v, want an error with %q", err, part)
			}
		}
		b.wantStatus(containerd.Running)
	}
	n, err := t.Network()
	if err != nil {
		t.Fatal(err)
	}

	refused("/etc/crac/policy.yaml", "no such file")
	put("mkfifo policy.yaml")
	refused("no regular file")
	put("ln -s /proc/1/environ policy.yaml") // of the root file system, where /proc is empty
	refused("no such file")
	put("printf 'type: socket\naction: shut\n' > policy.yaml")
	refused("policy.yaml of the image: line 2 (rule 1): unknown action")
	put("printf '" + strings.ReplaceAll(p.remote("error"), "\n", "\n") + "' > p; ln -s /etc/crac/p policy.yaml")
	refused("descriptor ", fmt.Sprintf("-> %s:%d", n.Gateway, p.port), "forbidden")
	mustHaveImage(t, image, false)

	put("printf '" + strings.ReplaceAll(p.remote("close"), "\n", "\n") + "' > policy.yaml")
	b.checkpoint()
	b.says("recv got ECONNABORTED", "epoll got ECONNABORTED")
	mustHaveImage(t, image, true)
}

// A policy that cannot be read is refused when the container is made.
func TestFDPolicyInError(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	for policy, says := range map[string]string{
		"close":                               "is neither",
		"type: socket\nactoin: close":         "line 2 (rule 1)",
		"type: socket\nport: 1\naction: x":    `unknown key "port"`,
		"file:policy.yaml":                    "absolute",
		`[{"type":"socket","action":"shut"}]`: "for the type socket there are error, ignore, close, reopen",
	} {
		_, err := tryStart(t, how{flags: []string{option("fd-policy", policy)}, args: []string{"true"}})
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q gives %v, want an error with %q", policy, err, says)
		}
	}
}

// kinds is a program that holds one of each kind. It says what it gets on its connections, who
// connects to it, and, when it is asked, what is left to read of its file.
const kinds = `
import errno
pipe = os.pipe()
u = socket.socket(socket.AF_UNIX); u.bind("/s"); u.listen(1)
f = open("/data", "w+"); f.write("before,after"); f.flush(); f.seek(7)
t = socket.create_server(("0.0.0.0", 7000))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); udp.connect(("127.0.0.1", 9999))
s6 = socket.create_server(("::1", 7006), family=socket.AF_INET6)
c6 = socket.create_connection(("::1", 7006)); a6 = s6.accept()[0]
def run(f, *args):
    import threading
    threading.Thread(target=f, args=args, daemon=True).start()
def say(*words): os.write(1, (" ".join(words) + "\n").encode())
def receive(name, s):
    try:
        say(name, "got", s.recv(100).decode() or "end")
    except OSError as e:
        say(name, "got", errno.errorcode[e.errno])
def accept(name, s):
    while True:
        c = s.accept()[0]
        say(name, "accepted")
        c.close()
def ask():
    while not os.path.exists("/ask"): time.sleep(0.05)
    say("file", f.read())
    try:
        udp.send(b"x")
    except OSError as e:
        say("udp sends", errno.errorcode[e.errno])
for job in [(receive, "udp", udp), (receive, "tcp6", c6), (accept, "tcp", t), (accept, "unix", u), (ask,)]: run(*job)
say("descriptors", *[f"{n}={fd}" for n, fd in [("pipe", pipe[0]), ("unix", u.fileno()), ("file", f.fileno()), ("tcp", t.fileno())]])
`

// What can be closed and what can be opened again is, in a clone as well; what cannot is refused,
// with the reason.
func TestFDPolicyOfEveryKind(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image := ref(t)
	b := holding(t, kinds, "--env", "CRAC_FD_POLICY=file:/policy", option("checkpoint.image", image))
	put := func(policy string) {
		b.exec("python3", "-c", "import sys; open('/policy', 'w').write(sys.argv[1])", policy)
	}

	for _, tt := range []struct{ policy, says string }{
		{"type: pipe\naction: error", ", pipe: forbidden"},
		{"type: pipe\naction: close", "a pipe cannot be closed from outside"},
		{"type: pipe\naction: reopen", "for the type pipe there are error, ignore, close"},
		{"type: socket\nfamily: unix\nlocalPath: /s\naction: error", "unix stream /s listening: forbidden"},
		{"type: socket\nfamily: unix\nlocalPath: /s\naction: close", "would leave the program without its listener"},
		{"type: file\npath: /data\naction: close", "a file cannot be closed from outside"},
		{"type: socket\nlocalPort: 7000\naction: close", "would leave the program without its listener"},
		{"type: socket\nfamily: ipv6\nremotePort: 7006\naction: reopen", "tcp [::1]:"},
	} {
		put(tt.policy)
		if _, err := t.Ctr(t.Ctx, "tasks", "checkpoint", b.id); err == nil || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%q: the checkpoint gives %v, want an error with %q", tt.policy, err, tt.says)
		}
	}
	mustHaveImage(t, image, false)

	put(`type: file
path: /data
action: reopen
---
type: socket
listening: true
action: reopen
---
type: socket
family: ip
remoteAddress: *
action: close
---
type: pipe
action: ignore
`)
	b.checkpoint()
	b.says("udp got ECONNABORTED", "tcp6 got ECONNABORTED")

	clone := start(t, how{image: image, flags: []string{option("restore", "require")}})
	clone.says("tcp6 got end")
	clone.exec("touch", "/ask")
	clone.exec("python3", "-c", `
import socket
socket.create_connection(("127.0.0.1", 7000))
socket.socket(socket.AF_UNIX).connect("/s")`)
	clone.says("file after", "udp sends EDESTADDRREQ", "tcp accepted", "unix accepted")
}

// A clone has the policy of its own request.
func TestFDPolicyOfAClone(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image := ref(t)
	script := []string{"sh", "-c", "mkfifo /f; exec 7<>/f; while :; do echo tick; sleep 0.05; done"}
	original := start(t, how{args: script, flags: []string{option("checkpoint.image", image)}})
	original.says("tick")
	original.checkpoint()
	clone := start(t, how{image: image, args: script, flags: []string{option("restore", "require"), option("checkpoint.image", ref(t)), option("fd-policy", "type: file\npath: /f\naction: error")}})
	_, err := t.Ctr(t.Ctx, "tasks", "checkpoint", clone.id)
	if want := fmt.Sprintf("process %d (sh, 1 inside): descriptor 7, fifo /f: forbidden", clone.task().Pid()); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("a checkpoint of the clone gives %v, want an error with %q", err, want)
	}
	clone.wantStatus(containerd.Running)
}

// The processes of the whole tree are looked at; those of exec, which no dump holds, are not.
func TestFDPolicyOfChildren(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	dir, err := t.Path("dumps")
	if err != nil {
		t.Fatal(err)
	}
	b := start(t, how{
		args:  []string{"sh", "-c", "mkfifo /f; (exec 7<>/f; echo ready; while :; do sleep 0.05; done) & wait"},
		flags: []string{option("fd-policy", "type: file\npath: /f\naction: error")},
	})
	b.says("ready")
	if _, err := t.Ctr(t.Ctx, "tasks", "checkpoint", "--image-path", filepath.Join(dir, b.id), b.id); err == nil || !strings.Contains(err.Error(), "descriptor 7, fifo /f: forbidden") {
		t.Errorf("a FIFO of a child: %v", err)
	}
	e := start(t, how{
		args:  []string{"sh", "-c", "mkfifo /f; while :; do sleep 0.05; done"},
		flags: []string{option("fd-policy", "type: file\npath: /f\naction: error")},
	})
	ended := make(chan error, 1)
	go func() {
		_, err := e.tryExec("sh", "-c", "exec 7<>/f; touch /ready; while [ ! -e /dumped ]; do sleep 0.05; done")
		ended <- err
	}()
	t.Eventually("exec runs", func() bool { _, err := e.tryExec("test", "-e", "/ready"); return err == nil })
	if _, err := t.Ctr(t.Ctx, "tasks", "checkpoint", "--image-path", filepath.Join(dir, e.id), e.id); err != nil {
		t.Errorf("a FIFO of a process that no dump holds: %v", err)
	}
	e.exec("touch", "/dumped")
	if err := <-ended; err != nil {
		t.Errorf("the exec ends with %v", err)
	}
}
