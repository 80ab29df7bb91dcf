package images

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/oci"
)

// facts is a manifest but for the files, for a container that this host's
// memory could come from.
func facts() oci.Manifest {
	m := oci.Manifest{
		Created: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC),
		Container: oci.Container{
			ID: "c", Args: []string{"/app"}, UID: 7, GID: 8, Namespaces: []string{"mount", "pid"},
		},
		Mounts: []oci.Mount{{Destination: "/data", Type: "bind"}},
		Base:   oci.Base{Name: "base:1"},
	}
	ThisHost(40101).Describe(&m)
	return m
}

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// dump makes a directory as CRIU and libcontainer leave it.
func dump(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range map[string]string{
		"inventory.img": inventoryImage(0), "core-1.img": oneCore(), "pages-1.img": strings.Repeat("memory", 10000), "empty-1.img": "",
		"descriptors.json": `["/dev/null"]`, "dump.log": "log", "stats-dump": "s", "crac-manifest.json": "{}",
	} {
		write(t, filepath.Join(dir, name), content)
	}
	return dir
}

// checkpointLayer makes a layer's directory as a snapshotter unpacks it.
func checkpointLayer(t testing.TB) string {
	t.Helper()
	m := facts()
	var buf bytes.Buffer
	if _, err := WriteLayer(&buf, dump(t), []byte(`{"ociVersion":"1.2.0"}`), &m, nil); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	untar(t, &buf, dir)
	return dir
}

func baseLayer(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "bin", "app"), "code")
	return dir
}

func overlayMount(options ...string) []Mount {
	return []Mount{{Type: "overlay", Source: "overlay", Options: options}}
}

func TestFindNothing(t *testing.T) {
	base := baseLayer(t)
	for _, mounts := range [][]Mount{
		nil,
		overlayMount("index=off", "workdir=/w", "upperdir=/u", "lowerdir="+base),
		overlayMount("lowerdir=" + base + ":" + base),
		{{Type: "bind", Source: base, Options: []string{"rbind", "ro"}}},
		{{Type: "ext4", Source: "/dev/null"}, {Type: "tmpfs", Source: "tmpfs"}, {Type: "bind", Source: "/does/not/exist"}},
		overlayMount("lowerdir=/does/not/exist:" + base),
	} {
		c, rest, err := Find(mounts)
		if c != nil || err != nil {
			t.Errorf("%v: found %+v, %v", mounts, c, err)
		}
		if !equalMounts(rest, mounts) {
			t.Errorf("%v became %v", mounts, rest)
		}
	}
}

func equalMounts(a, b []Mount) bool {
	return slices.EqualFunc(a, b, func(a, b Mount) bool {
		return a.Type == b.Type && a.Source == b.Source && a.Target == b.Target && slices.Equal(a.Options, b.Options)
	})
}

