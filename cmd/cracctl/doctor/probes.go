package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"

	containerd "github.com/containerd/containerd/v2/client"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/oci"
)

const shimName = "containerd-shim-crac-v2"

// prober keeps what a later probe needs of an earlier one.
type prober struct {
	Options
	criuPath string
	// daemon is containerd's process, when it answers.
	daemon int
}

// needed are the capabilities that CRIU and the shim use, with what for.
var needed = []struct {
	bit  uint
	name string
	use  string
	hard bool
}{
	{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN", "namespaces and mounts", true},
	{unix.CAP_SYS_PTRACE, "CAP_SYS_PTRACE", "reading the memory of processes", true},
	{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN", "network namespaces and locking connections", true},
	{unix.CAP_SYS_CHROOT, "CAP_SYS_CHROOT", "entering root file systems", true},
	{unix.CAP_SETUID, "CAP_SETUID", "users", true},
	{unix.CAP_SETGID, "CAP_SETGID", "groups", true},
	{unix.CAP_SETPCAP, "CAP_SETPCAP", "capabilities of the workload", true},
	{unix.CAP_DAC_OVERRIDE, "CAP_DAC_OVERRIDE", "files of any owner", true},
	{unix.CAP_MKNOD, "CAP_MKNOD", "devices", true},
	{unix.CAP_KILL, "CAP_KILL", "signals to any user's processes", true},
	{unix.CAP_CHECKPOINT_RESTORE, "CAP_CHECKPOINT_RESTORE", "process IDs and map_files; CAP_SYS_ADMIN does as well", false},
	{unix.CAP_SYS_RESOURCE, "CAP_SYS_RESOURCE", "raising resource limits and lowering OOM scores", false},
}

func (p *prober) privileges(context.Context) []Check {
	const name = "privileges"
	if os.Geteuid() != 0 {
		return one(name, Fail, fmt.Sprintf("user %d; checkpoint and restore need root", os.Geteuid()), "run as root, also containerd")
	}
	eff, err := effectiveCapabilities()
	if err != nil {
		return one(name, Fail, err.Error(), "mount /proc")
	}
	status := OK
	var missing []string
	for _, c := range needed {
		if eff&(1<<c.bit) != 0 {
			continue
		}
		missing = append(missing, fmt.Sprintf("%s (%s)", c.name, c.use))
		switch {
		case c.hard:
			status = Fail
		case status == OK:
			status = Warn
		}
	}
	if len(missing) == 0 {
		return one(name, OK, "root with every capability that is needed", "")
	}
	return one(name, status, "root, but without "+strings.Join(missing, ", "),
		"grant them to containerd: in its systemd unit (CapabilityBoundingSet=) or to the machine or container that it runs in")
}

func effectiveCapabilities() (uint64, error) {
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			return strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
		}
	}
	return 0, errors.New("/proc/self/status does not list capabilities")
}

func (p *prober) kernel(context.Context) []Check {
	const name = "kernel"
	h := images.ThisHost(0)
	var major, minor int
	if _, err := fmt.Sscanf(h.Kernel, "%d.%d", &major, &minor); err != nil {
		return one(name, Warn, fmt.Sprintf("cannot read its version from %q", h.Kernel), "")
	}
	found := fmt.Sprintf("%s on %s, memory pages of %d bytes", h.Kernel, h.Architecture, h.PageSize)
	// 5.9: openat2, clone3 with chosen process IDs, CAP_CHECKPOINT_RESTORE.
	if major < 5 || major == 5 && minor < 9 {
		return one(name, Fail, found, "use a kernel 5.9 or newer")
	}
	return one(name, OK, found, "")
}

