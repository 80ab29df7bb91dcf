package inspect

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// holderEnv makes the test binary a process that holds one descriptor of each
// kind, in a directory of its own, says which, and waits.
const holderEnv = "CRAC_TEST_HOLDER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(holderEnv); dir != "" {
		held, err := hold(dir)
		if err == nil {
			err = json.NewEncoder(os.Stdout).Encode(held)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// lacking are the errors for what a kernel does not have or does not allow.
var lacking = []error{unix.ENOSYS, unix.EPERM, unix.EAFNOSUPPORT, unix.EPROTONOSUPPORT, unix.ENOENT, unix.ENODEV}

// hold opens everything; what this kernel or its configuration does not have is
// left out.
func hold(dir string) (map[string]int, error) {
	held := make(map[string]int)
	var failed error
	add := func(name string, fd int, err error) int {
		switch {
		case err == nil:
			held[name] = fd
		case slices.ContainsFunc(lacking, func(e error) bool { return errors.Is(err, e) }):
		case failed == nil:
			failed = fmt.Errorf("%s: %w", name, err)
		}
		return fd
	}
	call := func(name string, nr uintptr, args ...uintptr) int {
		args = append(args, 0, 0, 0, 0, 0)
		fd, _, errno := unix.Syscall6(nr, args[0], args[1], args[2], args[3], args[4], 0)
		if errno != 0 {
			return add(name, -1, errno)
		}
		return add(name, int(fd), nil)
	}
	file := func(name, path string, flags int) int {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0o600)
		return add(name, fd, err)
	}
	in := func(name string) string { return filepath.Join(dir, name) }
	must := func(errs ...error) {
		for _, err := range errs {
			if err != nil && failed == nil {
				failed = err
			}
		}
	}

	file("file", in("file"), unix.O_CREAT|unix.O_RDWR)
	fd := file("deleted", in("deleted"), unix.O_CREAT|unix.O_WRONLY)
	if _, err := unix.Write(fd, make([]byte, 12345)); err != nil {
		must(err)
	}
	must(unix.Ftruncate(fd, 1<<30), unix.Unlink(in("deleted")))
	file("relinked", in("a"), unix.O_CREAT|unix.O_RDONLY)
	must(unix.Link(in("a"), in("b")), unix.Unlink(in("a")))
	file("directory", dir, unix.O_RDONLY|unix.O_DIRECTORY)
	must(unix.Symlink("/nowhere", in("link")))
	file("symlink", in("link"), unix.O_PATH|unix.O_NOFOLLOW)
	must(unix.Mkfifo(in("fifo"), 0o600))
	file("fifo", in("fifo"), unix.O_RDWR)
	file("null", "/dev/null", unix.O_RDONLY)
	file("terminal", "/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY)
	file("namespace", "/proc/self/ns/uts", unix.O_RDONLY)
	var pair [2]int
	must(unix.Pipe(pair[:]))
	add("pipe", pair[0], nil)

	fd, err := unix.Eventfd(0, 0)
	add("eventfd", fd, err)
	fd, err = unix.EpollCreate1(0)
	add("eventpoll", fd, err)
	fd, err = unix.TimerfdCreate(unix.CLOCK_MONOTONIC, 0)
	add("timerfd", fd, err)
	fd, err = unix.Signalfd(-1, &unix.Sigset_t{}, 0)
	add("signalfd", fd, err)
	fd, err = unix.InotifyInit()
	add("inotify", fd, err)
	fd, err = unix.FanotifyInit(0, 0)
	add("fanotify", fd, err)
	fd, err = unix.MemfdCreate("x", 0)
	add("memfd", fd, err)
	fd, err = unix.PidfdOpen(os.Getpid(), 0)
	add("pidfd", fd, err)
	fd, err = unix.PerfEventOpen(&unix.PerfEventAttr{Type: unix.PERF_TYPE_SOFTWARE, Size: uint32(unsafe.Sizeof(unix.PerfEventAttr{})), Config: unix.PERF_COUNT_SW_DUMMY}, 0, -1, -1, 0)
	add("perf_event", fd, err)
	params := make([]byte, 120) // struct io_uring_params
	ring := call("io_uring", unix.SYS_IO_URING_SETUP, 4, uintptr(unsafe.Pointer(&params[0])))
	if ring >= 0 {
		_, err := unix.Mmap(ring, 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
		must(err)
	}
	call("userfaultfd", unix.SYS_USERFAULTFD, uintptr(unix.O_CLOEXEC|1)) // 1: UFFD_USER_MODE_ONLY
	attr := []uint32{unix.BPF_MAP_TYPE_ARRAY, 4, 4, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	call("bpf-map", unix.SYS_BPF, unix.BPF_MAP_CREATE, uintptr(unsafe.Pointer(&attr[0])), uintptr(len(attr)*4))

	socket := func(name string, domain, kind, protocol int) int {
		fd, err := unix.Socket(domain, kind, protocol)
		return add(name, fd, err)
	}
	socket("netlink", unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE)
	socket("packet", unix.AF_PACKET, unix.SOCK_RAW, 0)
	socket("raw", unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_ICMP)
	socket("vsock", unix.AF_VSOCK, unix.SOCK_STREAM, 0)
	socket("unbound", unix.AF_INET, unix.SOCK_STREAM, 0)
	loopback := [4]byte{127, 0, 0, 1}
	fd = socket("mptcp", unix.AF_INET, unix.SOCK_STREAM, unix.IPPROTO_MPTCP)
	if fd >= 0 {
		must(unix.Bind(fd, &unix.SockaddrInet4{Addr: loopback}), unix.Listen(fd, 1))
	}
	fd = socket("udp", unix.AF_INET, unix.SOCK_DGRAM, 0)
	must(unix.Connect(fd, &unix.SockaddrInet4{Addr: loopback, Port: 53}))
	fd = socket("udp6", unix.AF_INET6, unix.SOCK_DGRAM, 0)
	must(unix.Bind(fd, &unix.SockaddrInet6{Addr: [16]byte{15: 1}}))

	// A listener of IPv6 and IPv4, one connection that is accepted, and as many as
	// its queue takes: the next one waits for an answer.
	listener := socket("listener", unix.AF_INET6, unix.SOCK_STREAM, 0)
	must(unix.Bind(listener, &unix.SockaddrInet6{}), unix.Listen(listener, 1))
	name, err := unix.Getsockname(listener)
	must(err)
	if failed != nil {
		return nil, failed
	}
	at := &unix.SockaddrInet4{Addr: loopback, Port: name.(*unix.SockaddrInet6).Port}
	client := socket("client", unix.AF_INET, unix.SOCK_STREAM, 0)
	must(unix.Connect(client, at))
	fd, _, err = unix.Accept(listener)
	add("accepted", fd, err)
	for range 2 {
		must(unix.Connect(socket("queued", unix.AF_INET, unix.SOCK_STREAM, 0), at))
	}
	fd = socket("syn-sent", unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK, 0)
	if err := unix.Connect(fd, at); !errors.Is(err, unix.EINPROGRESS) {
		must(fmt.Errorf("the queue took one more: %w", err))
	}

	both, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	must(err)
	add("pair", both[0], nil)
	add("other", both[1], nil)
	fd = socket("abstract", unix.AF_UNIX, unix.SOCK_SEQPACKET, 0)
	must(unix.Bind(fd, &unix.SockaddrUnix{Name: "@" + in("abstract")}), unix.Listen(fd, 1))
	fd = socket("outside", unix.AF_UNIX, unix.SOCK_DGRAM, 0)
	must(unix.Connect(fd, &unix.SockaddrUnix{Name: in("outside")}))

	// A mapping of a device, and System V memory. /dev/mem is the device that is
	// everywhere; where it is locked, there is none.
	if mem, err := unix.Open("/dev/mem", unix.O_RDONLY, 0); err == nil {
		if _, err := unix.Mmap(mem, 0xf0000, 4096, unix.PROT_READ, unix.MAP_SHARED); err == nil {
			held["mapped device"] = mem
		}
	}
	shm, err := unix.SysvShmGet(unix.IPC_PRIVATE, 4096, 0o600)
	if err == nil {
		_, err = unix.SysvShmAttach(shm, 0, 0)
		_, _ = unix.SysvShmCtl(shm, unix.IPC_RMID, nil)
	}
	must(err)
	return held, failed
}

// startHolder starts one, and returns its pid and its descriptors. It ends with
// the test.
func startHolder(t *testing.T, dir string) (pid int, held map[string]int) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), holderEnv+"="+dir)
	cmd.Stderr = os.Stderr
	// The session of the tests may have its leader outside this pid namespace.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
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
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("the process that holds descriptors: %v", err)
		}
	})
	line, err := bufio.NewReader(out).ReadBytes('\n')
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(line, &held); err != nil {
		t.Fatal(err)
	}
	return cmd.Process.Pid, held
}
