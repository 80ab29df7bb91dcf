package images

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/crac-shim/crac/oci/criuimage"
)

// defaultCapabilities are those that containerd gives a container.
const defaultCapabilities = 0xa80425fb

// ordinary is what a client asks for by default.
func ordinary() Privileges {
	return Privileges{
		Capabilities:  defaultCapabilities,
		ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/not-on-this-kernel"},
		Namespaces: []specs.LinuxNamespaceType{
			specs.PIDNamespace, specs.NetworkNamespace, specs.IPCNamespace, specs.UTSNamespace, specs.MountNamespace,
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs"},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "ro"}},
		},
	}
}

// nerdctls is what nerdctl asks for: other mounts.
func nerdctls() Privileges {
	p := ordinary()
	p.Mounts = append(p.Mounts,
		specs.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"ro"}},
		specs.Mount{Destination: "/etc/hosts", Type: "bind", Source: "/h", Options: []string{"bind"}},
		specs.Mount{Destination: "/v", Type: "bind", Source: "/x", Options: []string{"rbind", "ro"}},
		specs.Mount{Destination: "/w", Type: "bind", Source: "/y", Options: []string{"rbind"}})
	return p
}

func privileged() Privileges {
	p := ordinary()
	p.Capabilities = 1<<41 - 1
	p.ReadonlyPaths = nil
	p.Mounts = []specs.Mount{{Destination: "/proc", Type: "proc"}, {Destination: "/sys", Type: "sysfs"}}
	return p
}

// TestPrivilegesOfRealDumps looks at dumps that CRIU 4.2.1 made of containers
// of ctr (plain, --seccomp, --privileged) and of nerdctl (volumes, one read-only).
func TestPrivilegesOfRealDumps(t *testing.T) {
	readonlyRoot := ordinary()
	readonlyRoot.ReadonlyRootfs = true
	fewer := ordinary()
	fewer.Capabilities = 0
	userNS := ordinary()
	userNS.Namespaces = append(userNS.Namespaces, specs.UserNamespace)
	readonlyW := nerdctls()
	readonlyW.Mounts = append(readonlyW.Mounts, specs.Mount{Destination: "/w", Type: "bind", Options: []string{"rbind", "ro"}})
	narrow := privileged() // everything but the capabilities
	narrow.Capabilities = defaultCapabilities
	rw := privileged() // everything but what is read-only
	rw.Mounts = ordinary().Mounts
	rw.Capabilities &^= 1 << unix.CAP_SYS_ADMIN

	for _, tt := range []struct {
		dump    string
		allowed Privileges
		want    []string // code and text, of each reason
	}{
		{"plain", ordinary(), nil},
		{"plain", privileged(), nil},
		{"plain", readonlyRoot, []string{"mounts: a writable root"}},
		{"plain", fewer, []string{"privileges: CAP_CHOWN CAP_DAC_OVERRIDE"}},
		{"plain", userNS, []string{"namespaces: the host's user namespace"}},
		{"seccomp", ordinary(), nil},
		{"nerdctl", nerdctls(), nil},
		{"nerdctl", readonlyW, []string{"mounts: at \"/w\""}},
		{"privileged", privileged(), nil},
		{"privileged", narrow, []string{"privileges: CAP_SYS_ADMIN"}},
		{"privileged", rw, []string{"privileges: CAP_SYS_ADMIN", "mounts: sysfs (\"sysfs\") at \"/sys\""}},
		{"privileged", ordinary(), []string{"privileges: CAP_SYS_ADMIN", "mounts: 4 other mounts"}},
	} {
		reasons, err := openedDump(t, filepath.Join("testdata", "dumps", tt.dump)).CheckPrivileges(tt.allowed)
		if err != nil {
			t.Errorf("%s: %v", tt.dump, err)
			continue
		}
		expect(t, tt.dump, reasons, tt.want)
	}
}