func (p *prober) criu(ctx context.Context) []Check {
	const name = "CRIU"
	path, version, err := images.FindCRIU()
	if err != nil {
		return one(name, Fail, err.Error(), "")
	}
	p.criuPath = path
	found := fmt.Sprintf("%s at %s", oci.VersionString(version), path)
	if need := images.ThisHost(version).MinimumCRIU(); version < need {
		return one(name, Fail, found+", which fails on current kernels",
			fmt.Sprintf("install CRIU %s or newer and name its binary in CRAC_CRIU", oci.VersionString(need)))
	}
	checks := one(name, OK, found, "")

	out, err := p.criuCheck(ctx)
	if err != nil {
		return append(checks, Check{Name: "criu check", Status: Fail, Found: out, Fix: "the lines above name what the kernel or the privileges lack"})
	}
	checks = append(checks, Check{Name: "criu check", Status: OK, Found: out})

	if out, err := p.criuCheck(ctx, "--feature", "mem_dirty_track"); err != nil {
		checks = append(checks, Check{
			Name: "soft-dirty", Status: Warn,
			Found: "the kernel does not track changed memory (" + out + "), so a checkpoint cannot copy most of it before the freeze",
			Fix:   "use a kernel with CONFIG_MEM_SOFT_DIRTY to shorten the freeze of large workloads; nothing else needs it",
		})
	} else {
		checks = append(checks, Check{Name: "soft-dirty", Status: OK, Found: "the kernel tracks changed memory"})
	}
	return checks
}

// criuCheck gives what `criu check` says, on one line.
func (p *prober) criuCheck(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, p.criuPath, append([]string{"check"}, args...)...).CombinedOutput()
	said := strings.Join(strings.FieldsFunc(string(out), func(r rune) bool { return r == '\n' }), "; ")
	if said == "" && err != nil {
		said = err.Error()
	}
	return said, err
}

func (p *prober) cgroups(context.Context) []Check {
	const name = "cgroups"
	wanted := []string{"cpu", "memory", "pids"}
	if images.ThisHost(0).CgroupVersion == 2 {
		data, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
		if err != nil {
			return one(name, Fail, err.Error(), "mount cgroup2 on /sys/fs/cgroup")
		}
		missing := lacking(wanted, strings.Fields(string(data)))
		if len(missing) > 0 {
			return one(name, Warn, "v2, without the controllers "+strings.Join(missing, ", ")+": limits of these kinds have no effect",
				"enable them in the kernel, or pass them to the machine or container that this runs in")
		}
		return one(name, OK, "v2 with "+strings.Join(strings.Fields(string(data)), ", "), "")
	}
	var mounted []string
	for _, c := range append(wanted, "freezer", "devices", "cpuset", "blkio") {
		var st unix.Statfs_t
		if err := unix.Statfs("/sys/fs/cgroup/"+c, &st); err == nil && st.Type == unix.CGROUP_SUPER_MAGIC {
			mounted = append(mounted, c)
		}
	}
	if !slices.Contains(mounted, "freezer") {
		return one(name, Fail, "v1 without the freezer, so that nothing can be stopped for a checkpoint", "mount the freezer controller, or boot with cgroup v2 (systemd.unified_cgroup_hierarchy=1)")
	}
	if missing := lacking(wanted, mounted); len(missing) > 0 {
		return one(name, Warn, "v1, without the controllers "+strings.Join(missing, ", ")+": limits of these kinds have no effect", "mount them below /sys/fs/cgroup")
	}
	return one(name, OK, "v1 (deprecated in containerd) with "+strings.Join(mounted, ", "), "")
}

func lacking(want, have []string) (missing []string) {
	for _, w := range want {
		if !slices.Contains(have, w) {
			missing = append(missing, w)
		}
	}
	return missing
}

func (p *prober) overlay(context.Context) []Check {
	const name = "overlayfs"
	err := tryOverlay()
	if errors.Is(err, fs.ErrPermission) && os.Geteuid() != 0 {
		return one(name, Warn, "cannot be tried: "+err.Error(), "run this as root")
	}
	if err != nil {
		return one(name, Warn, "cannot be mounted: "+err.Error()+"; containerd falls back to copying every layer, and dumps are masked instead of left out", "load the overlay module")
	}
	return one(name, OK, "can be mounted", "")
}

