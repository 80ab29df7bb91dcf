package images

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crac-shim/crac/oci"
)

// MinimumCRIU is the oldest CRIU whose dumps and restores this code knows: older
// ones fail on the vDSO of kernels since 6.4. Newer kernels need newer ones: see
// Host.MinimumCRIU.
const MinimumCRIU = 40100

// Codes of the reasons why a checkpoint is not restored.
const (
	CodeNoCRIU        = "no-criu"
	CodeCRIUTooOld    = "criu-too-old"
	CodeArchitecture  = "architecture"
	CodePageSize      = "page-size"
	CodeCPUFeatures   = "cpu-features"
	CodeCgroupVersion = "cgroup-version"
	CodeArgs          = "args"
	CodeUser          = "user"
	CodeTerminal      = "terminal"
	CodeNamespaces    = "namespaces"
	CodeMounts        = "mounts"
	CodeKernel        = "kernel-features"
	CodeRequires      = "requires"
	CodeLSM           = "lsm"
)

// Request is what a create request asks for, as far as a restored workload
// cannot be given it afterwards.
type Request struct {
	Args []string
	// AnyArgs restores whatever the arguments are: the workload is told them.
	AnyArgs        bool
	Cwd            string
	UID, GID       uint32
	AdditionalGids []uint32
	Terminal       bool
	// Namespaces and the ID mappings are compared when Namespaces is not nil.
	Namespaces  []string
	UIDMappings []oci.IDMapping
	GIDMappings []oci.IDMapping
	Mounts      []oci.Mount
	// Profile is the AppArmor profile or SELinux context that takes the place of
	// those of the dump; empty for none.
	Profile string
}

// RequestOf reads a request from its container's facts: see oci.ContainerOf and
// oci.MountsOf.
func RequestOf(c oci.Container, mounts []oci.Mount) Request {
	namespaces := c.Namespaces
	if namespaces == nil {
		namespaces = []string{}
	}
	return Request{
		Args: c.Args, Cwd: c.Cwd, UID: c.UID, GID: c.GID, AdditionalGids: c.AdditionalGids, Terminal: c.Terminal,
		Namespaces: namespaces, UIDMappings: c.UIDMappings, GIDMappings: c.GIDMappings, Mounts: mounts,
	}
}

// Reason tells why a checkpoint cannot be restored here or for this request: a
// code for programs, and for people what the dump needs, what there is, and
// the way out.
type Reason struct {
	Code string
	Text string
}

func (r Reason) String() string { return r.Text }

// Gate compares what a checkpoint needs with the host and with the request. No
// reason means that a restore may be tried. It never trusts the image with
// more than a refusal.
func Gate(m *oci.Manifest, h Host, r Request) []Reason {
	reasons := GateHost(m, h)
	if r.Profile == "" {
		reasons = append(reasons, gateProfiles(m.Container.LSM, h)...)
	}
	return append(reasons, gateRequest(m, r)...)
}

// GateHost is the part of Gate that no request can change: what the checkpoint
// needs of a host.
func GateHost(m *oci.Manifest, h Host) []Reason {
	reasons := gateHost(m, h)
	// CRIU restores nothing that another security module confined, also with another
	// profile.
	if l := m.Container.LSM; l != nil && l.Name != h.LSM {
		reasons = append(reasons, Reason{CodeLSM, fmt.Sprintf("the checkpoint's processes were confined by %s and this host's kernel has %s; make one on a host with the same security module, or of a container that is not confined by one",
			l, cmp.Or(h.LSM, "neither AppArmor nor SELinux"))})
	}
	return reasons
}

