package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	metadata "github.com/checkpoint-restore/checkpointctl/lib"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

func packed(t testing.TB, how string, data []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	switch how {
	case "gzip":
		z := gzip.NewWriter(&buf)
		if _, err := z.Write(data); err != nil {
			t.Fatal(err)
		}
		if err := z.Close(); err != nil {
			t.Fatal(err)
		}
	case "zstd":
		z, err := zstd.NewWriter(&buf)
		if err != nil {
			t.Fatal(err)
		}
		return z.EncodeAll(data, nil)
	default:
		return data
	}
	return buf.Bytes()
}

// podmanArchive is what an archive of podman's begins with.
func podmanArchive(t testing.TB, more ...entry) []byte {
	t.Helper()
	return tarOf(t, append([]entry{
		{name: "config.dump", data: `{"id":"abc","rootfsImageName":"docker.io/x:1","checkpointedTime":"2026-01-02T03:04:05Z"}`},
		{name: "./spec.dump", data: `{"annotations":{"io.container.manager":"libpod"},"process":{"args":["app"]}}`},
		{name: "checkpoint/", kind: tar.TypeDir},
		{name: "checkpoint/inventory.img", data: "i"},
		{name: "checkpoint/dump.log", data: "not taken"},
		{name: "ctr.log", data: "not taken"},
		{name: "volumes/data.tar", data: "not taken"},
	}, more...)...)
}

func TestArchive(t *testing.T) {
	for _, how := range []string{"", "gzip", "zstd"} {
		dir := t.TempDir()
		file := filepath.Join(t.TempDir(), "a")
		put(t, filepath.Dir(file), "a", packed(t, how, podmanArchive(t, entry{name: "deleted.files", data: `["/bin/vi"]`}, entry{name: "rootfs-diff.tar", data: string(tarOf(t, entry{name: "n", data: "1"}))})))
		s, err := unpackArchive(t.Context(), file, dir, 0, silent)
		if err != nil {
			t.Fatalf("%q: %v", how, err)
		}
		if s.id != "abc" || s.base != "docker.io/x:1" || s.created.Year() != 2026 || s.spec.Process.Args[0] != "app" || s.report.From != "a checkpoint of podman" {
			t.Errorf("%q: %+v, %+v", how, s, s.report)
		}
		left, err := os.ReadDir(s.dump.dir)
		if err != nil || len(left) != 1 || left[0].Name() != "inventory.img" {
			t.Errorf("%q: the dump holds %v, %v", how, left, err)
		}
		if says := strings.Join(s.report.Left, "\n"); !strings.Contains(says, "volumes/data.tar") {
			t.Errorf("%q: the volume is not spoken of: %s", how, says)
		}
		var changes bytes.Buffer
		if err := s.changes(&changes); err != nil {
			t.Fatal(err)
		}
		if got := listed(t, changes.Bytes()); !slices.Equal(got, []string{"n 1", "bin/.wh.vi"}) {
			t.Errorf("%q: changes %q", how, got)
		}
	}
}

// An image says when the source was dumped, not when it was imported: the same source
// gives the same image.
func TestArchiveTime(t *testing.T) {
	dumped := time.Date(2026, 5, 6, 7, 8, 9, 0, time.UTC)
	for config, want := range map[string]time.Time{`{}`: dumped, `{"checkpointedTime":"2026-01-02T03:04:05Z"}`: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)} {
		var file bytes.Buffer
		tw := tar.NewWriter(&file)
		for name, data := range map[string]string{"config.dump": config, "spec.dump": "{}", "checkpoint/inventory.img": "i", "checkpoint/a.img": "a"} {
			h := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600, Size: int64(len(data)), ModTime: dumped.Add(-time.Hour)}
			if name == "checkpoint/inventory.img" {
				h.ModTime = dumped
			}
			if err := tw.WriteHeader(h); err != nil {
				t.Fatal(err)
			}
			if _, err := io.WriteString(tw, data); err != nil {
				t.Fatal(err)
			}
		}
		if err := tw.Close(); err != nil {
			t.Fatal(err)
		}
		at := t.TempDir()
		put(t, at, "a", file.Bytes())
		s, err := unpackArchive(t.Context(), filepath.Join(at, "a"), t.TempDir(), 0, silent)
		if err != nil {
			t.Fatal(err)
		}
		if !s.created.Equal(want) {
			t.Errorf("%s: made at %s, want %s", config, s.created, want)
		}
	}
}

