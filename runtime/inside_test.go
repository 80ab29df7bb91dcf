package runtime

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/utsns"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/runtime/thread"
)

// insideEnv is set for a test that runs in namespaces of its own.
const insideEnv = "CRAC_TEST_INSIDE"

// inside runs the calling test once more as root of a new user namespace, which
// may mount and make network namespaces. It returns true there, and false when
// that run is over.
func inside(t *testing.T) bool {
	t.Helper()
	if os.Getenv(insideEnv) != "" {
		// Nothing of this reaches the other mount namespaces.
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			t.Fatal(err)
		}
		return true
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v")
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	wait, err := reaper(t).Start(cmd)
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EACCES) {
		t.Skipf("this host lets nobody make a user namespace: %v", err)
	}
	if err == nil {
		err = wait()
	}
	if err != nil || !strings.Contains(out.String(), "--- PASS: "+t.Name()) {
		t.Errorf("in namespaces of its own: %v\n%s", err, out.String())
	}
	return false
}

// decodeUTS reads an image with CRIU's own tool.
func decodeUTS(t *testing.T, path string) (host, domain string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	img, err := crit.New(f, nil, "", false, false).Decode(&utsns.UtsnsEntry{})
	if err != nil {
		t.Fatalf("decode %s: %v", path, err)
	}
	if img.Magic != "UTSNS" || len(img.Entries) != 1 {
		t.Fatalf("%s: magic %s, %d entries", path, img.Magic, len(img.Entries))
	}
	e, ok := img.Entries[0].Message.(*utsns.UtsnsEntry)
	if !ok {
		t.Fatalf("%s holds a %T", path, img.Entries[0].Message)
	}
	return e.GetNodename(), e.GetDomainname()
}

func TestUTSImage(t *testing.T) {
	for _, tt := range []struct{ host, domain, wantDomain string }{
		{"web-1", "", "(none)"},
		{"web-1", "example.org", "example.org"},
		{strings.Repeat("h", 64), strings.Repeat("d", 64), strings.Repeat("d", 64)},
		{"", "", "(none)"},
	} {
		path := filepath.Join(t.TempDir(), "utsns-11.img")
		if err := os.WriteFile(path, utsImage(tt.host, tt.domain), 0o600); err != nil {
			t.Fatal(err)
		}
		if host, domain := decodeUTS(t, path); host != tt.host || domain != tt.wantDomain {
			t.Errorf("%q, %q came back as %q, %q", tt.host, tt.domain, host, domain)
		}
	}
	// The bytes, by hand from the format.
	want := []byte{0x19, 0x43, 0x56, 0x54, 0x03, 0x32, 0x47, 0x54, 11, 0, 0, 0, 0x0a, 1, 'h', 0x12, 6, '(', 'n', 'o', 'n', 'e', ')'}
	if got := utsImage("h", ""); !slices.Equal(got, want) {
		t.Errorf("got  %x\nwant %x", got, want)
	}
}

