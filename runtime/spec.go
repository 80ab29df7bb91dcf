package runtime

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/specconv"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// LoadSpec reads the OCI spec of a bundle.
func LoadSpec(bundle string) (*specs.Spec, error) {
	path := filepath.Join(bundle, "config.json")
	data, err := os.ReadFile(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("bundle %s has no config.json: %w", bundle, err)
		}
		return nil, err
	}
	var spec specs.Spec
	if err := json.Unmarshal(data, &spec); err != nil {
		return nil, fmt.Errorf("parse %s: %w", path, err)
	}
	if spec.Linux == nil {
		return nil, fmt.Errorf("%s is not the spec of a Linux container", path)
	}
	return &spec, nil
}

// anchor makes the paths of a spec absolute. libcontainer takes relative ones to
// start at the working directory, which is the bundle for runc but cannot be
// for a shim that serves several bundles.
func anchor(spec *specs.Spec, bundle, rootfs string) error {
	if spec.Root == nil {
		return errors.New("the OCI spec has no root")
	}
	switch {
	case rootfs != "":
		spec.Root.Path = rootfs
	case !filepath.IsAbs(spec.Root.Path):
		spec.Root.Path = filepath.Join(bundle, spec.Root.Path)
	}
	for i, m := range spec.Mounts {
		bind := m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind")
		if bind && !filepath.IsAbs(m.Source) {
			spec.Mounts[i].Source = filepath.Join(bundle, m.Source)
		}
	}
	return nil
}

// newConfig turns the spec into libcontainer's form of it.
func newConfig(spec *specs.Spec, cfg Config) (*configs.Config, error) {
	config, err := specconv.CreateLibcontainerConfig(&specconv.CreateOpts{
		CgroupName:       cfg.ID,
		UseSystemdCgroup: cfg.SystemdCgroup,
		NoPivotRoot:      cfg.NoPivotRoot,
		NoNewKeyring:     cfg.NoNewKeyring,
		Spec:             spec,
		RootlessEUID:     os.Geteuid() != 0,
	})
	if err != nil {
		return nil, fmt.Errorf("OCI spec of container %s: %w", cfg.ID, err)
	}
	// The working directory is not the bundle (see anchor), and hooks are told
	// of the bundle by this label.
	config.Labels = slices.DeleteFunc(config.Labels, func(l string) bool {
		return strings.HasPrefix(l, "bundle=")
	})
	config.Labels = append(config.Labels, "bundle="+cfg.Bundle)
	return config, nil
}

// namespace finds the request for a namespace of one type.
func namespace(spec *specs.Spec, t specs.LinuxNamespaceType) (*specs.LinuxNamespace, bool) {
	for i := range spec.Linux.Namespaces {
		if spec.Linux.Namespaces[i].Type == t {
			return &spec.Linux.Namespaces[i], true
		}
	}
	return nil, false
}

// private tells whether the container gets a new namespace of this type.
func private(spec *specs.Spec, t specs.LinuxNamespaceType) bool {
	ns, ok := namespace(spec, t)
	return ok && ns.Path == ""
}
