package runtime

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/crac-shim/crac/oci/criuimage"
)

func TestOwnTmpfs(t *testing.T) {
	const root = "30 20 0:40 / / rw - overlay overlay rw\n"
	places, binds := []string{"/dev", "/data", "/sys/firmware", "/proc/acpi", "/a b", "/a[b"}, []string{"/bound"}
	for name, tt := range map[string]struct {
		table string
		want  []string
	}{
		"what it was given":    {"31 30 0:50 / /dev rw,nosuid - tmpfs tmpfs rw\n32 30 0:51 / /data rw - tmpfs tmpfs rw\n", []string{"/dev", "/data"}},
		"one at two places":    {"31 30 0:50 / /proc/acpi ro - tmpfs tmpfs ro\n32 30 0:50 / /sys/firmware ro - tmpfs tmpfs ro\n", []string{"/proc/acpi"}},
		"what it has made":     {"31 30 0:50 / /own rw - tmpfs tmpfs rw\n", nil},
		"shared":               {"31 30 0:50 / /dev rw shared:3 - tmpfs tmpfs rw\n", nil},
		"of a master":          {"31 30 0:50 / /dev rw master:3 - tmpfs tmpfs rw\n", nil},
		"a part":               {"31 30 0:50 /sub /dev rw - tmpfs tmpfs rw\n", nil},
		"another file system":  {"31 30 0:50 / /dev rw - devtmpfs dev rw\n", nil},
		"bound elsewhere":      {"31 30 0:50 / /dev rw - tmpfs tmpfs rw\n32 30 0:50 / /bound rw - tmpfs tmpfs rw\n", nil},
		"under another":        {"31 30 0:50 / /dev rw - tmpfs tmpfs rw\n32 31 0:51 / /dev rw - tmpfs tmpfs rw\n", nil},
		"a place with a space": {"31 30 0:50 / /a\\040b rw - tmpfs tmpfs rw\n", nil},
		"a place with more":    {"31 30 0:50 / /a[b rw - tmpfs tmpfs rw\n", nil},
		"not a table":          {"31 30\n", nil},
		"not a device":         {"31 30 x / /dev rw - tmpfs tmpfs rw\n", nil},
	} {
		t.Run(name, func(t *testing.T) {
			var got []string
			for _, m := range ownTmpfs(root+tt.table, places, binds) {
				got = append(got, m.mountpoint)
			}
			if !slices.Equal(got, tt.want) {
				t.Errorf("%q, want %q", got, tt.want)
			}
		})
	}
	if got := ownTmpfs("31 30 259:7 / /dev rw - tmpfs tmpfs rw\n", places, nil); len(got) != 1 || got[0].device != 259<<20|7 || got[0].id != 31 {
		t.Errorf("%+v", got)
	}
}

// A dump is afterwards what CRIU would have written.
func TestCompleteDump(t *testing.T) {
	entry := func(id uint64, key string) []byte {
		e := protowire.AppendVarint(protowire.AppendTag(nil, 2, protowire.VarintType), id)
		e = protowire.AppendString(protowire.AppendTag(e, 6, protowire.BytesType), "/")
		if key != "" {
			e = protowire.AppendString(protowire.AppendTag(e, mountKey, protowire.BytesType), key)
		}
		return e
	}
	table := func(entries ...[]byte) []byte { return criuimage.New(criuimage.Mountpoints, entries...) }
	dir := t.TempDir()
	name := filepath.Join(dir, "mountpoints-7.img")
	if err := os.WriteFile(name, table(entry(1, ""), entry(2, "/etc/hosts"), entry(3, "crac-packed-50")), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := (&tmpfsPack{mounts: []packedTmpfs{{tmpfsMount: tmpfsMount{device: 50}, archive: []byte("archive")}}}).addTo(dir); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(name); err != nil || !bytes.Equal(got, table(entry(1, ""), entry(2, "/etc/hosts"), entry(3, ""))) {
		t.Errorf("%q, %v", got, err)
	}
	if got, err := os.ReadFile(filepath.Join(dir, "tmpfs-dev-50.tar.gz.img")); err != nil || string(got) != "archive" {
		t.Errorf("%q, %v", got, err)
	}
	for _, damaged := range [][]byte{nil, []byte("magic12"), []byte("magic123\xff"), []byte("magic123\xff\xff\xff\xff"), append([]byte("magic123"), 1, 0, 0, 0, 0xff)} {
		if _, err := withoutKeys(damaged); err == nil {
			t.Errorf("%q is a table", damaged)
		}
	}
}

func TestPackTmpfs(t *testing.T) {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	pack := func(t *testing.T, table []byte) *tmpfsPack {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "file"), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		tree, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		p := &tmpfsPack{pid: os.Getpid(), table: table, mounts: []packedTmpfs{{tmpfsMount: tmpfsMount{device: 50, mountpoint: "/x"}, tree: tree}}}
		t.Cleanup(p.close)
		return p
	}
	p := pack(t, table)
	if err := p.pack(); err != nil || len(p.mounts[0].archive) == 0 {
		t.Errorf("%d bytes, %v", len(p.mounts[0].archive), err)
	}
	if err := pack(t, append([]byte("1 1 0:1 / /new rw - tmpfs tmpfs rw\n"), table...)).pack(); !errors.Is(err, errTmpfsChanged) {
		t.Errorf("another mount table: %v", err)
	}
	p = pack(t, table)
	if err := os.Truncate(fmt.Sprintf("/proc/self/fd/%d/file", p.mounts[0].tree), 1<<20); err != nil {
		t.Fatal(err)
	}
	if err := p.pack(); !errors.Is(err, errTmpfsChanged) || !strings.Contains(err.Error(), "/x") {
		t.Errorf("a file with a hole: %v", err)
	}
	var none *tmpfsPack
	none.close()
	if err := errors.Join(none.pack(), none.addTo("/nonexistent"), (&tmpfsPack{}).pack()); err != nil {
		t.Errorf("nothing to pack: %v", err)
	}
}
