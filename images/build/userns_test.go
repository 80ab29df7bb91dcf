package build

import (
	"archive/tar"
	"bytes"
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

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/image-spec/identity"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crac-shim/crac/oci"
)

var (
	testUIDs = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 1000}, {ContainerID: 5000, HostID: 7, Size: 1}}
	testGIDs = []specs.LinuxIDMapping{{ContainerID: 0, HostID: 200000, Size: 1000}, {ContainerID: 3000000, HostID: 9, Size: 2}}
)

// userNamespace is a spec with a user namespace.
func userNamespace(uids, gids []specs.LinuxIDMapping) *specs.Spec {
	return &specs.Spec{
		Mounts: []specs.Mount{{Destination: "/srv/data", Type: "bind"}, {Destination: "etc/name"}},
		Linux:  &specs.Linux{UIDMappings: uids, GIDMappings: gids, Namespaces: []specs.LinuxNamespace{{Type: specs.UserNamespace}}},
	}
}

func TestOwnersOf(t *testing.T) {
	for name, spec := range map[string]*specs.Spec{
		"no Linux part":     {},
		"no user namespace": {Linux: &specs.Linux{UIDMappings: testUIDs, GIDMappings: testGIDs}},
		"somebody else's":   {Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.UserNamespace, Path: "/proc/1/ns/user"}}}},
	} {
		o := ownersOf(spec)
		if o != nil {
			t.Errorf("%s: %v, want nil", name, o)
		}
		var b bytes.Buffer
		if err := o.layer(&b, func(w io.Writer) error { _, err := io.WriteString(w, "as it is"); return err }); err != nil || b.String() != "as it is" {
			t.Errorf("%s: %q, %v", name, &b, err)
		}
	}
}

func fileCaps(revision, root uint32) string {
	b := binary.LittleEndian.AppendUint32(nil, revision|1)
	b = append(b, make([]byte, 16)...)
	b[4] = 0x20
	if revision == capRevision3 {
		b = binary.LittleEndian.AppendUint32(b, root)
	}
	return string(b)
}

