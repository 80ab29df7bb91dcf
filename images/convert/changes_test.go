package convert

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestChanges(t *testing.T) {
	for _, tt := range []struct {
		name  string
		in    []entry
		layer bool
		want  []string
		err   string
	}{
		{name: "kinds", in: []entry{
			{name: "d", kind: tar.TypeDir},
			{name: "./d/f", data: "1"},
			{name: "/abs", data: "2"},
			{name: "l", link: "../../anywhere", kind: tar.TypeSymlink},
			{name: "h", link: "d/f", kind: tar.TypeLink},
			{name: "p", kind: tar.TypeFifo},
			{name: ".", kind: tar.TypeDir},
		}, want: []string{"d/", "d/f 1", "abs 2", "l ../../anywhere", "h d/f", "p"}},
		{name: "a dump", in: []entry{{name: ".crac/v1/manifest.json", data: "x"}, {name: ".crac", kind: tar.TypeDir}, {name: ".cracker", data: "y"}}, want: []string{".cracker y"}},
		{name: "deletion in a layer", in: []entry{{name: "bin/.wh.vi"}}, layer: true, want: []string{"bin/.wh.vi"}},
		{name: "no deletion elsewhere", in: []entry{{name: "bin/.wh.vi"}}, err: "means a deletion"},
		{name: "deletion of nothing", in: []entry{{name: "bin/.wh."}}, layer: true, err: "deletes no file"},
		{name: "deletion upward", in: []entry{{name: "bin/.wh..."}}, layer: true, err: "deletes no file"},
		{name: "upward", in: []entry{{name: "../x"}}, err: "leads out"},
		{name: "too large", in: []entry{{name: "a", data: strings.Repeat("x", 10000)}, {name: "b", data: strings.Repeat("x", 10000)}}, err: "--max-size"},
		{name: "link upward", in: []entry{{name: "x", link: "../../etc/shadow", kind: tar.TypeLink}}, err: "leads out"},
		{name: "link into a dump", in: []entry{{name: "x", link: ".crac/v1/criu/pages-1.img", kind: tar.TypeLink}}, err: "dump"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			c := newChanges(&out, 1<<14)
			err := c.copy(t.Context(), bytes.NewReader(tarOf(t, tt.in...)), tt.layer)
			if tt.err != "" {
				if !errors.Is(err, ErrSource) || !strings.Contains(err.Error(), tt.err) {
					t.Fatalf("got %v, want ErrSource that says %s", err, tt.err)
				}
				return
			}
			if err := errors.Join(err, c.close()); err != nil {
				t.Fatal(err)
			}
			if got := listed(t, out.Bytes()); !slices.Equal(got, tt.want) {
				t.Errorf("got  %q\nwant %q", got, tt.want)
			}
		})
	}
}

