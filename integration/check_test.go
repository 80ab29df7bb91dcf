package integration

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/console"
	containerd "github.com/containerd/containerd/v2/client"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/integration/harness"
)

// checkReport is what programs read of cracctl check.
type checkReport struct {
	Container    string
	OK           bool
	Processes    int
	Participants int
	Findings     []struct {
		Level       string
		Code        string
		PID         int
		Inside      int `json:"container_pid"`
		Program     string
		Descriptors []int
		What        string
		Why         string
		Fix         string
	}
}

// check runs cracctl check and returns what it found, and its exit status.
func (b *box) check() (r checkReport, status int) {
	b.Helper()
	return checkOf(b.T, b.id)
}

func checkOf(t *harness.T, id string) (r checkReport, status int) {
	t.Helper()
	out, err := t.Cracctl(t.Ctx, "check", "--format", "json", id)
	if status = harness.ExitCode(err); status != 0 && status != 1 {
		t.Fatalf("cracctl check: %v", err)
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatalf("cracctl check: %v:\n%s", err, out)
	}
	if r.OK != (status == 0) || r.Container != id || r.Processes == 0 {
		t.Errorf("exit status %d with %+v", status, r)
	}
	return r, status
}

// codes lists what a report has of a level.
func (r checkReport) codes(level string) (codes []string) {
	for _, f := range r.Findings {
		if f.Level == level {
			codes = append(codes, f.Code)
		}
	}
	slices.Sort(codes)
	return slices.Compact(codes)
}

// holding is how a Python program is run that holds something.
func holding(t *harness.T, program string, flags ...string) *box {
	t.Helper()
	needImage(t, "python")
	b := start(t, how{image: harness.ImageRef("python"), flags: flags, args: []string{"/usr/bin/python3", "-c", `
import ctypes, mmap, os, socket, struct, time
libc = ctypes.CDLL(None, use_errno=True)
def call(*args):
    fd = libc.syscall(*[ctypes.c_long(a) if isinstance(a, int) else a for a in args])
    if fd < 0: raise OSError(ctypes.get_errno(), "system call")
    return fd
def child(f):
    if os.fork() == 0:
        f()
        open("/child", "w").close()
        time.sleep(1000)
    while not os.path.exists("/child"): time.sleep(0.01)
` + program + `
print("ready")
while True: time.sleep(1)
`}})
	b.says("ready")
	return b
}