// expect compares reasons with "code: part of the text".
func expect(t *testing.T, name string, reasons []Reason, want []string) {
	t.Helper()
	if len(reasons) != len(want) {
		t.Errorf("%s: reasons %q, want %q", name, reasons, want)
		return
	}
	for i, w := range want {
		code, text, _ := strings.Cut(w, ": ")
		if reasons[i].Code != code || !strings.Contains(reasons[i].Text, text) {
			t.Errorf("%s: reason %s: %q, want %q", name, reasons[i].Code, reasons[i].Text, w)
		}
	}
}

// Hand-made messages.

type message []byte

func (m message) num(n protowire.Number, values ...uint64) message {
	for _, v := range values {
		m = protowire.AppendVarint(protowire.AppendTag(m, n, protowire.VarintType), v)
	}
	return m
}

func (m message) str(n protowire.Number, v string) message {
	return protowire.AppendBytes(protowire.AppendTag(m, n, protowire.BytesType), []byte(v))
}

func (m message) msg(n protowire.Number, v message) message { return m.str(n, string(v)) }

func image(kind criuimage.Kind, messages ...message) string {
	file := criuimage.New(kind)
	for _, m := range messages {
		file = criuimage.Append(file, m)
	}
	return string(file)
}

func coreImage(m message) string      { return image(criuimage.Core, m) }
func mountImage(m ...message) string  { return image(criuimage.Mountpoints, m...) }
func leader(state uint64) message     { return message{}.num(1, state).str(6, "app") }
func thread(creds message) message    { return message{}.num(1, 0).msg(10, creds) }
func alive(thread message) message    { return message{}.num(1, 1).msg(3, leader(1)).msg(5, thread) }
func capable(mask ...uint64) message  { return message{}.num(12, mask...).num(18, 1) }
func ids(values ...uint64) message    { return numbered(5, values) }
func filtered(thread message) message { return thread.num(11, 2).num(12, 0) }

func numbered(first protowire.Number, values []uint64) (m message) {
	for i, v := range values {
		m = m.num(first+protowire.Number(i), v)
	}
	return m
}

// TestPrivilegesOfThreads looks at hand-made core images.
func TestPrivilegesOfThreads(t *testing.T) {
	allowed := Privileges{Capabilities: 1 << unix.CAP_CHOWN}
	good := capable(1, 0)
	for _, tt := range []struct {
		name string
		core message
		want []string // nil, reasons, or "damaged: part of the error"
	}{
		{"good", alive(filtered(thread(good))), nil},
		{"good thread", message{}.num(1, 1).msg(5, filtered(thread(good))), nil},
		{"no capabilities", alive(filtered(thread(capable()))), nil},
		{"packed capabilities", alive(filtered(thread(message{}.msg(11, protowire.AppendVarint(nil, 1<<21)).num(18, 1)))), []string{"privileges: CAP_SYS_ADMIN"}},
		{"inheritable", alive(filtered(thread(good.num(9, 2)))), []string{"privileges: CAP_DAC_OVERRIDE"}},
		{"permitted", alive(filtered(thread(good.num(10, 2)))), []string{"privileges: CAP_DAC_OVERRIDE"}},
		{"effective", alive(filtered(thread(good.num(11, 0, 1<<7)))), []string{"privileges: CAP_BPF"}},
		{"bounding", alive(filtered(thread(capable(1 << 21)))), []string{"privileges: CAP_SYS_ADMIN"}},
		{"ambient", alive(filtered(thread(good.num(19, 1<<12)))), []string{"privileges: CAP_NET_ADMIN"}},
		{"unknown capability", alive(filtered(thread(good.num(19, 0, 1<<31)))), []string{"privileges: capability 63"}},
		{"everything", alive(thread(message{}.num(12, 2))), []string{"privileges: CAP_DAC"}},
		{"zombie", message{}.num(1, 1).msg(3, leader(taskZombie)), []string{"damaged: no process"}},
		{"dead thread only in name", message{}.num(1, 1).msg(5, message{}.num(1, taskDead)), []string{"damaged: no credentials"}},
		{"no thread", message{}.num(1, 1).msg(3, leader(1)), []string{"damaged: nothing about its thread"}},
		{"no credentials", alive(message{}.num(1, 1)), []string{"damaged: no credentials"}},
		{"two threads", alive(filtered(thread(good))).msg(5, thread(good)), []string{"damaged: 2 times"}},
		{"two credentials", alive(filtered(thread(good)).msg(10, capable(1<<21))), []string{"damaged: 2 times"}},
		{"two new privileges", alive(filtered(thread(good.num(18, 0)))), []string{"damaged: 2 times"}},
		{"old seccomp", message{}.msg(3, leader(1).num(11, 0)).msg(5, filtered(thread(good))), []string{"damaged: seccomp"}},
		{"old ids", alive(filtered(thread(good))).msg(4, ids(1)), []string{"damaged: namespaces"}},
		{"more capabilities than there are", alive(filtered(thread(good.num(12, 1)))), []string{"damaged: more capabilities"}},
		{"large number", alive(filtered(thread(good.num(9, 1<<32)))), []string{"damaged: has the value"}},
		{"other type", alive(filtered(thread(good))).num(3, 1), []string{"damaged: 2 times"}},
		{"a number for a message", message{}.num(5, 1), []string{"damaged: wire type"}},
		{"cut off", alive(filtered(thread(good)))[:9], []string{"damaged: "}},
	} {
		dir := t.TempDir()
		write(t, filepath.Join(dir, "core-7.img"), coreImage(tt.core))
		check(t, tt.name, dir, allowed, tt.want)
	}
}

