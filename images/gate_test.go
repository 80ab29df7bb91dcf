package images

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/crac-shim/crac/oci"
)

func TestGate(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(m *oci.Manifest, h *Host, r *Request)
		code   string // none: no reason
		says   []string
	}{
		{name: "fits", change: func(*oci.Manifest, *Host, *Request) {}},
		{name: "no CRIU", code: CodeNoCRIU, says: []string{"4.1", "CRAC_CRIU"}, change: func(_ *oci.Manifest, h *Host, _ *Request) { h.CRIU = 0 }},
		{name: "old CRIU", code: CodeCRIUTooOld, says: []string{"4.1", "3.17.1"}, change: func(_ *oci.Manifest, h *Host, _ *Request) { h.CRIU = 31701 }},
		{name: "older than the dump needs", code: CodeCRIUTooOld, says: []string{"4.2", "4.1"}, change: func(m *oci.Manifest, h *Host, _ *Request) { m.CRIU.Minimum, h.CRIU = 40200, 40100 }},
		{name: "a manifest cannot ask for an old one", code: CodeCRIUTooOld, change: func(m *oci.Manifest, h *Host, _ *Request) { m.CRIU.Minimum, h.CRIU = 1, 31701 }},
		{name: "too old for the kernel", code: CodeCRIUTooOld, says: []string{"4.2", "4.1.1"}, change: func(_ *oci.Manifest, h *Host, _ *Request) { h.Kernel = "6.16.1-cloud" }},
		{name: "new enough for the kernel", change: func(_ *oci.Manifest, h *Host, _ *Request) { h.Kernel, h.CRIU = "7.1.0", 40200 }},
		{name: "the image's own command", change: func(m *oci.Manifest, _ *Host, r *Request) {
			m.Base.Args, r.Args = []string{"/default"}, []string{"/default"}
		}},
		{name: "newer CRIU", change: func(_ *oci.Manifest, h *Host, _ *Request) { h.CRIU = 50000 }},
		{name: "architecture", code: CodeArchitecture, says: []string{"riscv64"}, change: func(m *oci.Manifest, _ *Host, _ *Request) { m.Platform.Architecture = "riscv64" }},
		{name: "page size", code: CodePageSize, says: []string{"65536"}, change: func(m *oci.Manifest, _ *Host, _ *Request) { m.Host.PageSize = 65536 }},
		{name: "operating system", code: CodeArchitecture, says: []string{"plan9"}, change: func(m *oci.Manifest, _ *Host, _ *Request) { m.Platform.OS = "plan9" }},
		{name: "variant", change: func(m *oci.Manifest, _ *Host, _ *Request) { m.Platform.Variant = "v99" }},
		{name: "CPU", code: CodeCPUFeatures, says: []string{"avx512f avx9", "Old CPU"}, change: func(m *oci.Manifest, h *Host, _ *Request) {
			m.Host.CPU.Features, h.CPU = []string{"avx2", "avx512f", "avx9"}, oci.CPU{Model: "Old CPU", Features: []string{"avx2"}}
		}},
		{name: "richer CPU", change: func(m *oci.Manifest, h *Host, _ *Request) {
			m.Host.CPU.Features, h.CPU.Features = []string{"a"}, []string{"a", "b"}
		}},
		{name: "cgroup namespace", code: CodeCgroupVersion, says: []string{"v1", "v2"}, change: func(m *oci.Manifest, h *Host, r *Request) {
			m.Host.CgroupVersion, h.CgroupVersion = 1, 2
			m.Container.Namespaces = append(slices.Clone(m.Container.Namespaces), "cgroup")
			r.Namespaces = m.Container.Namespaces
		}},
		{name: "cgroup mount", code: CodeCgroupVersion, says: []string{"v2", "v1"}, change: func(m *oci.Manifest, h *Host, r *Request) {
			m.Host.CgroupVersion, h.CgroupVersion = 2, 1
			m.Mounts = append(slices.Clone(m.Mounts), oci.Mount{Destination: "/sys/fs/cgroup", Type: "cgroup"})
			r.Mounts = m.Mounts
		}},
		{name: "nothing of cgroups", change: func(m *oci.Manifest, h *Host, _ *Request) { m.Host.CgroupVersion, h.CgroupVersion = 2, 1 }},
		{name: "kernel", code: CodeKernel, says: []string{"ipv6 rseq", "5.4-small"}, change: func(m *oci.Manifest, h *Host, _ *Request) {
			m.Requires = []string{"ipv6", "rseq", "seccomp"}
			h.Kernel, h.Features = "5.4-small", []string{"seccomp"}
		}},
		{name: "kernel that has more", change: func(m *oci.Manifest, h *Host, _ *Request) {
			m.Requires, h.Features = []string{"seccomp"}, oci.KernelFeatures()
		}},
		{name: "of a later version", code: CodeRequires, says: []string{"newer one", "parents"}, change: func(m *oci.Manifest, h *Host, _ *Request) {
			m.Requires, h.Features = []string{"parents", "seccomp"}, []string{"seccomp"}
		}},
		{name: "no security module", code: CodeLSM, says: []string{"apparmor (web)", "neither"}, change: func(m *oci.Manifest, _ *Host, _ *Request) {
			m.Container.LSM = &oci.LSM{Name: "apparmor", Profiles: []string{"web"}}
		}},
		{name: "other security module", code: CodeLSM, says: []string{"apparmor (web)", "selinux"}, change: func(m *oci.Manifest, h *Host, _ *Request) {
			m.Container.LSM, h.LSM = &oci.LSM{Name: "apparmor", Profiles: []string{"web"}}, "selinux"
		}},
		{name: "profile that is not loaded", code: CodeLSM, says: []string{"loaded: web;"}, change: func(m *oci.Manifest, h *Host, _ *Request) {
			m.Container.LSM = &oci.LSM{Name: "apparmor", Profiles: []string{"app", ":other:x", "a//&b", "web"}}
			h.LSM, h.Profiles = "apparmor", []string{"app"}
		}},
		{name: "profile that is not loaded nor needed", change: func(m *oci.Manifest, h *Host, r *Request) {
			m.Container.LSM = &oci.LSM{Name: "apparmor", Profiles: []string{"web"}}
			h.LSM, h.Profiles, r.Profile = "apparmor", []string{"app"}, "app"
		}},
		{name: "profile for another security module", code: CodeLSM, says: []string{"apparmor (web)", "selinux"}, change: func(m *oci.Manifest, h *Host, r *Request) {
			m.Container.LSM = &oci.LSM{Name: "apparmor", Profiles: []string{"web"}}
			h.LSM, r.Profile = "selinux", "u:r:t:s0"
		}},
		{name: "profiles that cannot be listed", change: func(m *oci.Manifest, h *Host, _ *Request) {
			m.Container.LSM, h.LSM = &oci.LSM{Name: "apparmor", Profiles: []string{"web"}}, "apparmor"
		}},
		{name: "SELinux", change: func(m *oci.Manifest, h *Host, _ *Request) {
			m.Container.LSM, h.LSM = &oci.LSM{Name: "selinux", Profiles: []string{"u:r:t:s0"}}, "selinux"
		}},
		{name: "any command", change: func(_ *oci.Manifest, _ *Host, r *Request) { r.Args, r.AnyArgs = []string{"sh"}, true }},
		{name: "other command", code: CodeArgs, says: []string{"/app", "sh"}, change: func(_ *oci.Manifest, _ *Host, r *Request) { r.Args = []string{"sh"} }},
		{name: "other user", code: CodeUser, says: []string{"user 7, group 8", "user 0, group 8"}, change: func(_ *oci.Manifest, _ *Host, r *Request) { r.UID = 0 }},
		{name: "other group", code: CodeUser, change: func(_ *oci.Manifest, _ *Host, r *Request) { r.GID = 0 }},
		{name: "more groups", code: CodeUser, change: func(_ *oci.Manifest, _ *Host, r *Request) { r.AdditionalGids = []uint32{9} }},
		{name: "the same groups", change: func(m *oci.Manifest, _ *Host, r *Request) {
			m.Container.AdditionalGids, r.AdditionalGids = []uint32{1, 2}, []uint32{2, 1, 2}
		}},
		{name: "the user's group among the others", change: func(m *oci.Manifest, _ *Host, r *Request) {
			m.Container.AdditionalGids, r.AdditionalGids = nil, []uint32{r.GID}
		}},
		{name: "terminal", code: CodeTerminal, says: []string{"without", "with a"}, change: func(_ *oci.Manifest, _ *Host, r *Request) { r.Terminal = true }},
		{name: "namespaces", code: CodeNamespaces, says: []string{"mount, pid"}, change: func(_ *oci.Manifest, _ *Host, r *Request) { r.Namespaces = []string{"pid"} }},
		{name: "namespaces not said", change: func(_ *oci.Manifest, _ *Host, r *Request) { r.Namespaces = nil }},
		{name: "ID mappings of groups", code: CodeNamespaces, change: func(_ *oci.Manifest, _ *Host, r *Request) { r.GIDMappings = []oci.IDMapping{{Size: 1}} }},
		{name: "ID mappings", code: CodeNamespaces, change: func(_ *oci.Manifest, _ *Host, r *Request) { r.UIDMappings = []oci.IDMapping{{Size: 1}} }},
		{name: "mount gone", code: CodeMounts, says: []string{"/data"}, change: func(_ *oci.Manifest, _ *Host, r *Request) { r.Mounts = nil }},
		{name: "more mounts", change: func(_ *oci.Manifest, _ *Host, r *Request) {
			r.Mounts = append(r.Mounts, oci.Mount{Destination: "/more"})
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := facts()
			h := ThisHost(40101)
			h.Kernel = "6.12.0" // newer ones need a newer CRIU
			r := RequestOf(m.Container, slices.Clone(m.Mounts))
			tt.change(&m, &h, &r)
			got := Gate(&m, h, r)
			if tt.code == "" {
				if len(got) > 0 {
					t.Errorf("refused: %v", got)
				}
				return
			}
			if len(got) != 1 || got[0].Code != tt.code {
				t.Fatalf("got %v, want one reason %s", got, tt.code)
			}
			for _, s := range append(tt.says, ";") { // the way out follows a semicolon
				if !strings.Contains(got[0].String(), s) {
					t.Errorf("%q does not say %q", got[0], s)
				}
			}
		})
	}
}

