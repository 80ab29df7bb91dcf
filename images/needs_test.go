package images

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/oci/criuimage"
)

// oneCore is a process's image that needs nothing of its host.
func oneCore() string { return coreImage(alive(thread(capable()))) }

func inventoryImage(lsm uint64) string {
	return image(criuimage.Inventory, message{}.num(1, 2).num(6, lsm))
}

func socketImage(families ...uint64) string {
	entries := []message{message{}.num(1, 1).num(2, 1).msg(3, message{}.num(1, 1))} // a regular file
	for _, f := range families {
		entries = append(entries, message{}.num(1, inetSocket).num(2, 2).msg(4, message{}.num(3, f)))
	}
	return image(criuimage.Files, entries...)
}

func TestNeeds(t *testing.T) {
	confined := func(profile string) string { return coreImage(alive(thread(capable().str(15, profile)))) }
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  string // requires, and what confines
		err   string
	}{
		{"nothing", map[string]string{"core-1.img": oneCore()}, "", ""},
		{"a filter", map[string]string{"core-1.img": coreImage(alive(filtered(thread(capable()))))}, "seccomp", ""},
		{"rseq", map[string]string{"core-1.img": coreImage(alive(thread(capable()).msg(15, message{}.num(1, 1<<47))))}, "rseq", ""},
		{"no rseq", map[string]string{"core-1.img": coreImage(alive(thread(capable()).msg(15, message{}.num(1, 0))))}, "", ""},
		{"the dead need nothing", map[string]string{"core-1.img": coreImage(message{}.msg(3, leader(taskZombie)))}, "", ""},
		{"namespaces", map[string]string{"timens-0.img": "x", "userns-9.img": "y", "netns-1.img": "z"}, "time-namespace user-namespace", ""},
		{"sockets", map[string]string{"files.img": socketImage(unix.AF_INET)}, "", ""},
		{"sockets of both", map[string]string{"files.img": socketImage(unix.AF_INET, unix.AF_INET6)}, "ipv6", ""},
		{"AppArmor", map[string]string{"core-1.img": confined("web"), "core-2.img": confined("app"), "core-3.img": confined("web"), "inventory.img": inventoryImage(2)}, "apparmor: app web", ""},
		{"SELinux", map[string]string{"core-1.img": confined("u:r:t:s0"), "inventory.img": inventoryImage(1)}, "selinux: u:r:t:s0", ""},
		{"a module that confines nobody", map[string]string{"core-1.img": oneCore(), "inventory.img": inventoryImage(2)}, "", ""},
		{"not images", map[string]string{"files": "x", "core": "y", "dump.log": "z"}, "", ""},

		{"cut", map[string]string{"core-1.img": oneCore()[:10]}, "", "core-1.img"},
		{"sockets cut", map[string]string{"files.img": socketImage(2)[:len(socketImage(2))-1]}, "", "files.img"},
		{"socket without words", map[string]string{"files.img": image(criuimage.Files, message{}.num(1, inetSocket))}, "", "without its description"},
		{"other inventory", map[string]string{"inventory.img": "x"}, "", "inventory.img"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, data := range tt.files {
				write(t, filepath.Join(dir, name), data)
			}
			requires, lsm, err := Needs(dir)
			if tt.err != "" {
				if !errors.Is(err, ErrNotDump) || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("got %v, want ErrNotDump with %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			got := strings.Join(requires, " ")
			if lsm != nil {
				got = strings.TrimSpace(got + " " + lsm.Name + ": " + strings.Join(lsm.Profiles, " "))
			}
			if got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
	// What CRIU wrote.
	for dump, want := range map[string][]string{"plain": {oci.RequireRseq}, "seccomp": {oci.RequireRseq, oci.RequireSeccomp}} {
		requires, lsm, err := Needs(filepath.Join("testdata", "dumps", dump))
		if err != nil || !slices.Equal(requires, want) || lsm != nil {
			t.Errorf("%s: %v, %v, %v, want %s", dump, requires, lsm, err, want)
		}
	}
	if _, _, err := Needs("/does/not/exist"); err == nil {
		t.Error("no directory gives no error")
	}
}

func FuzzNeeds(f *testing.F) {
	f.Add("core-1.img", []byte(oneCore()))
	f.Add("files.img", []byte(socketImage(10)))
	f.Add("inventory.img", []byte(inventoryImage(2)))
	f.Fuzz(func(t *testing.T, name string, data []byte) {
		if !oci.ValidFileName(name) {
			return
		}
		dir := t.TempDir()
		write(t, filepath.Join(dir, name), string(data))
		requires, lsm, err := Needs(dir)
		if err != nil {
			if !errors.Is(err, ErrNotDump) {
				t.Fatalf("%v does not wrap ErrNotDump", err)
			}
			return
		}
		// Whatever it is can be written down.
		for _, r := range requires {
			if !slices.Contains(oci.KernelFeatures(), r) {
				t.Fatalf("needs %q", r)
			}
		}
		if lsm != nil && len(lsm.Profiles) == 0 {
			t.Fatalf("confined by nothing: %+v", lsm)
		}
	})
}

func TestSecurityModule(t *testing.T) {
	for _, tt := range []struct {
		name  string
		files map[string]string
		want  string
	}{
		{"none", nil, ""},
		{"off", map[string]string{"sys/module/apparmor/parameters/enabled": "N\n"}, ""},
		{"AppArmor", map[string]string{
			"sys/module/apparmor/parameters/enabled": "Y\n", "sys/kernel/security/apparmor/profiles": "cri-containerd.apparmor.d (enforce)\n/usr/bin/a (b) (complain)\nodd\n",
		}, "apparmor [cri-containerd.apparmor.d /usr/bin/a (b)]"},
		{"AppArmor that tells nothing", map[string]string{"sys/module/apparmor/parameters/enabled": "Y\n"}, "apparmor []"},
		{"SELinux", map[string]string{"sys/fs/selinux/enforce": "1"}, "selinux []"},
	} {
		root := t.TempDir()
		for name, data := range tt.files {
			write(t, filepath.Join(root, name), data)
		}
		name, profiles := securityModule(root)
		got := name
		if name != "" {
			got += " [" + strings.Join(profiles, " ") + "]"
		}
		if got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.name, got, tt.want)
		}
	}
}

// This machine runs the tests, so it has what the tests' programs need.
func TestKernelHas(t *testing.T) {
	if _, err := os.Stat("/proc/self/ns/time"); err == nil != kernelHas(oci.RequireTimeNamespace) {
		t.Errorf("time namespaces: %v", err)
	}
	for _, f := range oci.KernelFeatures() {
		t.Logf("%s: %v", f, kernelHas(f))
	}
	if kernelHas("no-such-feature") {
		t.Error("the kernel has what there is not")
	}
}
