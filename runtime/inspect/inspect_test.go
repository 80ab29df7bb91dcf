package inspect

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/oci"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root may look into other processes")
	}
}

func TestInspect(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	outside, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "outside"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer outside.Close()
	pid, held := startHolder(t, dir)
	c, err := Inspect(pid, []int{pid}, Options{Memory: true})
	if err != nil {
		t.Fatal(err)
	}
	p := c.Process(pid)
	if p == nil {
		t.Fatal("no process")
	}
	if p.Parent != os.Getpid() || p.Inside != pid || p.Outside || p.Zombie || p.Detached || len(p.Args) != 1 || !strings.HasPrefix(p.Args[0], "/") || p.Name == "" {
		t.Errorf("process: %+v", *p)
	}
	for _, ns := range []string{"mnt", "net", "pid", "user", "uts", "ipc"} {
		if p.Namespaces[ns] == 0 {
			t.Errorf("no %s namespace: %v", ns, p.Namespaces)
		}
	}
	fds := make(map[string]*FD)
	for name, n := range held {
		i := slices.IndexFunc(p.FDs, func(fd FD) bool { return fd.Number == n })
		if i < 0 {
			t.Errorf("descriptor %d (%s) is not seen", n, name)
			continue
		}
		fds[name] = &p.FDs[i]
	}
	// Every kernel that the project runs on has these.
	for _, name := range []string{
		"file", "deleted", "relinked", "directory", "symlink", "fifo", "null", "terminal", "namespace", "pipe",
		"eventfd", "eventpoll", "timerfd", "signalfd", "inotify", "memfd", "pidfd",
		"netlink", "packet", "raw", "unbound", "udp", "udp6", "listener", "client", "accepted", "queued", "syn-sent", "pair", "other", "abstract", "outside",
	} {
		if fds[name] == nil {
			t.Fatalf("the process could not open %s", name)
		}
	}
	kinds := map[string]Kind{
		"file": File, "deleted": File, "relinked": File, "null": Device,
	}
	for name, fd := range fds {
		want, ok := kinds[name]
		switch {
		case ok:
		case fd.Socket != nil:
			want = Socket
		case name == "mapped device":
			want = Device
		default:
			want = Kind(name)
		}
		if fd.Kind != want {
			t.Errorf("%s is a %s, want %s (%s)", name, fd.Kind, want, fd.Link)
		}
		if fd.Foreign || fd.Stdio {
			t.Errorf("%s is foreign (%v) or a stream of the container (%v)", name, fd.Foreign, fd.Stdio)
		}
	}
	if fd := fds["file"]; fd.Path != filepath.Join(dir, "file") || fd.Deleted || fd.Links != 1 || fd.Flags&unix.O_ACCMODE != unix.O_RDWR {
		t.Errorf("file: %+v", fd)
	}
	if fd := fds["deleted"]; fd.Path != filepath.Join(dir, "deleted") || !fd.Deleted || fd.Links != 0 || fd.Size < 12345 || fd.Size > 1<<20 {
		t.Errorf("deleted: %+v", fd)
	}
	if fd := fds["relinked"]; fd.Path != filepath.Join(dir, "a") || !fd.Deleted || fd.Links != 1 {
		t.Errorf("relinked: %+v", fd)
	}
	if fd := fds["memfd"]; fd.Path != "" || fd.For().Type != oci.FDOther {
		t.Errorf("memfd: %+v", fd)
	}

	port := ":" + strconv.Itoa(int(fds["listener"].Socket.Local.Port()))
	for name, want := range map[string]struct {
		text      string
		connected bool
	}{
		"listener": {text: "tcp [::]:PORT listening"},
		"client":   {text: "tcp 127.0.0.1:* -> 127.0.0.1:PORT", connected: true},
		"accepted": {text: "tcp 127.0.0.1:PORT -> 127.0.0.1:*", connected: true},
		"syn-sent": {text: "tcp 127.0.0.1:* -> 127.0.0.1:PORT (syn-sent)", connected: true},
		"unbound":  {text: "tcp (close)"},
		"udp":      {text: "udp 127.0.0.1:* -> 127.0.0.1:53", connected: true},
		"udp6":     {text: "udp [::1]:*"},
		"raw":      {text: "raw"},
		"netlink":  {text: "netlink raw"},
		"packet":   {text: "packet raw"},
		"pair":     {text: "unix stream", connected: true},
		"abstract": {text: "unix seqpacket @" + dir + "/abstract listening"},
		"outside":  {text: "unix dgram -> " + dir + "/outside", connected: true},
		"mptcp":    {text: "mptcp 127.0.0.1:* listening"},
		"vsock":    {text: "vsock stream"},
	} {
		fd := fds[name]
		if fd == nil && (name == "mptcp" || name == "vsock") {
			continue // not in every kernel
		}
		if got := strings.ReplaceAll(fd.String(), port, ":PORT"); !alike(want.text, got) {
			t.Errorf("%s is %q, want %q", name, got, want.text)
		}
		if fd.Socket.Connected() != want.connected {
			t.Errorf("%s is connected: %v", name, !want.connected)
		}
		if fd.Socket.Cookie == 0 {
			t.Errorf("%s has no cookie", name)
		}
	}
	if s := fds["accepted"].Socket; !s.Inbound || s.Connection() != "tcp from 127.0.0.1 to port "+port[1:] {
		t.Errorf("the server's end is %q", s.Connection())
	}
	if s := fds["client"].Socket; s.Inbound || s.Connection() != "tcp to 127.0.0.1"+port {
		t.Errorf("the client's end is %q", s.Connection())
	}
	if n := fds["listener"].Socket.Pending; n != 2 {
		t.Errorf("%d connections wait to be accepted, want 2", n)
	}
	if fd := fds["accepted"].For(); fd.Family != oci.FDIPv4 || fd.Remote.Port() == 0 || fd.Type != oci.FDSocket {
		t.Errorf("an IPv4 connection to an IPv6 socket is %+v", fd)
	}
	if s := fds["pair"].Socket; s.External || s.PeerInode != fds["other"].Inode {
		t.Errorf("socket pair: %+v", s)
	}
	if s := fds["outside"].Socket; !s.External || !s.PeerHere {
		t.Errorf("a socket of another process: %+v", s)
	}

	var ring, device, sysv bool
	for _, m := range p.Mapped {
		ring = ring || m.Anon && m.Path == "anon_inode:[io_uring]"
		device = device || m.Device && m.Path == "/dev/mem"
		sysv = sysv || m.SysV
	}
	if _, ok := held["io_uring"]; ring != ok {
		t.Errorf("a mapping of io_uring is seen: %v, want %v", ring, ok)
	}
	if _, ok := held["mapped device"]; device != ok {
		t.Errorf("a mapping of a device is seen: %v, want %v", device, ok)
	}
	if !sysv {
		t.Errorf("no mapping of System V memory is seen: %v", p.Mapped)
	}
	for _, m := range p.Mapped {
		if !m.Anon && !m.Device && !m.SysV && !m.Deleted {
			t.Errorf("%+v is worth no word", m)
		}
	}
}

