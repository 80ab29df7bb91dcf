package shim

import (
	"fmt"
	"maps"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/runtime"
	"github.com/crac-shim/crac/runtime/trace"
)

// confine makes the image files with which a dump is restored under the
// request's seccomp filter, security profile and resource limits, gains no
// privileges that it may not, and is without mounts that this kernel has no place for.
func (s *service) confine(r *restore, spec *specs.Spec) (map[string][]byte, error) {
	limits, err := limitsOf(spec.Process)
	if err != nil {
		return nil, err
	}
	want := images.Confinement{
		Limits:          limits,
		Profile:         profileOf(spec.Process),
		NoNewPrivileges: spec.Process.NoNewPrivileges,
		Replace:         r.manifest != nil && r.manifest.Container.Seccomp,
	}
	if spec.Linux != nil {
		filter, err := runtime.CompileSeccomp(s.reaper, spec.Linux.Seccomp)
		if err != nil {
			return nil, &coldReason{code: images.CodePrivileges, err: err}
		}
		if filter != nil {
			want.Seccomp = &images.SeccompFilter{Program: filter.Program, Flags: filter.Flags}
		}
	}
	all, err := want.Images(r.dir)
	if err != nil {
		return nil, err
	}
	mounts, err := images.MountsHere(r.dir)
	if err != nil {
		return nil, err
	}
	if all == nil {
		return mounts, nil
	}
	maps.Copy(all, mounts)
	return all, nil
}

// makeTmpfs makes small tmpfs mounts of the dump in dir before CRIU is there, and
// changes the images that it reads accordingly.
func (c *container) makeTmpfs(dir string, own map[string][]byte) error {
	defer c.trace.On(trace.Background, "make the small tmpfs mounts")()
	small, err := images.SmallTmpfs(dir, own)
	if err != nil {
		return err
	}
	all := make([]runtime.Tmpfs, len(small))
	for i, t := range small {
		all[i] = runtime.Tmpfs(t)
	}
	return images.MadeBefore(dir, own, c.rt.MakeTmpfs(all))
}

// profileOf is the request's AppArmor profile or SELinux context, whichever the
// kernel knows; empty for none.
func profileOf(p *specs.Process) string {
	switch lsm, _ := images.SecurityModule(); lsm {
	case "apparmor":
		return p.ApparmorProfile
	case "selinux":
		return p.SelinuxLabel
	}
	return ""
}

// limitsOf are the limits of a request, and for the others what a cold start
// would inherit from this process.
func limitsOf(p *specs.Process) ([]images.Limit, error) {
	limits := make([]images.Limit, len(oci.Rlimits))
	for _, number := range oci.Rlimits {
		var own unix.Rlimit
		if err := unix.Getrlimit(number, &own); err != nil {
			return nil, fmt.Errorf("resource limit %d: %w", number, err)
		}
		limits[number] = images.Limit{Soft: own.Max, Hard: own.Max}
	}
	for _, l := range p.Rlimits {
		number, ok := oci.Rlimits[l.Type]
		if !ok {
			return nil, fmt.Errorf("process.rlimits: unknown limit %q", l.Type)
		}
		limits[number] = images.Limit{Soft: l.Soft, Hard: l.Hard, Asked: true}
	}
	return limits, nil
}
