package images

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/oci/criuimage"
)

// ofTmpfs is the mnt_entry of a tmpfs that has a superblock of its own.
func ofTmpfs(id, device uint64, root, at, options string) message {
	return message{}.num(1, fsTmpfs).num(2, id).num(3, device).num(4, 1).num(5, unix.MS_NOSUID).str(6, root).str(7, at).str(8, "src").str(9, options)
}

// mountsOf are those of a dump on a host that lacks nothing.
func mountsOf(t testing.TB, dir string) *Mounts {
	t.Helper()
	m, err := openedDump(t, dir).mountsHere(func(string) bool { return true }, true)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestSmallTmpfs(t *testing.T) {
	plain := slices.Clip(ofTmpfs(9, 50, "/", "/data", "size=64k,mode=755"))
	for name, tt := range map[string]struct {
		mounts []message
		keys   []string
	}{
		"as most are":               {[]message{plain.num(17, 0)}, []string{"crac-tmpfs-9"}},
		"read-only":                 {[]message{plain.num(17, unix.MS_RDONLY)}, []string{"crac-tmpfs-9"}},
		"no options":                {[]message{ofTmpfs(9, 50, "/", "/data", "").num(17, 0)}, []string{"crac-tmpfs-9"}},
		"at two places":             {[]message{plain.num(17, 0), ofTmpfs(10, 50, "/", "/more", "size=64k,mode=755").num(17, 0)}, []string{"crac-tmpfs-9"}},
		"two":                       {[]message{plain.num(17, 0), ofTmpfs(10, 51, "/", "/more", "").num(17, 0)}, []string{"crac-tmpfs-9", "crac-tmpfs-10"}},
		"no archive":                {[]message{ofTmpfs(9, 52, "/", "/data", "").num(17, 0)}, nil},
		"a large archive":           {[]message{ofTmpfs(9, 53, "/", "/data", "").num(17, 0)}, nil},
		"an empty archive":          {[]message{ofTmpfs(9, 54, "/", "/data", "").num(17, 0)}, nil},
		"an archive that is a link": {[]message{ofTmpfs(9, 55, "/", "/data", "").num(17, 0)}, nil},
		"a part":                    {[]message{ofTmpfs(9, 50, "/sub", "/data", "").num(17, 0)}, nil},
		"from outside":              {[]message{plain.num(17, 0).str(18, "/data")}, nil},
		"from outside, long ago":    {[]message{plain.num(17, 0).num(13, 1)}, nil},
		"under one of our keys":     {[]message{plain.num(17, 0), ofTmpfs(10, 51, "/", "/more", "").num(17, 0).str(18, "crac-tmpfs-9")}, nil},
		"other options":             {[]message{ofTmpfs(9, 50, "/", "/data", "size=64k,mpol=bind:0").num(17, 0)}, nil},
		"an empty option":           {[]message{ofTmpfs(9, 50, "/", "/data", "size=64k,").num(17, 0)}, nil},
		"other flags":               {[]message{plain.num(17, unix.MS_SYNCHRONOUS)}, nil},
		"flags of both in one":      {[]message{plain}, nil},
		"shared":                    {[]message{plain.num(17, 0).num(10, 3)}, nil},
		"of a master":               {[]message{plain.num(17, 0).num(11, 3)}, nil},
		"of a plugin":               {[]message{plain.num(17, 0).num(12, 1)}, nil},
		"deleted":                   {[]message{plain.num(17, 0).num(16, 1)}, nil},
		"another file system":       {[]message{mounted(fsProc, 9, 1, "/", "/data").num(17, 0)}, nil},
		"by another name":           {[]message{plain.num(17, 0).str(14, "tmpfs")}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			for device, data := range map[int]string{50: "of 50", 51: "of 51", 53: strings.Repeat("x", maxTmpfsArchive+1), 54: ""} {
				write(t, filepath.Join(dir, fmt.Sprintf("tmpfs-dev-%d.tar.gz.img", device)), data)
			}
			if err := os.Symlink("tmpfs-dev-50.tar.gz.img", filepath.Join(dir, "tmpfs-dev-55.tar.gz.img")); err != nil {
				t.Fatal(err)
			}
			root := mounted(fsOverlay, 1, 0, "/", "/")
			write(t, filepath.Join(dir, "mountpoints-7.img"), mountImage(append([]message{root}, tt.mounts...)...))
			mounts := mountsOf(t, dir)
			found := mounts.SmallTmpfs()
			var keys []string
			for _, f := range found {
				keys = append(keys, f.Key)
			}
			if !slices.Equal(keys, tt.keys) {
				t.Fatalf("%q, want %q", keys, tt.keys)
			}
			if len(found) > 0 && (string(found[0].Archive) != "of 50" || found[0].Source != "src" || found[0].ReadOnly != (name == "read-only")) {
				t.Errorf("%+v", found[0])
			}

			mounts.MadeBefore(keys)
			changed := mounts.Images()
			if len(keys) == 0 {
				if len(changed) > 0 {
					t.Errorf("changed %q", changed)
				}
				return
			}
			want := slices.Clone(tt.mounts)
			for i, m := range want[:len(keys)] {
				want[i] = slices.Clip(m).str(18, keys[i])
			}
			if got := string(changed["mountpoints-7.img"]); got != mountImage(append([]message{root}, want...)...) {
				t.Errorf("changed to %q", got)
			}
			// They are no longer to be made before, once that has been said.
			write(t, filepath.Join(dir, "mountpoints-7.img"), string(changed["mountpoints-7.img"]))
			if again := mountsOf(t, dir).SmallTmpfs(); len(again) > 0 {
				t.Errorf("%+v", again)
			}
		})
	}
}