// alike compares with a pattern in which * stands for a number.
func alike(pattern, got string) bool {
	for {
		before, after, more := strings.Cut(pattern, "*")
		rest, ok := strings.CutPrefix(got, before)
		if !ok {
			return false
		}
		if !more {
			return rest == ""
		}
		pattern, got = after, strings.TrimLeft(rest, "0123456789")
		if got == rest {
			return false
		}
	}
}

// What exec starts, and what nobody holds any more.
func TestRelations(t *testing.T) {
	needRoot(t)
	sleep := func(name string, args ...string) *exec.Cmd {
		cmd := exec.Command(name, args...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		})
		return cmd
	}
	first := sleep("sh", "-c", "sleep 60 & wait")
	other := sleep("sleep", "60")
	zombie := exec.Command("true")
	if err := zombie.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = zombie.Wait() }()
	var child int
	for deadline := time.Now().Add(5 * time.Second); child == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the shell has no child")
		}
		child = onlyChild(t, first.Process.Pid)
	}
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_PID, zombie.Process.Pid, &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	c, err := Inspect(first.Process.Pid, []int{first.Process.Pid, child, other.Process.Pid, zombie.Process.Pid, 1 << 22}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Processes) != 4 {
		t.Fatalf("%d processes: %+v", len(c.Processes), c.Processes)
	}
	for pid, outside := range map[int]bool{first.Process.Pid: false, child: false, other.Process.Pid: true, zombie.Process.Pid: true} {
		p := c.Process(pid)
		if p.Outside != outside {
			t.Errorf("process %d (%s) is outside: %v", pid, p.Name, p.Outside)
		}
		if p.Zombie != (pid == zombie.Process.Pid) {
			t.Errorf("process %d (%s) is a zombie: %v", pid, p.Name, p.Zombie)
		}
	}
	// All have the same standard streams, but only three descriptors are streams.
	for _, fd := range c.Process(child).FDs {
		if fd.Stdio != (fd.Number <= 2) {
			t.Errorf("descriptor %d of the child is a stream: %v", fd.Number, fd.Stdio)
		}
	}
}