func TestDelete(t *testing.T) {
	var out bytes.Buffer
	c := newChanges(&out, 1<<14)
	for _, name := range []string{"/bin/vi", "top", "/.crac/v1"} {
		if err := c.delete(name); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, name := range []string{"/../etc", "a/../../b", "", "/"} {
		if err := c.delete(name); !errors.Is(err, ErrSource) {
			t.Errorf("%q: %v", name, err)
		}
	}
	if err := c.close(); err != nil {
		t.Fatal(err)
	}
	if got := listed(t, out.Bytes()); !slices.Equal(got, []string{"bin/.wh.vi", ".wh.top"}) {
		t.Errorf("got %q", got)
	}
}

// A deletion has no time: whoever compares directories gives it the moment in which it does.
func TestDeletionHasNoTime(t *testing.T) {
	h, err := changed(&tar.Header{Typeflag: tar.TypeReg, Name: "bin/.wh.vi", ModTime: time.Now()}, true)
	if err != nil || h.ModTime.Unix() != 0 {
		t.Errorf("%+v, %v", h, err)
	}
}

// FuzzChanges: a layer of changes never names what is outside of it, or a dump.
func FuzzChanges(f *testing.F) {
	f.Add(tarOf(f, entry{name: "a", data: "1"}, entry{name: "h", link: "a", kind: tar.TypeLink}), false)
	f.Add(tarOf(f, entry{name: ".wh..wh..opq"}, entry{name: ".crac/x", data: "1"}), true)
	f.Fuzz(func(t *testing.T, data []byte, layer bool) {
		var out bytes.Buffer
		c := newChanges(&out, 1<<14)
		if err := c.copy(t.Context(), bytes.NewReader(data), layer); err != nil {
			return
		}
		if err := c.close(); err != nil {
			t.Fatal(err)
		}
		for tr := tar.NewReader(&out); ; {
			h, err := tr.Next()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, name := range []string{h.Name, map[bool]string{true: h.Linkname}[h.Typeflag == tar.TypeLink]} {
				if strings.HasPrefix(name, "/") || slices.Contains(strings.Split(name, "/"), "..") || inDump(strings.TrimSuffix(name, "/")) {
					t.Errorf("%q is in the layer", name)
				}
			}
		}
	})
}

// Several layers become one set of changes.
func TestFlat(t *testing.T) {
	dir := func(name string) entry { return entry{name: name, kind: tar.TypeDir} }
	for _, tt := range []struct {
		name    string
		layers  [][]entry // lowest first
		base    []entry
		want    []string
		deleted []string
	}{
		{name: "the upper wins", layers: [][]entry{{{name: "a", data: "1"}, {name: "b", data: "1"}}, {{name: "a", data: "2"}}}, want: []string{"a 2", "b 1"}},
		{name: "deleted in the base", layers: [][]entry{{{name: "d/.wh.x"}}}, deleted: []string{"d/x"}},
		{name: "made and deleted", layers: [][]entry{{{name: "x", data: "1"}}, {{name: ".wh.x"}}}, deleted: []string{"x"}},
		{name: "deleted and made", layers: [][]entry{{{name: ".wh.x"}}, {{name: "x", data: "1"}}}, want: []string{"x 1"}},
		{name: "a deleted directory hides", layers: [][]entry{{dir("d"), {name: "d/x", data: "1"}}, {{name: ".wh.d"}}}, deleted: []string{"d"}},
		{name: "a file where a directory was", layers: [][]entry{{dir("d"), {name: "d/x", data: "1"}}, {{name: "d", data: "file"}}}, want: []string{"d file"}},
		{name: "a directory in both", layers: [][]entry{{dir("d"), {name: "d/x", data: "1"}}, {dir("d"), {name: "d/y", data: "2"}}}, want: []string{"d/", "d/y 2", "d/x 1"}},
		{
			name:   "a cleared directory",
			layers: [][]entry{{dir("d"), {name: "d/x", data: "1"}}, {dir("d"), {name: "d/.wh..wh..opq"}, {name: "d/new", data: "2"}}},
			base:   []entry{dir("d"), {name: "d/old", data: "0"}, {name: "d/new", data: "0"}, {name: "other/old", data: "0"}},
			want:   []string{"d/", "d/new 2"}, deleted: []string{"d/old"},
		},
		{
			name:   "all is cleared",
			layers: [][]entry{{{name: "x", data: "1"}}, {{name: ".wh..wh..opq"}, {name: "y", data: "2"}}},
			base:   []entry{dir("d"), {name: "d/old", data: "0"}, {name: "y", data: "0"}},
			want:   []string{"y 2"}, deleted: []string{"d"},
		},
		{
			name:   "a directory in a cleared one",
			layers: [][]entry{{dir("d"), {name: "d/.wh..wh..opq"}, dir("d/lib"), {name: "d/lib/new", data: "2"}}},
			base:   []entry{dir("d"), dir("d/lib"), {name: "d/lib/old", data: "0"}, dir("d/lib/sub"), {name: "d/lib/sub/old", data: "0"}},
			want:   []string{"d/", "d/lib/", "d/lib/new 2"}, deleted: []string{"d/lib/old", "d/lib/sub"},
		},
		{
			name:   "a directory deleted and made",
			layers: [][]entry{{{name: ".wh.d"}}, {dir("d"), {name: "d/new", data: "2"}}},
			base:   []entry{dir("d"), {name: "d/old", data: "0"}},
			want:   []string{"d/", "d/new 2"}, deleted: []string{"d/old"},
		},
		{
			name:   "a directory deleted and made in one layer",
			layers: [][]entry{{{name: ".wh.d"}, dir("d"), {name: "d/new", data: "2"}}},
			base:   []entry{dir("d"), {name: "d/old", data: "0"}},
			want:   []string{"d/", "d/new 2"}, deleted: []string{"d/old"},
		},
		{
			name:   "deleted below a cleared directory",
			layers: [][]entry{{dir("d"), {name: "d/.wh.x"}}, {dir("d"), {name: "d/.wh..wh..opq"}}},
			base:   []entry{dir("d"), dir("d/x"), {name: "d/x/old", data: "0"}},
			want:   []string{"d/"}, deleted: []string{"d/x"},
		},
		{
			name:   "a file between two directories",
			layers: [][]entry{{dir("a"), {name: "a/x", data: "1"}}, {{name: "a", data: "file"}}, {dir("a"), {name: "a/y", data: "2"}}},
			base:   []entry{dir("a"), {name: "a/old", data: "0"}, {name: "a/y", data: "0"}},
			want:   []string{"a/", "a/y 2"}, deleted: []string{"a/old"},
		},
		{
			name:   "a file in place of a directory of the base",
			layers: [][]entry{{dir("d"), {name: "d/.wh..wh..opq"}, {name: "d/x", data: "file"}}},
			base:   []entry{dir("d"), dir("d/x"), {name: "d/x/old", data: "0"}},
			want:   []string{"d/", "d/x file"},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			f := newFlat(&out)
			for _, l := range slices.Backward(tt.layers) {
				if err := f.layer(t.Context(), bytes.NewReader(tarOf(t, l...))); err != nil {
					t.Fatal(err)
				}
			}
			if f.needsBase() {
				if err := f.base(t.Context(), bytes.NewReader(tarOf(t, tt.base...))); err != nil {
					t.Fatal(err)
				}
			}
			if err := f.tw.Close(); err != nil {
				t.Fatal(err)
			}
			if got := listed(t, out.Bytes()); !slices.Equal(got, tt.want) {
				t.Errorf("got  %q\nwant %q", got, tt.want)
			}
			if got := slices.Sorted(maps.Keys(f.deleted)); !slices.Equal(got, tt.deleted) {
				t.Errorf("deleted %q, want %q", got, tt.deleted)
			}
		})
	}
	// A link without what it is a link to would be another file.
	f := newFlat(io.Discard)
	if err := f.layer(t.Context(), bytes.NewReader(tarOf(t, entry{name: "a", data: "2"}))); err != nil {
		t.Fatal(err)
	}
	if err := f.layer(t.Context(), bytes.NewReader(tarOf(t, entry{name: "a", data: "1"}, entry{name: "h", link: "a", kind: tar.TypeLink}))); err == nil {
		t.Error("a link to a covered file was taken")
	}
}