func TestViewRenamesTheHost(t *testing.T) {
	if !inside(t) {
		return
	}
	if err := unix.Sethostname([]byte("pod")); err != nil {
		t.Fatal(err)
	}
	// Longer than fsconfig(2) takes, and with what has a meaning to overlayfs.
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 50), "with:colon,comma")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	old := utsImage("original", "")
	for name, data := range map[string][]byte{"utsns-11.img": old, "core-1.img": []byte("core"), "inventory.img": []byte("inv")} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, tt := range map[string]struct {
		namespaces []specs.LinuxNamespace
		hostname   string
		want       string
	}{
		"a name of its own": {[]specs.LinuxNamespace{{Type: specs.UTSNamespace}}, "clone", "clone"},
		"no name asked":     {[]specs.LinuxNamespace{{Type: specs.UTSNamespace}}, "", "original"},
		"the host's name":   {nil, "clone", "original"},
		"the name of a pod": {[]specs.LinuxNamespace{{Type: specs.UTSNamespace, Path: "/proc/self/ns/uts"}}, "clone", "pod"},
	} {
		t.Run(name, func(t *testing.T) {
			bundle := t.TempDir()
			spec := specOf(tt.namespaces...)
			spec.Hostname = tt.hostname
			c := &Container{cfg: Config{ID: "c", Bundle: bundle}, spec: spec}
			v, err := c.view(dir, nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			if host, _ := decodeUTS(t, filepath.Join(v.dir, "utsns-11.img")); host != tt.want {
				t.Errorf("the restored host is called %q, want %q", host, tt.want)
			}
			entries, err := os.ReadDir(v.dir)
			if err != nil || len(entries) != 3 {
				t.Errorf("the view shows %v, %v", entries, err)
			}
			if data, err := os.ReadFile(filepath.Join(v.dir, "core-1.img")); err != nil || string(data) != "core" {
				t.Errorf("core-1.img holds %q, %v", data, err)
			}
			v.Close()
			if left, err := os.ReadDir(bundle); err != nil || len(left) != 0 {
				t.Errorf("left in the bundle: %v, %v", left, err)
			}
		})
	}
	if data, err := os.ReadFile(filepath.Join(dir, "utsns-11.img")); err != nil || !slices.Equal(data, old) {
		t.Errorf("the dump itself was changed: %x, %v", data, err)
	}
}

