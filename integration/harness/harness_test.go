package harness

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func TestWithFIFODir(t *testing.T) {
	for in, want := range map[string]string{
		"run -d ref id":                  "run --fifo-dir D -d ref id",
		"tasks exec --exec-id x id true": "tasks exec --fifo-dir D --exec-id x id true",
		"task start id":                  "task start --fifo-dir D id",
		"t start id":                     "t start --fifo-dir D id",
		"tasks ls":                       "tasks ls",
		"images push ref":                "images push ref",
		"run --log-uri file:///x ref id": "run --log-uri file:///x ref id",
	} {
		if got := strings.Join(withFIFODir(strings.Fields(in), "D"), " "); got != want {
			t.Errorf("%s: got %s, want %s", in, got, want)
		}
	}
}

func TestRunReportsAll(t *testing.T) {
	ctx := context.Background()
	out, err := Run(ctx, exec.CommandContext(ctx, "sh", "-c", "echo out; echo err >&2; exit 7"))
	var c *CommandError
	if !errors.As(err, &c) || c.Code != 7 || ExitCode(err) != 7 || out != "out\n" || c.Stdout != "out\n" || c.Stderr != "err\n" {
		t.Errorf("out %q, error %#v", out, err)
	}
	for _, want := range []string{"sh -c", "out", "err"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("the error does not hold %q: %v", want, err)
		}
	}
	if ExitCode(nil) != 0 || ExitCode(errors.New("x")) != -1 {
		t.Error("exit codes of nil and of a foreign error")
	}
}

// TestRunDoesNotHang: a grandchild keeps the pipes open after the command was killed.
func TestRunDoesNotHang(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	dir := t.TempDir()
	cmd := exec.CommandContext(ctx, "sh", "-c", "sleep 60 & echo $! > "+dir+"/pid; wait")
	if _, err := Run(ctx, cmd); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want the deadline", err)
	}
	pid, err := os.ReadFile(filepath.Join(dir, "pid"))
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("kill", strings.TrimSpace(string(pid))).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

func TestWaitHTTP(t *testing.T) {
	var n atomic.Int32
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if n.Add(1) < 5 {
			http.Error(w, "not yet", http.StatusServiceUnavailable)
			return
		}
		_, _ = w.Write([]byte("ready"))
	}))
	defer s.Close()
	body, _, err := WaitHTTP(context.Background(), s.URL)
	if err != nil || body != "ready" || n.Load() != 5 {
		t.Errorf("%q after %d requests, %v", body, n.Load(), err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, _, err := WaitHTTP(ctx, s.URL+"/%zz"); err == nil {
		t.Error("a page that cannot be")
	}
}

func TestMissingToolNamesTarget(t *testing.T) {
	t.Setenv("CRAC_BUILD", t.TempDir())
	_, err := FindTools(Containerd, Shim)
	if err == nil || !strings.Contains(err.Error(), "make tools") || !strings.Contains(err.Error(), "make build") {
		t.Errorf("got %v", err)
	}
	tools, err := FindTools()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tools.Image("nginx"); err == nil || !strings.Contains(err.Error(), "make images") {
		t.Errorf("got %v", err)
	}
}

// TestJanitor: what the janitor finds when its program has died is gone afterwards; what belongs
// to others is not.
func TestJanitor(t *testing.T) {
	start := func(dir, marker string) *exec.Cmd {
		cmd := exec.Command("sleep", "600")
		cmd.Env = append(os.Environ(), markerEnv+"="+marker)
		cmd.Dir = dir
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	for _, stopped := range []bool{false, true} {
		base := t.TempDir()
		d := &Daemon{Dir: filepath.Join(base, "d"), Namespace: namespacePrefix + "janitor-test"}
		if err := os.MkdirAll(d.path("some/where"), 0o755); err != nil {
			t.Fatal(err)
		}
		own, foreign := start(d.Dir, d.Dir), start(base, d.Dir+"x")
		ended := make(chan struct{})
		go func() {
			_ = own.Wait()
			close(ended)
		}()
		j, err := d.startJanitor()
		if err != nil {
			t.Fatal(err)
		}
		if stopped {
			if err := j.dismiss(); err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(d.path("some/where")); err != nil {
				t.Errorf("a dismissed janitor cleans: %v", err)
			}
			_ = own.Process.Kill()
			<-ended
		} else {
			_ = j.stdin.Close() // as the end of the program does
			if err := j.cmd.Wait(); err != nil {
				t.Errorf("the janitor: %v", err)
			}
			<-ended
			if _, err := os.Stat(d.Dir); err == nil {
				t.Error("the directory is still there")
			}
		}
		if p, err := ReadProcess(foreign.Process.Pid); err != nil || p.State == "Z" {
			t.Errorf("somebody else's process was killed: %v, %v", p, err)
		}
		_ = foreign.Process.Kill()
		_ = foreign.Wait()
	}
}

func TestSnapshot(t *testing.T) {
	s := func(items ...string) *Snapshot {
		m := map[string]struct{}{}
		for _, i := range items {
			m[i] = struct{}{}
		}
		return &Snapshot{m}
	}
	if got := s("b", "c", "a").NewSince(s("b", "x")); !slices.Equal(got, []string{"a", "c"}) {
		t.Errorf("new: %v", got)
	}
}

// TestKeepHostFile: what was there is there again, with its mode and its time, and what was not is not.
func TestKeepHostFile(t *testing.T) {
	dir := t.TempDir()
	old, none := filepath.Join(dir, "old"), filepath.Join(dir, "none")
	then := time.Unix(1700000000, 0)
	if err := errors.Join(os.WriteFile(old, []byte("old"), 0o640), os.Chtimes(old, then, then)); err != nil {
		t.Fatal(err)
	}
	d := &Daemon{}
	if err := errors.Join(d.KeepHostFile(old), d.KeepHostFile(none), d.KeepHostFile(filepath.Join(dir, "no", "such"))); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Remove(old), os.WriteFile(old, []byte("new"), 0o600), os.WriteFile(none, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := d.RestoreHostFile(old); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(old)
	st, serr := os.Stat(old)
	if err := errors.Join(err, serr); err != nil || string(data) != "old" || st.Mode().Perm() != 0o640 || !st.ModTime().Equal(then) {
		t.Errorf("%q, %v, %v", data, st, err)
	}
	if _, err := os.Stat(none); err != nil {
		t.Errorf("the other one is gone, too: %v", err)
	}
	if err := d.restoreHostFiles(func(hostFile) bool { return true }); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(none); err == nil {
		t.Error("a file that was not there is")
	}
}