func TestOwners(t *testing.T) {
	withCaps := func(c string) map[string]string {
		return map[string]string{fileCapability: c, "SCHILY.xattr.user.x": "y"}
	}
	for _, c := range []struct {
		name     string
		in       tar.Header
		uid, gid int
		caps     string
		err      []string
	}{
		{name: "root", in: tar.Header{Name: "a", Uid: 100000, Gid: 200000}},
		{name: "directory", in: tar.Header{Name: "a/", Typeflag: tar.TypeDir, Uid: 100999, Gid: 200001}, uid: 999, gid: 1},
		{name: "symbolic link", in: tar.Header{Name: "a", Linkname: "/x", Typeflag: tar.TypeSymlink, Uid: 100002, Gid: 200003}, uid: 2, gid: 3},
		{name: "hard link", in: tar.Header{Name: "a", Linkname: "x", Typeflag: tar.TypeLink, Uid: 100002, Gid: 200003}, uid: 2, gid: 3},
		{name: "device", in: tar.Header{Name: "a", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3, Uid: 100002, Gid: 200003}, uid: 2, gid: 3},
		{name: "pipe", in: tar.Header{Name: "a", Typeflag: tar.TypeFifo, Uid: 100002, Gid: 200003}, uid: 2, gid: 3},
		{name: "the second line, and room for a larger number", in: tar.Header{Name: "a", Uid: 7, Gid: 10}, uid: 5000, gid: 3000001},
		{name: "whiteout", in: tar.Header{Name: "d/.wh.a"}},
		{name: "opaque directory", in: tar.Header{Name: "d/.wh..wh..opq"}},
		{name: "mount point", in: tar.Header{Name: "srv/data/", Typeflag: tar.TypeDir}},
		{name: "on the way to a mount point", in: tar.Header{Name: "srv/", Typeflag: tar.TypeDir}},
		{name: "mount point for a file", in: tar.Header{Name: "etc/name"}},
		{name: "beside a mount point", in: tar.Header{Name: "srv/other"}, err: []string{"/srv/other", "user ID 0 ", "100000-100999, 7-7"}},
		{name: "mount point of somebody", in: tar.Header{Name: "srv/data/", Typeflag: tar.TypeDir, Uid: 1}, err: []string{"/srv/data ", "user ID 1 "}},
		{name: "user below the map", in: tar.Header{Name: "a/b", Uid: 99999, Gid: 200000}, err: []string{"owner of /a/b ", "user ID 99999 "}},
		{name: "user above the map", in: tar.Header{Name: "a/b", Uid: 101000, Gid: 200000}, err: []string{"/a/b", "user ID 101000 "}},
		{name: "group outside", in: tar.Header{Name: "a/b", Uid: 100000, Gid: 11}, err: []string{"group of /a/b ", "group ID 11 ", "200000-200999, 9-10"}},
		{
			name: "capabilities of the container's root", in: tar.Header{Name: "a", Uid: 100000, Gid: 200000, PAXRecords: withCaps(fileCaps(capRevision3, 100000))},
			caps: fileCaps(capRevision2, 0),
		},
		{
			name: "capabilities of a namespace in the container", in: tar.Header{Name: "a", Uid: 100000, Gid: 200000, PAXRecords: withCaps(fileCaps(capRevision3, 100010))},
			caps: fileCaps(capRevision3, 10),
		},
		{
			name: "capabilities of an image", in: tar.Header{Name: "a", Uid: 100000, Gid: 200000, PAXRecords: withCaps(fileCaps(capRevision2, 0))},
			caps: fileCaps(capRevision2, 0),
		},
		{
			name: "capabilities of a stranger", in: tar.Header{Name: "a", Uid: 100000, Gid: 200000, PAXRecords: withCaps(fileCaps(capRevision3, 5))},
			err: []string{"capabilities of /a ", "user ID 5 "},
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			content := "content"
			in := c.in
			if in.Typeflag == 0 {
				in.Typeflag, in.Size = tar.TypeReg, int64(len(content))
			}
			in.Mode, in.Format = 0o640, tar.FormatPAX
			var out bytes.Buffer
			err := ownersOf(userNamespace(testUIDs, testGIDs)).layer(&out, func(w io.Writer) error {
				tw := tar.NewWriter(w)
				if err := tw.WriteHeader(&in); err != nil {
					return err
				}
				if _, err := io.WriteString(tw, content[:in.Size]); err != nil {
					return err
				}
				return tw.Close()
			})
			for _, want := range c.err {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("got %v, want an error with %q", err, want)
				}
			}
			if len(c.err) > 0 {
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			tr := tar.NewReader(&out)
			h, err := tr.Next()
			if err != nil {
				t.Fatal(err)
			}
			data, err := io.ReadAll(tr)
			if err != nil || int64(len(data)) != in.Size {
				t.Errorf("content %q, %v", data, err)
			}
			if h.Uid != c.uid || h.Gid != c.gid {
				t.Errorf("belongs to %d:%d, want %d:%d", h.Uid, h.Gid, c.uid, c.gid)
			}
			if h.Name != in.Name || h.Typeflag != in.Typeflag || h.Linkname != in.Linkname || h.Devmajor != in.Devmajor || h.Devminor != in.Devminor || h.Mode != in.Mode {
				t.Errorf("became %+v", h)
			}
			if got := h.PAXRecords[fileCapability]; got != c.caps {
				t.Errorf("capabilities %x, want %x", got, c.caps)
			}
			if c.caps != "" && h.PAXRecords["SCHILY.xattr.user.x"] != "y" {
				t.Errorf("other attributes are gone: %v", h.PAXRecords)
			}
			if _, err := tr.Next(); !errors.Is(err, io.EOF) {
				t.Errorf("after the only entry: %v", err)
			}
		})
	}
}

// Neither side of the pipe waits for one that has failed.
func TestOwnersErrors(t *testing.T) {
	o := ownersOf(userNamespace(testUIDs, testGIDs))
	sick := errors.New("sick disk")
	err := o.layer(io.Discard, func(w io.Writer) error {
		if err := tar.NewWriter(w).WriteHeader(&tar.Header{Name: "a", Uid: 100000, Gid: 200000, Size: 5}); err != nil {
			return err
		}
		return sick
	})
	if !errors.Is(err, sick) {
		t.Errorf("a source that fails: %v", err)
	}
	err = o.layer(failingWriter{sick}, func(w io.Writer) error {
		tw := tar.NewWriter(w)
		for i := range 100 {
			if err := tw.WriteHeader(&tar.Header{Name: fmt.Sprint(i), Uid: 100000, Gid: 200000}); err != nil {
				return err
			}
		}
		return tw.Close()
	})
	if !errors.Is(err, sick) {
		t.Errorf("a destination that fails: %v", err)
	}
}

type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }

