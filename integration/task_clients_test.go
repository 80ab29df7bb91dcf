package integration

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/crac-shim/crac/integration/harness"
)

// freePort returns a TCP port that nobody listens on, and that the kernel gives nobody who asks for
// any: those come from another range.
func freePort(tb testing.TB) string {
	tb.Helper()
	text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range")
	if err != nil {
		tb.Fatal(err)
	}
	var first, last int
	if _, err := fmt.Sscan(string(text), &first, &last); err != nil {
		tb.Fatal(err)
	}
	const lowest = 10000 // above what programs are known by
	for range 100 {
		port := strconv.Itoa(lowest + rand.IntN(max(first-lowest, 1000)))
		l, err := net.Listen("tcp", "127.0.0.1:"+port)
		if err == nil {
			_ = l.Close()
			return port
		}
	}
	tb.Fatal("no free port was found")
	return ""
}

// TestNerdctl goes through what people do with a container. nerdctl makes the network by a
// createRuntime hook and keeps the log by a binary:// logger.
func TestNerdctl(tb *testing.T) {
	t := setup(tb)
	needImage(t, "busybox")
	if _, err := t.Network(); err != nil {
		t.Fatal(err)
	}
	name, port, ref := newID(t), freePort(t), harness.ImageRef("busybox")
	nerdctl := func(args ...string) string { t.Helper(); return t.NerdctlOK(args...) }
	id := strings.TrimSpace(nerdctl("run", "-d", "--runtime", testRuntime, "--name", name, "-p", "127.0.0.1:"+port+":8080", "-m", "64m", "--hostname", "box", ref,
		"sh", "-c", "mkdir /www; echo page > /www/index.html; echo started; trap 'echo bye; exit 0' TERM; httpd -f -p 8080 -h /www & wait"))
	removed := false
	t.Cleanup(func() {
		if !removed {
			nerdctl("rm", "-f", name)
		}
		t.NoLeftovers(id)
	})
	page := func() {
		t.Helper()
		if body, _, err := harness.WaitHTTP(t.Ctx, "http://127.0.0.1:"+port+"/"); err != nil || body != "page\n" {
			t.Errorf("the published port answers %q, %v", body, err)
		}
	}
	page()
	if out := nerdctl("logs", name); out != "started\n" {
		t.Errorf("logs: %q", out)
	}
	if out := nerdctl("exec", name, "hostname"); out != "box\n" {
		t.Errorf("exec: %q", out)
	}
	if _, err := t.Nerdctl(t.Ctx, "exec", name, "sh", "-c", "exit 21"); err == nil || !strings.Contains(err.Error(), "exit code 21") {
		t.Errorf("exec's exit code: %v", err)
	}
	if out := nerdctl("ps", "--format", "{{.Names}} {{.Status}}"); !strings.Contains(out, name+" Up") {
		t.Errorf("ps: %q", out)
	}
	if out := nerdctl("stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}}", name); !strings.Contains(out, "64MiB") {
		t.Errorf("stats: %q", out)
	}
	if out := nerdctl("top", name); !strings.Contains(out, "httpd") {
		t.Errorf("top: %q", out)
	}
	nerdctl("update", "-m", "96m", name)
	nerdctl("pause", name)
	nerdctl("unpause", name)
	page()
	nerdctl("stop", name)
	if out := nerdctl("logs", name); out != "started\nbye\n" {
		t.Errorf("logs after stop: %q", out)
	}
	if out := nerdctl("inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", name); out != "exited 0\n" {
		t.Errorf("inspect after stop: %q", out)
	}
	nerdctl("start", name)
	page()
	nerdctl("rm", "-f", name)
	removed = true
	if out := nerdctl("run", "--rm", "--runtime", testRuntime, "--network", "none", ref, "sh", "-c", "echo one; echo two >&2"); out != "one\n" {
		t.Errorf("run --rm: %q", out)
	}
}

// TestCtrCNI: ctr calls CNI with the task's network namespace between Create and Start.
func TestCtrCNI(tb *testing.T) {
	t := setup(tb)
	needImage(t, "busybox")
	n, err := t.Network()
	if err != nil {
		t.Fatal(err)
	}
	id := newID(t)
	t.CtrOK("run", "-d", "--cni", "--runtime", testRuntime, harness.ImageRef("busybox"), id,
		"sh", "-c", "ip -o addr show lo | grep -q 127.0.0.1 && echo loopback > /tmp/index.html; httpd -f -p 80 -h /tmp")
	t.Cleanup(func() {
		if err := n.Release(t.Ctx, id); err != nil {
			t.Error(err)
		}
		t.CtrOK("tasks", "delete", "--force", id)
		t.CtrOK("containers", "delete", id)
		t.NoLeftovers(id)
	})
	c, err := t.Client.LoadContainer(t.Ctx, id)
	if err != nil {
		t.Fatal(err)
	}
	task, err := c.Task(t.Ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	ip, err := n.IP(t.Ctx, int(task.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	if body, _, err := harness.WaitHTTP(t.Ctx, "http://"+ip+"/"); err != nil || body != "loopback\n" {
		t.Errorf("the container's address answers %q, %v", body, err)
	}
}

// TestRegistry: an image goes to a registry and comes back.
func TestRegistry(tb *testing.T) {
	t := setup(tb)
	needImage(t, "busybox")
	r, err := t.StartRegistry(t.Ctx)
	if err != nil {
		t.Fatal(err)
	}
	ref, id := r.Host+"/library/busybox:"+newID(t), newID(t)
	t.CtrOK("images", "tag", harness.ImageRef("busybox"), ref)
	t.CtrOK("images", "push", "--plain-http", ref)
	t.CtrOK("images", "rm", "--sync", ref)
	t.CtrOK("images", "pull", "--plain-http", ref)
	if out := t.CtrOK("run", "--rm", "--runtime", testRuntime, ref, id, "echo", "pulled"); out != "pulled\n" {
		t.Errorf("the pulled image printed %q", out)
	}
	t.NoLeftovers(id)
	t.CtrOK("images", "rm", ref)
}