// A file of another mount namespace, a terminal of another session.
func TestForeign(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cmd := exec.Command("unshare", "--mount", "--pid", "--fork", "sh", "-c", "mount -t tmpfs none "+dir+" && exec 4>"+dir+"/own && echo ready && read x")
	cmd.ExtraFiles = []*os.File{f}
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		in.Close()
		_ = cmd.Wait()
	}()
	if _, err := out.Read(make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	pid := onlyChild(t, cmd.Process.Pid)
	c, err := Inspect(pid, []int{pid}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	p := c.Process(pid)
	if p.Inside != 1 || !p.Detached {
		t.Errorf("the first process of a pid namespace, in a session of ours: %+v", p)
	}
	for _, fd := range p.FDs {
		switch fd.Number {
		case 3:
			if !fd.Foreign || fd.Path == "" {
				t.Errorf("a file of ours: %+v", fd)
			}
		case 4:
			if fd.Foreign || fd.Path != dir+"/own" {
				t.Errorf("a file of its own: %+v", fd)
			}
		}
	}
}

// onlyChild is the pid of the one child of a process; 0: it has none, or more.
func onlyChild(t *testing.T, pid int) int {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		t.Fatal(err)
	}
	child, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		return 0
	}
	return child
}

// The user is the one that opens files, whatever the process was started as.
func TestUser(t *testing.T) {
	needRoot(t)
	cmd := exec.Command("sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 1234, Gid: 567}}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if _, _, err := User(cmd.Process.Pid); !errors.Is(err, errGone) {
			t.Errorf("of one that has ended: %v", err)
		}
	}()
	if uid, gid, err := User(cmd.Process.Pid); uid != 1234 || gid != 567 || err != nil {
		t.Errorf("got %d:%d, %v", uid, gid, err)
	}
}

// A file whose file system does not answer, such as the workload's own by FUSE, holds
// nobody up: what the kernel knows of it is enough.
func TestFilesystemThatDoesNotAnswer(t *testing.T) {
	needRoot(t)
	fuse, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("no FUSE here: %v", err)
	}
	dir := t.TempDir()
	err = unix.Mount("crac-test", dir, "fuse", 0, fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", fuse))
	if err != nil {
		unix.Close(fuse)
		t.Skipf("FUSE cannot be mounted here: %v", err)
	}
	held, err := unix.Open(dir, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Error(err)
	}
	done := make(chan error, 1)
	go func() {
		c, err := Inspect(os.Getpid(), []int{os.Getpid()}, Options{Memory: true})
		if err == nil && !slices.ContainsFunc(c.Processes[0].FDs, func(fd FD) bool { return fd.Number == held && fd.Kind == Directory && fd.Path == dir }) {
			err = fmt.Errorf("descriptor %d is not seen: %+v", held, c.Processes[0].FDs)
		}
		done <- err
	}()
	select {
	case err = <-done:
	case <-time.After(10 * time.Second):
		err = errors.New("it waits for the file system")
	}
	if err != nil {
		t.Error(err)
	}
	unix.Close(fuse) // ends all that waits
	unix.Close(held)
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
		t.Error(err)
	}
}
