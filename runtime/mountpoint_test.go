package runtime

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/runc/libcontainer/configs"
)

func TestMakeMountPoints(t *testing.T) {
	top := t.TempDir()
	rootfs, host := filepath.Join(top, "rootfs"), filepath.Join(top, "host")
	for _, dir := range []string{"rootfs/etc", "rootfs/real", "host/data", "outside"} {
		if err := os.MkdirAll(filepath.Join(top, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(host, "resolv.conf")
	if err := os.WriteFile(file, []byte("host's"), 0o644); err != nil {
		t.Fatal(err)
	}
	// The image's links are hostile, and those of a shared volume.
	for name, target := range map[string]string{
		"rootfs/up": "../../outside", "rootfs/abs": filepath.Join(top, "outside"), "rootfs/alias": "/real", "host/data/up": "../../outside",
	} {
		if err := os.Symlink(target, filepath.Join(top, name)); err != nil {
			t.Fatal(err)
		}
	}
	bind := func(source, destination string) *configs.Mount {
		return &configs.Mount{Device: "bind", Source: source, Destination: destination}
	}
	for name, tt := range map[string]struct {
		mounts []*configs.Mount
		dirs   []string // below top
		files  []string
		not    []string
	}{
		"directory":       {mounts: []*configs.Mount{bind(filepath.Join(host, "data"), "/a/b")}, dirs: []string{"rootfs/a/b"}},
		"file":            {mounts: []*configs.Mount{bind(file, "/etc/resolv.conf")}, files: []string{"rootfs/etc/resolv.conf"}},
		"of a new kind":   {mounts: []*configs.Mount{{Device: "tmpfs", Destination: "/scratch"}}, dirs: []string{"rootfs/scratch"}},
		"there already":   {mounts: []*configs.Mount{bind(file, "/etc/resolv.conf"), bind(host, "/real")}, files: []string{"rootfs/etc/resolv.conf"}, dirs: []string{"rootfs/real"}},
		"through a link":  {mounts: []*configs.Mount{bind(host, "/alias/x")}, dirs: []string{"rootfs/real/x"}},
		"link upwards":    {mounts: []*configs.Mount{bind(host, "/up/y")}, not: []string{"outside/y"}},
		"link to abroad":  {mounts: []*configs.Mount{bind(host, "/abs/z")}, not: []string{"outside/z"}},
		"in a bind":       {mounts: []*configs.Mount{bind(filepath.Join(host, "data"), "/in"), bind(host, "/in/sub")}, dirs: []string{"rootfs/in", "host/data/sub"}, not: []string{"rootfs/in/sub"}},
		"in a bind, evil": {mounts: []*configs.Mount{bind(filepath.Join(host, "data"), "/in"), bind(host, "/in/up/w")}, not: []string{"outside/w"}},
		"in a tmpfs":      {mounts: []*configs.Mount{{Device: "tmpfs", Destination: "/tmp"}, bind(host, "/tmp/sub")}, dirs: []string{"rootfs/tmp"}, not: []string{"rootfs/tmp/sub"}},
		"cgroups":         {mounts: []*configs.Mount{{Device: "cgroup", Destination: "/sys/fs/cgroup"}}, not: []string{"rootfs/sys"}},
	} {
		t.Run(name, func(t *testing.T) {
			// A link may be refused instead of followed below the root.
			if err := makeMountPoints(rootfs, tt.mounts); err != nil && len(tt.not) == 0 {
				t.Fatal(err)
			}
			for _, d := range tt.dirs {
				if st, err := os.Lstat(filepath.Join(top, d)); err != nil || !st.IsDir() {
					t.Errorf("no directory %s: %v", d, err)
				}
			}
			for _, f := range tt.files {
				if st, err := os.Lstat(filepath.Join(top, f)); err != nil || !st.Mode().IsRegular() || st.Size() != 0 {
					t.Errorf("no empty file %s: %v", f, err)
				}
			}
			for _, n := range tt.not {
				if _, err := os.Lstat(filepath.Join(top, n)); err == nil {
					t.Errorf("made %s", n)
				}
			}
		})
	}
	if err := makeMountPoints(rootfs, []*configs.Mount{bind(filepath.Join(host, "gone"), "/gone")}); err == nil {
		t.Error("a bind mount of nothing has a mount point")
	}
	if data, err := os.ReadFile(file); err != nil || string(data) != "host's" {
		t.Errorf("the host's file holds %q now, %v", data, err)
	}
}