func gateHost(m *oci.Manifest, h Host) (reasons []Reason) {
	add := func(code, format string, a ...any) {
		reasons = append(reasons, Reason{Code: code, Text: fmt.Sprintf(format, a...)})
	}
	need := max(m.CRIU.Minimum, h.MinimumCRIU())
	switch {
	case h.CRIU == 0:
		add(CodeNoCRIU, "the checkpoint needs CRIU %s or newer and this host has none; install it, or name its binary in CRAC_CRIU (see cracctl doctor)",
			oci.VersionString(need))
	case h.CRIU < need:
		add(CodeCRIUTooOld, "the checkpoint needs CRIU %s or newer and this host has %s; install a newer one, or name its binary in CRAC_CRIU (see cracctl doctor)",
			oci.VersionString(need), oci.VersionString(h.CRIU))
	}
	if m.Platform.OS != h.OS || m.Platform.Architecture != h.Architecture {
		add(CodeArchitecture, "the checkpoint was made on %s/%s and this host is %s/%s; make one on this architecture",
			m.Platform.OS, m.Platform.Architecture, h.OS, h.Architecture)
		// The rest of the machine differs with it.
		return reasons
	}
	if m.Host.PageSize != h.PageSize {
		add(CodePageSize, "the checkpoint was made with memory pages of %d bytes and this host's kernel has %d; make one on a host with this page size",
			m.Host.PageSize, h.PageSize)
	}
	var missing []string
	for _, f := range m.Host.CPU.Features {
		if !slices.Contains(h.CPU.Features, f) {
			missing = append(missing, f)
		}
	}
	if len(missing) > 0 {
		add(CodeCPUFeatures, "the checkpoint was made on a CPU (%s) with features that this host's (%s) lacks: %s; make one on the oldest CPU it is to run on",
			orUnknown(m.Host.CPU.Model), orUnknown(h.CPU.Model), strings.Join(missing, " "))
	}
	if m.Host.CgroupVersion != h.CgroupVersion && holdsCgroups(m) {
		add(CodeCgroupVersion, "the checkpoint holds a view of cgroup v%d (a cgroup namespace or a mount of type cgroup) and this host has v%d; make one on a host with v%d, or of a container without either",
			m.Host.CgroupVersion, h.CgroupVersion, h.CgroupVersion)
	}
	var unknown, lacking []string
	for _, r := range m.Requires {
		switch {
		case r == oci.RequireParent: // Find has looked for it
		case !slices.Contains(oci.KernelFeatures(), r):
			unknown = append(unknown, r)
		case !slices.Contains(h.Features, r):
			lacking = append(lacking, r)
		}
	}
	if len(unknown) > 0 {
		add(CodeRequires, "the checkpoint requires what this version does not know: %s; install a newer one", strings.Join(unknown, " "))
	}
	if len(lacking) > 0 {
		add(CodeKernel, "the checkpoint needs features that this host's kernel (%s) lacks: %s; enable them, or make a checkpoint on a kernel without them",
			orUnknown(h.Kernel), strings.Join(lacking, " "))
	}
	return reasons
}

// holdsCgroups tells whether the dump has something of the hierarchy that it was
// made under: a namespace of it, or a mount. Where there is neither, CRIU is told
// to leave cgroups alone, and the clone is in its own like any container.
func holdsCgroups(m *oci.Manifest) bool {
	return slices.Contains(m.Container.Namespaces, string(specs.CgroupNamespace)) ||
		slices.ContainsFunc(m.Mounts, func(d oci.Mount) bool { return strings.HasPrefix(d.Type, "cgroup") })
}

