package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// PodmanHome is a podman with storage and configuration of its own, on the daemon's runc and CRIU.
type PodmanHome struct {
	d         *Daemon
	bin       string
	name, dir string
}

// NewPodmanHome makes one in a directory of this name below the daemon's. Its containers have no
// network unless they are given one.
func (d *Daemon) NewPodmanHome(name string) (*PodmanHome, error) {
	bin, err := d.Tools.Path(Podman)
	if err != nil {
		return nil, err
	}
	dir, err := d.Path(name)
	if err != nil {
		return nil, err
	}
	p := &PodmanHome{d, bin, name, dir}
	for name, text := range map[string]string{
		"storage.conf":    fmt.Sprintf("[storage]\ndriver = \"overlay\"\nrunroot = %q\ngraphroot = %q\n", p.state("run"), p.Path("root")),
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
`, filepath.Dir(bin), filepath.Join(filepath.Dir(bin), "conmon"), p.Path("copy"), filepath.Join(d.Tools.Tools, "runc")),
	} {
		if err := os.WriteFile(p.Path(name), []byte(text), 0o600); err != nil {
			return nil, err
		}
	}
	return p, errors.Join(os.Mkdir(p.Path("copy"), 0o700), os.Mkdir(d.StatePath(p.name), 0o700))
}

// Path is that of a file in its directory.
func (p *PodmanHome) Path(name string) string { return filepath.Join(p.dir, name) }

// state is the path of what it would have in /run.
func (p *PodmanHome) state(name string) string { return p.d.StatePath(filepath.Join(p.name, name)) }

// Run runs podman and returns its stdout.
func (p *PodmanHome) Run(ctx context.Context, args ...string) (string, error) {
	flags := []string{
		"--root", p.Path("root"), "--runroot", p.state("run"), "--tmpdir", p.state("tmp"), "--volumepath", p.Path("volumes"),
		"--runtime-flag", "root=" + p.state("runc"),
	}
	cmd := p.d.Command(ctx, p.bin, append(flags, args...)...)
	cmd.Env = append(
		cmd.Env, "CONTAINERS_CONF="+p.Path("containers.conf"), "CONTAINERS_STORAGE_CONF="+p.Path("storage.conf"),
		"CONTAINERS_REGISTRIES_CONF="+p.Path("registries.conf"), "PODMAN_IGNORE_CGROUPSV1_WARNING=1", "XDG_RUNTIME_DIR="+p.dir,
	)
	return Run(ctx, cmd)
}

// Load brings one of the test applications' images into its storage.
func (p *PodmanHome) Load(ctx context.Context, image string) error {
	archive, err := p.d.Tools.Image(image)
	if err != nil {
		return err
	}
	_, err = p.Run(ctx, "load", "--quiet", "--signature-policy", p.Path("policy.json"), "--input", archive)
	return err
}

// Remove removes its containers, mounts and files. What conmon leaves in the cgroups stays: it may
// still run.
func (p *PodmanHome) Remove(ctx context.Context) error {
	_, err := p.Run(ctx, "rm", "--force", "--all", "--time", "0")
	return errors.Join(err, unmountBelow(p.dir), os.RemoveAll(p.dir))
}
