package thread

import (
	"errors"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestOwn(t *testing.T) {
	tid := 0
	want := errors.New("result")
	if err := Own(func() error { tid = unix.Gettid(); return want }); !errors.Is(err, want) {
		t.Errorf("got %v", err)
	}
	if tid == unix.Getpid() {
		t.Error("it is the first thread")
	}
	for deadline := time.Now().Add(5 * time.Second); unix.Tgkill(unix.Getpid(), tid, 0) == nil; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the thread outlives what it was for")
		}
	}
}

func TestInNetwork(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("a network namespace can be made and entered by root only")
	}
	cmd := exec.Command("unshare", "--net", "sh", "-c", "echo ready; read x")
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
	defer func() {
		in.Close()
		_ = cmd.Wait()
	}()
	if _, err := out.Read(make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	link := func(path string) string {
		s, err := os.Readlink(path)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	before := link("/proc/self/ns/net")
	var inside string
	err = InNetwork(cmd.Process.Pid, func() error {
		inside = link("/proc/thread-self/ns/net")
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if inside == before || link("/proc/self/ns/net") != before {
		t.Errorf("inside %s, before %s, after %s", inside, before, link("/proc/self/ns/net"))
	}
	if err := InNetwork(1<<22, func() error { return nil }); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a process that is not there: %v", err)
	}
}