func TestRemapped(t *testing.T) {
	const chain = "sha256:092495b566d9b4a68629b2d064a84c39bb6954b1098879913e1676e3ed4dd7d6"
	maps := []specs.LinuxIDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}}
	o := &owners{uids: maps, gids: maps}
	for key, want := range map[string]bool{
		// Made by ctr 2.4.2 run --uidmap 0:100000:65536 --gidmap 0:100000:65536.
		"sha256:eb76873e81fd8c53818022bc17ef7ebaacab18c90df261c1373b22b007288d08": true,
		chain + "-100000-100000": true,
		chain + "-100000-100001": false,
		chain:                    false,
		"sha256:5337807fb431c2dcaf044a2fc0628c805dca67477b9b037af7d54ab273598e6d": false,
	} {
		if got := o.remapped(key, chain); got != want {
			t.Errorf("%s: %v, want %v", key, got, want)
		}
		if (*owners)(nil).remapped(key, chain) {
			t.Errorf("%s without a user namespace", key)
		}
	}
	other := &owners{uids: testUIDs, gids: testGIDs}
	if other.remapped("sha256:eb76873e81fd8c53818022bc17ef7ebaacab18c90df261c1373b22b007288d08", chain) {
		t.Error("a snapshot with other owners is taken for one of this container")
	}
	// containerd sorts the maps before it makes the name.
	uids := slices.Clone(testUIDs)
	slices.Reverse(uids)
	if got := remapKey(t, other, chain); !(&owners{uids: uids, gids: testGIDs}).remapped(got, chain) {
		t.Errorf("%s is not known by maps in another order", got)
	}
}

// remapKey is containerd's name for a snapshot with a container's owners.
func remapKey(t *testing.T, o *owners, chain string) string {
	t.Helper()
	uid, okUID := toHost(o.uids, 0)
	gid, okGID := toHost(o.gids, 0)
	if !okUID || !okGID {
		t.Fatal("the container has no root")
	}
	return fmt.Sprintf("%s-%d-%d", chain, uid, gid)
}

func TestBuildInUserNamespace(t *testing.T) {
	for _, c := range []struct{ snapshotter, compression string }{
		{"overlayfs", "zstd"}, {"native", "gzip"},
	} {
		t.Run(c.snapshotter, func(t *testing.T) {
			w := newWorld(t)
			w.image("base:1", c.snapshotter, "one", "two")
			spec := userNamespace(testUIDs, testGIDs)
			container := func(id, image, key, file string, uid, gid int) Request {
				t.Helper()
				l := w.load(image)
				chain := identity.ChainID(l.config.RootFS.DiffIDs).String()
				if key == "" {
					key = remapKey(t, ownersOf(spec), chain)
				}
				w.container(id, image, c.snapshotter)
				sn := w.snapshots(c.snapshotter)
				w.must(sn.Remove(w.ctx, "snap-"+id))
				_, err := sn.Prepare(w.ctx, key+"-remap", chain)
				w.must(err)
				w.must(sn.Commit(w.ctx, key, key+"-remap", snapshots.WithLabels(map[string]string{"containerd.io/gc.root": "1"})))
				mounts, err := sn.Prepare(w.ctx, "snap-"+id, key)
				w.must(err)
				path := filepath.Join(writable(t, mounts), file)
				w.must(os.WriteFile(path, []byte(file), 0o600))
				if err := os.Chown(path, uid, gid); err != nil {
					t.Skipf("this needs root: %v", err)
				}
				r := w.request(id, "warm:"+id)
				r.Compression = oci.Compression(c.compression)
				data, err := json.Marshal(spec)
				w.must(err)
				w.must(os.WriteFile(r.SpecPath, data, 0o600))
				return r
			}
			build := func(r Request, layers int, file string, uid, gid int) {
				t.Helper()
				_, _, err := w.build(r)
				w.must(err)
				l := w.check(r.Ref)
				if len(l.manifest.Layers) != layers {
					t.Fatalf("%d layers, want %d", len(l.manifest.Layers), layers)
				}
				all := w.entries(l.manifest.Layers[layers-2])
				if len(all) != 1 || all[0].Name != file || all[0].Uid != uid || all[0].Gid != gid || string(all[0].data) != file {
					t.Errorf("changes %v of %+v", names(all), all[0].Header)
				}
			}
			build(container("a", "base:1", "", "f1", 100005, 200006), 4, "f1", 5, 6)
			w.unpackImage("warm:a", c.snapshotter)
			build(container("b", "warm:a", "", "f2", 100007, 200008), 5, "f2", 7, 8)

			_, _, err := w.build(container("c", "base:1", "somebody's snapshot", "f", 100000, 200000))
			if err == nil || !strings.Contains(err.Error(), "was not made from what the name base:1 means") {
				t.Errorf("a snapshot with other content: %v", err)
			}
			w.unpackImage("warm:b", c.snapshotter)
			r := container("d", "warm:b", "", "strange", 1, 1)
			if _, _, err = w.build(r); err == nil || !strings.Contains(err.Error(), "/strange") {
				t.Errorf("an owner outside of the map: %v", err)
			}
			if _, err := w.images.Get(w.ctx, r.Ref); err == nil {
				t.Error("a build that failed has made an image")
			}
		})
	}
}
