package shim

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func owner(tb testing.TB) stdioOwner {
	return stdioOwner{namespace: "ns", id: "id", reaper: reaper(tb)}
}

// fifos makes FIFOs as a client does.
func fifos(tb testing.TB, names ...string) []string {
	tb.Helper()
	dir := tb.TempDir()
	paths := make([]string, len(names))
	for i, n := range names {
		paths[i] = filepath.Join(dir, n)
		if err := unix.Mkfifo(paths[i], 0o600); err != nil {
			tb.Fatal(err)
		}
	}
	return paths
}

func openFiles(tb testing.TB) int {
	tb.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		tb.Fatal(err)
	}
	return len(fds)
}

// noMoreFiles checks at the end of the test that it has left no file open.
func noMoreFiles(t *testing.T) {
	t.Helper()
	reaper(t) // has files of its own
	if f, err := os.CreateTemp(t.TempDir(), ""); err == nil {
		f.SetDeadline(time.Time{}) //nolint:errcheck // starts Go's poller, which has files of its own
		f.Close()
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	w.Close()
	before := openFiles(t)
	t.Cleanup(func() {
		if t.Failed() {
			return
		}
		waitFor(t, fmt.Sprintf("only the %d files of before to be open", before), func() bool { return openFiles(t) <= before })
	})
}

type received struct {
	sum [sha256.Size]byte
	n   int64
	err error
}

// receive reads a FIFO to its end.
func receive(path string) <-chan received {
	result := make(chan received, 1)
	go func() {
		f, err := os.Open(path)
		if err != nil {
			result <- received{err: err}
			return
		}
		defer f.Close()
		h := sha256.New()
		n, err := io.Copy(h, f)
		r := received{n: n, err: err}
		h.Sum(r.sum[:0])
		result <- r
	}()
	return result
}

// Everything arrives, whoever is slow, and the streams end by themselves.
func TestPipesLoseNothing(t *testing.T) {
	noMoreFiles(t)
	paths := fifos(t, "out", "err")
	out, errs := receive(paths[0]), receive(paths[1])
	p, err := newProcessIO(context.Background(), stdioConfig{Stdout: paths[0], Stderr: paths[1]}, owner(t))
	if err != nil {
		t.Fatal(err)
	}
	defer p.close()
	data := bytes.Repeat([]byte("0123456789abcde\n"), 10<<20/16)
	other := []byte("on the other stream")
	wrote := make(chan error, 2)
	// The process's own ends outlive afterStart, as its copies would.
	stdout, err := unix.Dup(int(p.child.Stdout.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	stderr, err := unix.Dup(int(p.child.Stderr.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	p.afterStart()
	for fd, text := range map[int][]byte{stdout: data, stderr: other} {
		go func() {
			f := os.NewFile(uintptr(fd), "process")
			_, err := f.Write(text)
			wrote <- errors.Join(err, f.Close())
		}()
	}
	for range 2 {
		if err := <-wrote; err != nil {
			t.Error(err)
		}
	}
	// Before close: clients wait for the end of their streams before they delete.
	if r := <-out; r.err != nil || r.n != int64(len(data)) || r.sum != sha256.Sum256(data) {
		t.Errorf("stdout: %d of %d bytes arrived, the same: %v, %v", r.n, len(data), r.sum == sha256.Sum256(data), r.err)
	}
	if r := <-errs; r.err != nil || r.sum != sha256.Sum256(other) {
		t.Errorf("stderr: %d of %d bytes arrived, %v", r.n, len(other), r.err)
	}
	p.wait()
}

// A client that goes away does not kill the process, and one that comes back
// gets what follows.
func TestClientMayGoAndComeBack(t *testing.T) {
	noMoreFiles(t)
	path := fifos(t, "out")[0]
	opened := make(chan *os.File, 1)
	go func() {
		f, _ := os.Open(path)
		opened <- f
	}()
	p, err := newProcessIO(context.Background(), stdioConfig{Stdout: path}, owner(t))
	if err != nil {
		t.Fatal(err)
	}
	(<-opened).Close()
	if _, err := p.child.Stdout.WriteString("while away\n"); err != nil {
		t.Fatal(err)
	}
	back, err := os.Open(path) // before the process ends: then there is nothing to come back to
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	if _, err := p.child.Stdout.WriteString("and back\n"); err != nil {
		t.Fatal(err)
	}
	p.afterStart()
	if got, err := io.ReadAll(back); err != nil || string(got) != "while away\nand back\n" {
		t.Errorf("%q arrived, %v", got, err)
	}
	back.Close()
	p.wait()
	p.close()
}

// A client that never reads keeps nothing open once the process is deleted.
func TestStuckCopyEnds(t *testing.T) {
	noMoreFiles(t)
	path := fifos(t, "out")[0]
	client, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	p, err := newProcessIO(context.Background(), stdioConfig{Stdout: path}, owner(t))
	if err != nil {
		t.Fatal(err)
	}
	wrote := make(chan struct{})
	w := p.child.Stdout
	go func() {
		defer close(wrote)
		// More than both pipes hold; it ends when nobody reads any more.
		_, _ = w.Write(make([]byte, 1<<20))
	}()
	waitFor(t, "the FIFO to be full", func() bool {
		pfd := []unix.PollFd{{Fd: int32(client.Fd()), Events: unix.POLLOUT}}
		n, err := unix.Poll(pfd, 0)
		return err == nil && n == 0
	})
	p.close()
	p.copies.Wait()
	<-wrote
	p.afterStart()
}

func TestFileSinkIsShared(t *testing.T) {
	noMoreFiles(t)
	path := filepath.Join(t.TempDir(), "made", "log")
	p, err := newProcessIO(context.Background(), stdioConfig{Stdout: "file://" + path}, owner(t))
	if err != nil {
		t.Fatal(err)
	}
	var want strings.Builder
	for i := range 50 {
		for _, f := range []*os.File{p.child.Stdout, p.child.Stderr} {
			line := fmt.Sprintf("%d\n", i)
			want.WriteString(line)
			if _, err := f.WriteString(line); err != nil {
				t.Fatal(err)
			}
			// In this order they come only if they were read in it.
			waitFor(t, "the line", func() bool {
				fi, err := os.Stat(path)
				return err == nil && fi.Size() == int64(want.Len())
			})
		}
	}
	// The end of one stream is not that of the other.
	p.child.Stdout.Close()
	p.child.Stdout = nil
	if _, err := p.child.Stderr.WriteString("last"); err != nil {
		t.Fatal(err)
	}
	p.afterStart()
	p.wait()
	p.close()
	if data, err := os.ReadFile(path); err != nil || string(data) != want.String()+"last" {
		t.Errorf("the file holds %q, %v", data, err)
	}
	// Another process's output is added, and what was there stays.
	p, err = newProcessIO(context.Background(), stdioConfig{Stdout: path, Stderr: path}, owner(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.child.Stderr.WriteString("+"); err != nil {
		t.Fatal(err)
	}
	p.afterStart()
	p.wait()
	p.close()
	if data, err := os.ReadFile(path); err != nil || string(data) != want.String()+"last+" {
		t.Errorf("the file holds %q, %v", data, err)
	}
}

func TestSharedSink(t *testing.T) {
	var closed int
	s := &sharedSink{WriteCloser: closer{func() error { closed++; return nil }}}
	s.users.Add(2)
	if err := s.Close(); err != nil || closed != 0 {
		t.Errorf("closed %d times with a user left, %v", closed, err)
	}
	if err := s.Close(); err != nil || closed != 1 {
		t.Errorf("closed %d times without users, %v", closed, err)
	}
}

type closer struct{ f func() error }

func (closer) Write(p []byte) (int, error) { return len(p), nil }
func (c closer) Close() error              { return c.f() }

// The process sees the end of its input when both the client and CloseIO have
// closed theirs.
func TestCloseIO(t *testing.T) {
	noMoreFiles(t)
	path := fifos(t, "in")[0]
	p, err := newProcessIO(context.Background(), stdioConfig{Stdin: path}, owner(t))
	if err != nil {
		t.Fatal(err)
	}
	stdin, err := unix.Dup(int(p.child.Stdin.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	input := os.NewFile(uintptr(stdin), "stdin")
	p.afterStart()
	client, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.WriteString("typed\n"); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	if n, err := input.Read(buf); err != nil || string(buf[:n]) != "typed\n" {
		t.Errorf("read %q, %v", buf[:n], err)
	}
	// Another client's end, as after `ctr` has gone.
	client.Close()
	client, err = os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.WriteString("again\n"); err != nil {
		t.Fatal(err)
	}
	client.Close()
	if n, err := input.Read(buf); err != nil || string(buf[:n]) != "again\n" {
		t.Errorf("read %q, %v", buf[:n], err)
	}
	for range 2 { // again does nothing
		if err := p.closeStdin(); err != nil {
			t.Error(err)
		}
	}
	if n, err := input.Read(buf); n != 0 || !errors.Is(err, io.EOF) {
		t.Errorf("after CloseIO: %q, %v; want the end", buf[:n], err)
	}
	input.Close()
	p.wait()
	p.close()
}

func TestStdioRefused(t *testing.T) {
	noMoreFiles(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, tt := range map[string]struct {
		config stdioConfig
		says   string
	}{
		"scheme":           {stdioConfig{Stdout: "http://x/y"}, `unknown scheme "http"`},
		"no URI":           {stdioConfig{Stdout: "%zz"}, "%zz"},
		"no directory":     {stdioConfig{Stdout: filepath.Join(dir, "none", "out")}, "none/out"},
		"a file as parent": {stdioConfig{Stdout: "file://" + file + "/log"}, file},
		"no such logger":   {stdioConfig{Stdout: "binary:///nonexistent/logger"}, "/nonexistent/logger"},
	} {
		p, err := newProcessIO(context.Background(), tt.config, owner(t))
		if err == nil {
			p.afterStart()
			p.close()
		}
		if err == nil || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: error is %v, want one that says %q", name, err, tt.says)
		}
	}
	// A client that never opens its end.
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := newProcessIO(ctx, stdioConfig{Stdout: fifos(t, "out")[0]}, owner(t)); !errors.Is(err, context.Canceled) {
		t.Errorf("a client that does not come: %v", err)
	}
}

func TestNullIO(t *testing.T) {
	noMoreFiles(t)
	p, err := newProcessIO(context.Background(), stdioConfig{}, owner(t))
	if err != nil {
		t.Fatal(err)
	}
	for name, f := range map[string]*os.File{"stdin": p.child.Stdin, "stdout": p.child.Stdout, "stderr": p.child.Stderr} {
		if target, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd())); err != nil || target != os.DevNull {
			t.Errorf("%s is %s, %v", name, target, err)
		}
	}
	if err := errors.Join(p.closeStdin(), p.resize(80, 24)); err != nil {
		t.Errorf("without input and terminal there is nothing to do: %v", err)
	}
	p.afterStart()
	p.wait()
	p.close()
}

func TestLoggerCommand(t *testing.T) {
	u, err := url.Parse("binary:///usr/bin/logger?flag&key=value&key=second")
	if err != nil {
		t.Fatal(err)
	}
	cmd := loggerCommand(u, stdioOwner{namespace: "ns", id: "exec"})
	if cmd.Path != "/usr/bin/logger" {
		t.Errorf("program %s", cmd.Path)
	}
	// As containerd's own shim has it: each key, and its first value even if empty.
	pairs := [][]string{cmd.Args[1:3], cmd.Args[3:]}
	slices.SortFunc(pairs, func(a, b []string) int { return strings.Compare(a[0], b[0]) })
	if want := [][]string{{"flag", ""}, {"key", "value"}}; !reflect.DeepEqual(pairs, want) {
		t.Errorf("arguments %q, want %q in any order", cmd.Args[1:], want)
	}
	if want := []string{"CONTAINER_ID=exec", "CONTAINER_NAMESPACE=ns"}; !reflect.DeepEqual(cmd.Env, want) {
		t.Errorf("environment %q, want %q", cmd.Env, want)
	}
	if cmd.SysProcAttr == nil || !cmd.SysProcAttr.Setpgid {
		t.Error("a signal to the shim's process group would reach it")
	}
}

// script is a logging program.
func script(t *testing.T, body string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "logger")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestLogger(t *testing.T) {
	noMoreFiles(t)
	dir := t.TempDir()
	// It reads both streams to their ends, and takes its time to finish.
	path := script(t, fmt.Sprintf("trap : TERM\nPATH=/usr/bin:/bin\ncat <&3 >%[1]s/out & a=$!\ncat <&4 >%[1]s/err & b=$!\nprintf x >&5\nexec 5>&-\nwhile kill -0 $a 2>/dev/null; do wait $a; done\nwhile kill -0 $b 2>/dev/null; do wait $b; done\necho $CONTAINER_NAMESPACE/$CONTAINER_ID >%[1]s/done\n", dir))
	for _, scheme := range []string{"binary", "binary-v2"} {
		p, err := newProcessIO(context.Background(), stdioConfig{Stdout: scheme + "://" + path}, owner(t))
		if err != nil {
			t.Fatal(err)
		}
		data := bytes.Repeat([]byte("line of output\n"), 20000)
		if _, err := p.child.Stdout.Write(data); err != nil {
			t.Fatal(err)
		}
		if _, err := p.child.Stderr.WriteString("trouble\n"); err != nil {
			t.Fatal(err)
		}
		p.afterStart()
		p.wait()
		p.close()
		for name, want := range map[string]string{"out": string(data), "err": "trouble\n", "done": "ns/id\n"} {
			if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
				t.Errorf("%s: %s holds %d bytes, want %d (%v)", scheme, name, len(got), len(want), err)
			}
			os.Remove(filepath.Join(dir, name))
		}
	}
}

// A program that knows nothing of SIGTERM loses nothing by it, nor what it reads late.
func TestLoggerReadsToTheEnd(t *testing.T) {
	noMoreFiles(t)
	out := filepath.Join(t.TempDir(), "out")
	path := script(t, fmt.Sprintf("PATH=/usr/bin:/bin\nprintf x >&5\nexec 5>&-\nuntil [ -e %[1]s.go ]; do sleep 0.01; done\ncat <&3 >%[1]s\n", out))
	p, err := newProcessIO(context.Background(), stdioConfig{Stdout: "binary-v2://" + path}, owner(t))
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("line of output\n"), 4000) // what a pipe holds
	if _, err := p.child.Stdout.Write(data); err != nil {
		t.Fatal(err)
	}
	p.afterStart()
	p.wait()
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		p.close()
	}()
	time.Sleep(50 * time.Millisecond) // long enough to lose it
	if err := os.WriteFile(out+".go", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	<-closed
	if got, err := os.ReadFile(out); err != nil || !bytes.Equal(got, data) {
		t.Errorf("it wrote %d bytes, want %d (%v)", len(got), len(data), err)
	}
}

// A log that cannot be written loses output, and does not stop who writes it.
func TestOutputThatCannotBeWritten(t *testing.T) {
	noMoreFiles(t)
	var sink failingSink
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p := &processIO{}
	p.copyOut(&sink, r)
	sink.fail.Store(true)
	full := bytes.Repeat([]byte("x"), 1<<20) // more than a pipe holds
	if _, err := w.Write(full); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "all of it to be lost", func() bool { return sink.lost.Load() == int64(len(full)) })
	sink.fail.Store(false)
	if _, err := w.WriteString("again\n"); err != nil {
		t.Fatal(err)
	}
	w.Close()
	p.wait()
	if got := sink.String(); got != "again\n" {
		t.Errorf("written: %q", got)
	}
}

// failingSink is a file on a disk that may be full.
type failingSink struct {
	bytes.Buffer
	fail atomic.Bool
	lost atomic.Int64
}

func (f *failingSink) Write(p []byte) (int, error) {
	if f.fail.Load() {
		f.lost.Add(int64(len(p)))
		return 0, unix.ENOSPC
	}
	return f.Buffer.Write(p)
}

func (f *failingSink) Close() error { return nil }

func TestLoggerThatDies(t *testing.T) {
	noMoreFiles(t)
	path := script(t, "exit 1\n")
	_, err := newProcessIO(context.Background(), stdioConfig{Stdout: "binary-v2://" + path}, owner(t))
	if err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "before it was ready") {
		t.Errorf("binary-v2: %v, want an error that names it", err)
	}
	// In the first version the end of the pipe is readiness.
	p, err := newProcessIO(context.Background(), stdioConfig{Stdout: "binary://" + path}, owner(t))
	if err != nil {
		t.Fatalf("binary: %v", err)
	}
	p.afterStart()
	p.close()
}

func TestReceiveFile(t *testing.T) {
	pair := func() (ours *os.File, theirs int) {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		return os.NewFile(uintptr(fds[0]), "console"), fds[1]
	}
	noMoreFiles(t)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()

	ours, theirs := pair()
	if err := unix.Sendmsg(theirs, []byte("/dev/pts/7"), unix.UnixRights(int(null.Fd())), nil, 0); err != nil {
		t.Fatal(err)
	}
	f, err := receiveFile(ours)
	if err != nil {
		t.Fatal(err)
	}
	a, aerr := f.Stat()
	b, berr := null.Stat()
	if err := errors.Join(aerr, berr); err != nil || !os.SameFile(a, b) || f.Name() != "/dev/pts/7" {
		t.Errorf("another file came: %s, %v", f.Name(), err)
	}
	if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
		t.Errorf("every program that the shim starts would get it: %#x, %v", flags, err)
	}
	f.Close()
	if err := unix.Sendmsg(theirs, []byte("no file"), nil, nil, 0); err != nil {
		t.Fatal(err)
	}
	if f, err := receiveFile(ours); err == nil {
		t.Errorf("a message without a file gave %s", f.Name())
	}
	unix.Close(theirs)
	if f, err := receiveFile(ours); err == nil {
		t.Errorf("a closed socket gave %s", f.Name())
	}
	ours.Close()
}
