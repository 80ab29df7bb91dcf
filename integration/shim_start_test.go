package integration

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/integration/harness"
)

// shimStart calls the shim's `start` as containerd before 2.3 does, in a bundle: all that is written, until
// nobody is left who could write more, is the answer.
func shimStart(t *harness.T, bundle, id string) (string, error) {
	program, err := t.Tools.Path(harness.Shim)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Ctx, program, "-namespace", t.Namespace, "-address", t.Address, "-publish-binary", "/none", "-id", id, "start")
	cmd.Dir = bundle
	cmd.Env = append(os.Environ(), "TTRPC_ADDRESS="+t.Address+".ttrpc")
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// The process that `start` leaves behind is a shim: it listens, has nothing that its caller waits for, is not a
// member of the caller's group, and takes its socket away when it ends.
func TestShimStart(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	bundle, err := t.Path("bundle")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(bundle, 0o700); err != nil {
		t.Fatal(err)
	}
	id := fmt.Sprintf("start-%d", os.Getpid())
	if out, err := shimStart(t, bundle, id); err == nil || !strings.Contains(out, "config.json") {
		t.Fatalf("without a container: %q, %v; want an error that names what is missing", out, err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	// Where the shim logs to, as containerd makes it.
	log := filepath.Join(bundle, "log")
	if err := unix.Mkfifo(log, 0o600); err != nil {
		t.Fatal(err)
	}
	reader, err := os.OpenFile(log, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	begin := time.Now()
	out, err := shimStart(t, bundle, id)
	if err != nil {
		t.Fatalf("%q, %v", out, err)
	}
	var answer struct {
		Version           int
		Address, Protocol string
	}
	if err := json.Unmarshal([]byte(out), &answer); err != nil || answer.Version != 3 || answer.Protocol != "ttrpc" {
		t.Fatalf("the answer is %q, %v", out, err)
	}
	socket := strings.TrimPrefix(answer.Address, "unix://")
	var pid int
	for _, p := range t.OwnProcesses() {
		if strings.Contains(p.Cmdline, "-id "+id) {
			if pid != 0 {
				t.Errorf("%d and %d are the shim", pid, p.PID)
			}
			pid = p.PID
		}
	}
	if pid == 0 {
		t.Fatalf("no shim is left after %v", time.Since(begin))
	}
	defer func() { _ = unix.Kill(pid, unix.SIGKILL) }()
	defer func() { _ = os.Remove(socket) }() // if that is not what it does itself
	// It has no container yet. That it says so tells that it serves.
	if _, err := dialShim(t, answer.Address).Pids(t.Ctx, &task.PidsRequest{ID: id}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("the shim answers %v", err)
	}
	if group, err := unix.Getpgid(pid); err != nil || group != pid {
		t.Errorf("its process group is %d, %v", group, err)
	}
	if cmdline, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid)); err != nil || bytes.Contains(cmdline, []byte("start\x00")) {
		t.Errorf("it looks as if the call had not ended: %q, %v", cmdline, err)
	}
	for fd := range 2 {
		if to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd)); err != nil || to != os.DevNull {
			t.Errorf("descriptor %d is %s, %v", fd, to, err)
		}
	}
	if again, err := shimStart(t, bundle, id); err != nil || again != out {
		t.Errorf("once more: %q, %v; want the address of the shim that is there", again, err)
	}
	t.Eventually("the shim has ended and its socket is gone", func() bool {
		// containerd's package begins to serve before it begins to heed this signal.
		gone := unix.Kill(pid, syscall.SIGTERM) == unix.ESRCH
		_, err := os.Lstat(socket)
		return gone && os.IsNotExist(err)
	})
}