// What check says is what happens: an error, and the checkpoint fails; none, and it succeeds.
func TestCheckForetells(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	outside, err := t.Path("outside")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(outside, 0o755); err != nil { //nolint:gosec // the container's root may be anybody
		t.Fatal(err)
	}
	stream, err := net.Listen("unix", filepath.Join(outside, "stream"))
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	go func() {
		for {
			c, err := stream.Accept()
			if err != nil {
				return
			}
			tb.Cleanup(func() { _ = c.Close() })
		}
	}()
	datagrams, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(outside, "datagrams"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer datagrams.Close()
	volume := "--mount=type=bind,src=" + outside + ",dst=/outside,options=rbind:rw"
	// What a process outside has opened, the container gets over a socket.
	terminal, _, err := console.NewPty()
	if err != nil {
		t.Fatal(err)
	}
	defer terminal.Close()
	foreign, err := os.Open("check_test.go")
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.Close()
	for name, f := range map[string]interface{ Fd() uintptr }{"terminal": terminal, "file": foreign} {
		handOut(t, filepath.Join(outside, name), f)
	}
	const get = `
s = socket.socket(socket.AF_UNIX); s.connect("/outside/%s")
held = socket.recv_fds(s, 1, 1)[1]
s.close()`

	for _, tt := range []struct {
		name, program string
		flags         []string
		errors        string // codes
		warnings      string
		infos         string
	}{
		{name: "nothing", program: `pass`},
		{name: "kinds that CRIU carries", program: `
keep = [os.memfd_create("x"), os.pidfd_open(os.getpid()), os.eventfd(0), open("/proc/self/ns/net"), open("/dev/null"), os.open("/etc", os.O_RDONLY)]
a, b = socket.socketpair()
n = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
l = socket.create_server(("0.0.0.0", 80))
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s = socket.socket(socket.AF_UNIX); s.bind("/s"); s.listen(1); c = socket.socket(socket.AF_UNIX); c.connect("/s")
m = mmap.mmap(-1, 4096)`},
		{name: "io_uring", program: `call(425, 4, ctypes.create_string_buffer(120))`, errors: "io_uring"},
		{name: "userfaultfd", program: `call(323, 1)`, errors: "kind"},
		{name: "device", program: `os.open("/dev/fuse", os.O_RDWR)`, flags: []string{"--privileged", "--device", "/dev/fuse"}, errors: "device"},
		{name: "vsock", program: `v = socket.socket(40, socket.SOCK_STREAM)`, errors: "family"},
		{name: "deleted", program: `f = open("/f", "w"); f.write("x"); f.flush(); os.unlink("/f")`, infos: "deleted"},
		{name: "deleted with holes", program: `f = open("/f", "w"); f.truncate((1 << 30) + 4096); os.unlink("/f")`, infos: "deleted"},
		{name: "deleted with another name", program: `f = open("/f", "w"); os.link("/f", "/g"); os.unlink("/f")`, errors: "linked"},
		{name: "deleted from the image", program: `f = open("/etc/passwd"); os.unlink("/etc/passwd")`, errors: "linked"},
		{name: "mapped and deleted", program: `f = open("/f", "w+b"); f.truncate(4096); m = mmap.mmap(f.fileno(), 4096); f.close(); os.link("/f", "/g"); os.unlink("/f")`, errors: "linked"},
		{name: "waiting connection", program: `l = socket.create_server(("127.0.0.1", 0)); c = socket.create_connection(l.getsockname())`, errors: "pending", warnings: "connection"},
		{name: "connection", program: `l = socket.create_server(("127.0.0.1", 0)); c = socket.create_connection(l.getsockname()); a = l.accept()`, warnings: "connection"},
		{
			name: "connection, not allowed", program: `l = socket.create_server(("127.0.0.1", 0)); c = socket.create_connection(l.getsockname()); a = l.accept()`,
			flags: []string{option("tcp", "error")}, errors: "connection",
		},
		{
			name: "connection, closed by the policy", program: `l = socket.create_server(("127.0.0.1", 0)); c = socket.create_connection(l.getsockname()); a = l.accept()`,
			flags: []string{option("tcp", "error"), option("fd-policy", "type: socket\nremotePort: *\naction: close")}, warnings: "policy",
		},
		{
			name: "refused by the policy", program: `f = open("/f", "w")`,
			flags: []string{option("fd-policy", "type: file\npath: /f\naction: error")}, errors: "policy",
		},
		{name: "stream to outside", program: `s = socket.socket(socket.AF_UNIX); s.connect("/outside/stream")`, flags: []string{volume}, errors: "external"},
		{name: "datagrams to outside", program: `s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.connect("/outside/datagrams")`, flags: []string{volume}, errors: "external"},
		{
			name: "datagrams to outside, host's network", program: `s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); s.connect("/outside/datagrams")`,
			flags: []string{volume, "--net-host"}, warnings: "external",
		},
		{name: "terminal of outside", program: fmt.Sprintf(get, "terminal"), flags: []string{volume}, errors: "terminal"},
		{name: "file of outside", program: fmt.Sprintf(get, "file"), flags: []string{volume}, errors: "foreign"},
		{name: "System V memory", program: `
id = libc.shmget(0, 4096, 0o1600)
libc.shmat.restype = ctypes.c_void_p
libc.shmat(id, None, 0)`},
		{name: "System V memory of the host", program: `
id = libc.shmget(0, 4096, 0o1600)
libc.shmat.restype = ctypes.c_void_p
libc.shmat(id, None, 0)
libc.shmctl(id, 0, None) # IPC_RMID: it goes with its last user`, flags: []string{"--with-ns", fmt.Sprintf("ipc:/proc/%d/ns/ipc", os.Getpid())}, errors: "sysv"},
		{name: "deleted and large", program: `f = open("/f", "w"); os.posix_fallocate(f.fileno(), 0, (1 << 30) + 4096); os.unlink("/f")`, errors: "deleted"},
		{name: "control socket", program: `s = socket.socket(socket.AF_UNIX); s.connect("/run/crac/control.sock")`},
		{name: "traced", program: `
pid = os.fork()
if pid == 0: time.sleep(1000)
libc.ptrace(0x4206, pid, 0, 0) # PTRACE_SEIZE`, flags: []string{"--privileged"}, errors: "traced"},
		{name: "nested host name", program: `child(lambda: libc.unshare(0x04000000))`, flags: []string{"--privileged"}, errors: "namespace"},
		{name: "nested pids", program: `
def f():
    libc.unshare(0x20000000)
    if os.fork() == 0: time.sleep(1000)
child(f)`, flags: []string{"--privileged"}, errors: "namespace"},
		{name: "nested mounts", program: `child(lambda: libc.unshare(0x00020000))`, flags: []string{"--privileged"}},
	} {
		tb.Run(tt.name, func(tb *testing.T) {
			t := setup(tb)
			b := holding(t, tt.program, tt.flags...)
			r, status := b.check()
			for level, want := range map[string]string{"error": tt.errors, "warning": tt.warnings, "info": tt.infos} {
				if got := strings.Join(r.codes(level), " "); got != want {
					t.Errorf("%s: got %q, want %q: %+v", level, got, want, r.Findings)
				}
			}
			dir, err := t.Path("dumps")
			if err != nil {
				t.Fatal(err)
			}
			_, err = t.Ctr(t.Ctx, "tasks", "checkpoint", "--image-path", filepath.Join(dir, b.id), b.id)
			if (err == nil) != (status == 0) {
				t.Errorf("check ends with %d, and the checkpoint with %v: %+v", status, err, r.Findings)
			}
		})
	}
}

// handOut gives whoever connects to a socket an open file.
func handOut(t *harness.T, path string, f interface{ Fd() uintptr }) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.AcceptUnix()
			if err != nil {
				return
			}
			if _, _, err := c.WriteMsgUnix([]byte("x"), unix.UnixRights(int(f.Fd())), nil); err != nil {
				t.Errorf("hand out %s: %v", path, err)
			}
			_ = c.Close()
		}
	}()
}

