package oci

import (
	"fmt"
	"slices"
	"strings"
)

// What a manifest's Requires may name. A reader that does not know a name must not
// restore: this is how later versions say what an earlier one would get wrong.
// Names of the kernel's are needs of the dumped processes.
const (
	RequireSeccomp       = "seccomp"        // seccomp filters
	RequireRseq          = "rseq"           // restartable sequences (rseq(2)), which glibc uses since 2.35
	RequireTimeNamespace = "time-namespace" // so that clocks do not jump
	RequireUserNamespace = "user-namespace"
	RequireIPv6          = "ipv6" // sockets of that family
)

// RequireParent is required by a dump that continues another one: of its
// manifest's Parent. It is about the format, not the kernel.
const RequireParent = "parent"

// MaxDepth is how many dumps a dump may continue, one after the other. Each costs
// a restore a look into one more page map for every page.
const MaxDepth = 8

// Parent is the dump that another one continues: pages that its page maps call the
// parent's are there.
type Parent struct {
	// Manifest is the digest of the parent's manifest.json, which has the digests
	// of everything else.
	Manifest string `json:"manifest"`
	// Depth is how many dumps are continued: 1 when the parent is a whole one.
	Depth int `json:"depth"`
}

func (p *Parent) valid(requires []string) bool {
	if needed := slices.Contains(requires, RequireParent); p == nil || !needed {
		return p == nil && !needed
	}
	return validDigest(p.Manifest) && p.Depth >= 1 && p.Depth <= MaxDepth
}

// KernelFeatures are the names above that the kernel of a host has or lacks.
func KernelFeatures() []string {
	return []string{RequireIPv6, RequireRseq, RequireSeccomp, RequireTimeNamespace, RequireUserNamespace}
}

// validName tells whether s may stand in Requires: a name that is safe to show.
func validName(s string) bool {
	const letters = "abcdefghijklmnopqrstuvwxyz0123456789-."
	return s != "" && len(s) <= 64 && strings.Trim(s, letters) == "" && s[0] != '-' && s[0] != '.'
}

// LSM is the Linux security module that confined a dump's processes.
type LSM struct {
	// Name is apparmor or selinux.
	Name string `json:"name"`
	// Profiles are what the processes were confined by: AppArmor's profiles or
	// SELinux's contexts, sorted. CRIU puts the processes back into them.
	Profiles []string `json:"profiles"`
}

func (l *LSM) valid() bool {
	return l == nil || validName(l.Name) && len(l.Profiles) > 0 && len(l.Profiles) <= maxList && !slices.Contains(l.Profiles, "")
}

// String names the module, and the profiles if they are known.
func (l *LSM) String() string {
	if len(l.Profiles) == 0 {
		return l.Name
	}
	return fmt.Sprintf("%s (%s)", l.Name, strings.Join(l.Profiles, ", "))
}