func check(t *testing.T, name, dir string, allowed Privileges, want []string) {
	t.Helper()
	reasons, err := openedDump(t, dir).CheckPrivileges(allowed)
	if len(want) > 0 && strings.HasPrefix(want[0], "damaged: ") {
		if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), strings.TrimPrefix(want[0], "damaged: ")) {
			t.Errorf("%s: error %v, want %q", name, err, want[0])
		}
		return
	}
	if err != nil {
		t.Errorf("%s: %v", name, err)
		return
	}
	expect(t, name, reasons, want)
}

// TestPrivilegesCountThreads: one reason for many, with the first and the number.
func TestPrivilegesCountThreads(t *testing.T) {
	dir := t.TempDir()
	for _, n := range []string{"1", "2", "3"} {
		write(t, filepath.Join(dir, "core-"+n+".img"), coreImage(alive(thread(capable(1<<21)))))
	}
	check(t, "three", dir, Privileges{}, []string{`privileges: process 1 ("app") and 2 other threads`})
}

func TestPrivilegesOfNamespaces(t *testing.T) {
	host := []uint64{1, 2, 3, 4, 6, 7, 8}
	both := []specs.LinuxNamespaceType{specs.PIDNamespace, specs.NetworkNamespace}
	for _, tt := range []struct {
		name    string
		ids     message
		asked   []specs.LinuxNamespaceType
		missing bool
		want    []string
	}{
		{"own", ids(9, 10, 11, 12, 13, 7, 8), both, false, nil},
		{"host asked for", ids(host...), nil, false, nil},
		{"host", ids(host...), both, false, []string{"namespaces: host's pid namespace and 1 other"}},
		{"host's network", ids(9, 2), both, false, []string{"namespaces: host's network namespace"}},
		{"none said", ids(9), both, false, []string{"namespaces: host's network namespace"}},
		{"no image", nil, both, true, []string{"damaged: ids-1.img"}},
	} {
		dir := t.TempDir()
		write(t, filepath.Join(dir, "core-1.img"), coreImage(alive(thread(capable()))))
		if !tt.missing {
			write(t, filepath.Join(dir, "ids-1.img"), image(criuimage.IDs, tt.ids))
		}
		write(t, filepath.Join(dir, "inventory.img"), image(criuimage.Inventory, message{}.num(1, 2).msg(3, ids(host...))))
		check(t, tt.name, dir, Privileges{Namespaces: tt.asked}, tt.want)
	}
}