// A dump that continues others is shown with them, as CRIU looks for them.
func TestViewShowsParents(t *testing.T) {
	if !inside(t) {
		return
	}
	dirs := make([]string, 3)
	for i := range dirs {
		dirs[i] = t.TempDir()
		for _, name := range []string{"pages-1.img", fmt.Sprintf("of-%d.img", i)} {
			if err := os.WriteFile(filepath.Join(dirs[i], name), []byte(dirs[i]), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	for depth := range dirs {
		bundle := t.TempDir()
		c := &Container{cfg: Config{ID: "c", Bundle: bundle}, spec: specOf()}
		v, err := c.view(dirs[0], nil, dirs[1:depth+1])
		if err != nil {
			t.Fatal(err)
		}
		place := v.dir
		for i := range dirs {
			data, err := os.ReadFile(filepath.Join(place, "pages-1.img"))
			if i > depth {
				if !errors.Is(err, os.ErrNotExist) {
					t.Errorf("at depth %d there is a parent too many: %v", i, err)
				}
				break
			}
			if err != nil || string(data) != dirs[i] {
				t.Errorf("at depth %d of %d: %q, %v; want %q", i, depth, data, err, dirs[i])
			}
			if _, err := os.Stat(filepath.Join(place, fmt.Sprintf("of-%d.img", i))); err != nil {
				t.Error(err)
			}
			place = filepath.Join(place, "parent")
		}
		v.Close()
		if left, err := os.ReadDir(bundle); err != nil || len(left) != 0 {
			t.Errorf("left in the bundle: %v, %v", left, err)
		}
	}
}

// statfs flags of mount attributes (statfs(2)).
var mountFlags = map[string]int64{
	"ro": unix.ST_RDONLY, "nosuid": unix.ST_NOSUID, "nodev": unix.ST_NODEV, "noexec": unix.ST_NOEXEC, "noatime": unix.ST_NOATIME,
}

func TestDetachedTree(t *testing.T) {
	// Refused before anything is made, whoever asks.
	for _, tt := range []struct {
		mount specs.Mount
		says  string
	}{
		{specs.Mount{Type: "bind", Source: "/", Options: []string{"rbind", "rshared"}}, `"rshared"`},
		{specs.Mount{Type: "none", Source: "/", Options: []string{"ro", "bind", "size=4k"}}, `"size=4k"`},
	} {
		fd, err := detachedTree(tt.mount)
		if err == nil {
			unix.Close(fd)
		}
		if err == nil || !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%+v: error is %v, want one that names %s", tt.mount, err, tt.says)
		}
	}
	if !inside(t) {
		return
	}
	source := t.TempDir()
	if err := os.WriteFile(filepath.Join(source, "file"), []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	tmpfs := specs.Mount{Type: "tmpfs", Source: "tmpfs"}
	bind := specs.Mount{Type: "bind", Source: source}
	with := func(m specs.Mount, options ...string) specs.Mount {
		m.Options = options
		return m
	}
	for name, tt := range map[string]struct {
		mount specs.Mount
		flags []string
		check func(t *testing.T, root string, st *unix.Statfs_t)
	}{
		"tmpfs with options": {
			with(tmpfs, "ro", "nosuid", "nodev", "noexec", "size=8k", "mode=0"),
			[]string{"ro", "nosuid", "nodev", "noexec"},
			func(t *testing.T, root string, st *unix.Statfs_t) {
				if size := int64(st.Blocks) * st.Bsize; size != 8<<10 {
					t.Errorf("it holds %d bytes, want 8 KiB", size)
				}
				if fi, err := os.Stat(root); err != nil || fi.Mode().Perm() != 0 {
					t.Errorf("mode %v, %v; want none", fi.Mode(), err)
				}
			},
		},
		"tmpfs that notes every reading": {
			with(tmpfs, "nosuid", "strictatime", "mode=755"),
			[]string{"nosuid"},
			func(t *testing.T, _ string, st *unix.Statfs_t) {
				if st.Flags&(unix.ST_NOATIME|unix.ST_RELATIME) != 0 {
					t.Errorf("flags %#x", st.Flags)
				}
			},
		},
		"tmpfs, writable": {
			with(tmpfs, "rw", "nosuid"),
			[]string{"nosuid"},
			func(t *testing.T, root string, _ *unix.Statfs_t) {
				if err := os.WriteFile(filepath.Join(root, "f"), nil, 0o600); err != nil {
					t.Error(err)
				}
			},
		},
		"bind, read-only": {
			with(bind, "rbind", "ro", "rprivate"),
			[]string{"ro"},
			func(t *testing.T, root string, _ *unix.Statfs_t) {
				if data, err := os.ReadFile(filepath.Join(root, "file")); err != nil || string(data) != "content" {
					t.Errorf("file holds %q, %v", data, err)
				}
				if err := os.WriteFile(filepath.Join(root, "file"), nil, 0o600); !errors.Is(err, unix.EROFS) {
					t.Errorf("a write to it: %v, want EROFS", err)
				}
			},
		},
		"bind by its type alone": {with(bind), nil, func(*testing.T, string, *unix.Statfs_t) {}},
	} {
		t.Run(name, func(t *testing.T) {
			fd, err := detachedTree(tt.mount)
			if err != nil {
				t.Fatal(err)
			}
			defer unix.Close(fd)
			var st, had unix.Statfs_t
			if err := errors.Join(unix.Fstatfs(fd, &st), unix.Statfs(source, &had)); err != nil {
				t.Fatal(err)
			}
			for flag, bit := range mountFlags {
				inherited := tt.mount.Type == "bind" && had.Flags&bit != 0
				if want := slices.Contains(tt.flags, flag) || inherited; (st.Flags&bit != 0) != want {
					t.Errorf("%s is %v, want %v", flag, st.Flags&bit != 0, want)
				}
			}
			tt.check(t, fmt.Sprintf("/proc/self/fd/%d", fd), &st)
		})
	}
	for name, m := range map[string]specs.Mount{
		"/nonexistent": {Type: "bind", Source: "/nonexistent"},
		"nosuchfs":     {Type: "nosuchfs", Source: "x"},
		`"size=luck"`:  {Type: "tmpfs", Source: "tmpfs", Options: []string{"size=luck"}},
	} {
		if fd, err := detachedTree(m); err == nil || !strings.Contains(err.Error(), name) {
			unix.Close(fd)
			t.Errorf("%+v: error is %v, want one that names %s", m, err, name)
		}
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

// What an image makes of a path leads nowhere but below the container's own root, and not into
// /proc.
func TestAttachMounts(t *testing.T) {
	if !inside(t) {
		return
	}
	dir := t.TempDir()
	target := filepath.Join(dir, "target")
	if err := errors.Join(os.Mkdir(target, 0o700), os.Symlink("target", filepath.Join(dir, "link")), os.Symlink("/proc/self/root", filepath.Join(dir, "magic")), os.Symlink("/proc/sys", filepath.Join(dir, "kernel"))); err != nil {
		t.Fatal(err)
	}
	attach := func(destination string) error {
		trees, err := detachedTrees([]specs.Mount{{Destination: destination, Type: "tmpfs", Source: "tmpfs", Options: []string{"mode=711"}}})
		defer trees.close()
		if err != nil {
			t.Fatal(err)
		}
		return trees.attach(os.Getpid())
	}
	// The library that makes mount points keeps a handle of /proc from its first use.
	if err := makeMountPoint(dir, "made", false); err != nil {
		t.Fatal(err)
	}
	before := openFiles(t)
	for _, destination := range []string{target, filepath.Join(dir, "link"), filepath.Join("../../../../../../../..", target)} {
		if err := attach(destination); err != nil {
			t.Errorf("%s: %v", destination, err)
		}
		if fi, err := os.Stat(target); err != nil || fi.Mode().Perm() != 0o711 {
			t.Errorf("%s: nothing is mounted there: %v, %v", destination, fi.Mode(), err)
		}
		if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
	}
	// A mount point may be missing: that of a mount in a file system of the dump.
	for _, destination := range []string{filepath.Join(dir, "none"), filepath.Join(dir, "link", "far", "none")} {
		if err := attach(destination); err != nil {
			t.Errorf("%s: %v", destination, err)
		}
		if err := unix.Unmount(destination, unix.MNT_DETACH); err != nil {
			t.Errorf("%s: nothing is mounted there: %v", destination, err)
		}
	}
	if err := os.Symlink("nowhere", filepath.Join(dir, "dangling")); err != nil {
		t.Fatal(err)
	}
	for _, destination := range []string{filepath.Join(dir, "dangling"), filepath.Join(dir, "dangling", "below"), filepath.Join(dir, "magic", target), filepath.Join(dir, "kernel"), "/proc/sys/kernel"} {
		if err := attach(destination); err == nil || !strings.Contains(err.Error(), destination) {
			t.Errorf("%s: error is %v, want one that names it", destination, err)
		}
	}
	// One that cannot be made leaves none of the others open.
	trees, err := detachedTrees([]specs.Mount{{Type: "tmpfs", Source: "tmpfs"}, {Destination: "/bad", Type: "bind", Source: "/nonexistent"}})
	if err == nil || !strings.Contains(err.Error(), "/bad") {
		t.Errorf("a mount that cannot be made: %v", err)
	}
	trees.close()
	if after := openFiles(t); after != before {
		t.Errorf("%d open files before, %d after", before, after)
	}
}

func TestHeldNetwork(t *testing.T) {
	if h, err := holdNetwork(specOf(specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: "/run/netns/x"})); h != nil || err != nil {
		t.Errorf("for a namespace that exists: %v, %v", h, err)
	}
	// All that may be done with none.
	var none *heldNetwork
	none.apply(specOf())
	none.retire()
	none.release()
	if none.pid() != 0 {
		t.Errorf("pid %d stands for nothing", none.pid())
	}
	if !inside(t) {
		return
	}
	before := openFiles(t)
	spec := specOf(specs.LinuxNamespace{Type: specs.PIDNamespace}, specs.LinuxNamespace{Type: specs.NetworkNamespace})
	spec.Linux.Sysctl = map[string]string{"net.ipv4.ip_unprivileged_port_start": "77", "kernel.shm_rmid_forced": "1"}
	h, err := holdNetwork(spec)
	if err != nil {
		t.Fatal(err)
	}
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	// As a client finds it between Create and Start.
	theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", h.pid()))
	if err != nil || theirs == own {
		t.Errorf("namespace of the pid that Create returns: %s, %v; ours is %s", theirs, err, own)
	}
	h.apply(spec)
	path := spec.Linux.Namespaces[1].Path
	if byPath, err := os.Stat(path); err != nil {
		t.Error(err)
	} else if byPid, err := os.Stat(fmt.Sprintf("/proc/%d/ns/net", h.pid())); err != nil || !os.SameFile(byPath, byPid) {
		t.Errorf("%s is another namespace than that of the pid (%v)", path, err)
	}
	if spec.Linux.Namespaces[0].Path != "" {
		t.Errorf("the pid namespace got the path %s", spec.Linux.Namespaces[0].Path)
	}
	err = onOwnThread(func() error {
		if err := unix.Setns(int(h.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		lo, err := net.InterfaceByName("lo")
		if err != nil {
			return err
		}
		if lo.Flags&net.FlagUp == 0 {
			t.Error("lo is down")
		}
		data, err := os.ReadFile("/proc/thread-self/net/dev")
		if err != nil || !strings.Contains(string(data), "lo:") {
			t.Errorf("devices %q, %v", data, err)
		}
		data, err = os.ReadFile("/proc/sys/net/ipv4/ip_unprivileged_port_start")
		if strings.TrimSpace(string(data)) != "77" {
			t.Errorf("net.ipv4.ip_unprivileged_port_start is %q, %v; want 77", data, err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	h.retire()
	h.retire() // again does nothing
	waitFor(t, "the holding thread's end", func() bool {
		_, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", h.pid()))
		return errors.Is(err, os.ErrNotExist)
	})
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the namespace went with the thread: %v", err)
	}
	h.release()
	if after := openFiles(t); after != before {
		t.Errorf("%d open files before, %d after", before, after)
	}

	// What cannot be set up leaves no thread and no file.
	spec = specOf(specs.LinuxNamespace{Type: specs.NetworkNamespace})
	spec.Linux.Sysctl = map[string]string{"net.no.such.thing": "1"}
	if _, err := holdNetwork(spec); err == nil || !strings.Contains(err.Error(), "net.no.such.thing") {
		t.Errorf("a sysctl that is not there: %v", err)
	}
	if after := openFiles(t); after != before {
		t.Errorf("%d open files before, %d after a failure", before, after)
	}
}

// What CRIU has made for a restore, before that fails, is what a cold start joins.
func TestHeldNetworkOfUser(t *testing.T) {
	if !inside(t) {
		return
	}
	before := openFiles(t)
	ids := []specs.LinuxIDMapping{{Size: 1}}
	first := exec.Command("/bin/sleep", "1000")
	first.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{Size: 1}}, GidMappings: []syscall.SysProcIDMap{{Size: 1}},
	}
	wait, err := reaper(t).Start(first)
	if err != nil {
		t.Fatal(err)
	}
	end := sync.OnceFunc(func() {
		_ = first.Process.Kill()
		_ = wait()
	})
	defer end()

	spec := specOf(specs.LinuxNamespace{Type: specs.UserNamespace}, specs.LinuxNamespace{Type: specs.NetworkNamespace})
	spec.Root = &specs.Root{Path: t.TempDir()}
	spec.Linux.UIDMappings, spec.Linux.GIDMappings = ids, ids
	spec.Linux.Sysctl = map[string]string{"net.ipv4.ip_unprivileged_port_start": "77"}
	h, err := holdNetworkOf(first.Process.Pid, spec)
	if err != nil {
		t.Fatal(err)
	}
	if h.pid() != first.Process.Pid || !h.ofUser() {
		t.Errorf("held: %+v, want the namespaces of process %d", h, first.Process.Pid)
	}
	end()
	h.apply(spec)
	for _, ns := range spec.Linux.Namespaces {
		if _, err := os.Stat(ns.Path); err != nil {
			t.Errorf("the %s namespace went with its process: %v", ns.Type, err)
		}
	}
	// libcontainer compares the maps.
	if _, err := newConfig(spec, Config{ID: "c", Bundle: t.TempDir()}); err != nil {
		t.Error(err)
	}
	err = thread.InNetworkOf(int(h.file.Fd()), func() error {
		lo, err := net.InterfaceByName("lo")
		if err == nil && lo.Flags&net.FlagUp == 0 {
			t.Error("lo is down")
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	h.release()
	if after := openFiles(t); after != before {
		t.Errorf("%d open files before, %d after", before, after)
	}
	if h, err := holdNetworkOf(first.Process.Pid, spec); err == nil {
		h.release()
		t.Error("the namespaces of a process that has ended were held")
	}
}
