package tmpfs

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

const most = 1 << 20

func needRoot(tb testing.TB) {
	tb.Helper()
	if os.Getuid() != 0 {
		tb.Skip("only root can give files to others and make devices")
	}
}

// entry is one of an archive; its contents are as many bytes as the header says.
type entry = tar.Header

func archive(tb testing.TB, entries ...entry) []byte {
	tb.Helper()
	var out bytes.Buffer
	zipped := gzip.NewWriter(&out)
	w := tar.NewWriter(zipped)
	for _, h := range entries {
		if err := w.WriteHeader(&h); err != nil {
			tb.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := w.Write(bytes.Repeat([]byte("x"), int(h.Size))); err != nil {
				tb.Fatal(err)
			}
		}
	}
	for _, c := range []interface{ Close() error }{w, zipped} {
		if err := c.Close(); err != nil {
			tb.Fatal(err)
		}
	}
	return out.Bytes()
}

func unpack(tb testing.TB, data []byte, dir string) (int64, error) {
	tb.Helper()
	d, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		tb.Fatal(err)
	}
	defer d.Close()
	return Unpack(int(d.Fd()), bytes.NewReader(data), most)
}

// tree says of each file below dir what an archive can say of it.
func tree(tb testing.TB, dir string) (lines []string) {
	tb.Helper()
	names := map[uint64]string{} // by the inodes
	err := filepath.WalkDir(dir, func(p string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(p, &st); err != nil {
			return err
		}
		name, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		line := fmt.Sprintf("%s %o %d:%d %d %d", name, st.Mode, st.Uid, st.Gid, st.Rdev, st.Mtim.Sec)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			data, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" %d bytes %d blocks %x", st.Size, st.Blocks, data[max(0, len(data)-8):])
		case unix.S_IFLNK:
			to, err := os.Readlink(p)
			if err != nil {
				return err
			}
			line += " -> " + to
		}
		if st.Nlink > 1 && st.Mode&unix.S_IFMT != unix.S_IFDIR {
			if names[st.Ino] == "" {
				names[st.Ino] = name
			}
			line += " is " + names[st.Ino]
		}
		lines = append(lines, line)
		return nil
	})
	if err != nil {
		tb.Fatal(err)
	}
	return lines
}