// mnt is a mnt_entry.
type mnt struct {
	fs, id, parent, device, flags            uint64
	root, at, source, options, fsname, extBy string
}

func (m mnt) message() message {
	out := message{}.num(1, m.fs).num(2, m.id).num(3, m.device).num(4, m.parent).num(5, m.flags).
		str(6, m.root).str(7, m.at).str(8, m.source).str(9, m.options)
	if m.fsname != "" {
		out = out.str(14, m.fsname)
	}
	if m.extBy != "" {
		out = out.str(18, m.extBy)
	}
	return out
}

func TestPrivilegesOfMounts(t *testing.T) {
	const ro = unix.MS_RDONLY
	base := []mnt{
		{fs: fsOverlay, id: 1, parent: 99, device: 40, root: "/", at: "/", source: "overlay", options: "lowerdir=/l"},
		{fs: fsProc, id: 2, parent: 1, device: 41, root: "/", at: "/proc", source: "proc"},
		{fs: fsProc, id: 3, parent: 2, device: 41, flags: ro, root: "/sys", at: "/proc/sys", source: "proc"},
		{fs: fsSysfs, id: 4, parent: 1, device: 42, flags: ro, root: "/", at: "/sys", source: "sysfs"},
		{fs: fsTmpfs, id: 5, parent: 1, device: 43, root: "/", at: "/dev", source: "tmpfs"},
		{id: 6, parent: 1, device: 44, flags: ro, root: "/x", at: "/v", source: "/dev/vda", extBy: "/v"},
	}
	allowed := Privileges{
		ReadonlyPaths: []string{"/proc/sys"},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc"},
			{Destination: "/sys", Type: "sysfs", Options: []string{"ro"}},
			{Destination: "/v", Type: "bind", Source: "/no-such-directory", Options: []string{"rbind", "ro"}},
			{Destination: "/host/", Type: "bind", Source: "/", Options: []string{"rbind"}},
			{Destination: "/trace", Type: "tracefs"},
			{Destination: "/cg", Type: "cgroup", Options: []string{"ro"}},
		},
	}
	admin := allowed
	admin.Capabilities = 1 << unix.CAP_SYS_ADMIN

	for _, tt := range []struct {
		name  string
		extra []mnt
		edit  func([]mnt)
		want  []string
		admin []string // for a request with CAP_SYS_ADMIN
	}{
		{name: "ordinary"},
		{name: "tmpfs anywhere", extra: []mnt{{fs: fsTmpfs, root: "/", at: "/t", source: "tmpfs"}}},
		{name: "bind of the root", extra: []mnt{{fs: fsOverlay, device: 40, root: "/a", at: "/b", source: "overlay", options: "lowerdir=/l"}}},
		{
			name: "other overlay", extra: []mnt{{fs: fsOverlay, device: 40, root: "/", at: "/b", source: "overlay", options: "lowerdir=/"}},
			want: []string{`mounts: overlay ("overlay") at "/b"`}, admin: []string{"mounts: overlay"},
		},
		{
			name: "disk", extra: []mnt{{fs: 16, device: 45, root: "/", at: "/d", source: "/dev/vda", fsname: "ext4"}},
			want: []string{`mounts: ext4 ("/dev/vda") at "/d"`}, admin: []string{"mounts: ext4"},
		},
		{
			name: "disk that says it is a tmpfs", extra: []mnt{{fs: fsTmpfs, device: 45, root: "/", at: "/d", source: "/dev/vda", fsname: "ext4"}},
			want: []string{"mounts: ext4"}, admin: []string{"mounts: ext4"},
		},
		{
			name: "directory of the host", extra: []mnt{{device: 45, root: "/etc", at: "/d", source: "/dev/vda"}},
			want: []string{`mounts: a file system of its own ("/dev/vda") at "/d"`}, admin: []string{"mounts: "},
		},
		{
			name: "source that CRIU finds by itself", extra: []mnt{{device: 45, root: "/", at: "/d", source: "/etc", extBy: "CRIU:AUTOGENERATED"}},
			want: []string{"mounts: "}, admin: []string{"mounts: "},
		},
		{name: "debugfs", extra: []mnt{{fs: 11, root: "/", at: "/d", source: "debugfs"}}, want: []string{"mounts: debugfs"}},
		{name: "devtmpfs", extra: []mnt{{fs: 3, root: "/", at: "/d", source: "devtmpfs"}}, want: []string{"mounts: devtmpfs"}},
		{name: "asked for", extra: []mnt{{fs: 19, root: "/", at: "/trace", source: "tracefs"}}},
		{name: "cgroup", extra: []mnt{{fs: fsCgroup, root: "/../x", at: "/cg/memory", source: "cgroup"}}},
		{name: "other cgroup", extra: []mnt{{fs: fsCgroup2, root: "/", at: "/mnt", source: "cgroup"}}, want: []string{"mounts: cgroup2"}},
		{name: "device", extra: []mnt{{fs: fsTmpfs, root: "/null", at: "/proc/keys", source: "tmpfs", extBy: "/dev/null"}}},
		{name: "writable sysfs", edit: func(m []mnt) { m[3].flags = 0 }, want: []string{"mounts: sysfs"}},
		{name: "writable volume", edit: func(m []mnt) { m[5].flags = 0 }, want: []string{`mounts: at "/v"`}, admin: []string{`mounts: at "/v"`}},
		{
			name: "part of a volume", extra: []mnt{{device: 44, flags: ro, root: "/x/y", at: "/part", source: "/dev/vda"}},
		},
		{
			name: "writable part of a volume", extra: []mnt{{device: 44, root: "/x/y", at: "/part", source: "/dev/vda"}},
			want: []string{`mounts: at "/part"`}, admin: []string{`mounts: at "/part"`},
		},
		{
			name: "beside a volume", extra: []mnt{{device: 44, flags: ro, root: "/xy", at: "/part", source: "/dev/vda"}},
			want: []string{`mounts: at "/part"`}, admin: []string{`mounts: at "/part"`},
		},
		{name: "another proc", extra: []mnt{{fs: fsProc, device: 41, root: "/", at: "/dev/p", source: "proc"}}, want: []string{`mounts: proc ("proc") at "/dev/p"`}},
		{name: "proc above proc", extra: []mnt{{fs: fsProc, parent: 2, device: 41, root: "/", at: "/proc", source: "proc"}}, want: []string{"mounts: proc"}},
		{name: "proc of the host's root", extra: []mnt{{fs: fsProc, device: 46, root: "/", at: "/host/proc", source: "proc"}}},
		{name: "proc where the host has none", extra: []mnt{{fs: fsProc, device: 46, root: "/", at: "/host/etc", source: "proc"}}, want: []string{"mounts: proc"}},
		{name: "read-only part of proc", extra: []mnt{{fs: fsProc, device: 41, flags: ro, root: "/bus", at: "/b", source: "proc"}}},
		{name: "writable part of proc", extra: []mnt{{fs: fsProc, device: 41, root: "/bus", at: "/b", source: "proc"}}, want: []string{"mounts: proc"}},
		{
			name: "writable below a read-only path", extra: []mnt{{fs: fsProc, parent: 3, device: 41, root: "/sys/kernel", at: "/proc/sys/kernel", source: "proc"}},
			want: []string{"mounts: proc"},
		},
		{name: "writable path", edit: func(m []mnt) { m[2].flags = 0 }, want: []string{"mounts: 1 other"}},
		{name: "path not mounted", edit: func(m []mnt) { m[2].at = "/proc/sy" }, want: []string{"mounts: a writable /proc/sys"}},
		{name: "path below what hides it", edit: func(m []mnt) { m[2].parent = 1 }, want: []string{"mounts: a writable /proc/sys"}},
		{
			name: "two at a path", extra: []mnt{{fs: fsTmpfs, parent: 3, root: "/", at: "/proc/sys", source: "tmpfs"}},
			want: []string{"mounts: a writable /proc/sys"},
		},
		{name: "path that is not clean", edit: func(m []mnt) { m[4].at = "/proc/../dev" }, want: []string{"damaged: mount point"}},
		{name: "root that leads out", edit: func(m []mnt) { m[5].root = "/x/../.." }, want: []string{"damaged: root"}},
		{name: "two of an ID", edit: func(m []mnt) { m[4].id = 3 }, want: []string{"damaged: two mounts"}},
		{name: "no root", edit: func(m []mnt) { m[0].at = "/a" }, want: []string{"damaged: no root"}},
		{name: "two roots", extra: []mnt{{fs: fsOverlay, parent: 98, root: "/", at: "/"}}, want: []string{"damaged: two root"}},
	} {
		mounts := append(slices.Clone(base), tt.extra...)
		if tt.edit != nil {
			tt.edit(mounts)
		}
		var messages []message
		for i, m := range mounts {
			if m.id == 0 {
				m.id = uint64(100 + i)
			}
			if m.parent == 0 {
				m.parent = 1
			}
			messages = append(messages, m.message())
		}
		// CRIU lists the newest first.
		slices.Reverse(messages)
		dir := t.TempDir()
		write(t, filepath.Join(dir, "core-1.img"), coreImage(alive(thread(capable()))))
		write(t, filepath.Join(dir, "mountpoints-12.img"), mountImage(messages...))
		check(t, tt.name, dir, allowed, tt.want)
		if tt.admin == nil && len(tt.want) > 0 && strings.HasPrefix(tt.want[0], "damaged") {
			tt.admin = tt.want
		}
		check(t, tt.name+" with CAP_SYS_ADMIN", dir, admin, tt.admin)
	}
}