// Connections are told by process, descriptor and peer; nothing is changed by that.
func TestCheckShowsConnections(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	p := startPeer(t)
	n, err := t.Network()
	if err != nil {
		t.Fatal(err)
	}
	b := startConnected(t, p, option("tcp", "error"))
	pid := int(b.task().Pid())
	peerName := fmt.Sprintf("tcp to %s:%d", n.Gateway, p.port)

	r, status := b.check()
	if status != 1 || len(r.Findings) != 1 {
		t.Fatalf("exit status %d: %+v", status, r.Findings)
	}
	f := r.Findings[0]
	if f.PID != pid || f.Inside != 1 || f.Program != "python3" || f.What != peerName || len(f.Descriptors) != 2 || f.Fix == "" {
		t.Errorf("finding: %+v", f)
	}
	if !strings.Contains(b.log(), fmt.Sprintf("connected %d %d", f.Descriptors[0], f.Descriptors[1])) {
		t.Errorf("the descriptors are %v, and the program says %q", f.Descriptors, b.log())
	}

	out, err := t.Cracctl(t.Ctx, "check", b.id)
	if harness.ExitCode(err) != 1 {
		t.Errorf("cracctl check: %v", err)
	}
	for _, part := range []string{
		fmt.Sprintf("error    process %d (python3, 1 inside), descriptors %d and %d: %s\n", pid, f.Descriptors[0], f.Descriptors[1], peerName),
		"\n         → let the program close it", "before-checkpoint", b.id + ": 1 process. One thing stands in the way of a checkpoint.\n",
	} {
		if !strings.Contains(out, part) {
			t.Errorf("the table lacks %q:\n%s", part, out)
		}
	}

	for _, args := range [][]string{{"check"}, {"check", "--format", "xml", b.id}, {"check", "--nonsense", b.id}, {"check", "no-such-container"}} {
		if _, err := t.Cracctl(t.Ctx, args...); harness.ExitCode(err) != 2 {
			t.Errorf("cracctl %v: %v, want exit status 2", args, err)
		}
	}

	b.exec("touch", "/go")
	b.says("recv got hello", "epoll got hello")
	if got := p.ended(); len(got) != 0 {
		t.Errorf("connections have ended: %v", got)
	}
	b.wantStatus(containerd.Running)
	b.task()
	if err := b.task().Pause(t.Ctx); err != nil {
		t.Fatal(err)
	}
	if r, _ := b.check(); !slices.Contains(r.codes("info"), "paused") {
		t.Errorf("paused: %+v", r.Findings)
	}
	b.wantStatus(containerd.Paused)
	if err := b.task().Resume(t.Ctx); err != nil {
		t.Fatal(err)
	}
}