// onTmpfs is an empty tmpfs.
func onTmpfs(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
		t.Skipf("mount a tmpfs: %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

const makeTree = `set -e
mkdir -p dir/deep sticky; chmod 1777 sticky; chmod 2750 dir/deep; chown 12:34 dir
echo text >dir/file; chown 5:6 dir/file; chmod 4711 dir/file
ln dir/file hard; ln -s dir/file soft; chown -h 7:8 soft; ln -s /nowhere dangling
mkfifo pipe; chmod 640 pipe; mknod null c 1 3; mknod block b 7 300
: >empty; echo secret >none; chmod 000 none; mkdir shut; echo in >shut/it; chmod 000 shut
printf x | dd of=sparse bs=4096 seek=20 2>/dev/null; truncate -s 200000 sparse
truncate -s 5000 hole; head -c 9000 /dev/zero >zero
echo 'odd name' >'a b*c\n'; echo v >-v
long=$(printf '%0120d' 0); mkdir $long; echo deep >$long/$long; ln -s $long/$long/$long/$long longlink; ln $long/$long zlong
touch -d '2001-02-03 04:05:06' dir/file dir sticky
touch -h -d '1901-02-03 04:05:06' soft
chown 1:2 .; chmod 1751 .; touch -d '2002-02-03 04:05:06.5' .
`

// What tar packs as CRIU calls it, comes out as it was, and as tar unpacks it.
func TestUnpackWhatTarPacks(t *testing.T) {
	needRoot(t)
	from, to, other := onTmpfs(t), onTmpfs(t), onTmpfs(t)
	run := func(name string, args ...string) []byte {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Dir = from
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%v: %v", cmd.Args, err)
		}
		return out
	}
	run("bash", "-c", makeTree)
	data := run("tar", "--create", "--gzip", "--no-unquote", "--no-wildcards", "--one-file-system", "--check-links",
		"--preserve-permissions", "--sparse", "--numeric-owner", "--directory", from, ".")
	if _, err := unpack(t, data, to); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("tar", "--extract", "--gzip", "--no-unquote", "--no-wildcards", "--directory", other)
	cmd.Stdin = bytes.NewReader(data)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	want, got := tree(t, other), tree(t, to)
	if !slices.Equal(got, want) {
		t.Errorf("unpacked\n%s\nby tar\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if want := tree(t, from); !slices.Equal(got, want) {
		t.Errorf("unpacked\n%s\npacked\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// What Pack packs, tar unpacks as it was, and so does Unpack.
func TestPack(t *testing.T) {
	needRoot(t)
	from := onTmpfs(t)
	cmd := exec.Command("bash", "-c", strings.ReplaceAll(strings.ReplaceAll(makeTree, "truncate -s 200000 sparse", "rm sparse"), "truncate -s 5000 hole;", ""))
	cmd.Dir = from
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	d, err := os.OpenFile(from, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	data, err := Pack(int(d.Fd()), most)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := Pack(int(d.Fd()), most); err != nil || !bytes.Equal(again, data) {
		t.Errorf("packed again it is another archive: %v", err)
	}
	want := tree(t, from)
	to := onTmpfs(t)
	if _, err := unpack(t, data, to); err != nil {
		t.Fatal(err)
	}
	if got := tree(t, to); !slices.Equal(got, want) {
		t.Errorf("unpacked\n%s\npacked\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	other := onTmpfs(t)
	cmd = exec.Command("tar", "--extract", "--gzip", "--no-unquote", "--no-wildcards", "--directory", other)
	cmd.Stdin = bytes.NewReader(data)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if got := tree(t, other); !slices.Equal(got, want) {
		t.Errorf("by tar\n%s\npacked\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if _, err := Pack(int(d.Fd()), 100); err == nil {
		t.Error("more than may be was packed")
	}
	if err := os.Truncate(filepath.Join(from, "empty"), 5000); err != nil {
		t.Fatal(err)
	}
	if _, err := Pack(int(d.Fd()), most); err == nil {
		t.Error("a hole was packed")
	}
}

func TestUnpackRefuses(t *testing.T) {
	needRoot(t)
	dir := entry{Name: "./d/", Typeflag: tar.TypeDir, Mode: 0o755}
	file := func(name string) entry { return entry{Name: name, Typeflag: tar.TypeReg, Mode: 0o644, Size: 5} }
	symlink := func(name, to string) entry { return entry{Name: name, Linkname: to, Typeflag: tar.TypeSymlink} }
	link := func(name, to string) entry { return entry{Name: name, Linkname: to, Typeflag: tar.TypeLink} }
	many := make([]entry, maxEntries+1)
	for i := range many {
		many[i] = entry{Name: fmt.Sprintf("./%d", i), Typeflag: tar.TypeFifo}
	}
	good := archive(t, dir, file("./d/f"))
	for name, tt := range map[string]struct {
		data []byte
		ok   bool
	}{
		"nothing unusual":            {good, true},
		"links to anywhere":          {archive(t, symlink("./l", "../../outside"), file("./f"), link("./g", "./f"), link("./m", "./l")), true},
		"an absolute name":           {archive(t, file("/f")), false},
		"a name of no directory":     {archive(t, file("f")), false},
		"a name above":               {archive(t, file("./../f")), false},
		"a name above, inside":       {archive(t, dir, file("./d/../../f")), false},
		"a name through itself":      {archive(t, dir, file("./d/./f")), false},
		"an empty name":              {archive(t, entry{Name: ".//", Typeflag: tar.TypeDir}), false},
		"a root that is a file":      {archive(t, file(".")), false},
		"through a link":             {archive(t, symlink("./l", ".."), file("./l/f")), false},
		"through a link, inside":     {archive(t, dir, symlink("./l", "d"), file("./l/f")), false},
		"onto a link":                {archive(t, symlink("./l", "../f"), file("./l")), false},
		"onto a file":                {archive(t, file("./f"), file("./f")), false},
		"a directory twice":          {archive(t, dir, dir), false},
		"below a file":               {archive(t, file("./f"), file("./f/g")), false},
		"below nothing":              {archive(t, file("./d/f")), false},
		"a link to above":            {archive(t, link("./g", "../outside")), false},
		"a link to outside":          {archive(t, link("./g", "/etc/passwd")), false},
		"a link through a link":      {archive(t, symlink("./l", ".."), link("./g", "./l/outside")), false},
		"a link to a directory":      {archive(t, dir, link("./g", "./d")), false},
		"attributes":                 {archive(t, entry{Name: "./f", Typeflag: tar.TypeReg, PAXRecords: map[string]string{"SCHILY.xattr.security.capability": "x"}}), false},
		"exact times":                {archive(t, entry{Name: "./f", Typeflag: tar.TypeReg, Format: tar.FormatPAX, ModTime: time.Unix(1, 2)}), true},
		"an odd type":                {archive(t, entry{Name: "./f", Typeflag: 'Z'}), false},
		"an owner that is nobody":    {archive(t, entry{Name: "./f", Typeflag: tar.TypeReg, Uid: 1<<32 - 1}), false},
		"as much as may be":          {archive(t, entry{Name: "./f", Typeflag: tar.TypeReg, Size: most}), true},
		"too much":                   {archive(t, entry{Name: "./f", Typeflag: tar.TypeReg, Size: most + 1}), false},
		"too much together":          {archive(t, file("./f"), entry{Name: "./g", Typeflag: tar.TypeReg, Size: most - 4}), false},
		"too many":                   {archive(t, many...), false},
		"as many as may be":          {archive(t, many[1:]...), true},
		"cut off":                    {good[:len(good)-20], false},
		"another checksum":           {append(good[:len(good)-8:len(good)-8], 1, 2, 3, 4, 5, 6, 7, 8), false},
		"followed by something else": {append(slices.Clip(good), "something else"...), false},
		"endless":                    {endless(t, good), false},
		"no archive":                 {[]byte("not one at all"), false},
		"empty":                      {nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			above := t.TempDir()
			in := filepath.Join(above, "in")
			if err := os.Mkdir(in, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(above, "outside"), []byte("outside"), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := unpack(t, tt.data, in); (err == nil) != tt.ok {
				t.Errorf("%v; files: %q", err, tree(t, in))
			}
			outside(t, above)
		})
	}
}

// endless is an archive with sixteen megabytes of zeroes at its end.
func endless(t *testing.T, data []byte) []byte {
	t.Helper()
	out := bytes.NewBuffer(slices.Clone(data))
	zipped := gzip.NewWriter(out)
	zero := make([]byte, 1<<20)
	for range 16 {
		if _, err := zipped.Write(zero); err != nil {
			t.Fatal(err)
		}
	}
	if err := zipped.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

// outside fails the test unless nothing but in has changed above it.
func outside(tb testing.TB, above string) {
	tb.Helper()
	entries, err := os.ReadDir(above)
	if err != nil {
		tb.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(above, "outside"))
	if len(entries) != 2 || string(data) != "outside" || err != nil {
		tb.Errorf("outside: %v, %q, %v", entries, data, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(above, "outside"), &st); err != nil || st.Nlink != 1 || st.Mode&0o7777 != 0o600 || st.Uid != 0 {
		tb.Errorf("outside: %+v, %v", st, err)
	}
}

func FuzzUnpack(f *testing.F) {
	needRoot(f)
	f.Add([]byte{})
	f.Add(archive(f, entry{Name: "./", Typeflag: tar.TypeDir, Mode: 0o1777}, entry{Name: "./d/", Typeflag: tar.TypeDir, Mode: 0o755},
		entry{Name: "./d/f", Typeflag: tar.TypeReg, Size: 5}, entry{Name: "./g", Linkname: "./d/f", Typeflag: tar.TypeLink}))
	f.Add(archive(f, entry{Name: "./l", Linkname: "..", Typeflag: tar.TypeSymlink}, entry{Name: "./l/f", Typeflag: tar.TypeReg, Size: 5},
		entry{Name: "./n", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}))
	// Most of what a fuzzer makes of compressed bytes is none: it gets them as they are.
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) == 0 || data[0] != 0x1f {
			var out bytes.Buffer
			zipped := gzip.NewWriter(&out)
			if _, err := zipped.Write(data); err != nil {
				t.Fatal(err)
			}
			if err := zipped.Close(); err != nil {
				t.Fatal(err)
			}
			data = out.Bytes()
		}
		above := t.TempDir()
		in := filepath.Join(above, "in")
		if err := os.Mkdir(in, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(above, "outside"), []byte("outside"), 0o600); err != nil {
			t.Fatal(err)
		}
		size, err := unpack(t, data, in)
		if err == nil && (size < 0 || size > most) {
			t.Errorf("%d bytes", size)
		}
		outside(t, above)
	})
}