// TestPrivilegesOfOtherRoots: a second mount namespace may have no other root.
func TestPrivilegesOfOtherRoots(t *testing.T) {
	root := mnt{fs: fsOverlay, id: 1, parent: 9, device: 40, root: "/", at: "/", source: "overlay", options: "lowerdir=/l"}
	dir := t.TempDir()
	write(t, filepath.Join(dir, "core-1.img"), coreImage(alive(thread(capable()))))
	write(t, filepath.Join(dir, "mountpoints-1.img"), mountImage(root.message()))
	write(t, filepath.Join(dir, "mountpoints-2.img"), mountImage(root.message()))
	check(t, "same", dir, Privileges{}, nil)
	root.options = "lowerdir=/"
	write(t, filepath.Join(dir, "mountpoints-2.img"), mountImage(root.message()))
	check(t, "other", dir, Privileges{}, []string{"mounts: another root file system"})
}

func TestPrivilegesOfDamagedFiles(t *testing.T) {
	good := coreImage(alive(thread(capable())))
	for _, tt := range []struct {
		name string
		make func(dir string)
		want string
	}{
		{"empty", func(string) {}, "no process"},
		{"empty file", func(dir string) { write(t, filepath.Join(dir, "core-1.img"), "") }, "not what its name says"},
		{"other kind", func(dir string) { write(t, filepath.Join(dir, "core-1.img"), mountImage()) }, "not what its name says"},
		{"old format", func(dir string) { write(t, filepath.Join(dir, "core-1.img"), good[4:]) }, "not what its name says"},
		{"no message", func(dir string) { write(t, filepath.Join(dir, "core-1.img"), good[:8]) }, "0 messages"},
		{"two messages", func(dir string) { write(t, filepath.Join(dir, "core-1.img"), good+good[8:]) }, "2 messages"},
		{"cut size", func(dir string) { write(t, filepath.Join(dir, "core-1.img"), good[:10]) }, "cut off"},
		{"cut message", func(dir string) { write(t, filepath.Join(dir, "core-1.img"), good[:len(good)-1]) }, "cut off"},
		{"other name", func(dir string) { write(t, filepath.Join(dir, "core-x.img"), good) }, "not named after a process"},
		{"too large", func(dir string) {
			path := filepath.Join(dir, "core-1.img")
			write(t, path, good)
			if err := os.Truncate(path, maxImage+1); err != nil {
				t.Fatal(err)
			}
		}, "more than"},
		{"link", func(dir string) {
			write(t, filepath.Join(dir, "core"), good)
			if err := os.Symlink("core", filepath.Join(dir, "core-1.img")); err != nil {
				t.Fatal(err)
			}
		}, unix.ELOOP.Error()},
		{"pipe", func(dir string) {
			if err := unix.Mkfifo(filepath.Join(dir, "core-1.img"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "not a regular file"},
	} {
		dir := t.TempDir()
		tt.make(dir)
		check(t, tt.name, dir, Privileges{}, []string{"damaged: " + tt.want})
	}
}

func TestPrivilegesOfSpec(t *testing.T) {
	spec := &specs.Spec{
		Process: &specs.Process{
			Capabilities: &specs.LinuxCapabilities{Bounding: []string{"CAP_CHOWN", "CAP_SYS_ADMIN", "CAP_CHECKPOINT_RESTORE", "CAP_OF_TOMORROW"}, Effective: []string{"CAP_BPF"}},
		},
		Root: &specs.Root{Readonly: true},
		Linux: &specs.Linux{
			ReadonlyPaths: []string{"/proc/sys"},
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace},
				{Type: specs.IPCNamespace, Path: "/proc/self/ns/ipc"}, // the host's: none of its own
				{Type: specs.NetworkNamespace, Path: "/no/such/namespace"},
			},
		},
	}
	p := PrivilegesOf(spec)
	if p.Capabilities != 1|1<<21|1<<40 {
		t.Errorf("capabilities %#x", p.Capabilities)
	}
	if !p.ReadonlyRootfs || !slices.Equal(p.ReadonlyPaths, []string{"/proc/sys"}) {
		t.Errorf("got %+v", p)
	}
	if want := []specs.LinuxNamespaceType{specs.PIDNamespace, specs.NetworkNamespace}; !slices.Equal(p.Namespaces, want) {
		t.Errorf("namespaces %v, want %v", p.Namespaces, want)
	}
	if p := PrivilegesOf(&specs.Spec{}); p.Capabilities != 0 {
		t.Errorf("of an empty spec: %+v", p)
	}
}

// FuzzPrivileges: whatever an image holds, it is an answer or ErrDamaged, and a
// thread that is let through with no privileges has none.
func FuzzPrivileges(f *testing.F) {
	for _, pattern := range []string{"core-*.img", "mountpoints-*.img"} {
		names, err := filepath.Glob(filepath.Join("testdata", "dumps", "*", pattern))
		if err != nil || len(names) == 0 {
			f.Fatalf("no %s: %v", pattern, err)
		}
		for _, name := range names {
			data, err := os.ReadFile(name)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(data, strings.HasPrefix(pattern, "core"))
		}
	}
	f.Fuzz(func(t *testing.T, data []byte, core bool) {
		dir := t.TempDir()
		name := "mountpoints-1.img"
		if core {
			name = "core-1.img"
		} else {
			write(t, filepath.Join(dir, "core-1.img"), coreImage(alive(thread(capable()))))
		}
		write(t, filepath.Join(dir, name), string(data))
		reasons, err := openedDump(t, dir).CheckPrivileges(Privileges{})
		if err != nil && !errors.Is(err, ErrDamaged) {
			t.Errorf("error %v", err)
		}
		if err == nil && core && len(reasons) == 0 {
			messages, err := criuimage.Split(data, criuimage.Core, maxMessages)
			if err != nil || len(messages) != 1 {
				t.Fatalf("let through: %v, %d messages", err, len(messages))
			}
			if th, err := parseCore(messages[0]); err != nil || th.capabilities != 0 {
				t.Errorf("let through: %v, %+v", err, th)
			}
		}
	})
}
