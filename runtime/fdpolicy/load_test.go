package fdpolicy

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/oci"
)

func TestLoad(t *testing.T) {
	outside := t.TempDir()
	root := filepath.Join(outside, "rootfs")
	write := func(path, text string) {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	rule := func(port string) string { return "type: socket\nremotePort: " + port + "\naction: close\n" }
	write(filepath.Join(outside, "policy"), rule("666"))
	write(filepath.Join(root, "policy"), rule("1"))
	write(filepath.Join(root, "etc/policy"), rule("2"))
	write(filepath.Join(root, "bad"), "type: file\naction: shut\n")
	write(filepath.Join(root, "large"), strings.Repeat("#", oci.MaxFDPolicy+100))
	for link, to := range map[string]string{"absolute": "/policy", "climbs": "../../../../policy", "magic": "/proc/self/fd/0", "loop": "loop"} {
		if err := os.Symlink(to, filepath.Join(root, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := unix.Mkfifo(filepath.Join(root, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ option, port, says string }{
		{"", "", ""},
		{rule("3"), "3", ""},
		{"file:/etc/policy", "2", ""},
		{"file:/absolute", "1", ""}, // links of the image stay in the image
		{"file:/climbs", "1", ""},
		{"file:/none", "", "no such file"},
		{"file:/fifo", "", "no regular file"},
		{"file:/etc", "", "no regular file"},
		{"file:/magic", "", ""},
		{"file:/loop", "", "too many"},
		{"file:/large", "", "at most 65536"},
		{"file:/bad", "", "/bad of the image: line 2 (rule 1): unknown action"},
		{"type: file", "", "no action"},
	} {
		p, err := Load(tt.option, root)
		if tt.port == "" && tt.option != "" {
			if err == nil || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("%q: %v", tt.option, err)
			}
			continue
		}
		if err != nil {
			t.Errorf("%q: %v", tt.option, err)
		} else if tt.option == "" != (len(p.Rules) == 0) || tt.option != "" && p.Rules[0].RemotePort != tt.port {
			t.Errorf("%q: %v", tt.option, p)
		}
	}
}

// A lease, which makes an open wait for up to 45 s, holds nobody.
func TestLoadWithALease(t *testing.T) {
	root := t.TempDir()
	held, err := os.Create(filepath.Join(root, "policy"))
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	if _, err := unix.FcntlInt(held.Fd(), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
		t.Skipf("this file system has no leases: %v", err)
	}
	loaded := make(chan error, 1)
	go func() {
		_, err := Load("file:/policy", root)
		loaded <- err
	}()
	select {
	case err := <-loaded:
		if err == nil || !strings.Contains(err.Error(), "holds a lease") {
			t.Errorf("got %v", err)
		}
	case <-time.After(20 * time.Second):
		t.Error("it waits")
	}
}