// participants of a Python program: each answers as it is called.
const participants = `
import json, threading
def serve(name, answer):
    s = socket.socket(socket.AF_UNIX)
    s.bind("/run/crac/" + name)
    s.listen(8)
    def loop():
        while True:
            c, _ = s.accept()
            m = json.loads(c.makefile().readline())
            os.write(1, (name + " hears " + m["event"] + "\n").encode())
            if answer is None: time.sleep(1000)
            c.sendall(json.dumps(answer).encode() + b"\n")
            c.close()
    threading.Thread(target=loop, daemon=True).start()
`

// Participants are asked, and nothing else is told them.
func TestCheckAsksParticipants(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	b := holding(t, participants+`
serve("a.sock", {"ok": True})
serve("b.sock", {"ok": False, "error": "pool busy"})
serve("c.sock", None)`, option("hook.timeout", "1s"))
	r, status := b.check()
	if status != 1 || r.Participants != 3 || !slices.Equal(r.codes("error"), []string{"participant"}) || len(r.Findings) != 2 {
		t.Errorf("exit status %d: %+v", status, r)
	}
	for _, part := range []string{"b.sock", "pool busy", "c.sock", "within 1s"} {
		if !strings.Contains(fmt.Sprint(r.Findings), part) {
			t.Errorf("the findings lack %q: %+v", part, r.Findings)
		}
	}
	b.says("a.sock hears check", "b.sock hears check", "c.sock hears check")
	if strings.Contains(b.log(), "checkpoint") {
		t.Errorf("they hear more:\n%s", b.log())
	}

	good := holding(t, participants+`serve("a.sock", {"ok": True})`, option("hooks", "required"))
	if r, status := good.check(); status != 0 || r.Participants != 1 || len(r.Findings) != 0 {
		t.Errorf("a participant that agrees: %d, %+v", status, r)
	}
	alone := holding(t, `pass`, option("hooks", "required"))
	if r, status := alone.check(); status != 1 || !slices.Equal(r.codes("error"), []string{"nobody"}) {
		t.Errorf("hooks=required and nobody to tell: %d, %+v", status, r)
	}
	off := holding(t, `pass`, option("hooks", "off"))
	if r, status := off.check(); status != 0 || len(r.Findings) != 0 {
		t.Errorf("hooks=off: %d, %+v", status, r)
	}
}

// Nothing is changed: what the processes hold, their mounts, the container's directories on the
// host, its state.
func TestCheckChangesNothing(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	b := holding(t, participants+`
serve("a.sock", {"ok": True})
l = socket.create_server(("127.0.0.1", 0)); c = socket.create_connection(l.getsockname()); a = l.accept()
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.connect(("127.0.0.1", 9))
f = open("/f", "w"); f.write("x"); f.flush(); os.unlink("/f")
p = os.pipe()
m = mmap.mmap(-1, 4096)`, option("fd-policy", "type: socket\nremotePort: *\naction: close"))
	before := b.fingerprint()
	if r, status := b.check(); status != 0 || r.Participants != 1 || len(r.Findings) == 0 {
		t.Errorf("exit status %d: %+v", status, r)
	}
	var after string
	t.Eventually("everything is as before", func() bool {
		after = b.fingerprint() // the participant's connection may be just closing
		return after == before
	})
	b.wantStatus(containerd.Running)
}

