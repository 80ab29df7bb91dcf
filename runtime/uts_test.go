package runtime

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

func inUserNamespace() *specs.Spec {
	return &specs.Spec{Linux: &specs.Linux{
		Namespaces:  []specs.LinuxNamespace{{Type: specs.UserNamespace}},
		UIDMappings: []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 10}, {ContainerID: 50, HostID: 7, Size: 1}},
		GIDMappings: []specs.LinuxIDMapping{{ContainerID: 0, HostID: 200000, Size: 10}},
	}}
}

func TestHostname(t *testing.T) {
	own, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name       string
		namespaces []specs.LinuxNamespace
		want       string
		wantErr    bool
	}{
		{name: "the host's", want: ""},
		{name: "its own", namespaces: []specs.LinuxNamespace{{Type: specs.UTSNamespace}}, want: "asked"},
		{name: "joined", namespaces: []specs.LinuxNamespace{{Type: specs.UTSNamespace, Path: "/proc/self/ns/uts"}}, want: own},
		{name: "gone", namespaces: []specs.LinuxNamespace{{Type: specs.UTSNamespace, Path: "/proc/self/ns/gone"}}, wantErr: true},
		{name: "of another kind", namespaces: []specs.LinuxNamespace{{Type: specs.UTSNamespace, Path: "/proc/self/ns/pid"}}, wantErr: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if len(tt.namespaces) > 0 && tt.namespaces[0].Path != "" && os.Geteuid() != 0 {
				t.Skip("only root may join a namespace")
			}
			got, err := Hostname(&specs.Spec{Hostname: "asked", Linux: &specs.Linux{Namespaces: tt.namespaces}})
			if got != tt.want || (err != nil) != tt.wantErr {
				t.Errorf("got %q, %v, want %q", got, err, tt.want)
			}
		})
	}
}

func TestTmpfsOwners(t *testing.T) {
	for _, c := range []struct {
		name     string
		kind     string
		in, want []string
	}{
		{"root", "tmpfs", []string{"ro", "mode=0"}, []string{"ro", "mode=0", "uid=100000", "gid=200000"}},
		{"somebody", "tmpfs", []string{"uid=3", "gid=4"}, []string{"uid=100003", "gid=200004"}},
		{"the second line of the map", "tmpfs", []string{"uid=50"}, []string{"uid=7", "gid=200000"}},
		{"not in the map", "tmpfs", []string{"uid=10", "gid=1"}, []string{"uid=10", "gid=200001"}},
		{"no number", "tmpfs", []string{"uid=x"}, []string{"uid=x", "uid=100000", "gid=200000"}},
		{"bind", "bind", []string{"rbind"}, []string{"rbind"}},
	} {
		in := []specs.Mount{{Destination: "/a", Type: c.kind, Options: slices.Clone(c.in)}}
		got := tmpfsOwners(inUserNamespace(), in)[0].Options
		slices.Sort(got)
		slices.Sort(c.want)
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
		if !slices.Equal(in[0].Options, c.in) {
			t.Errorf("%s: the request became %q", c.name, in[0].Options)
		}
		if got := tmpfsOwners(&specs.Spec{Linux: &specs.Linux{}}, in)[0].Options; !slices.Equal(got, c.in) {
			t.Errorf("%s without a user namespace: %q", c.name, got)
		}
	}
}

func TestOwnedByRoot(t *testing.T) {
	dir := t.TempDir()
	spec := inUserNamespace()
	for uid, want := range map[uint32]bool{uint32(os.Getuid()): true, uint32(os.Getuid()) + 1: false} {
		spec.Linux.UIDMappings[0].HostID = uid
		if got, err := ownedByRoot(spec, dir); got != want || err != nil {
			t.Errorf("root is %d: %v, %v, want %v", uid, got, err, want)
		}
	}
	if _, err := ownedByRoot(spec, filepath.Join(dir, "gone")); err == nil {
		t.Error("no error for a directory that is not there")
	}
}

// What CRIU reads before a user namespace has its map has to be readable for
// all, whatever the dump's mode is.
func TestViewFromInsideShowsClocks(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("mounting an overlay needs root")
	}
	dump := t.TempDir()
	for name, data := range map[string]string{"timens-0.img": "clocks", "utsns-1.img": "name", "core-1.img": "core"} {
		if err := os.WriteFile(filepath.Join(dump, name), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(dump, 0o700); err != nil {
		t.Fatal(err)
	}
	spec := inUserNamespace()
	for name, owner := range map[string]uint32{"the dump belongs to the host": 100000, "the dump belongs to the container": 0} {
		spec.Linux.UIDMappings = []specs.LinuxIDMapping{{ContainerID: 0, HostID: owner, Size: 10}}
		c := &Container{spec: spec, cfg: Config{Bundle: t.TempDir()}}
		v, err := c.view(dump, nil, nil)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for path, want := range map[string]os.FileMode{"": 0o755 | os.ModeDir, "timens-0.img": 0o644, "core-1.img": 0o600} {
			st, err := os.Stat(filepath.Join(v.dir, path))
			if err != nil || st.Mode() != want {
				t.Errorf("%s: %q has mode %v (%v), want %v", name, path, st.Mode(), err, want)
			}
		}
		if data, err := os.ReadFile(filepath.Join(v.dir, "timens-0.img")); string(data) != "clocks" {
			t.Errorf("%s: the clocks are %q, %v", name, data, err)
		}
		v.Close()
		if left, err := os.ReadDir(c.cfg.Bundle); err != nil || len(left) > 0 {
			t.Errorf("%s: the view leaves %v (%v)", name, left, err)
		}
	}
}
