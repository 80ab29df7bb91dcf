package integration

import (
	"context"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/crac-shim/crac/integration/harness"
)

// podman is Debian's podman with storage and configuration of its own, on our runc and CRIU.
type podman struct {
	*harness.T
	home   *harness.PodmanHome
	shared []string // directories that were not there before
	others bool     // containers of another podman are here
}

// newPodman prepares podman, with the busybox image. All that it leaves is removed.
func newPodman(t *harness.T) *podman {
	t.Helper()
	home, err := t.NewPodmanHome(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	p := &podman{T: t, home: home}
	for _, dir := range []string{"/run/containers/networks", "/run/containers"} {
		if _, err := os.Stat(dir); err != nil {
			p.shared = append(p.shared, dir)
		}
	}
	others, err := harness.Cgroups(func(path string) bool { return strings.Contains(path, "/libpod_parent/libpod-") })
	if err != nil {
		t.Fatal(err)
	}
	p.others = len(others) > 0
	t.Cleanup(p.clean)
	if err := home.Load(t.Ctx, "busybox"); err != nil {
		t.Fatal(err)
	}
	return p
}

// clean removes containers, and the mounts of the storage.
func (p *podman) clean() {
	p.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*harness.WaitLimit)
	defer cancel()
	if err := p.home.Remove(ctx); err != nil {
		p.Error(err)
	}
	// What podman makes for all of its containers, it leaves.
	for _, dir := range p.shared {
		_ = os.Remove(dir)
	}
	p.Eventually("podman's cgroups are gone", func() bool {
		left, err := harness.Cgroups(func(path string) bool {
			return strings.HasSuffix(path, "/"+p.Namespace+"/conmon") || strings.Contains(path, "/libpod_parent") && !p.others
		})
		slices.Reverse(left) // children sort after their parents
		for _, path := range left {
			_ = os.Remove(path)
		}
		return err == nil && len(left) == 0
	})
}

func (p *podman) ok(args ...string) string {
	p.Helper()
	out, err := p.home.Run(p.Ctx, args...)
	if err != nil {
		p.Fatal(err)
	}
	return strings.TrimSpace(out)
}

func (p *podman) path(name string) string { return p.home.Path(name) }

// podTicker is a ticker in podman.
type podTicker struct {
	*podman
	name string
}

// ticker starts one, in cgroups of the test's own.
func (p *podman) ticker() *podTicker {
	p.Helper()
	c := &podTicker{p, newID(p)}
	p.ok("run", "--detach", "--name", c.name, "--cgroup-parent", "/"+p.Namespace, "--log-driver", "k8s-file", "--log-opt", "path="+p.path(c.name+".log"),
		harness.ImageRef("busybox"), "sh", "-c", tick)
	return c
}

var podTick = regexp.MustCompile(`(?m) tick (\d+)$`)

// ticks are the numbers that it has written.
func (c *podTicker) ticks() (all []int) {
	data, err := os.ReadFile(c.path(c.name + ".log"))
	if err != nil {
		return nil
	}
	for _, m := range podTick.FindAllStringSubmatch(string(data), -1) {
		n, err := strconv.Atoi(m[1])
		if err != nil {
			c.Fatal(err)
		}
		all = append(all, n)
	}
	return all
}

func (c *podTicker) waitTicks(n int) {
	c.Helper()
	have := len(c.ticks())
	c.Eventually(fmt.Sprintf("%d more ticks of %s", n, c.name), func() bool { return len(c.ticks()) >= have+n })
}

func (c *podTicker) lastTick() int {
	c.Helper()
	all := c.ticks()
	if len(all) == 0 {
		c.Fatalf("%s has written nothing", c.name)
	}
	return all[len(all)-1]
}

var _ testing.TB = (*podman)(nil)
