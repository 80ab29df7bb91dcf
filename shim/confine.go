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

// ownImages makes the image files that a restore reads instead of the dump's: those
// that confine it, and mount tables without the mounts that this kernel has no place for,
// which know of the small tmpfs mounts that are there before CRIU is. It is the last
// look at the dump, and closes it.
func (s *service) ownImages(c *container, r *restore, spec *specs.Spec) (map[string][]byte, error) {
	defer c.trace.On(trace.Background, "write the dump's images anew")()
	defer r.dump.Close()
	own, err := s.confine(r, spec)
	if err != nil {
		return nil, err
	}
	mounts, err := r.dump.MountsHere()
	if err != nil {
		return nil, err
	}
	c.makeTmpfs(mounts)
	tables := mounts.Images()
	maps.Copy(tables, own)
	return tables, nil
}

// confine makes the image files with which a dump is restored under the
// request's seccomp filter, security profile and resource limits, and gains no
// privileges that it may not.
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
	return want.Images(r.dump)
}

// makeTmpfs makes small tmpfs mounts of a dump before CRIU is there, and has its mount
// tables say so.
func (c *container) makeTmpfs(mounts *images.Mounts) {
	defer c.trace.On(trace.Background, "make the small tmpfs mounts")()
	small := mounts.SmallTmpfs()
	all := make([]runtime.Tmpfs, len(small))
	for i, t := range small {
		all[i] = runtime.Tmpfs(t)
	}
	mounts.MadeBefore(c.rt.MakeTmpfs(all))
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
