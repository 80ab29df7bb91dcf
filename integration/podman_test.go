package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/integration/harness"
)

// podman is Debian's podman with storage and configuration of its own, on our runc and CRIU.
type podman struct {
	*harness.T
	dir, bin string
	flags    []string
	env      []string
	shared   []string // directories that were not there before
	others   bool     // containers of another podman are here
}

// newPodman prepares podman, with the busybox image. All that it leaves is removed.
func newPodman(t *harness.T) *podman {
	t.Helper()
	bin, err := t.Tools.Path(harness.Podman)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	p := &podman{T: t, dir: dir, bin: bin}
	at := func(name string) string { return filepath.Join(dir, name) }
	for name, text := range map[string]string{
		"storage.conf":    fmt.Sprintf("[storage]\ndriver = \"overlay\"\nrunroot = %q\ngraphroot = %q\n", at("run"), at("root")),
		"registries.conf": "",
		"policy.json":     `{"default":[{"type":"insecureAcceptAnything"}]}`,
		// Locks in files: the others lie in the host's /dev/shm, for all podmans.
		"containers.conf": fmt.Sprintf(`[engine]
helper_binaries_dir = [%q]
conmon_path = [%q]
cgroup_manager = "cgroupfs"
events_logger = "none"
lock_type = "file"
runtime = "runc"
image_copy_tmp_dir = %q
[engine.runtimes]
runc = [%q]
[containers]
netns = "none"
apparmor_profile = ""
`, filepath.Dir(bin), filepath.Join(filepath.Dir(bin), "conmon"), at("copy"), filepath.Join(t.Tools.Tools, "runc")),
	} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(at("copy"), 0o700); err != nil {
		t.Fatal(err)
	}
	p.flags = []string{
		"--root", at("root"), "--runroot", at("run"), "--tmpdir", at("tmp"), "--volumepath", at("volumes"), "--runtime-flag", "root=" + at("runc"),
	}
	p.env = []string{
		"CONTAINERS_CONF=" + at("containers.conf"), "CONTAINERS_STORAGE_CONF=" + at("storage.conf"),
		"CONTAINERS_REGISTRIES_CONF=" + at("registries.conf"), "PODMAN_IGNORE_CGROUPSV1_WARNING=1", "XDG_RUNTIME_DIR=" + dir,
	}
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
	image, err := t.Tools.Image("busybox")
	if err != nil {
		t.Fatal(err)
	}
	p.ok("load", "--quiet", "--signature-policy", at("policy.json"), "--input", image)
	return p
}

// clean removes containers, and the mounts of the storage.
func (p *podman) clean() {
	p.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if _, err := p.try(ctx, "rm", "--force", "--all", "--time", "0"); err != nil {
		p.Error(err)
	}
	mounts, err := harness.Mounts(p.dir)
	if err != nil {
		p.Error(err)
	}
	for i := len(mounts) - 1; i >= 0; i-- {
		if err := unix.Unmount(mounts[i], unix.MNT_DETACH); err != nil {
			p.Errorf("unmount %s: %v", mounts[i], err)
		}
	}
	if err := os.RemoveAll(p.dir); err != nil {
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

func (p *podman) try(ctx context.Context, args ...string) (string, error) {
	cmd := p.Command(ctx, p.bin, append(p.flags[:len(p.flags):len(p.flags)], args...)...)
	cmd.Env = append(cmd.Env, p.env...)
	return harness.Run(ctx, cmd)
}

func (p *podman) ok(args ...string) string {
	p.Helper()
	out, err := p.try(p.Ctx, args...)
	if err != nil {
		p.Fatal(err)
	}
	return strings.TrimSpace(out)
}

func (p *podman) path(name string) string { return filepath.Join(p.dir, name) }

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