func TestGateAllReasons(t *testing.T) {
	m := facts()
	h := ThisHost(0)
	h.PageSize *= 2
	got := Gate(&m, h, Request{Terminal: true})
	var codes []string
	for _, r := range got {
		codes = append(codes, r.Code)
	}
	want := []string{CodeNoCRIU, CodePageSize, CodeArgs, CodeUser, CodeTerminal, CodeMounts}
	if !slices.Equal(codes, want) {
		t.Errorf("got %v, want %v", codes, want)
	}
}

// What a request can change is no matter of the host alone.
func TestGateHost(t *testing.T) {
	m := facts()
	m.Container.LSM = &oci.LSM{Name: "apparmor", Profiles: []string{"web"}}
	h := ThisHost(40101)
	h.Kernel, h.LSM, h.Profiles = "6.12.0", "apparmor", []string{"app"}
	if got := GateHost(&m, h); len(got) > 0 {
		t.Errorf("refused: %v", got)
	}
	h.LSM = "selinux"
	// As annotations tell it: without the profiles.
	m.Container.LSM.Profiles = nil
	if got := GateHost(&m, h); len(got) != 1 || got[0].Code != CodeLSM || !strings.Contains(got[0].Text, "by apparmor and") {
		t.Errorf("got %v", got)
	}
}

