package runtime

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

func TestAnchor(t *testing.T) {
	for name, tt := range map[string]struct {
		root, rootfs string
		want         string
	}{
		"relative":   {"rootfs", "", "/b/rootfs"},
		"absolute":   {"/somewhere", "", "/somewhere"},
		"overridden": {"/somewhere", "/mounted", "/mounted"},
		"empty":      {"", "", "/b"},
	} {
		spec := &specs.Spec{Root: &specs.Root{Path: tt.root}}
		if err := anchor(spec, "/b", tt.rootfs); err != nil || spec.Root.Path != tt.want {
			t.Errorf("%s: root is %s, %v; want %s", name, spec.Root.Path, err, tt.want)
		}
	}
	if err := anchor(&specs.Spec{}, "/b", ""); err == nil {
		t.Error("a spec without a root is taken")
	}

	spec := &specs.Spec{Root: &specs.Root{}, Mounts: []specs.Mount{
		{Type: "bind", Source: "a"},
		{Type: "none", Source: "b", Options: []string{"ro", "rbind"}},
		{Source: "c", Options: []string{"bind"}},
		{Type: "bind", Source: "/abs"},
		{Type: "tmpfs", Source: "tmpfs"},
		{Type: "proc", Source: "proc"},
	}}
	if err := anchor(spec, "/b", ""); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range spec.Mounts {
		got = append(got, m.Source)
	}
	if want := []string{"/b/a", "/b/b", "/b/c", "/abs", "tmpfs", "proc"}; !reflect.DeepEqual(got, want) {
		t.Errorf("sources %v, want %v", got, want)
	}
}

func TestLoadSpec(t *testing.T) {
	for name, tt := range map[string]struct {
		config string // none if empty
		says   string // of the error
	}{
		"none":       {"", "no config.json"},
		"cut short":  {`{"linux":`, "config.json"},
		"no Linux":   {`{"windows":{}}`, "not the spec of a Linux container"},
		"wrong type": {`{"linux":{"namespaces":7}}`, "config.json"},
		"good":       {`{"linux":{"namespaces":[{"type":"pid"}]},"root":{"path":"x"},"unknown":1}`, ""},
	} {
		t.Run(name, func(t *testing.T) {
			bundle := t.TempDir()
			if tt.config != "" {
				if err := os.WriteFile(filepath.Join(bundle, "config.json"), []byte(tt.config), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			spec, err := LoadSpec(bundle)
			if tt.says == "" {
				if err != nil || spec.Root.Path != "x" || len(spec.Linux.Namespaces) != 1 {
					t.Errorf("got %+v, %v", spec, err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.says) || !strings.Contains(err.Error(), bundle) {
				t.Errorf("error is %v, want one that says %q and names %s", err, tt.says, bundle)
			}
			if tt.config == "" && !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%v is no ErrNotExist", err)
			}
		})
	}
}

func TestNewConfigLabels(t *testing.T) {
	spec := specOf(specs.LinuxNamespace{Type: specs.MountNamespace})
	spec.Version, spec.Root.Path = specs.Version, t.TempDir()
	spec.Annotations = map[string]string{"org.criu.config": "/the/users", "bundle": "/elsewhere", "kept": "yes"}
	cfg := Config{ID: "c", Bundle: "/b"}
	config, err := newConfig(spec, cfg)
	if err != nil {
		t.Fatal(err)
	}
	labels := make(map[string][]string)
	for _, l := range config.Labels {
		k, v, _ := strings.Cut(l, "=")
		labels[k] = append(labels[k], v)
	}
	// libcontainer takes the first label of a name, CRIU's file must be ours.
	want := map[string][]string{"org.criu.config": {"/the/users"}, "bundle": {"/b"}, "kept": {"yes"}}
	if !reflect.DeepEqual(labels, want) {
		t.Errorf("labels %v, want %v", labels, want)
	}
}
