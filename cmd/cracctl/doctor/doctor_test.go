package doctor

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/oci"
)

func TestTable(t *testing.T) {
	checks := []Check{{"kernel", OK, "6.12", ""}, {"soft-dirty", Warn, "not there", "use another kernel"}, {"CRIU", Fail, "none", "install it"}}
	for _, tt := range []struct {
		n    int
		want string
	}{
		{1, "ok    kernel  6.12\n\nThis host can checkpoint and restore.\n"},
		{2, "ok    kernel      6.12\nwarn  soft-dirty  not there\n                  → use another kernel\n\nThis host can checkpoint and restore, within the limits marked warn.\n"},
		{3, "ok    kernel      6.12\nwarn  soft-dirty  not there\n                  → use another kernel\nfail  CRIU        none\n                  → install it\n\nThis host cannot restore checkpoints: see what is marked fail.\n"},
	} {
		var out bytes.Buffer
		if err := (Report{OK: tt.n < 3, Checks: checks[:tt.n]}).Table(&out); err != nil {
			t.Fatal(err)
		}
		if out.String() != tt.want {
			t.Errorf("got\n%s\nwant\n%s", out.String(), tt.want)
		}
	}
}

func TestRun(t *testing.T) {
	r := Run(t.Context(), Options{Address: filepath.Join(t.TempDir(), "none.sock")})
	failed := false
	seen := make(map[string]bool)
	for _, c := range r.Checks {
		if c.Name == "" || c.Found == "" || c.Status != OK && c.Status != Warn && c.Status != Fail {
			t.Errorf("incomplete: %+v", c)
		}
		if seen[c.Name] {
			t.Errorf("%s is there twice", c.Name)
		}
		seen[c.Name] = true
		failed = failed || c.Status == Fail
	}
	if r.OK == failed {
		t.Errorf("OK is %v, and there is a failed check: %v", r.OK, failed)
	}
	for _, name := range []string{"privileges", "kernel", "CRIU", "cgroups", "overlayfs", "userfaultfd", "containerd", "shim"} {
		if !seen[name] {
			t.Errorf("no check of %s", name)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(os.TempDir(), "cracctl-doctor-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestCRIU(t *testing.T) {
	criu := filepath.Join(t.TempDir(), "criu")
	t.Setenv("CRAC_CRIU", criu)
	for _, tt := range []struct {
		name, body string
		want       map[string]Status
		says       string
	}{
		{"too old", `echo "Version: 3.17.1"`, map[string]Status{"CRIU": Fail}, "4."},
		{"kernel lacks something", `[ "$1" = check ] && { echo "Error: no compel"; exit 1; }; echo "Version: 4.2"`, map[string]Status{"CRIU": OK, "criu check": Fail}, "no compel"},
		{"no soft-dirty", `[ "$2" = --feature ] && exit 1; echo "Version: 4.2"`, map[string]Status{"CRIU": OK, "criu check": OK, "soft-dirty": Warn}, "changed memory"},
		{"all there", `echo "Version: 4.2"`, map[string]Status{"CRIU": OK, "criu check": OK, "soft-dirty": OK}, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := os.WriteFile(criu, []byte("#!/bin/sh\n"+tt.body+"\n"), 0o700); err != nil {
				t.Fatal(err)
			}
			p := &prober{}
			var text string
			got := make(map[string]Status)
			for _, c := range p.criu(t.Context()) {
				got[c.Name] = c.Status
				text += c.Found + c.Fix
			}
			if len(got) != len(tt.want) || !strings.Contains(text, tt.says) {
				t.Errorf("got %v: %s", got, text)
			}
			for name, status := range tt.want {
				if got[name] != status {
					t.Errorf("%s: got %s, want %s", name, got[name], status)
				}
			}
		})
	}
}

func TestShim(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	put := func(name, body string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\n"+body+"\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	status := func() (all []Status) {
		p := &prober{}
		for _, c := range p.shim(t.Context()) {
			all = append(all, c.Status)
		}
		return all
	}
	put(shimName, "echo libseccomp.so.2 is missing >&2; exit 127")
	if got := status(); got[0] != Fail {
		t.Errorf("a shim that does not run: %v", got)
	}
	put(shimName, "exit 0")
	put("cracctl", "exit 0")
	if got := status(); !slices.Equal(got, []Status{OK, Warn, OK}) {
		t.Errorf("shim and cracctl, and no Java library: %v", got)
	}
	put("crac.jar", "")
	if got := status(); !slices.Equal(got, []Status{OK, OK, OK}) {
		t.Errorf("all of it: %v", got)
	}
	if err := os.Remove(filepath.Join(dir, "cracctl")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	if got := status(); !slices.Equal(got, []Status{OK, OK, Warn}) {
		t.Errorf("no cracctl: %v", got)
	}
}

// What a shim has from containerd's environment counts where this process has nothing of its own.
func TestAsShim(t *testing.T) {
	t.Setenv("PATH", "/here")
	t.Setenv(images.CRIUEnv, "/own/criu")
	t.Setenv(oci.PolicyEnv, "")
	daemon := exec.Command("/bin/sleep", "1000")
	daemon.Env = []string{"PATH=/there", images.CRIUEnv + "=/its/criu", oci.PolicyEnv + "=/its/policy.json"}
	if err := daemon.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = daemon.Process.Kill()
		_ = daemon.Wait()
	})
	AsShim(daemon.Process.Pid)
	for name, want := range map[string]string{"PATH": "/here:/there", images.CRIUEnv: "/own/criu", oci.PolicyEnv: "/its/policy.json"} {
		if got := os.Getenv(name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	_ = daemon.Process.Kill()
	_ = daemon.Wait()
	AsShim(daemon.Process.Pid) // there is nothing to see
	if got := os.Getenv("PATH"); got != "/here:/there" {
		t.Errorf("PATH is %q", got)
	}
}
