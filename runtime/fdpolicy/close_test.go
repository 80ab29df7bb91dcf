package fdpolicy

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/runtime/inspect"
)

// clientEnv makes the test binary a client: "NETWORK ADDRESS WAIT". It connects,
// waits in the given way for data, and says what it got.
const clientEnv = "CRAC_TEST_CLIENT"

func TestMain(m *testing.M) {
	if how := os.Getenv(clientEnv); how != "" {
		if err := client(strings.Fields(how)); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func client(how []string) error {
	network, wait := how[0], how[2]
	at, err := netip.ParseAddrPort(how[1])
	if err != nil {
		return err
	}
	domain, kind := unix.AF_INET6, unix.SOCK_STREAM
	var sa unix.Sockaddr = &unix.SockaddrInet6{Addr: at.Addr().As16(), Port: int(at.Port())}
	if strings.HasSuffix(network, "4") {
		domain, sa = unix.AF_INET, &unix.SockaddrInet4{Addr: at.Addr().As4(), Port: int(at.Port())}
	}
	if strings.HasPrefix(network, "udp") {
		kind = unix.SOCK_DGRAM
	}
	fd, err := unix.Socket(domain, kind, 0)
	if err != nil {
		return err
	}
	if err := unix.Connect(fd, sa); err != nil {
		return err
	}
	poll, err := unix.EpollCreate1(0)
	if err != nil {
		return err
	}
	if err := unix.EpollCtl(poll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLRDHUP}); err != nil {
		return err
	}
	fmt.Printf("connected %d\n", fd)
	buf := make([]byte, 100)
	switch wait {
	case "read":
	case "epoll":
		for {
			_, err := unix.EpollWait(poll, make([]unix.EpollEvent, 1), -1)
			if !errors.Is(err, unix.EINTR) {
				break
			}
		}
	case "write": // busy with something else, it writes when it is told to
		_, _ = io.Copy(io.Discard, os.Stdin)
		err := unix.Send(fd, []byte("x"), unix.MSG_NOSIGNAL)
		fmt.Printf("write: %s\n", errno(err))
		return nil
	}
	n, err := unix.Read(fd, buf)
	fmt.Printf("read %d: %s\n", max(n, 0), errno(err))
	return nil
}

func errno(err error) string {
	var n unix.Errno
	if errors.As(err, &n) {
		return unix.ErrnoName(n)
	}
	return fmt.Sprint(err)
}

// running is a client that waits.
type running struct {
	pid, fd int
	in      io.Closer
	out     *bufio.Reader
}

func startClient(t *testing.T, network, address, wait string) *running {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), clientEnv+"="+network+" "+address+" "+wait)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	c := &running{pid: cmd.Process.Pid, in: in, out: bufio.NewReader(out)}
	said := c.line(t)
	number, ok := strings.CutPrefix(said, "connected ")
	if c.fd, err = strconv.Atoi(number); !ok || err != nil {
		t.Fatalf("the client says %q", said)
	}
	return c
}

// line is what the client says next. A client that is left in silence fails the
// test.
func (c *running) line(t *testing.T) string {
	t.Helper()
	line := make(chan string, 1)
	go func() {
		s, _ := c.out.ReadString('\n')
		line <- strings.TrimSpace(s)
	}()
	select {
	case s := <-line:
		return s
	case <-time.After(20 * time.Second):
		t.Fatal("the client hears nothing")
		return ""
	}
}

// freeze stops the client, when it has begun to wait.
func (c *running) freeze(t *testing.T) {
	t.Helper()
	time.Sleep(20 * time.Millisecond) // it may not wait yet, which is as good
	c.signal(t, unix.SIGSTOP)
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.pid))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(data), ") T ") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the client does not stop")
		}
	}
}

func (c *running) signal(t *testing.T, sig unix.Signal) {
	t.Helper()
	if err := unix.Kill(c.pid, sig); err != nil {
		t.Fatal(err)
	}
}