func TestThisHost(t *testing.T) {
	h := ThisHost(40101)
	if h.OS != "linux" || h.Architecture == "" || h.Kernel == "" || h.PageSize != os.Getpagesize() || h.CRIU != 40101 {
		t.Errorf("%+v", h)
	}
	if h.CgroupVersion != 1 && h.CgroupVersion != 2 {
		t.Errorf("cgroup version %d", h.CgroupVersion)
	}
	if len(h.CPU.Features) == 0 || !slices.IsSorted(h.CPU.Features) {
		t.Errorf("CPU features %v", h.CPU.Features)
	}
}

func TestCPU(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cpuinfo")
	write(t, path, "processor\t: 0\nvendor_id\t: V\nmodel name\t: A CPU: fast\nflags\t\t: sse4_2 avx2 vmx ibrs pti avx avx2\n\nprocessor\t: 1\nvendor_id\t: W\nflags\t\t: avx512f\n")
	c := cpu(path)
	if c.Vendor != "V" || c.Model != "A CPU: fast" {
		t.Errorf("%+v", c)
	}
	if ThisHost(0).Architecture == "amd64" && !slices.Equal(c.Features, []string{"avx", "avx2", "sse4_2"}) {
		t.Errorf("features %v", c.Features)
	}
	if c := cpu("/does/not/exist"); c.Vendor != "" || c.Features != nil {
		t.Errorf("made up %+v", c)
	}
}

func TestFindCRIU(t *testing.T) {
	dir := t.TempDir()
	script := func(name, body string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
		return path
	}
	t.Setenv("PATH", t.TempDir())
	for _, tt := range []struct {
		name, body string
		version    int
		err        string
	}{
		{"good", `echo "Version: 4.1.1"; echo "GitID: v4.1.1"`, 40101, ""},
		{"two-part", `echo "Version: 4.2"`, 40200, ""},
		{"candidate", `echo "Version: 4.2-rc1"`, 40200, ""},
		{"old", `echo "Version: 3.17.1"`, 31701, ""},
		{"silent", `exit 0`, 0, "no version"},
		{"odd", `echo "Version: new"`, 0, "no version"},
		{"odder", `echo "Version: 4.x"`, 0, "version"},
		{"broken", `echo "libnet.so.9: not found" >&2; exit 127`, 0, "libnet.so.9"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			want := script(tt.name, tt.body)
			t.Setenv("CRAC_CRIU", want)
			path, version, err := FindCRIU()
			if tt.err == "" && (err != nil || path != want || version != tt.version) {
				t.Errorf("got %s, %d, %v", path, version, err)
			}
			if tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err) || version != 0) {
				t.Errorf("got %d, %v; want an error with %q", version, err, tt.err)
			}
		})
	}

	t.Setenv("CRAC_CRIU", filepath.Join(dir, "none"))
	if _, _, err := FindCRIU(); err == nil || !strings.Contains(err.Error(), "CRAC_CRIU") {
		t.Errorf("a CRAC_CRIU that is not there: %v", err)
	}
	t.Setenv("CRAC_CRIU", "")
	if _, _, err := FindCRIU(); err == nil || !strings.Contains(err.Error(), "PATH") {
		t.Errorf("none anywhere: %v", err)
	}
	script("criu", `echo "Version: 5.0"`)
	t.Setenv("PATH", dir)
	if path, version, err := FindCRIU(); err != nil || path != filepath.Join(dir, "criu") || version != 50000 {
		t.Errorf("in PATH: got %s, %d, %v", path, version, err)
	}
}