// tryOverlay mounts one in a mount namespace of its own, which is gone with its
// thread.
func tryOverlay() error {
	result := make(chan error, 1)
	go func() {
		// Not unlocked: the thread ends with the goroutine, and with it what
		// was mounted.
		goruntime.LockOSThread()
		result <- func() error {
			dir, err := os.MkdirTemp("", "cracctl-doctor-")
			if err != nil {
				return err
			}
			defer os.RemoveAll(dir)
			if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
				return fmt.Errorf("new mount namespace: %w", err)
			}
			if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
				return fmt.Errorf("private mounts: %w", err)
			}
			for _, d := range []string{"a", "b", "m"} {
				if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
					return err
				}
			}
			target := filepath.Join(dir, "m")
			data := fmt.Sprintf("lowerdir=%s:%s", filepath.Join(dir, "a"), filepath.Join(dir, "b"))
			if err := unix.Mount("overlay", target, "overlay", unix.MS_RDONLY, data); err != nil {
				return err
			}
			return unix.Unmount(target, unix.MNT_DETACH)
		}()
	}()
	return <-result
}

func (p *prober) userNamespaces(ctx context.Context) []Check {
	const name = "user namespaces"
	cmd := exec.CommandContext(ctx, "true")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return one(name, Warn, fmt.Sprintf("cannot be made (%v %s): containers that ask for one do not start", err, strings.TrimSpace(string(out))),
			"raise the sysctl user.max_user_namespaces")
	}
	return one(name, OK, "can be made", "")
}

func (p *prober) security(context.Context) []Check {
	var checks []Check
	if data, err := os.ReadFile("/proc/sys/kernel/seccomp/actions_avail"); err != nil {
		checks = append(checks, Check{Name: "seccomp", Status: Warn, Found: "the kernel has no filters: " + err.Error() + "; system calls of containers are not limited", Fix: "use a kernel with CONFIG_SECCOMP_FILTER"})
	} else {
		checks = append(checks, Check{Name: "seccomp", Status: OK, Found: "filters with the actions " + strings.Join(strings.Fields(string(data)), ", ")})
	}
	found := "off: containers run without a profile, and a checkpoint that was made under one is restored without"
	if data, err := os.ReadFile("/sys/module/apparmor/parameters/enabled"); err == nil && strings.HasPrefix(string(data), "Y") {
		found = "on"
	}
	return append(checks, Check{Name: "AppArmor", Status: OK, Found: found})
}

func (p *prober) userfault(context.Context) []Check {
	const name = "userfaultfd"
	const fix = "as root it needs CAP_SYS_PTRACE and a kernel with CONFIG_USERFAULTFD; memory is restored before the start without it"
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if errno != 0 {
		return one(name, Warn, "not available ("+errno.Error()+"): memory cannot be brought in on demand", fix)
	}
	defer unix.Close(int(fd))
	// What a pager has to be told about a workload's memory: forks, moves,
	// removals and unmaps (UFFD_FEATURE_EVENT_*).
	const events = 1<<1 | 1<<2 | 1<<3 | 1<<6
	api := struct{ api, features, ioctls uint64 }{api: 0xaa, features: events}
	const uffdioAPI = 0xc018aa3f
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, uffdioAPI, uintptr(unsafe.Pointer(&api))); errno != 0 {
		return one(name, Warn, "does not report forks and unmaps ("+errno.Error()+"): memory cannot be brought in on demand", fix)
	}
	return one(name, OK, "available, with the events that memory on demand needs", "")
}

func (p *prober) runTmpfs(context.Context) []Check {
	const name = "/run"
	var st unix.Statfs_t
	if err := unix.Statfs("/run", &st); err != nil {
		return one(name, Warn, err.Error(), "make it a tmpfs")
	}
	if st.Type != unix.TMPFS_MAGIC {
		return one(name, Warn, "is no tmpfs, where alone CRIU keeps what it learned about the kernel (/run/criu.kdat): each restore takes 30 to 50 ms longer, unless the runtime brings a copy",
			"mount a tmpfs there")
	}
	return one(name, OK, "is a tmpfs, where CRIU keeps what it learned about the kernel", "")
}

func (p *prober) networkLock(ctx context.Context) []Check {
	const name = "network lock"
	var found []string
	for _, tool := range [][]string{{"iptables", "--version"}, {"nft", "--version"}} {
		out, err := exec.CommandContext(ctx, tool[0], tool[1:]...).Output()
		if err == nil {
			found = append(found, strings.TrimSpace(string(out)))
		}
	}
	nft := false
	if p.criuPath != "" {
		_, err := p.criuCheck(ctx, "--feature", "network_lock_nftables")
		nft = err == nil
	}
	if nft {
		found = append(found, "CRIU locks with nftables itself")
	}
	if len(found) == 0 {
		return one(name, Warn, "neither iptables nor nft is there: CRIU cannot hold connections still, and a dump with tcp=established of a container with a network of its own fails", "install iptables or nftables")
	}
	return one(name, OK, strings.Join(found, "; "), "")
}