// The archive of containerd's CRI has a layer where others have a plain tar.
func TestArchiveOfContainerd(t *testing.T) {
	layer := packed(t, "gzip", tarOf(t, entry{name: "bin/.wh.vi"}, entry{name: "n", data: "1"}))
	dir, at := t.TempDir(), t.TempDir()
	put(t, at, "a", tarOf(t, entry{name: "config.dump", data: `{"rootfsImageRef":"x@sha256:1"}`}, entry{name: "spec.dump", data: "{}"},
		entry{name: "status", data: "{}"}, entry{name: "status.dump", data: "{}"}, entry{name: "rootfs-diff.tar", data: string(layer)}))
	s, err := unpackArchive(t.Context(), filepath.Join(at, "a"), dir, 0, silent)
	if err != nil {
		t.Fatal(err)
	}
	var changes bytes.Buffer
	if err := s.changes(&changes); err != nil {
		t.Fatal(err)
	}
	if got := listed(t, changes.Bytes()); !slices.Equal(got, []string{"bin/.wh.vi", "n 1"}) {
		t.Errorf("changes %q", got)
	}
	if s.report.From != "a checkpoint of containerd's CRI" || s.base != "x@sha256:1" {
		t.Errorf("%+v of %s", s.report, s.base)
	}
}

// Whatever is in an archive: nothing lies outside of the directory, there are no links,
// and the error says that it is the archive.
func TestArchiveRefuses(t *testing.T) {
	for _, tt := range []struct {
		name string
		data []byte
		size int64
		says string
	}{
		{"upward", tarOf(t, entry{name: "checkpoint/../../x.img", data: "x"}), 0, "leads out"},
		{"absolute", tarOf(t, entry{name: "/etc/passwd", data: "x"}), 0, "leads out"},
		{"link", tarOf(t, entry{name: "checkpoint/a.img", link: "/etc/shadow", kind: tar.TypeSymlink}), 0, "not a regular file"},
		{"hard link", tarOf(t, entry{name: "config.dump", link: "/etc/shadow", kind: tar.TypeLink}), 0, "not a regular file"},
		{"link for the directory", tarOf(t, entry{name: "checkpoint", link: "/tmp", kind: tar.TypeSymlink}, entry{name: "checkpoint/a.img", data: "x"}), 0, "config.dump"},
		{"device", tarOf(t, entry{name: "checkpoint/a.img", kind: tar.TypeChar}), 0, "not a regular file"},
		{"twice", podmanArchive(t, entry{name: "config.dump", data: "{}"}), 0, "twice"},
		{"too large", podmanArchive(t, entry{name: "checkpoint/pages-1.img", data: strings.Repeat("x", 10000)}), 10000, "--max-size"},
		{"too large, in what is passed over", podmanArchive(t, entry{name: "volumes/more.tar", data: strings.Repeat("x", 10000)}), 10000, "--max-size"},
		{"a hole that is too large", sparse(t, "checkpoint/pages-1.img", 1<<40), 1 << 20, "--max-size"},
		{"a hole that is too large, in what is passed over", sparse(t, "volumes/data.tar", 1<<40), 1 << 20, "--max-size"},
		{"continues another", podmanArchive(t, entry{name: "checkpoint/parent", link: "../pre-checkpoint", kind: tar.TypeSymlink}), 0, "--with-previous"},
		{"no tar", []byte(strings.Repeat("no tar at all", 100)), 0, "no whole tar"},
		{"cut off", podmanArchive(t)[:1500], 0, "no whole tar"},
		{"cut off between two entries", cutBefore(t, podmanArchive(t, entry{name: "rootfs-diff.tar", data: "x"}), "rootfs-diff.tar"), 0, "end-of-archive"},
		{"damaged", damagedEnd(packed(t, "gzip", podmanArchive(t))), 0, "no whole tar"},
		{"in several parts", podmanArchive(t, entry{name: "pre-checkpoint/pages-1.img", data: "x"}), 0, "--pre-checkpoint"},
		{"bzip2", []byte("BZh91AY"), 0, "bzip2"},
		{"nothing", tarOf(t), 0, "config.dump"},
		{"no JSON", tarOf(t, entry{name: "config.dump", data: "{"}), 0, "config.dump"},
		{"deleted files", podmanArchive(t, entry{name: "deleted.files", data: `{"a":1}`}), 0, "deleted.files"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			top := t.TempDir()
			dir := filepath.Join(top, "work")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			put(t, top, "archive", tt.data)
			_, err := unpackArchive(t.Context(), filepath.Join(top, "archive"), dir, tt.size, silent)
			if !errors.Is(err, ErrSource) || !strings.Contains(err.Error(), tt.says) {
				t.Errorf("got %v, want ErrSource that says %s", err, tt.says)
			}
			if left, err := os.ReadDir(top); err != nil || len(left) != 2 {
				t.Errorf("beside the work directory lie %v, %v", left, err)
			}
			onlyFiles(t, dir)
		})
	}
}