// gateProfiles looks for the profiles that CRIU puts processes back into, if the request
// has none of its own.
func gateProfiles(l *oci.LSM, h Host) []Reason {
	if l == nil || l.Name != h.LSM {
		return nil
	}
	var missing []string
	for _, p := range l.Profiles {
		// Only AppArmor lists what it knows. A profile of another AppArmor
		// namespace, or a stack of profiles, is not listed under this name.
		if h.Profiles != nil && !strings.ContainsAny(p, ":&") && !slices.Contains(h.Profiles, p) {
			missing = append(missing, p)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	return []Reason{{CodeLSM, fmt.Sprintf("the checkpoint needs AppArmor profiles that this host has not loaded: %s; load them with apparmor_parser, start a container that uses them first, or ask for a profile that takes their place",
		strings.Join(missing, ", "))}}
}

// InDump tells whether CRIU makes a mount anew, with what was in it: a request
// need not have it. Others come from outside.
func InDump(m oci.Mount) bool {
	switch m.Type {
	case "tmpfs", "proc", "sysfs", "mqueue", "devpts":
		return true
	}
	return false
}

// OtherArgs tells whether a request's arguments are others than the dump's, and how
// that is said.
func OtherArgs(m *oci.Manifest, args []string) (Reason, bool) {
	// A client that is given no command takes the image's own.
	unasked := len(m.Base.Args) > 0 && slices.Equal(m.Base.Args, args)
	if slices.Equal(m.Container.Args, args) || unasked {
		return Reason{}, false
	}
	return Reason{CodeArgs, fmt.Sprintf("the checkpoint runs %q and the request asks for %q; leave the command out to restore it", m.Container.Args, args)}, true
}

func gateRequest(m *oci.Manifest, r Request) (reasons []Reason) {
	add := func(code, format string, a ...any) {
		reasons = append(reasons, Reason{Code: code, Text: fmt.Sprintf(format, a...)})
	}
	c := m.Container
	if other, differ := OtherArgs(m, r.Args); differ && !r.AnyArgs {
		reasons = append(reasons, other)
	}
	// Some clients list the group of the user among the additional ones, others do not.
	if c.UID != r.UID || c.GID != r.GID || !sameSet(slices.Concat(c.AdditionalGids, []uint32{c.GID}), slices.Concat(r.AdditionalGids, []uint32{r.GID})) {
		add(CodeUser, "the checkpoint runs as %s and the request asks for %s; ask for the same user to restore it",
			user(c.UID, c.GID, c.AdditionalGids), user(r.UID, r.GID, r.AdditionalGids))
	}
	if c.Terminal != r.Terminal {
		with := map[bool]string{true: "with a terminal", false: "without a terminal"}
		add(CodeTerminal, "the checkpoint was made %s and the request is %s; ask for the same to restore it", with[c.Terminal], with[r.Terminal])
	}
	if r.Namespaces != nil {
		switch {
		case !sameSet(c.Namespaces, r.Namespaces):
			add(CodeNamespaces, "the checkpoint has namespaces of its own for %s and the request for %s; ask for the same to restore it",
				orNone(c.Namespaces), orNone(r.Namespaces))
		case !slices.Equal(c.UIDMappings, r.UIDMappings) || !slices.Equal(c.GIDMappings, r.GIDMappings):
			add(CodeNamespaces, "the checkpoint's user namespace has other ID mappings than the request's; ask for the same to restore it")
		}
	}
	var missing []string
	for _, need := range m.Mounts {
		if InDump(need) {
			continue
		}
		if !slices.ContainsFunc(r.Mounts, func(have oci.Mount) bool { return have.Destination == need.Destination }) {
			missing = append(missing, need.Destination)
		}
	}
	if len(missing) > 0 {
		add(CodeMounts, "the checkpoint needs mounts that the request lacks: %s; add them to restore it", strings.Join(missing, ", "))
	}
	return reasons
}

func sameSet[T interface{ ~string | ~uint32 }](a, b []T) bool {
	a, b = slices.Sorted(slices.Values(a)), slices.Sorted(slices.Values(b))
	return slices.Equal(slices.Compact(a), slices.Compact(b))
}

func user(uid, gid uint32, more []uint32) string {
	s := fmt.Sprintf("user %d, group %d", uid, gid)
	if len(more) > 0 {
		s += fmt.Sprintf(" and %d", more)
	}
	return s
}

func orUnknown(s string) string {
	if s == "" {
		return "unknown"
	}
	return s
}

func orNone(s []string) string {
	if len(s) == 0 {
		return "nothing"
	}
	return strings.Join(s, ", ")
}