func (p *prober) containerd(ctx context.Context) []Check {
	const name = "containerd"
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	missing := func(err error) []Check {
		return one(name, Warn, fmt.Sprintf("does not answer at %s: %v", p.Address, err), "start it, or say where it is with --address")
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", p.Address)
	if errors.Is(err, fs.ErrPermission) {
		return one(name, Warn, fmt.Sprintf("cannot be asked: %v", err), "run this as root")
	}
	if err != nil {
		return missing(err)
	}
	conn.Close()
	client, err := containerd.New(p.Address)
	if err != nil {
		return missing(err)
	}
	defer client.Close()
	v, err := client.Version(ctx)
	if err != nil {
		return missing(err)
	}
	if s, err := client.IntrospectionService().Server(ctx); err == nil {
		p.daemon = int(s.Pid)
		AsShim(p.daemon) // which the probes that follow are about
	}
	var major, minor int
	found := fmt.Sprintf("%s at %s", v.Version, p.Address)
	if _, err := fmt.Sscanf(strings.TrimPrefix(v.Version, "v"), "%d.%d", &major, &minor); err == nil && (major < 2 || major == 2 && minor < 1) {
		return one(name, Fail, found+" is too old", "use containerd 2.1 or newer")
	}
	return one(name, OK, found, "")
}

// shim looks where containerd does: its PATH, then the directory it is in.
func (p *prober) shim(ctx context.Context) []Check {
	const name = "shim"
	search, whose, absent := os.Getenv("PATH"), "PATH", Warn
	if p.daemon > 0 {
		if path, ok := variable(p.daemon, "PATH"); ok {
			search, whose, absent = path, "containerd's PATH", Fail
		}
		if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", p.daemon)); err == nil {
			search += string(os.PathListSeparator) + filepath.Dir(exe)
		}
	}
	if self, err := os.Executable(); err == nil && p.daemon == 0 {
		search += string(os.PathListSeparator) + filepath.Dir(self)
	}
	path := lookIn(search, shimName)
	if path == "" {
		return one(name, absent, fmt.Sprintf("%s is not in %s (%s)", shimName, whose, search), "make install, or put it there")
	}
	checks := one(name, OK, path, "")

	// What containerd asks a shim before it uses it.
	ictx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ictx, path, "-v")
	if out, err := cmd.CombinedOutput(); err != nil {
		checks[0].Status = Fail
		checks[0].Found = fmt.Sprintf("%s does not run: %v: %s", path, err, strings.TrimSpace(string(out)))
		checks[0].Fix = "build it on this system, or install the libraries that it names"
	}

	checks = append(checks, javaLibrary(path))
	builder := lookIn(filepath.Dir(path)+string(os.PathListSeparator)+search, "cracctl")
	if builder == "" {
		return append(checks, Check{
			Name: "cracctl", Status: Warn,
			Found: fmt.Sprintf("is neither beside %s nor in %s: checkpoint images cannot be built", path, whose),
			Fix:   "make install, or put it beside the shim",
		})
	}
	return append(checks, Check{Name: "cracctl", Status: OK, Found: builder})
}

// javaLibrary looks where the shim does.
func javaLibrary(shim string) Check {
	if itself, err := filepath.EvalSymlinks(shim); err == nil {
		shim = itself
	}
	for _, jar := range images.JavaLibraryPaths(shim) {
		if _, err := os.Stat(jar); err == nil {
			return Check{Name: "Java library", Status: OK, Found: jar}
		}
	}
	return Check{
		Name: "Java library", Status: Warn,
		Found: "is not there: containers with the option java=auto or java=env do not start",
		Fix:   "install a JDK (Debian: default-jdk-headless), then make install",
	}
}

func lookIn(list, name string) string {
	for _, dir := range filepath.SplitList(list) {
		if !filepath.IsAbs(dir) {
			continue
		}
		if p, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return p
		}
	}
	return ""
}