// fingerprint is what of a container can be seen from outside, but for its memory and the times.
func (b *box) fingerprint() string {
	b.Helper()
	var all []string
	pids, err := b.task().Pids(b.Ctx)
	if err != nil {
		b.Fatal(err)
	}
	for _, p := range pids {
		links, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.Pid))
		if err != nil {
			b.Fatal(err)
		}
		for _, l := range links {
			to, _ := os.Readlink(l) // or it was just closed
			all = append(all, l+" "+to)
		}
		mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", p.Pid))
		if err != nil {
			b.Fatal(err)
		}
		all = append(all, string(mounts))
	}
	bundle := filepath.Dir(b.hooksDir())
	err = filepath.WalkDir(bundle, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		all = append(all, fmt.Sprint(path, info.Mode(), info.Size(), info.ModTime()))
		if d.Name() == "rootfs" {
			return filepath.SkipDir
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
	images, err := b.Client.ImageService().List(b.Ctx, "name~=checkpoint")
	if err != nil {
		b.Fatal(err)
	}
	leases, err := b.Client.LeasesService().List(b.Ctx)
	if err != nil {
		b.Fatal(err)
	}
	return fmt.Sprint(all, b.status(), len(images), len(leases))
}

// What exec has started is told, and a clone can be checked as well as its original.
func TestCheckOfACloneWithExec(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image := ref(t)
	original := start(t, how{args: ticker().args, flags: []string{option("checkpoint.image", image)}})
	original.waitTicks(2)
	original.checkpoint()
	b := start(t, warm(image))
	b.waitTicks(2)
	if r, status := b.check(); status != 0 || len(r.Findings) != 0 {
		t.Errorf("a clone: %d, %+v", status, r.Findings)
	}
	done := make(chan error, 1)
	go func() {
		_, err := b.Ctr(b.Ctx, "tasks", "exec", "--exec-id", newID(b), b.id, "sh", "-c", "touch /there; while [ ! -e /gone ]; do sleep 0.05; done")
		done <- err
	}()
	t.Eventually("exec runs", func() bool { _, err := b.tryExec("test", "-e", "/there"); return err == nil })
	r, status := b.check()
	if status != 0 || !slices.Equal(r.codes("info"), []string{"exec"}) {
		t.Errorf("a clone with an exec: %d, %+v", status, r.Findings)
	}
	b.exec("touch", "/gone")
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A terminal of the container's own is no reason against a checkpoint, and other users are one
// only where CRIU may not look at them.
func TestCheckOfTerminalsAndUsers(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	c := newContainer(t, config{args: []string{"sleep", "1000"}, terminal: true, stdin: strings.NewReader("")}).start()
	if r, status := checkOf(t, c.ID()); status != 0 || len(r.Findings) != 0 {
		t.Errorf("a terminal: %d, %+v", status, r.Findings)
	}
	b := holding(t, `pass`, "--user", "1000:1000")
	r, status := b.check()
	dir, err := t.Path("dumps")
	if err != nil {
		t.Fatal(err)
	}
	_, err = t.Ctr(t.Ctx, "tasks", "checkpoint", "--image-path", filepath.Join(dir, b.id), b.id)
	if (err == nil) != (status == 0) || status == 1 && !slices.Equal(r.codes("error"), []string{"limits"}) {
		t.Errorf("user 1000: check ends with %d and the checkpoint with %v: %+v", status, err, r.Findings)
	}
}

// The address that a clone must have is told: with another one it does not start.
func TestCheckTellsOfAddresses(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image := ref(t)
	b := startAt(t, `
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
u.connect((GATEWAY, 9))`, image)
	r, status := b.check()
	if status != 0 || !slices.Equal(r.codes("warning"), []string{"address"}) || !strings.Contains(fmt.Sprint(r.Findings), b.address()) {
		t.Fatalf("exit status %d: %+v", status, r.Findings)
	}
	b.checkpoint()
	clone, err := tryStart(t, how{image: image, cni: true, flags: []string{option("restore", "require")}})
	log := filepath.Join(t.Dir, "root/io.containerd.runtime.v2.task", t.Namespace, clone.id+".restore.log")
	if err := os.Remove(log); err != nil { // it is kept for people
		t.Error(err)
	}
	if err == nil || !strings.Contains(err.Error(), "criu restore failed") {
		t.Errorf("a clone with another address: %v, want a failing restore", err)
	}
}

func startAt(t *harness.T, program, image string) *box {
	t.Helper()
	n, err := t.Network()
	if err != nil {
		t.Fatal(err)
	}
	needImage(t, "python")
	b := start(t, how{image: harness.ImageRef("python"), cni: true, flags: []string{option("checkpoint.image", image)}, args: []string{
		"/usr/bin/python3", "-c", `
import socket, time
GATEWAY = ` + strconv.Quote(n.Gateway) + `
while True:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect((GATEWAY, 9))
        break
    except OSError:
        time.sleep(0.05)
` + program + `
print("ready")
while True: time.sleep(1)
`,
	}})
	b.says("ready")
	return b
}