func TestFindInOverlay(t *testing.T) {
	a, b := baseLayer(t), baseLayer(t)
	warm, older := checkpointLayer(t), checkpointLayer(t)
	odd := filepath.Join(t.TempDir(), `co:lon\back`)
	if err := os.Rename(checkpointLayer(t), odd); err != nil {
		t.Fatal(err)
	}
	escaped := strings.NewReplacer(`\`, `\\`, `:`, `\:`).Replace(odd)
	oddBase := filepath.Join(t.TempDir(), "ba:se")
	if err := os.Rename(baseLayer(t), oddBase); err != nil {
		t.Fatal(err)
	}
	escapedBase := strings.ReplaceAll(oddBase, ":", `\:`)

	for _, tt := range []struct {
		name  string
		in    []Mount
		layer string
		rest  []Mount
	}{
		{
			"as the overlay snapshotter writes it",
			overlayMount("workdir=/w", "upperdir=/u", "lowerdir="+warm+":"+a+":"+b, "index=off"), warm,
			overlayMount("workdir=/w", "upperdir=/u", "lowerdir="+a+":"+b, "index=off"),
		},
		{
			"a clone's earlier checkpoint goes as well",
			overlayMount("upperdir=/u", "workdir=/w", "lowerdir="+warm+":"+a+":"+older+":"+b), warm,
			overlayMount("upperdir=/u", "workdir=/w", "lowerdir="+a+":"+b),
		},
		{
			"escapes",
			overlayMount("upperdir=/u", "workdir=/w", "lowerdir="+escaped+":"+escapedBase+":"+a), odd,
			overlayMount("upperdir=/u", "workdir=/w", "lowerdir="+escapedBase+":"+a),
		},
		{
			"one option for each layer",
			overlayMount("lowerdir+="+odd, "lowerdir+="+a, "lowerdir+="+b, "ro"), odd,
			overlayMount("lowerdir+="+a, "lowerdir+="+b, "ro"),
		},
		{
			"read-only with one layer left",
			overlayMount("lowerdir="+warm+":"+escapedBase, "index=off", "nodev"), warm,
			[]Mount{{Type: "bind", Source: oddBase, Options: []string{"nodev", "ro", "rbind"}}},
		},
		{
			"read-only with one layer left, target and ID maps stay",
			[]Mount{{Type: "overlay", Source: "overlay", Target: "sub", Options: []string{"uidmap=0:1:2", "gidmap=0:3:4", "lowerdir=" + warm + ":" + a, "ro"}}},
			warm,
			[]Mount{{Type: "bind", Source: a, Target: "sub", Options: []string{"uidmap=0:1:2", "gidmap=0:3:4", "ro", "rbind"}}},
		},
		{
			"writable with no layer left",
			overlayMount("lowerdir="+warm, "upperdir=/u", "workdir=/w", "volatile"), warm,
			[]Mount{{Type: "bind", Source: "/u", Options: []string{"rw", "rbind"}}},
		},
		{
			"data layers stay behind their colons",
			overlayMount("lowerdir=" + warm + ":" + a + "::" + b + "::/data"), warm,
			overlayMount("lowerdir=" + a + "::" + b + "::/data"),
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := slices.Clone(tt.in[0].Options)
			c, rest, err := Find(tt.in)
			if err != nil {
				t.Fatal(err)
			}
			if c == nil {
				t.Fatal("no checkpoint found")
			}
			if c.Layer != tt.layer || c.Dir != filepath.Join(tt.layer, ".crac/v1") || c.Manifest.Container.ID != "c" || c.Visible {
				t.Errorf("found %+v", c)
			}
			if !equalMounts(rest, tt.rest) {
				t.Errorf("got  %v\nwant %v", rest, tt.rest)
			}
			if !slices.Equal(tt.in[0].Options, before) {
				t.Errorf("the request's mounts became %v", tt.in[0].Options)
			}
			if err := c.Verify(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestFindElsewhere(t *testing.T) {
	root := baseLayer(t)
	if err := os.Rename(filepath.Join(checkpointLayer(t), ".crac"), filepath.Join(root, ".crac")); err != nil {
		t.Fatal(err)
	}
	in := []Mount{{Type: "bind", Source: root, Options: []string{"rbind", "rw"}}}
	c, rest, err := Find(in)
	if err != nil || c == nil || c.Layer != root || !c.Visible {
		t.Fatalf("bind: found %+v, %v", c, err)
	}
	if !equalMounts(rest, in) {
		t.Errorf("bind became %v", rest)
	}

	// A layer that holds more than the checkpoint (a remapped copy of a whole
	// root file system does) cannot be left out.
	in = overlayMount("upperdir=/u", "workdir=/w", "lowerdir="+root+":"+baseLayer(t))
	c, rest, err = Find(in)
	if err != nil || c == nil || c.Layer != root || !c.Visible {
		t.Fatalf("mixed layer: found %+v, %v", c, err)
	}
	if !equalMounts(rest, in) {
		t.Errorf("mixed layer became %v", rest)
	}

	// What cannot be restored must be masked all the same.
	if err := os.Remove(filepath.Join(root, ".crac/v1/manifest.json")); err != nil {
		t.Fatal(err)
	}
	for _, in := range [][]Mount{in, {{Type: "bind", Source: root}}} {
		if _, rest, err := Find(in); !errors.Is(err, ErrDamaged) || !Visible(rest) {
			t.Errorf("damaged: %v, visible %v", err, Visible(rest))
		}
	}
}

func TestFindRefuses(t *testing.T) {
	a := baseLayer(t)
	manifest := func(dir string) string { return filepath.Join(dir, ".crac/v1/manifest.json") }
	for _, tt := range []struct {
		name string
		make func(t *testing.T, warm string) (lowerdirs string)
		err  error
	}{
		{"layers above", func(t *testing.T, warm string) string { return a + ":" + warm + ":" + a + ":" + a }, ErrCovered},
		{"no manifest", func(t *testing.T, warm string) string {
			if err := os.Remove(manifest(warm)); err != nil {
				t.Fatal(err)
			}
			return warm + ":" + a + ":" + a
		}, ErrDamaged},
		{"no JSON", func(t *testing.T, warm string) string {
			write(t, manifest(warm), "\x00")
			return warm + ":" + a + ":" + a
		}, ErrDamaged},
		{"only a later format", func(t *testing.T, warm string) string {
			if err := os.Rename(filepath.Join(warm, ".crac/v1"), filepath.Join(warm, ".crac/v2")); err != nil {
				t.Fatal(err)
			}
			return warm + ":" + a + ":" + a
		}, ErrDamaged},
		{"a link to a manifest", func(t *testing.T, warm string) string {
			good := filepath.Join(t.TempDir(), "good.json")
			if err := os.Rename(manifest(warm), good); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(good, manifest(warm)); err != nil {
				t.Fatal(err)
			}
			return warm + ":" + a + ":" + a
		}, ErrDamaged},
		{"a link to a directory", func(t *testing.T, warm string) string {
			good := filepath.Join(t.TempDir(), "v1")
			if err := os.Rename(filepath.Join(warm, ".crac/v1"), good); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(good, filepath.Join(warm, ".crac/v1")); err != nil {
				t.Fatal(err)
			}
			return warm + ":" + a + ":" + a
		}, ErrDamaged},
		{"a FIFO", func(t *testing.T, warm string) string {
			if err := os.Remove(manifest(warm)); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mkfifo(manifest(warm), 0o600); err != nil {
				t.Fatal(err)
			}
			return warm + ":" + a + ":" + a
		}, ErrDamaged},
		{"a directory", func(t *testing.T, warm string) string {
			if err := os.Remove(manifest(warm)); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(manifest(warm), 0o700); err != nil {
				t.Fatal(err)
			}
			return warm + ":" + a + ":" + a
		}, ErrDamaged},
	} {
		t.Run(tt.name, func(t *testing.T) {
			warm := checkpointLayer(t)
			lowers := tt.make(t, warm)
			c, rest, err := Find(overlayMount("upperdir=/u", "workdir=/w", "lowerdir="+lowers))
			if !errors.Is(err, tt.err) || c != nil {
				t.Fatalf("found %+v, %v; want %v", c, err, tt.err)
			}
			// A cold start still must not see it.
			left := slices.DeleteFunc(splitLower(lowers), func(l string) bool { return l == warm })
			want := overlayMount("upperdir=/u", "workdir=/w", "lowerdir="+strings.Join(left, ":"))
			if !equalMounts(rest, want) {
				t.Errorf("got  %v\nwant %v", rest, want)
			}
			if Visible(rest) {
				t.Errorf("visible in %v", rest)
			}
			if !strings.Contains(err.Error(), warm) && errors.Is(tt.err, ErrCovered) {
				t.Errorf("the error does not name the layer: %v", err)
			}
		})
	}
}

// A layer that deletes the checkpoint of the layers below makes a cold image.
func TestFindDeleted(t *testing.T) {
	warm, a := checkpointLayer(t), baseLayer(t)
	// A file in the way hides what is below just as a whiteout does, which only
	// root could make here.
	write(t, filepath.Join(a, ".crac"), "")
	c, rest, err := Find(overlayMount("upperdir=/u", "workdir=/w", "lowerdir="+a+":"+warm))
	if c != nil || err != nil {
		t.Fatalf("found %+v, %v", c, err)
	}
	if want := overlayMount("upperdir=/u", "workdir=/w", "lowerdir="+a); !equalMounts(rest, want) {
		t.Errorf("got %v", rest)
	}
	if Visible(overlayMount("lowerdir=" + a + ":" + warm)) {
		t.Error("visible, though a layer above hides it")
	}
	if !Visible(overlayMount("lowerdir=" + warm + ":" + a)) {
		t.Error("not visible, though nothing hides it")
	}
}

func TestFindBadOptions(t *testing.T) {
	warm := checkpointLayer(t)
	for _, options := range [][]string{
		{"upperdir=/u"},
		{"lowerdir="},
		{"lowerdir=:" + warm},
		{"lowerdir=" + warm + ":"},
		{"lowerdir=" + warm + ":::/a"},
		{"lowerdir=relative"},
		{"lowerdir=" + warm, "lowerdir=/a"},
		{"lowerdir=" + warm},
		{"lowerdir=" + warm + "::/data"},
	} {
		in := overlayMount(options...)
		c, rest, err := Find(in)
		if err == nil || c != nil {
			t.Errorf("%v: found %+v, %v", options, c, err)
		}
		if !equalMounts(rest, in) {
			t.Errorf("%v became %v", options, rest)
		}
	}
}

func FuzzOverlayOptions(f *testing.F) {
	f.Add("lowerdir=/a:/b\\:c::/d", "upperdir=/u", uint8(1))
	f.Add("lowerdir+=/a:b", "lowerdir+=/c", uint8(2))
	f.Add("lowerdir=/a\\", "ro", uint8(0))
	f.Fuzz(func(t *testing.T, first, second string, drop uint8) {
		options := []string{first, second}
		o, err := parseOverlay(options)
		if err != nil {
			return
		}
		marks := make([]bool, len(o.lower))
		var want []string
		for i, l := range o.lower {
			if i < 8 && drop&(1<<i) != 0 {
				marks[i] = true
			} else {
				want = append(want, l.path)
			}
		}
		rest, err := o.without(Mount{Type: "overlay", Options: options}, marks)
		if err != nil {
			return
		}
		if rest.Type == "bind" {
			if rest.Source != o.upper && (len(want) != 1 || rest.Source != want[0]) {
				t.Fatalf("bind mount of %q; layers left are %q", rest.Source, want)
			}
			return
		}
		// What was written anew means exactly the layers that were to stay.
		again, err := parseOverlay(rest.Options)
		if err != nil {
			t.Fatalf("%q became %q: %v", options, rest.Options, err)
		}
		var got []string
		for _, l := range again.lower {
			got = append(got, l.path)
		}
		if !slices.Equal(got, want) || again.upper != o.upper {
			t.Fatalf("%q became %q: layers %q, want %q", options, rest.Options, got, want)
		}
	})
}
