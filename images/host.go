package images

import (
	"bufio"
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/oci"
)

// Host is what a machine offers to a restore.
type Host struct {
	OS           string
	Architecture string
	Kernel       string
	PageSize     int
	// CgroupVersion is 2 for the unified hierarchy, else 1.
	CgroupVersion int
	CPU           oci.CPU
	// CRIU is the version found, as oci.CRIU gives it; 0 when there is none.
	CRIU int
	// Features are those of oci.KernelFeatures that the kernel has.
	Features []string
	// LSM is the security module that confines containers, apparmor or selinux;
	// empty for none. Profiles are those that AppArmor knows, if that can be read.
	LSM      string
	Profiles []string
}

// ThisHost describes the machine it runs on. criuVersion is what FindCRIU said.
func ThisHost(criuVersion int) Host {
	h := Host{
		OS:            goruntime.GOOS,
		Architecture:  goruntime.GOARCH,
		PageSize:      os.Getpagesize(),
		CgroupVersion: 1,
		CPU:           cpu("/proc/cpuinfo"),
		CRIU:          criuVersion,
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err == nil {
		h.Kernel = unix.ByteSliceToString(u.Release[:])
	}
	var st unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &st); err == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
		h.CgroupVersion = 2
	}
	for _, f := range oci.KernelFeatures() {
		if kernelHas(f) {
			h.Features = append(h.Features, f)
		}
	}
	h.LSM, h.Profiles = SecurityModule()
	return h
}

// kernelHas asks the kernel for one of oci.KernelFeatures.
func kernelHas(feature string) bool {
	switch feature {
	case oci.RequireSeccomp:
		return exists("/proc/sys/kernel/seccomp/actions_avail")
	case oci.RequireRseq:
		// Nothing at address 0 can be registered; a kernel without says so first.
		_, _, errno := unix.RawSyscall6(unix.SYS_RSEQ, 0, 0, 0, 0, 0, 0)
		return errno != unix.ENOSYS
	case oci.RequireTimeNamespace:
		return exists("/proc/self/ns/time")
	case oci.RequireUserNamespace:
		return exists("/proc/self/ns/user")
	case oci.RequireIPv6:
		return exists("/proc/self/net/if_inet6")
	}
	return false
}

// SecurityModule finds the module that gives processes profiles or contexts,
// "apparmor" or "selinux", and the profiles that AppArmor knows, if that can be read.
func SecurityModule() (name string, profiles []string) { return securityModule("/") }

// securityModule is SecurityModule below a root.
func securityModule(root string) (name string, profiles []string) {
	if on, err := os.ReadFile(filepath.Join(root, "sys/module/apparmor/parameters/enabled")); err == nil && strings.TrimSpace(string(on)) == "Y" {
		f, err := os.Open(filepath.Join(root, "sys/kernel/security/apparmor/profiles"))
		if err != nil {
			return "apparmor", nil
		}
		defer f.Close()
		for s := bufio.NewScanner(f); s.Scan(); {
			// The mode follows in brackets; the name may hold anything.
			if i := strings.LastIndex(s.Text(), " ("); i > 0 {
				profiles = append(profiles, s.Text()[:i])
			}
		}
		return "apparmor", profiles
	}
	if exists(filepath.Join(root, "sys/fs/selinux/enforce")) {
		return "selinux", nil
	}
	return "", nil
}

// MinimumCRIU is the oldest CRIU that works on the host's kernel. Since 6.16,
// CRIU before 4.2 cannot dump any internet socket, though `criu check` is happy.
func (h Host) MinimumCRIU() int {
	var major, minor int
	if _, err := fmt.Sscanf(h.Kernel, "%d.%d", &major, &minor); err == nil && (major > 6 || major == 6 && minor >= 16) {
		return 40200
	}
	return MinimumCRIU
}

// Describe fills what a manifest says about the machine of the dump.
func (h Host) Describe(m *oci.Manifest) {
	m.Version = oci.Version
	m.Platform = oci.Platform{OS: h.OS, Architecture: h.Architecture}
	m.Host = oci.Host{Kernel: cmp.Or(h.Kernel, oci.UnknownKernel), PageSize: h.PageSize, CgroupVersion: h.CgroupVersion, CPU: h.CPU}
	m.CRIU = oci.CRIU{Version: h.CRIU, Minimum: OldestReader(h.CRIU)}
}

// OldestReader is the oldest CRIU that can restore what a version of it dumped.
// From 4.2 on the numbers of pages are where earlier ones do not look: they would
// restore a process without its memory (criu's issue 2847).
func OldestReader(version int) int {
	if version >= 40200 {
		return 40200
	}
	return MinimumCRIU
}

// cpu reads the first processor's block only: the kernel makes the file up as it
// is read, which takes long on a machine with many processors.
func cpu(path string) oci.CPU {
	var c oci.CPU
	f, err := os.Open(path)
	if err != nil {
		return c
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		key, value, ok := strings.Cut(s.Text(), ":")
		if !ok {
			break // the empty line between two processors
		}
		value = strings.TrimSpace(value)
		switch strings.TrimSpace(key) {
		case "vendor_id", "CPU implementer":
			c.Vendor = value
		case "model name", "CPU part":
			c.Model = value
		case "flags", "Features":
			for _, name := range strings.Fields(value) {
				if isCodeFeature(name) {
					c.Features = append(c.Features, name)
				}
			}
		}
	}
	slices.Sort(c.Features)
	c.Features = slices.Compact(c.Features)
	return c
}

// isCodeFeature tells the CPU features by which a program, a C library or a
// just-in-time compiler chooses its code, or that change the register state in
// a dump. The kernel lists many more (power, virtualisation, mitigations) that
// a workload cannot use; comparing those would refuse restores for nothing.
func isCodeFeature(name string) bool {
	if goruntime.GOARCH == "arm64" {
		// All that is listed there is for user space.
		return name != "cpuid" && name != "evtstrm"
	}
	if strings.HasPrefix(name, "avx") || strings.HasPrefix(name, "amx_") {
		return true
	}
	switch name {
	case "cx8", "cmov", "mmx", "mmxext", "fxsr", "fxsr_opt", "sse", "sse2", "pni", "ssse3", "sse4_1", "sse4_2", "sse4a",
		"misalignsse", "3dnow", "3dnowext", "3dnowprefetch", "cx16", "lahf_lm", "popcnt", "abm", "bmi1", "bmi2", "movbe",
		"f16c", "fma", "fma4", "xop", "tbm", "lwp", "aes", "vaes", "pclmulqdq", "vpclmulqdq", "sha_ni", "sha512", "sm3", "sm4",
		"gfni", "adx", "rdrand", "rdseed", "rdpid", "rdtscp", "fsgsbase", "clflush", "clflushopt", "clwb", "clzero", "cldemote",
		"movdiri", "movdir64b", "serialize", "waitpkg", "rtm", "hle", "erms", "fsrm", "pku", "ospke", "user_shstk",
		"xsave", "xsavec", "xsaveopt", "xgetbv1", "tsx", "tsxldtrk", "enqcmd", "uintr":
		return true
	}
	return false
}
