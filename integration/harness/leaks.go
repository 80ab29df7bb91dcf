package harness

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Process is one process of the host.
type Process struct {
	PID, PPID int
	State     string // one letter, Z for a zombie
	Cmdline   string
	environ   string
	cgroup    string
}

func (p Process) String() string {
	return fmt.Sprintf("process %d (%s, parent %d) %s", p.PID, p.State, p.PPID, tail(p.Cmdline, 300))
}

func describe(procs []Process) []string {
	var s []string
	for _, p := range procs {
		s = append(s, p.String())
	}
	return s
}

// Processes returns all processes of the host but our own.
func Processes() []Process {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	var all []Process
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil || pid == os.Getpid() {
			continue
		}
		if p, err := ReadProcess(pid); err == nil {
			all = append(all, p)
		}
	}
	return all
}

// ReadProcess reads what /proc says about one process.
func ReadProcess(pid int) (Process, error) {
	dir := fmt.Sprintf("/proc/%d/", pid)
	stat, err := os.ReadFile(dir + "stat")
	if err != nil {
		return Process{}, err
	}
	p := Process{PID: pid}
	name, rest, ok := cutLast(string(stat), ")")
	if f := strings.Fields(rest); ok && len(f) > 2 {
		p.State = f[0]
		p.PPID, _ = strconv.Atoi(f[1])
	}
	cmdline, _ := os.ReadFile(dir + "cmdline")
	p.Cmdline = strings.TrimSpace(strings.ReplaceAll(string(cmdline), "\x00", " "))
	if p.Cmdline == "" { // a zombie or a kernel thread
		_, name, _ = strings.Cut(name, "(")
		p.Cmdline = "[" + name + "]"
	}
	environ, _ := os.ReadFile(dir + "environ")
	cgroup, _ := os.ReadFile(dir + "cgroup")
	p.environ, p.cgroup = "\x00"+string(environ), string(cgroup)
	return p, nil
}

func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

// processes returns everything that runs because of this daemon, containerd itself left out.
func (d *Daemon) processes() []Process {
	var own []Process
	for _, p := range Processes() {
		if d.proc != nil && p.PID == d.PID() || p.State == "X" {
			continue
		}
		if strings.Contains(p.environ, "\x00"+markerEnv+"="+d.Dir+"\x00") ||
			strings.Contains(p.cgroup, "/"+d.Namespace+"/") ||
			strings.Contains(p.Cmdline, d.Address) {
			own = append(own, p)
		}
	}
	return own
}

// OwnProcesses returns what runs for this daemon, but not containerd itself.
func (d *Daemon) OwnProcesses() []Process { return d.processes() }

// shims returns the shims of this daemon.
func (d *Daemon) shims() []Process {
	var shims []Process
	for _, p := range d.processes() {
		name, _, _ := strings.Cut(p.Cmdline, " ")
		if strings.HasPrefix(filepath.Base(name), "containerd-shim-") {
			shims = append(shims, p)
		}
	}
	return shims
}

// ShimPID returns the process id of the shim that was started for a container, or for the pod of it.
func (d *Daemon) ShimPID(id string) (int, error) {
	for _, p := range d.shims() {
		if strings.Contains(p.Cmdline+" ", "-id "+id+" ") {
			return p.PID, nil
		}
	}
	return 0, fmt.Errorf("no shim of container %s runs", id)
}

// Mounts returns the host's mount points that have this text in any field of their line.
func Mounts(text string) ([]string, error) {
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, err
	}
	var found []string
	for _, m := range mounts {
		if line := m.Mountpoint + " " + m.Source + " " + m.Root + " " + m.VFSOptions; strings.Contains(line, text) {
			found = append(found, m.Mountpoint)
		}
	}
	return found, nil
}

func unmountBelow(dir string) error {
	var errs []error
	found, err := Mounts(dir)
	for i := len(found) - 1; i >= 0; i-- {
		// What is no mount any more was unmounted by its owner meanwhile.
		if err := unix.Unmount(found[i], unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", found[i], err))
		}
	}
	return errors.Join(append(errs, err)...)
}

// runEntries returns what lies in /run with this text in its name, deep enough for the state of
// runtimes (/run/containerd/NAME/NAMESPACE/ID). An empty directory named after the namespace is
// what runtimes leave there: it counts as nothing, and purge removes it.
func runEntries(text string) []string {
	var found []string
	_ = filepath.WalkDir("/run", func(p string, e fs.DirEntry, err error) error {
		if err != nil || p == "/run/nerdctl" { // nerdctl leaves a directory of each container there
			return fs.SkipDir
		}
		if strings.Contains(e.Name(), text) {
			found = append(found, p)
		}
		if strings.Count(p, "/") >= 6 && e.IsDir() {
			return fs.SkipDir
		}
		return nil
	})
	return found
}

func removeRunEntries(namespace string) error {
	var errs []error
	for _, p := range append(runEntries(namespace), "/run/nerdctl/"+namespace) {
		errs = append(errs, os.RemoveAll(p))
	}
	return errors.Join(errs...)
}

