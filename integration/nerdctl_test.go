package integration

import (
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/crac-shim/crac/integration/harness"
)

// served is a workload that counts on its standard output and on a page.
// The page is in a tmpfs, which is part of a dump: nerdctl starts a checkpoint on
// the files of today, and CRIU refuses one in which an open file has changed.
const served = `mkdir -p /dev/shm/www; httpd -p 8080 -h /dev/shm/www; i=0; while :; do i=$((i+1)); echo tick $i; echo $i >/dev/shm/www/n; sleep 0.05; done`

// neb is a container that nerdctl started.
type neb struct {
	*harness.T
	id, name, port string
}

// nerdctlRun starts the workload, or an image that continues it, with a published port.
func nerdctlRun(t *harness.T, image string, command []string, flags ...string) *neb {
	t.Helper()
	if _, err := t.Network(); err != nil {
		t.Fatal(err)
	}
	b := &neb{T: t, name: newID(t), port: freePort(t)}
	t.Cleanup(func() {
		if _, err := t.Nerdctl(t.Daemon.Context(t.Ctx), "rm", "-f", b.name); err != nil {
			t.Error(err)
		}
		if b.id != "" {
			t.NoLeftovers(b.id)
		}
	})
	args := []string{"run", "-d", "--runtime", cracRuntime, "--name", b.name, "-p", "127.0.0.1:" + b.port + ":8080"}
	args = append(append(args, flags...), image)
	b.id = strings.TrimSpace(t.NerdctlOK(append(args, command...)...))
	return b
}

// page is the number that the published port answers.
func (b *neb) page() (n int) {
	b.Helper()
	b.Eventually("a number on the published port", func() bool {
		body, _, err := harness.WaitHTTP(b.Ctx, "http://127.0.0.1:"+b.port+"/n")
		if err != nil {
			b.Fatal(err)
		}
		n, err = strconv.Atoi(strings.TrimSpace(body))
		return err == nil // between truncating and writing, the file is empty
	})
	return n
}

// runsOn checks that the container counts on from at least this number.
func (b *neb) runsOn(from int) {
	b.Helper()
	n := b.page()
	if n < from {
		b.Errorf("the restored container is at %d, want at least %d", n, from)
	}
	b.Eventually("the restored container counts", func() bool { return b.page() > n })
}

func (b *neb) ticks() []int {
	b.Helper()
	var all []int
	for _, m := range tickLine.FindAllStringSubmatch(b.NerdctlOK("logs", b.name), -1) {
		n, err := strconv.Atoi(m[1])
		if err != nil {
			b.Fatal(err)
		}
		all = append(all, n)
	}
	return all
}

func (b *neb) state() string {
	b.Helper()
	return strings.TrimSpace(b.NerdctlOK("inspect", "--format", "{{.State.Status}}", b.name))
}

// nerdctl sends no options to a runtime that is not runc's, so an annotation says whether a
// checkpoint ends the container.
func TestNerdctlCheckpointStart(tb *testing.T) {
	onlyCrac(tb)
	for _, own := range []bool{false, true} {
		for _, exit := range []bool{false, true} {
			tb.Run(fmt.Sprintf("own-dir-%v-exit-%v", own, exit), func(tb *testing.T) {
				t := setup(tb)
				needImage(t, "busybox")
				b := nerdctlRun(t, harness.ImageRef("busybox"), []string{"sh", "-c", served},
					"--annotation", fmt.Sprintf("io.containerd.crac.checkpoint.exit=%v", exit))
				t.Eventually("the container counts", func() bool { return b.page() >= 3 })
				create, startFrom := []string{"checkpoint", "create"}, []string{"start"}
				if own {
					dir, err := t.Path(b.name)
					if err != nil {
						t.Fatal(err)
					}
					create, startFrom = append(create, "--checkpoint-dir", dir), append(startFrom, "--checkpoint-dir", dir)
				}
				before := b.page()
				if out := t.NerdctlOK(append(create, b.name, b.name+"-1")...); strings.TrimSpace(out) != b.name+"-1" {
					t.Errorf("nerdctl checkpoint create says %q", out)
				}
				if exit {
					t.Eventually("the container has ended", func() bool { return b.state() == "exited" })
				} else {
					b.runsOn(before)
					t.NerdctlOK("kill", "--signal", "KILL", b.name)
					t.Eventually("the container has ended", func() bool { return b.state() == "exited" })
				}
				logged := b.ticks()
				t.NerdctlOK(append(startFrom, "--checkpoint", b.name+"-1", b.name)...)
				b.runsOn(before)

				// The log goes on where it was, for the restored program knows what it has written.
				var after []int
				t.Eventually("the log goes on", func() bool {
					after = b.ticks()
					return len(after) >= len(logged)+3
				})
				next := after[len(logged)]
				if exit && next != logged[len(logged)-1]+1 {
					t.Errorf("the log goes on with %d after %d", next, logged[len(logged)-1])
				}
				if next < before || next > logged[len(logged)-1]+1 {
					t.Errorf("the log goes on with %d; the page was at %d before the checkpoint", next, before)
				}
				if out := t.NerdctlOK("exec", b.name, "sh", "-c", "echo $((40+2))"); out != "42\n" {
					t.Errorf("exec says %q", out)
				}
				t.NerdctlOK("stop", "--time", "1", b.name)
				if s := b.state(); s != "exited" {
					t.Errorf("after stop it is %s", s)
				}
			})
		}
	}
}

