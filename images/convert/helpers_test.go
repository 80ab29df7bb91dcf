package convert

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	criucore "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	fownimg "github.com/checkpoint-restore/go-criu/v7/crit/images/fown"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/inventory"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/mnt"
	skopts "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-opts"
	"google.golang.org/protobuf/proto"

	"github.com/crac-shim/crac/images/build"
	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/oci/criuimage"
)

func silent(build.Event) {}

// entry is one of a tar; the zero type is a file's.
type entry struct {
	name, data, link string
	kind             byte
}

func tarOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, e := range entries {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: e.name, Linkname: e.link, Mode: 0o644, Size: int64(len(e.data))}
		if e.kind != 0 {
			h.Typeflag = e.kind
		}
		if err := tw.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(tw, e.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// listed reads a tar: each name with what it holds or links to.
func listed(t testing.TB, data []byte) (all []string) {
	t.Helper()
	for tr := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, strings.TrimSpace(h.Name+" "+string(content)+h.Linkname))
	}
}

func criuImage(t testing.TB, kind criuimage.Kind, messages ...proto.Message) []byte {
	t.Helper()
	parts := make([][]byte, len(messages))
	for i, m := range messages {
		var err error
		if parts[i], err = proto.Marshal(m); err != nil {
			t.Fatal(err)
		}
	}
	return criuimage.New(kind, parts...)
}

// dumpOf writes what of a dump is looked at here.
func dumpOf(t testing.TB, mounts []*mnt.MntEntry, files ...*fdinfo.FileEntry) dump {
	t.Helper()
	d := dump{t.TempDir()}
	ids := func(net uint32) *criucore.TaskKobjIdsEntry {
		n := proto.Uint32(1)
		return &criucore.TaskKobjIdsEntry{VmId: n, FilesId: n, FsId: n, SighandId: n, NetNsId: &net}
	}
	ms := make([]proto.Message, len(mounts))
	for i, m := range mounts {
		ms[i] = m
	}
	fs := make([]proto.Message, len(files))
	for i, f := range files {
		fs[i] = f
	}
	for name, data := range map[string][]byte{
		"mountpoints-13.img": criuImage(t, criuimage.Mountpoints, ms...),
		"files.img":          criuImage(t, criuimage.Files, fs...),
		"ids-1.img":          criuImage(t, criuimage.IDs, ids(10)),
		inventoryName:        criuImage(t, criuimage.Inventory, &inventory.InventoryEntry{ImgVersion: proto.Uint32(2), RootIds: ids(2), RootCgSet: proto.Uint32(1), TcpClose: proto.Bool(true)}),
	} {
		put(t, d.dir, name, data)
	}
	return d
}

func put(t testing.TB, dir, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// mountAt is a mount of a dump; with a key it is external.
func mountAt(id, parent uint32, place, key string) *mnt.MntEntry {
	m := &mnt.MntEntry{
		Fstype: proto.Uint32(5), MntId: &id, RootDev: proto.Uint32(100 + id), ParentMntId: &parent, Flags: proto.Uint32(0),
		Root: proto.String("/"), Mountpoint: &place, Source: proto.String("s"), Options: proto.String("size=4k"),
	}
	if key != "" {
		m.ExtKey = &key
	}
	return m
}

func fown() *fownimg.FownEntry {
	n := proto.Uint32(0)
	return &fownimg.FownEntry{Uid: n, Euid: n, Signum: n, PidType: n, Pid: n}
}

func sockOpts() *skopts.SkOptsEntry {
	n := proto.Uint32(0)
	return &skopts.SkOptsEntry{SoSndbuf: n, SoRcvbuf: n, SoSndTmoSec: proto.Uint64(0), SoSndTmoUsec: proto.Uint64(0), SoRcvTmoSec: proto.Uint64(0), SoRcvTmoUsec: proto.Uint64(0)}
}

// facts are a manifest's of a container with mounts at these places.
func facts(mounts ...string) *oci.Manifest {
	m := new(oci.Manifest)
	for _, p := range mounts {
		m.Mounts = append(m.Mounts, oci.Mount{Destination: p})
	}
	return m
}

// coreImage is a process's, in these cgroups.
func coreImage(t testing.TB, set uint32) []byte {
	t.Helper()
	data, err := proto.MarshalOptions{AllowPartial: true}.Marshal(&criucore.CoreEntry{
		Mtype: criucore.CoreEntry_X86_64.Enum(), Tc: &criucore.TaskCoreEntry{
			TaskState: proto.Uint32(1), ExitCode: proto.Uint32(0), Personality: proto.Uint32(0), Flags: proto.Uint32(0), BlkSigset: proto.Uint64(0),
			Comm: proto.String("app"), CgSet: &set,
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return criuimage.New(criuimage.Core, data)
}