// cutBefore ends a tar where an entry begins.
func cutBefore(t testing.TB, data []byte, name string) []byte {
	t.Helper()
	i := bytes.Index(data, []byte(name+"\x00"))
	if i < 0 || i%tarBlock != 0 {
		t.Fatalf("%s is at %d", name, i)
	}
	return data[:i]
}

// damagedEnd has another checksum behind it, in gzip's form.
func damagedEnd(data []byte) []byte {
	data[len(data)-6] ^= 1
	return data
}

// sparse is a tar of one file, of which all is a hole, in GNU's old form.
func sparse(t testing.TB, name string, size int64) []byte {
	t.Helper()
	data := tarOf(t, entry{name: name})
	octal := func(at, n int, v int64) { copy(data[at:], fmt.Sprintf("%0*o\x00", n-1, v)) }
	copy(data[257:], "ustar  \x00")
	data[156] = tar.TypeGNUSparse
	octal(386, 12, size)           // the hole ends here
	octal(398, 12, 0)              // with nothing behind it
	copy(data[483:], []byte{0x80}) // a size in binary
	binary.BigEndian.PutUint64(data[487:], uint64(size))
	copy(data[148:], "        ")
	sum := int64(0)
	for _, c := range data[:tarBlock] {
		sum += int64(c)
	}
	octal(148, 7, sum)
	return data
}