// What people run goes on where it was, on its published port: sockets, threads, pipes, child processes.
func TestNerdctlContinuesApplications(tb *testing.T) {
	onlyCrac(tb)
	for _, app := range []string{"goserver", "python", "nginx"} {
		tb.Run(app, func(tb *testing.T) {
			t := setup(tb)
			needImage(t, app)
			b := nerdctlRun(t, harness.ImageRef(app), nil, "--annotation", "io.containerd.crac.checkpoint.exit=true")
			ask := func() string {
				t.Helper()
				body, _, err := harness.WaitHTTP(t.Ctx, "http://127.0.0.1:"+b.port+"/count")
				if err != nil {
					t.Fatal(err)
				}
				return body
			}
			for i, from := range [][]string{nil, {"--checkpoint-dir", filepath.Join(t.Dir, "x", b.name)}} {
				before := ask()
				name := fmt.Sprintf("%s-%d", b.name, i)
				t.NerdctlOK(slices.Concat([]string{"checkpoint", "create"}, from, []string{b.name, name})...)
				t.Eventually("the container has ended", func() bool { return b.state() == "exited" })
				t.NerdctlOK(slices.Concat([]string{"start"}, from, []string{"--checkpoint", name, b.name})...)
				countsOn(t, ask, before)
			}
		})
	}
}

// A checkpoint image is run by nerdctl as by ctr, whichever of them made it.
func TestNerdctlRunsCheckpointImage(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	needImage(t, "busybox")
	image := ref(t)
	original := nerdctlRun(t, harness.ImageRef("busybox"), []string{"sh", "-c", served},
		"--annotation", "io.containerd.crac.checkpoint.image="+image)
	t.Eventually("the container counts", func() bool { return original.page() >= 3 })
	before := original.page()
	t.NerdctlOK("checkpoint", "create", original.name, original.name+"-1")
	mustHaveImage(t, image, true)
	clone := nerdctlRun(t, image, nil, "--hostname", "clone", "-e", "NEW=1", "--annotation", "io.containerd.crac.restore=require")
	clone.runsOn(before)
	original.runsOn(before)
	// cracctl finds a container by nerdctl's name for it.
	again := ref(t)
	t.CracctlOK("check", clone.name)
	t.CracctlOK("checkpoint", clone.name, again)
	mustHaveImage(t, again, true)
	if out := t.CracctlOK("trace", clone.name); !strings.Contains(out, "warm") {
		t.Errorf("the trace says %s", out)
	}
	if out := t.NerdctlOK("exec", clone.name, "hostname"); out != "clone\n" {
		t.Errorf("the clone's hostname is %q", out)
	}
	if all := clone.ticks(); len(all) == 0 || all[0] < before {
		t.Errorf("the clone's log begins with %v, want no number before %d", all, before)
	}
	// nerdctl's own files, mounted anew for each container.
	if out := t.NerdctlOK("exec", clone.name, "cat", "/etc/hosts"); !strings.Contains(out, "clone") {
		t.Errorf("the clone's /etc/hosts: %q", out)
	}

	// Made by ctr, without these mounts and without a seccomp filter; run with both.
	made, last := checkpointed(t)
	from := nerdctlRun(t, made, nil, "--hostname", "other", "--annotation", "io.containerd.crac.restore=require")
	t.Eventually("the log goes on", func() bool { return len(from.ticks()) >= 3 })
	if first := from.ticks()[0]; first != last+1 {
		t.Errorf("the container counts on from %d, want %d", first, last+1)
	}
	if out := t.NerdctlOK("exec", from.name, "cat", "/etc/hosts"); !strings.Contains(out, "other") {
		t.Errorf("/etc/hosts of a container that was dumped without one: %q", out)
	}
	if out := t.NerdctlOK("exec", from.name, "grep", "Seccomp:", "/proc/1/status"); !strings.Contains(out, "2") {
		t.Errorf("nerdctl asks for a seccomp filter, and the clone has: %q", out)
	}
	// Made with mounts that the request lacks.
	refuses(t, how{image: image}, "/etc/resolv.conf")
}
