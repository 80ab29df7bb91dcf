package oci

import (
	"path"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// ContainerOf reads from a runtime spec what a manifest says about a container
// and what a request to restore one is compared by. The ID is not in a spec.
func ContainerOf(spec *specs.Spec) Container {
	c := Container{Hostname: spec.Hostname}
	if p := spec.Process; p != nil {
		c.Args = slices.Clone(p.Args)
		c.Cwd = p.Cwd
		c.UID, c.GID = p.User.UID, p.User.GID
		c.AdditionalGids = slices.Clone(p.User.AdditionalGids)
		c.Terminal = p.Terminal
	}
	if l := spec.Linux; l != nil {
		c.Seccomp = l.Seccomp != nil
		for _, ns := range l.Namespaces {
			c.Namespaces = append(c.Namespaces, string(ns.Type))
		}
		slices.Sort(c.Namespaces)
		c.Namespaces = slices.Compact(c.Namespaces)
		c.UIDMappings, c.GIDMappings = mappings(l.UIDMappings), mappings(l.GIDMappings)
	}
	return c
}

// MountsOf lists a runtime spec's mounts by the place they have in the
// container: the one of two that hide each other, sorted.
func MountsOf(spec *specs.Spec) []Mount {
	byPlace := make(map[string]Mount, len(spec.Mounts))
	var places []string
	for _, m := range spec.Mounts {
		// runc takes a relative destination from the container's root.
		place := path.Join("/", m.Destination)
		if _, ok := byPlace[place]; !ok {
			places = append(places, place)
		}
		kind := m.Type
		if slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind") {
			kind = "bind" // whatever it is called
		}
		byPlace[place] = Mount{Destination: place, Type: kind}
	}
	slices.Sort(places)
	mounts := make([]Mount, len(places))
	for i, p := range places {
		mounts[i] = byPlace[p]
	}
	return mounts
}

func mappings(in []specs.LinuxIDMapping) []IDMapping {
	var out []IDMapping
	for _, m := range in {
		out = append(out, IDMapping{ContainerID: m.ContainerID, HostID: m.HostID, Size: m.Size})
	}
	return out
}