func (c *running) inspect(t *testing.T) *inspect.Container {
	t.Helper()
	all, err := inspect.Inspect(c.pid, []int{c.pid}, inspect.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func policy(t *testing.T, text string) oci.FDPolicy {
	t.Helper()
	p, err := oci.ParseFDPolicy([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root may close what others hold")
	}
}

// tcpServer accepts connections and tells how each ended.
func tcpServer(t *testing.T, network, address string) (at string, ends <-chan error) {
	t.Helper()
	lc := net.ListenConfig{}
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(t.Context(), network, address)
	if err != nil {
		t.Skipf("%s is not to be had here: %v", network, err)
	}
	t.Cleanup(func() { l.Close() })
	ended := make(chan error, 10)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, err = c.Read(make([]byte, 1))
			c.Close()
			ended <- err
		}
	}()
	return l.Addr().String(), ended
}

// The program sees an error, and not silence, in each way in which it may wait,
// and the other end hears of it while the program is still frozen.
func TestCloseIsSeen(t *testing.T) {
	needRoot(t)
	udp, err := net.ListenPacket("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	tcp4, ends4 := tcpServer(t, "tcp4", "127.0.0.1:0")
	tcp6, ends6 := tcpServer(t, "tcp6", "[::1]:0")
	mapped := strings.Replace(tcp4, "127.0.0.1", "[::ffff:127.0.0.1]", 1)

	for _, tt := range []struct {
		name, network, address, wait string
		ends                         <-chan error
		destroyed, disconnected      string // what the program says
	}{
		{"tcp, read", "tcp4", tcp4, "read", ends4, "read 0: ECONNABORTED", "read 0: ECONNRESET"},
		{"tcp, epoll", "tcp4", tcp4, "epoll", ends4, "read 0: ECONNABORTED", "read 0: ECONNRESET"},
		{"tcp, write", "tcp4", tcp4, "write", ends4, "write: ECONNABORTED", "write: ECONNRESET"},
		{"tcp6, read", "tcp6", tcp6, "read", ends6, "read 0: ECONNABORTED", "read 0: ECONNRESET"},
		{"tcp over a mapped address, epoll", "tcp6", mapped, "epoll", ends4, "read 0: ECONNABORTED", "read 0: ECONNRESET"},
		{"udp, read", "udp4", udp.LocalAddr().String(), "read", nil, "read 0: ECONNABORTED", "read 0: <nil>"},
		{"udp, epoll", "udp4", udp.LocalAddr().String(), "epoll", nil, "read 0: ECONNABORTED", "read 0: <nil>"},
		{"udp, write", "udp4", udp.LocalAddr().String(), "write", nil, "write: EDESTADDRREQ", "write: EDESTADDRREQ"},
	} {
		for _, by := range []struct {
			name  string
			close func(int, *inspect.SocketInfo) error
			want  string
		}{{"destroyed", destroy, tt.destroyed}, {"disconnected", disconnect, tt.disconnected}} {
			t.Run(tt.name+", "+by.name, func(t *testing.T) {
				c := startClient(t, tt.network, tt.address, tt.wait)
				c.freeze(t)
				var fd *inspect.FD
				for i, f := range c.inspect(t).Process(c.pid).FDs {
					if f.Number == c.fd {
						fd = &c.inspect(t).Process(c.pid).FDs[i]
					}
				}
				if fd == nil || !fd.Socket.Connected() {
					t.Fatalf("descriptor %d is %v", c.fd, fd)
				}
				own, err := inspect.Duplicate(c.pid, c.fd)
				if err != nil {
					t.Fatal(err)
				}
				defer unix.Close(own)
				if err := isClosed(own, fd.Socket); err == nil {
					t.Fatal("it counts as closed before it is")
				}
				err = by.close(own, fd.Socket)
				if by.name == "destroyed" && errors.Is(err, unix.EOPNOTSUPP) {
					t.Skip("this kernel has no SOCK_DESTROY (CONFIG_INET_DIAG_DESTROY)")
				}
				if err == nil {
					err = isClosed(own, fd.Socket)
				}
				if err != nil {
					t.Fatal(err)
				}
				if tt.ends != nil {
					select {
					case err := <-tt.ends:
						if !errors.Is(err, unix.ECONNRESET) {
							t.Errorf("the other end sees %v", err)
						}
					case <-time.After(5 * time.Second):
						t.Error("the other end hears nothing")
					}
				}
				c.signal(t, unix.SIGCONT)
				c.in.Close()
				if got := c.line(t); got != by.want {
					t.Errorf("the program says %q, want %q", got, by.want)
				}
			})
		}
	}
}

func TestEnforce(t *testing.T) {
	needRoot(t)
	at, ends := tcpServer(t, "tcp4", "127.0.0.1:0")
	_, port, err := net.SplitHostPort(at)
	if err != nil {
		t.Fatal(err)
	}
	rule := "type: socket\nremotePort: " + port + "\naction: "

	c := startClient(t, "tcp4", at, "read")
	c.freeze(t)

	var refused *RefusedError
	_, err = Enforce(policy(t, rule+"close\n---\ntype: filedescriptor\nregex: .*eventpoll.*\naction: error"), c.inspect(t))
	if !errors.As(err, &refused) || len(refused.Refused) != 1 || refused.Refused[0].FD.Kind != inspect.Epoll {
		t.Fatalf("got %v", err)
	}
	for _, part := range []string{fmt.Sprintf("process %d (", c.pid), "descriptor " + strconv.Itoa(refused.Refused[0].FD.Number), "rule 2 (line 5", "before-checkpoint"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q lacks %q", err, part)
		}
	}
	select {
	case err := <-ends:
		t.Fatalf("a refused checkpoint has closed a connection: %v", err)
	case <-time.After(50 * time.Millisecond):
	}

	_, err = Enforce(policy(t, rule+"error"), c.inspect(t))
	if !errors.As(err, &refused) || !strings.Contains(err.Error(), "-> 127.0.0.1:"+port) {
		t.Errorf("the peer is not named: %v", err)
	}

	done, err := Enforce(policy(t, rule+"close\n---\ntype: filedescriptor\naction: ignore\nwarn: false"), c.inspect(t))
	if err != nil {
		t.Fatal(err)
	}
	if len(done) != 1 || !done[0].Close || done[0].FD.Number != c.fd || !strings.Contains(done[0].String(), "closed by rule 1") {
		t.Errorf("done: %v", done)
	}
	if err := <-ends; !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("the other end sees %v", err)
	}
	// It is an ordinary socket without a connection now, and the rule has nothing more to do.
	again, err := Enforce(policy(t, "type: socket\naction: close"), c.inspect(t))
	if err != nil || len(again) != 1 || again[0].Close {
		t.Errorf("a second time: %v, %v", again, err)
	}
	c.signal(t, unix.SIGCONT)
	if got := c.line(t); !strings.HasPrefix(got, "read 0: ECONN") {
		t.Errorf("the program says %q", got)
	}
}

// A connection that was replaced since it was looked at is not touched.
func TestCloseOnlyWhatWasSeen(t *testing.T) {
	needRoot(t)
	at, ends := tcpServer(t, "tcp4", "127.0.0.1:0")
	c := startClient(t, "tcp4", at, "read")
	all := c.inspect(t)
	for i := range all.Process(c.pid).FDs {
		if fd := &all.Process(c.pid).FDs[i]; fd.Number == c.fd {
			fd.Socket.Cookie++
		}
	}
	if _, err := Enforce(policy(t, "type: socket\naction: close"), all); !errors.Is(err, unix.ESTALE) {
		t.Errorf("got %v", err)
	}
	select {
	case err := <-ends:
		t.Errorf("the connection was closed: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
}