// A process with mounts of its own may have the same tmpfs.
func TestSmallTmpfsOfTwoTables(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "tmpfs-dev-50.tar.gz.img"), "of 50")
	for _, name := range []string{"mountpoints-7.img", "mountpoints-8.img"} {
		write(t, filepath.Join(dir, name), mountImage(mounted(fsOverlay, 1, 0, "/", "/"), ofTmpfs(9, 50, "/", "/data", "").num(17, 0)))
	}
	if found := mountsOf(t, dir).SmallTmpfs(); len(found) > 0 {
		t.Errorf("%+v", found)
	}
}

// FuzzMountTables: whatever a table says, it is damaged, or what takes its place can be read, and
// has our keys at tmpfs mounts and nowhere else.
func FuzzMountTables(f *testing.F) {
	f.Add([]byte(mountImage(mounted(fsOverlay, 1, 0, "/", "/"), ofTmpfs(9, 50, "/", "/data", "size=64k").num(17, 0))), true)
	names, err := filepath.Glob(filepath.Join("testdata", "dumps", "*", "mountpoints-*.img"))
	if err != nil || len(names) == 0 {
		f.Fatalf("no tables: %v", err)
	}
	for _, name := range names {
		data, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, false)
	}
	f.Fuzz(func(t *testing.T, data []byte, shared bool) {
		dir := t.TempDir()
		write(t, filepath.Join(dir, "mountpoints-1.img"), string(data))
		// Any device has an archive: the table says which.
		if messages, err := criuimage.Split(data, criuimage.Mountpoints, maxMessages); err == nil {
			for _, message := range messages {
				if m, err := parseMount(message); err == nil {
					write(t, filepath.Join(dir, fmt.Sprintf("tmpfs-dev-%d.tar.gz.img", m.device)), "an archive")
				}
			}
		}
		mounts, err := openedDump(t, dir).mountsHere(func(path string) bool { return len(path)%2 == 0 }, shared)
		if err != nil {
			if !errors.Is(err, ErrDamaged) {
				t.Errorf("%v is not ErrDamaged", err)
			}
			return
		}
		var keys []string
		for _, tmpfs := range mounts.SmallTmpfs() {
			keys = append(keys, tmpfs.Key)
		}
		mounts.MadeBefore(keys)
		for name, table := range mounts.Images() {
			messages, err := criuimage.Split(table, criuimage.Mountpoints, maxMessages)
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			for _, message := range messages {
				m, err := parseMount(message)
				if err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				if slices.Contains(keys, m.by) && m.fstype != fsTmpfs {
					t.Errorf("%+v has one of our keys", m)
				}
			}
		}
	})
}