// What is passed over, too, ends with its context.
func TestArchiveStops(t *testing.T) {
	ctx, stop := context.WithCancel(t.Context())
	a, err := prepare(t.TempDir(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer a.close()
	err = a.read(ctx, bytes.NewReader(tarOf(t, entry{name: "volumes/data.tar", data: strings.Repeat("x", 1<<20)})), func(string) string {
		stop()
		return ""
	})
	if !errors.Is(err, context.Canceled) || errors.Is(err, ErrSource) {
		t.Errorf("got %v", err)
	}
}

// Only what the report tells of is kept of what is passed over.
func TestArchiveKeepsFewNames(t *testing.T) {
	a, err := prepare(t.TempDir(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer a.close()
	var all []entry
	for n := range 2 * maxVolumes {
		all = append(all, entry{name: fmt.Sprintf("volumes/v%d.tar", n)}, entry{name: fmt.Sprintf("other/%d", n)}, entry{name: fmt.Sprintf("volumes/\x1b%d", n)})
	}
	if err := a.read(t.Context(), bytes.NewReader(tarOf(t, all...)), archivePlace); err != nil {
		t.Fatal(err)
	}
	if len(a.volumes) != maxVolumes || slices.ContainsFunc(a.volumes, func(s string) bool { return strings.Contains(s, "\x1b") }) {
		t.Errorf("kept %d names: %q", len(a.volumes), a.volumes)
	}
	a.allowed.names = 100
	if err := a.read(t.Context(), bytes.NewReader(tarOf(t, all...)), archivePlace); !errors.Is(err, ErrSource) {
		t.Errorf("any number of names is read: %v", err)
	}
}

// piped ends when both sides have, whichever gives up first.
func TestPiped(t *testing.T) {
	failed := errors.New("failed")
	for name, tt := range map[string]struct{ write, take, want error }{
		"neither": {}, "the writer": {write: failed, want: failed}, "the reader": {take: failed, want: failed},
	} {
		ended := false
		err := piped(func(w io.Writer) error {
			defer func() { ended = true }()
			if tt.write != nil {
				return tt.write
			}
			for range 3 {
				if _, err := io.WriteString(w, "data"); err != nil {
					return fmt.Errorf("write: %w", err)
				}
			}
			return nil
		}, func(r io.Reader) error {
			if tt.take != nil {
				return tt.take
			}
			if _, err := io.Copy(io.Discard, r); err != nil {
				return fmt.Errorf("read: %w", err)
			}
			return nil
		})
		if !ended || !errors.Is(err, tt.want) || err != nil && err.Error() != "failed" {
			t.Errorf("%s fails: %v; the writer has ended: %v", name, err, ended)
		}
	}
}

func onlyFiles(t testing.TB, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() && !d.Type().IsRegular() {
			t.Errorf("%s is a %v", path, d.Type())
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// FuzzArchive: whatever an archive holds, it is unpacked as files of the directory, or
// refused as what it is.
func FuzzArchive(f *testing.F) {
	f.Add(podmanArchive(f))
	f.Add(packed(f, "zstd", podmanArchive(f, entry{name: "deleted.files", data: `["/bin/vi"]`})))
	f.Add(tarOf(f, entry{name: "checkpoint/a.img", link: "/etc/shadow", kind: tar.TypeSymlink}))
	f.Fuzz(func(t *testing.T, data []byte) {
		top := t.TempDir()
		dir := filepath.Join(top, "work")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		a, err := prepare(dir, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		defer a.close()
		if err := a.read(t.Context(), bytes.NewReader(data), archivePlace); err == nil {
			if s, err := engineArchive(t.Context(), a, dir, 0, nil); err == nil && s.spec == nil {
				t.Error("a source without a spec")
			} else if err != nil && !errors.Is(err, ErrSource) {
				t.Errorf("%v does not wrap ErrSource", err)
			}
		}
		if left, err := os.ReadDir(top); err != nil || len(left) != 1 {
			t.Errorf("beside the work directory lie %v, %v", left, err)
		}
		onlyFiles(t, dir)
	})
}

func TestAnnotationOf(t *testing.T) {
	for _, tt := range []struct {
		annotations map[string]string
		key, want   string
	}{
		{map[string]string{"io.podman.annotations.checkpoint.criu.version": "40101"}, "criu.version", "40101"},
		{map[string]string{"io.podman.annotations.checkpoint.rootfs-image-name": "x"}, "rootfs.image.name", "x"},
		{map[string]string{"org.criu.checkpoint.rootfsImageName": "x", "io.kubernetes.cri-o.annotations.checkpoint.rootfsImageName": "y"}, "rootfs.image.name", "y"},
		{map[string]string{"rootfsImageName": "x"}, "rootfs.image.name", ""},
	} {
		if got := annotationOf(tt.annotations, tt.key); got != tt.want {
			t.Errorf("%v: %s is %q, want %q", tt.annotations, tt.key, got, tt.want)
		}
	}
}

// What podman reads of a container that it did not make.
func TestPodmanConfig(t *testing.T) {
	var got map[string]any
	data, err := json.Marshal(podmanConfig{ContainerConfig: metadata.ContainerConfig{RootfsImageName: "x"}, RootfsImageID: "i", IDMappings: podmanIDs{true, true}})
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"id", "name", "rootfsImageID", "rootfsImageName", "idMappingsOptions", "createdTime", "cgroupManager"} {
		if _, ok := got[key]; !ok {
			t.Errorf("%s is not in %s", key, data)
		}
	}
}
