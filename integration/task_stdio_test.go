package integration

import (
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"

	"github.com/crac-shim/crac/integration/harness"
)

const tenMB = 10 << 20

// check that a stream is n times the letter.
func wantLetters(tb testing.TB, name, got string, letter string, n int) {
	tb.Helper()
	if len(got) != n || strings.Count(got, letter) != n {
		tb.Errorf("%s: %d bytes arrived, %d of them %q; want %d", name, len(got), strings.Count(got, letter), letter, n)
	}
}

func TestOutputIsComplete(tb *testing.T) {
	t := setup(tb)
	script := "head -c 10485760 /dev/zero | tr '\\0' o & head -c 10485760 /dev/zero | tr '\\0' e >&2; wait"
	r := runContainer(t, sh(script))
	wantLetters(t, "stdout", r.out, "o", tenMB)
	wantLetters(t, "stderr", r.err, "e", tenMB)
	n := newContainer(t, sh("sleep 1000")).start()
	r = n.exec(script)
	wantLetters(t, "exec's stdout", r.out, "o", tenMB)
	wantLetters(t, "exec's stderr", r.err, "e", tenMB)
}

// slowReader takes its time, so that the process ends long before its output was read.
type slowReader struct{ output }

func (s *slowReader) Write(p []byte) (int, error) {
	time.Sleep(2 * time.Millisecond)
	return s.output.Write(p)
}

func TestOutputAfterExit(tb *testing.T) {
	t := setup(tb)
	n := newContainer(t, sh("head -c 2097152 /dev/zero | tr '\\0' x"))
	slow := &slowReader{}
	n.io = n.streams(nil, slow, io.Discard, false)
	n.start()
	n.wait()
	wantLetters(t, "stdout", slow.String(), "x", 2<<20)
	n.deleteTask()
}

// TestShortRuns: what a process writes just before its end is the easiest to lose.
func TestShortRuns(tb *testing.T) {
	t := setup(tb)
	workers, each := 4, times(13)
	var wg sync.WaitGroup
	all := make([][]*ctn, workers)
	for w := range workers {
		all[w] = make([]*ctn, each)
		for i := range each {
			all[w][i] = newContainer(t, config{args: []string{"echo", fmt.Sprintf("run %d %d", w, i)}})
		}
	}
	for w := range workers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i, n := range all[w] {
				err := n.tryCreate()
				if err == nil {
					err = n.task.Start(t.Ctx)
				}
				if err != nil {
					t.Errorf("run %d %d: %v", w, i, err)
					continue
				}
				s := <-n.exit
				if err := harness.WaitIO(t.Ctx, n.task.IO()); err != nil {
					t.Error(err)
				}
				if out := n.out.String(); out != fmt.Sprintf("run %d %d\n", w, i) || s.ExitCode() != 0 {
					t.Errorf("run %d %d: code %d, output %q", w, i, s.ExitCode(), out)
				}
				if _, err := n.task.Delete(t.Ctx); err != nil {
					t.Errorf("run %d %d: %v", w, i, err)
				}
			}
		}()
	}
	wg.Wait()
}

