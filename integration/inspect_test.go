package integration

import (
	"bufio"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/crac-shim/crac/integration/harness"
)

// fromJSON reads what cracctl prints.
func fromJSON[T any](t *harness.T, args ...string) T {
	t.Helper()
	var v T
	out := t.CracctlOK(append(args, "--format", "json")...)
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		t.Fatalf("cracctl %v says %q: %v", args, out, err)
	}
	return v
}

type inspected struct {
	Digest    string
	DumpSize  int64
	Processes []struct {
		PID, Parent uint32
		Command     string
		Mapped      int64
		Dumped      int64
		Descriptors []struct {
			FD     uint32
			Kind   string
			Name   string
			Socket *struct{ Protocol, State, Local string }
		}
	}
	Manifest struct {
		Container struct{ Args []string }
		Requires  []string
	}
	Here struct {
		OK bool
	}
}

type verified struct {
	OK, Whole bool
	Damage    string
	Here      struct {
		OK      bool
		Reasons []struct{ Code, Text string }
	}
}

func TestCracctlImages(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image := ref(t)

	// What happens is told while it does.
	watcher := t.Command(t.Ctx, "cracctl", "events", "--format", "json")
	out, err := watcher.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := watcher.Start(); err != nil {
		t.Fatal(err)
	}
	told := make(chan string, 16)
	go func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			told <- s.Text()
		}
		close(told)
	}()
	t.Cleanup(func() {
		_ = watcher.Process.Kill()
		_ = watcher.Wait()
	})
	hears := func(what string) {
		t.Helper()
		for timeout := time.After(harness.WaitLimit); ; {
			select {
			case line := <-told:
				if strings.Contains(line, what) {
					return
				}
			case <-timeout:
				t.Fatalf("cracctl events said nothing of %q", what)
			}
		}
	}

	b := start(t, how{args: []string{"sh", "-c", "nc -l -p 7 & exec 5</etc/passwd; " + tick}})
	b.waitTicks(3)
	t.Eventually("nc listens", func() bool {
		out, err := b.tryExec("netstat", "-ltn")
		return err == nil && strings.Contains(out, ":7 ")
	})
	t.Eventually("the events are heard", func() bool { // a subscription takes its time
		t.CracctlOK("checkpoint", "--quiet", b.id, image)
		select {
		case line := <-told:
			if !strings.Contains(line, image) || !strings.Contains(line, b.id) {
				t.Errorf("cracctl events said %q", line)
			}
			return true
		case <-time.After(time.Second):
			return false
		}
	})

	in := fromJSON[inspected](t, "inspect", image)
	if !in.Here.OK || in.DumpSize == 0 || !slices.Equal(in.Manifest.Container.Args[:2], []string{"sh", "-c"}) || !slices.Contains(in.Manifest.Requires, "time-namespace") {
		t.Errorf("%+v", in)
	}
	listens, opened := false, false
	for _, p := range in.Processes {
		if p.Mapped <= 0 || p.Dumped <= 0 || p.Dumped > p.Mapped || p.PID != 1 && p.Parent != 1 {
			t.Errorf("process %+v", p)
		}
		for _, d := range p.Descriptors {
			listens = listens || p.Command == "nc" && d.Socket != nil && d.Socket.State == "listen" && strings.HasSuffix(d.Socket.Local, ":7")
			opened = opened || p.PID == 1 && d.FD == 5 && d.Name == "/etc/passwd"
		}
	}
	if !listens || !opened {
		t.Errorf("of its socket (%v) and its file (%v): %+v", listens, opened, in.Processes)
	}
	for _, want := range []string{"└─ ", "nc", "/etc/passwd", "*:7", "fits this host", "DUMPED"} {
		if table := t.CracctlOK("inspect", "--full", image); !strings.Contains(table, want) {
			t.Errorf("the table does not say %q:\n%s", want, table)
		}
	}
	if got := t.CracctlOK("inspect", "--format", "{{.Manifest.Platform.OS}} {{len .Layers}}", image); !strings.HasPrefix(got, "linux ") {
		t.Errorf("by a template: %q", got)
	}

	if v := fromJSON[verified](t, "verify", image); !v.OK || !v.Whole || !v.Here.OK {
		t.Errorf("%+v", v)
	}
	if kinds := strings.Fields(t.CracctlOK("history", "--format", "{{.Kind}}", image)); kinds[0] != "base" || kinds[len(kinds)-1] != "checkpoint" {
		t.Errorf("history: %v", kinds)
	}
	if list := t.CracctlOK("ls"); !strings.Contains(list, image) || strings.Contains(list, harness.ImageRef("busybox")+" ") && !strings.Contains(list, "fits") {
		t.Errorf("ls:\n%s", list)
	}
	if names := t.CracctlOK("__complete", "inspect", ""); !strings.Contains(names, image) {
		t.Errorf("completion offers %q", names)
	}
	if names := t.CracctlOK("__complete", "checkpoint", ""); !strings.Contains(names, b.id) {
		t.Errorf("completion offers %q", names)
	}

	// A process that has counted on has changed some of its memory, and not the most.
	second := ref(t)
	t.CracctlOK("checkpoint", "--quiet", b.id, second)
	type differs struct {
		Memory    struct{ Equal, Changed int64 }
		Processes []struct{ PID uint32 }
	}
	if d := fromJSON[differs](t, "diff", image, second); d.Memory.Changed == 0 || d.Memory.Equal == 0 || len(d.Processes) < 2 {
		t.Errorf("diff: %+v", d)
	}
	t.CracctlOK("rm", second)

	// A cold start in place of a restore is heard of as well.
	cold := start(t, how{image: image, args: []string{"sh", "-c", "sleep 1000"}})
	hears("/crac/cold-start")
	cold.remove()

	// Only checkpoint images are removed, and with them what is theirs alone.
	if _, err := t.Cracctl(t.Ctx, "rm", harness.ImageRef("busybox")); err == nil || !strings.Contains(err.Error(), "no checkpoint image") {
		t.Errorf("rm of a plain image: %v", err)
	}
	top := manifestOf(t, image).Layers
	t.CracctlOK("rm", image)
	mustHaveImage(t, image, false)
	mustHaveImage(t, harness.ImageRef("busybox"), true)
	if _, err := t.Client.ContentStore().Info(t.Ctx, top[len(top)-1].Digest); err == nil {
		t.Error("the checkpoint layer is still there")
	}
	for _, cmd := range []string{"inspect", "verify", "history", "rm", "push"} {
		args := []string{cmd, "crac.test/no/such:image"}
		if _, err := t.Cracctl(t.Ctx, args...); err == nil || !strings.Contains(err.Error(), "no/such") || !strings.Contains(err.Error(), "cracctl ls") {
			t.Errorf("%v: %v", args, err)
		}
	}
	if _, err := t.Cracctl(t.Ctx, "inspect", harness.ImageRef("busybox")); err == nil || !strings.Contains(err.Error(), "no checkpoint") {
		t.Errorf("inspect of a plain image: %v", err)
	}
}
