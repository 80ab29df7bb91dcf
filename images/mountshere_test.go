package images

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// mounted is a mnt_entry.
func mounted(fstype, id, parent uint64, root, at string) message {
	return message{}.num(1, fstype).num(2, id).num(3, 1).num(4, parent).num(5, 0).str(6, root).str(7, at)
}

// tablesHere are the tables that are to be read instead of those of a dump.
func tablesHere(t testing.TB, dir string, has func(string) bool, shared bool) (map[string][]byte, error) {
	t.Helper()
	m, err := openedDump(t, dir).mountsHere(has, shared)
	if err != nil {
		return nil, err
	}
	return m.Images(), nil
}

func TestMountsHere(t *testing.T) {
	table := []message{
		mounted(fsOverlay, 1, 0, "/", "/"),
		mounted(fsProc, 2, 1, "/", "/proc"),
		mounted(fsSysfs, 3, 1, "/", "/sys"),
	}
	for name, tt := range map[string]struct {
		mount message
		stays bool
	}{
		"read-only, and there":         {mounted(fsProc, 9, 2, "/sys", "/proc/sys"), true},
		"read-only, and not there":     {mounted(fsProc, 9, 2, "/sysrq-trigger", "/proc/sysrq-trigger"), false},
		"hidden, and not there":        {mounted(fsTmpfs, 9, 2, "/null", "/proc/kcore"), false},
		"a directory that is not":      {mounted(fsTmpfs, 9, 3, "/", "/sys/devices/virtual/powercap"), false},
		"a directory that is":          {mounted(fsTmpfs, 9, 3, "/", "/sys/firmware"), true},
		"of a process":                 {mounted(fsTmpfs, 9, 2, "/", "/proc/17/fd"), true},
		"of itself":                    {mounted(fsTmpfs, 9, 2, "/", "/proc/self/net"), true},
		"over all of it":               {mounted(fsTmpfs, 9, 2, "/", "/proc"), true},
		"elsewhere":                    {mounted(fsTmpfs, 9, 1, "/", "/data"), true},
		"on something else in between": {mounted(fsTmpfs, 9, 1, "/", "/proc/kcore"), true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			all := append(slices.Clone(table), tt.mount)
			write(t, filepath.Join(dir, "mountpoints-7.img"), mountImage(all...))
			has := func(p string) bool { return p == "/proc/sys" || p == "/sys/firmware" }
			got, err := tablesHere(t, dir, has, true)
			if err != nil {
				t.Fatal(err)
			}
			want := map[string][]byte{"mountpoints-7.img": []byte(mountImage(table...))}
			if tt.stays {
				delete(want, "mountpoints-7.img")
			}
			if len(got) != len(want) || string(got["mountpoints-7.img"]) != string(want["mountpoints-7.img"]) {
				t.Errorf("got %q\nwant %q", got, want)
			}
		})
	}
}

// What something is mounted on has to stay.
func TestMountsHereKeepsParents(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "mountpoints-7.img"), mountImage(
		mounted(fsProc, 2, 1, "/", "/proc"), mounted(fsTmpfs, 3, 2, "/", "/proc/gone"), mounted(fsTmpfs, 4, 3, "/", "/proc/gone/below"),
	))
	if got, err := tablesHere(t, dir, func(string) bool { return false }, true); err != nil || len(got) > 0 {
		t.Errorf("%q, %v", got, err)
	}
}

// What came from the host receives mounts only where the host shares some.
func TestMountsHereSharing(t *testing.T) {
	dir := t.TempDir()
	inside, outside := mounted(fsTmpfs, 2, 1, "/", "/a").num(11, 5), mounted(fsTmpfs, 3, 1, "/", "/b")
	write(t, filepath.Join(dir, "mountpoints-7.img"), mountImage(inside, outside.num(11, 6).str(18, "/b")))
	all := func(string) bool { return true }
	if got, err := tablesHere(t, dir, all, true); err != nil || len(got) > 0 {
		t.Errorf("%q, %v", got, err)
	}
	got, err := tablesHere(t, dir, all, false)
	if want := mountImage(inside, outside.str(18, "/b")); err != nil || string(got["mountpoints-7.img"]) != want {
		t.Errorf("got %q, %v\nwant %q", got, err, want)
	}
}

func TestMountsHereOfRealDumps(t *testing.T) {
	for _, name := range []string{"plain", "nerdctl"} {
		dir := filepath.Join("testdata/dumps", name)
		if got, err := tablesHere(t, dir, func(string) bool { return true }, true); err != nil || len(got) > 0 {
			t.Errorf("%s: %d tables changed, %v", name, len(got), err)
		}
		got, err := tablesHere(t, dir, func(string) bool { return false }, true)
		if err != nil || len(got) != 1 {
			t.Errorf("%s: %d tables changed, %v", name, len(got), err)
		}
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "mountpoints-1.img"), []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := tablesHere(t, dir, func(string) bool { return true }, true); !errors.Is(err, ErrDamaged) {
		t.Errorf("nonsense gives %v", err)
	}
}