// leftovers names what is still there of the daemon after it was stopped.
func (d *Daemon) leftovers() []string {
	left := d.find(d.Namespace, func(p Process) bool { return p.PID != os.Getpid() })
	for _, m := range must(Mounts(d.Dir)) {
		if !d.opts.StateInMemory || m != d.path("state") {
			left = append(left, "mount "+m)
		}
	}
	return left
}

// Leftovers names what is still there of a container that was deleted: cgroups, mounts, state in
// /run, the bundle, its shim, its processes. It waits a moment for what ends by itself. The
// container's id should be one that no other program would use.
func (d *Daemon) Leftovers(id string) []string {
	left, _ := waitGone(WaitLimit, func() ([]string, error) {
		left := d.find(id, func(p Process) bool { return strings.Contains(p.Cmdline+" ", id+" ") })
		for _, m := range must(Mounts(id)) {
			left = append(left, "mount "+m)
		}
		return left, nil
	})
	return left
}

func (d *Daemon) find(name string, isOwn func(Process) bool) []string {
	var left []string
	for _, p := range d.processes() {
		if isOwn(p) || strings.Contains(p.cgroup, name) {
			left = append(left, p.String())
		}
	}
	for _, c := range must(cgroupsOf(name)) {
		if !strings.HasSuffix(c, "/"+d.Namespace) { // the parent is the daemon's own, and purge's
			left = append(left, "cgroup "+c)
		}
	}
	for _, p := range runEntries(name) {
		if entries, err := os.ReadDir(p); err == nil && len(entries) == 0 && filepath.Base(p) == d.Namespace {
			continue
		}
		left = append(left, p)
	}
	for _, dir := range []string{"state/io.containerd.runtime.v2.task/" + d.Namespace, "root/io.containerd.runtime.v2.task/" + d.Namespace, "tmp"} {
		entries, _ := os.ReadDir(d.path(dir))
		for _, e := range entries {
			// containerd itself never removes these.
			if dir == "tmp" && strings.HasPrefix(e.Name(), "ctrd-checkpoint") {
				continue
			}
			if dir == "tmp" || strings.Contains(e.Name(), name) || name == d.Namespace {
				left = append(left, d.path(filepath.Join(dir, e.Name())))
			}
		}
	}
	entries, _ := os.ReadDir(d.path("s"))
	if name == d.Namespace {
		for _, e := range entries {
			left = append(left, "shim socket "+d.path("s/"+e.Name()))
		}
	}
	return left
}

func must(list []string, err error) []string {
	if err != nil {
		return append(list, err.Error())
	}
	return list
}

// Snapshot is what of the host a run could change.
type Snapshot struct{ items map[string]struct{} }

// TakeSnapshot notes mounts, cgroups, network namespaces and links, the runtimes' directories in
// /run, and temporary files. Other harnesses' parts are left out, so that runs do not see each other.
func (d *Daemon) TakeSnapshot() (*Snapshot, error) { return takeSnapshot(d.Namespace, d.Dir) }

// TakeHostSnapshot is TakeSnapshot for before a daemon was started and after it was stopped.
func TakeHostSnapshot() (*Snapshot, error) { return takeSnapshot("\x00", "\x00") }

func takeSnapshot(namespace, dir string) (*Snapshot, error) {
	s := &Snapshot{map[string]struct{}{}}
	foreign := func(text string) bool {
		if strings.Contains(text, namespace) || strings.Contains(text, dir) {
			return false
		}
		return strings.Contains(text, namespacePrefix) || strings.Contains(text, "/crac-") || strings.Contains(text, bridgePrefix)
	}
	add := func(kind string, items ...string) {
		for _, i := range items {
			if !foreign(i) {
				s.items[kind+" "+i] = struct{}{}
			}
		}
	}
	mounts, err := mountinfo.GetMounts(nil)
	if err != nil {
		return nil, err
	}
	for _, m := range mounts {
		if !foreign(m.VFSOptions) && !foreign(m.Root) {
			add("mount", m.Mountpoint)
		}
	}
	cgroups, err := Cgroups(func(string) bool { return true })
	if err != nil {
		return nil, err
	}
	add("cgroup", cgroups...)
	tmp := os.TempDir()
	for _, glob := range []string{
		"/run/netns/*", "/run/containerd/*/*", "/run/crac*", "/var/lib/cni/*/*", "/sys/class/net/*",
		tmp + "/containerd*", tmp + "/crac*", tmp + "/criu*", tmp + "/ctr*", tmp + "/nerdctl*", tmp + "/runc*",
	} {
		paths, err := filepath.Glob(glob)
		if err != nil {
			return nil, err
		}
		add("path", paths...)
	}
	return s, nil
}

// NewSince names what this snapshot has and the earlier one has not.
func (s *Snapshot) NewSince(before *Snapshot) []string {
	var added []string
	for i := range s.items {
		if _, ok := before.items[i]; !ok {
			added = append(added, i)
		}
	}
	sort.Strings(added)
	return added
}