func TestStdin(tb *testing.T) {
	t := setup(tb)
	// All that was written before CloseIO arrives, and then the end.
	in := strings.Repeat("0123456789abcde\n", 64<<10)
	c := config{args: []string{"sh", "-c", "cat; echo end"}, stdin: strings.NewReader(in)}
	n := newContainer(t, c).start()
	t.Eventually("all input to come back", func() bool { return len(n.out.String()) == len(in) })
	if err := n.task.CloseIO(t.Ctx, containerd.WithStdinCloser); err != nil {
		t.Fatal(err)
	}
	if code := n.wait(); code != 0 {
		t.Errorf("code %d", code)
	}
	if got := n.out.String(); got != in+"end\n" {
		t.Errorf("%d bytes came back, want %d", len(got), len(in)+4)
	}
	n.deleteTask()

	// The same for an exec; and a client's late CloseIO does no harm.
	n = newContainer(t, sh("sleep 1000")).start()
	p, err := n.newExec("cat", strings.NewReader("hello"), false, "cat")
	if err == nil {
		err = p.Start(t.Ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Eventually("the exec's echo", func() bool { return p.out.String() == "hello" })
	for range 2 {
		if err := p.CloseIO(t.Ctx, containerd.WithStdinCloser); err != nil {
			t.Fatal(err)
		}
	}
	if r := n.end(p); r.code != 0 || r.out != "hello" {
		t.Errorf("exec cat: %+v", r)
	}
	if err := n.task.CloseIO(t.Ctx, containerd.WithStdinCloser); err != nil {
		t.Errorf("CloseIO without a stdin: %v", err)
	}
}

func TestNullIO(tb *testing.T) {
	t := setup(tb)
	c := sh("cat; echo lost; echo lost >&2; exit 6")
	c.io = cio.NullIO
	n := newContainer(t, c).start()
	if code := n.wait(); code != 6 {
		t.Errorf("code %d", code)
	}
	n.deleteTask()
}

func TestTerminal(tb *testing.T) {
	t := setup(tb)
	r, w := io.Pipe()
	defer func() { _ = w.Close() }()
	n := newContainer(t, config{args: []string{"sh"}, terminal: true, stdin: r, spec: []oci.SpecOpts{oci.WithTTYSize(91, 17)}}).start()
	type dialog struct{ in, want string }
	// What the shell answers is not in what the terminal echoes.
	talk := func(in io.Writer, out *output, d dialog) {
		t.Helper()
		if _, err := io.WriteString(in, d.in+"\n"); err != nil {
			t.Fatal(err)
		}
		t.Eventually(fmt.Sprintf("%q after %q; there is %q", d.want, d.in, out.String()), func() bool { return strings.Contains(out.String(), d.want) })
	}
	talk(w, n.out, dialog{"test -t 0 && test -t 1 && test -t 2 && echo is-a-$((1+1))", "is-a-2"})
	talk(w, n.out, dialog{"stty size", "17 91"})
	if err := n.task.Resize(t.Ctx, 77, 33); err != nil {
		t.Fatal(err)
	}
	talk(w, n.out, dialog{"stty size", "33 77"})
	talk(w, n.out, dialog{"tty", "/dev/"})
	if n.err.String() != "" {
		t.Errorf("a terminal wrote to stderr: %q", n.err)
	}

	// An exec has a terminal of its own.
	er, ew := io.Pipe()
	defer func() { _ = ew.Close() }()
	p, err := n.newExec("tty", er, true, "sh")
	if err == nil {
		err = p.Start(t.Ctx)
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Resize(t.Ctx, 55, 44); err != nil {
		t.Fatal(err)
	}
	talk(ew, p.out, dialog{"stty size", "44 55"})
	talk(w, n.out, dialog{"stty size; echo mine-$((2+1))", "mine-3"})
	if strings.Contains(n.out.String(), "44 55") {
		t.Error("the exec's window size is also init's")
	}
	talk(ew, p.out, dialog{"exit 12", "exit"})
	if r := n.end(p); r.code != 12 {
		t.Errorf("the exec's code %d", r.code)
	}
	// Output just before the end is complete on a terminal, too; Ctrl-D ends the input.
	if _, err := io.WriteString(w, "trap 'seq 1 5000; echo last-$((3+1)); exit 13' EXIT\n\x04"); err != nil {
		t.Fatal(err)
	}
	if code := n.wait(); code != 13 {
		t.Errorf("init's code %d", code)
	}
	if !strings.Contains(n.out.String(), "5000\r\nlast-4") {
		t.Errorf("the terminal's last output is lost: it ends with %q", last(n.out.String(), 100))
	}
	n.deleteTask()
}

func last(s string, n int) string { return s[max(0, len(s)-n):] }

func TestLogFile(tb *testing.T) {
	t := setup(tb)
	dir, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "sub", "log")
	var want []string
	for i := range 3 { // it appends
		c := sh(fmt.Sprintf("echo out %d; echo err %d >&2", i, i))
		c.io = cio.LogFile(file)
		n := newContainer(t, c).start()
		if code := n.wait(); code != 0 {
			t.Errorf("code %d", code)
		}
		n.deleteTask()
		want = append(want, fmt.Sprintf("out %d", i), fmt.Sprintf("err %d", i))
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	got := strings.Split(strings.TrimSuffix(string(b), "\n"), "\n")
	slices.Sort(got) // the two streams may overtake each other
	slices.Sort(want)
	if !slices.Equal(got, want) {
		t.Errorf("the log has the lines %q, want %q", got, want)
	}
}

// TestLogBinary: a logger gets all output, and knows whose it is. This test's program is the logger.
func TestLogBinary(tb *testing.T) {
	t := setup(tb)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	read := func(dir, name string) string {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Error(err)
		}
		return string(b)
	}
	for _, c := range []struct {
		name     string
		terminal bool
	}{{"pipes", false}, {"terminal", true}} {
		dir, err := t.Path(newID(t))
		if err != nil {
			t.Fatal(err)
		}
		uri := &url.URL{Scheme: "binary", Path: self, RawQuery: url.Values{loggerArg: {dir}}.Encode()}
		conf := sh("head -c 10485760 /dev/zero | tr '\\0' o; echo error >&2")
		conf.io, conf.terminal = cio.LogURI(uri), c.terminal
		if c.terminal {
			conf.io = cio.TerminalLogURI(uri)
		}
		n := newContainer(t, conf).start()
		if code := n.wait(); code != 0 {
			t.Errorf("%s: code %d", c.name, code)
		}
		n.deleteTask()
		t.Eventually("the logger to end", func() bool {
			_, err := os.Stat(filepath.Join(dir, "done"))
			return err == nil
		})
		if who := read(dir, "who"); who != t.Namespace+"/"+n.ID() {
			t.Errorf("%s: the logger was told %q", c.name, who)
		}
		if c.terminal {
			if out := read(dir, "stdout"); len(out) != tenMB+len("error\r\n") || !strings.HasSuffix(out, "error\r\n") {
				t.Errorf("terminal: %d bytes ending with %q", len(out), last(out, 20))
			}
			continue
		}
		wantLetters(t, c.name, read(dir, "stdout"), "o", tenMB)
		if e := read(dir, "stderr"); e != "error\n" {
			t.Errorf("%s: stderr %q", c.name, e)
		}
	}
	// A logger that does not start is an error that names it.
	conf := sh("true")
	conf.io = cio.LogURI(&url.URL{Scheme: "binary", Path: "/no/such/logger"})
	if err := newContainer(t, conf).tryCreate(); err == nil || !strings.Contains(err.Error(), "/no/such/logger") {
		t.Errorf("a logger that is not there: %v", err)
	}
}

// TestReaderGoesAway: a client that ends does not end the workload by SIGPIPE (`ctr run -d`).
func TestReaderGoesAway(tb *testing.T) {
	t := setup(tb)
	n := newContainer(t, sh("i=0; while [ $i -lt 100 ]; do i=$((i+1)); echo $i || exit 9; sleep 0.01; done; exit 5")).start()
	t.Eventually("output", func() bool { return n.out.String() != "" })
	n.task.IO().Cancel()
	if err := n.task.IO().Close(); err != nil {
		t.Fatal(err)
	}
	if code := exitCode(t, n.exit); code != 5 {
		t.Errorf("code %d after the client went away, want 5", code)
	}
}
