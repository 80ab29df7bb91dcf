package convert

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/mnt"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/regfile"
	skinet "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-inet"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"

	"github.com/crac-shim/crac/images/compress"
	"github.com/crac-shim/crac/oci/criuimage"
)

// openIn is an open file in a mount.
func openIn(mount int32, name string) *fdinfo.FileEntry {
	return &fdinfo.FileEntry{
		Type: fdinfo.FdTypes_REG.Enum(), Id: proto.Uint32(1),
		Reg: &regfile.RegFileEntry{
			Id: proto.Uint32(1), Flags: proto.Uint32(0), Pos: proto.Uint64(0), Fown: fown(), Name: &name, MntId: &mount, Mode: proto.Uint32(0o40555),
		},
	}
}

// podmanMounts are those of a container in podman on cgroup v1.
func podmanMounts() []*mnt.MntEntry {
	return []*mnt.MntEntry{
		mountAt(9, 8, "/sys/fs/cgroup/cpu", "/sys/fs/cgroup/cpu"),
		mountAt(8, 7, "/sys/fs/cgroup", ""),
		mountAt(7, 1, "/sys", ""),
		mountAt(6, 1, "/data", "/data"),
		mountAt(5, 4, "/dev/shm", "/dev/shm"),
		mountAt(4, 1, "/dev", ""),
		mountAt(3, 1, "/etc/hostname", "/etc/hostname"),
		mountAt(2, 1, "/etc/hosts", "/etc/hosts"),
		mountAt(11, 1, "/proc/keys", "/dev/null"),
		mountAt(1, 0, "/", ""),
	}
}

func places(t *testing.T, d dump) (all []string) {
	t.Helper()
	m, err := d.readMounts()
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range m.entries {
		all = append(all, e.GetMountpoint())
	}
	slices.Sort(all)
	return all
}

// An import leaves what a plain request fits.
func TestAdapt(t *testing.T) {
	base := []string{"/", "/data", "/dev", "/dev/shm", "/proc/keys", "/sys"}
	for _, tt := range []struct {
		name  string
		files []*fdinfo.FileEntry
		keep  []string
		more  []string // that stay beside base
	}{
		{name: "nothing open", files: []*fdinfo.FileEntry{openIn(1, "/etc/hosts")}},
		{name: "hosts open", files: []*fdinfo.FileEntry{openIn(2, "/etc/hosts")}, more: []string{"/etc/hosts"}},
		{name: "cgroup open", files: []*fdinfo.FileEntry{openIn(9, "/sys/fs/cgroup/cpu/cpu.shares")}, more: []string{"/sys/fs/cgroup", "/sys/fs/cgroup/cpu"}},
		{name: "kept", keep: []string{"/sys/fs/cgroup", "/etc/hostname/"}, more: []string{"/etc/hostname", "/sys/fs/cgroup", "/sys/fs/cgroup/cpu"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := dumpOf(t, podmanMounts(), tt.files...)
			put(t, d.dir, "tmpfs-dev-108.tar.gz.img", nil) // of /sys/fs/cgroup
			put(t, d.dir, "tmpfs-dev-105.tar.gz.img", []byte("another /dev/shm"))
			put(t, d.dir, "netdev-10.img", []byte("interfaces"))
			shm := filepath.Join(t.TempDir(), "shm.tar")
			put(t, filepath.Dir(shm), "shm.tar", tarOf(t, entry{name: "state", data: "1"}))
			s := &source{report: &Report{}, dump: d, shm: shm, spec: &specs.Spec{Mounts: []specs.Mount{
				{Destination: "/etc/hosts", Type: "bind"}, {Destination: "/dev/shm", Type: "bind"}, {Destination: "/data", Type: "bind"},
			}}}
			if err := s.adapt(t.Context(), tt.keep, silent); err != nil {
				t.Fatal(err)
			}
			want := slices.Sorted(slices.Values(slices.Concat(base, tt.more)))
			if got := places(t, d); !slices.Equal(got, want) {
				t.Errorf("mounts %q, want %q", got, want)
			}
			_, err := os.Stat(filepath.Join(d.dir, "tmpfs-dev-108.tar.gz.img"))
			if gone := errors.Is(err, os.ErrNotExist); gone == slices.Contains(want, "/sys/fs/cgroup") {
				t.Errorf("the files of /sys/fs/cgroup: %v", err)
			}
			if _, err := os.Stat(filepath.Join(d.dir, "netdev-10.img")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the interfaces are still there: %v", err)
			}
			net, err := os.ReadFile(filepath.Join(d.dir, "netns-10.img"))
			if err != nil || !bytes.Contains(net, []byte(externalNetwork)) {
				t.Errorf("the network namespace: %q, %v", net, err)
			}
			// /dev/shm comes with the dump now.
			packed, err := os.ReadFile(filepath.Join(d.dir, "tmpfs-dev-105.tar.gz.img"))
			if err != nil {
				t.Fatal(err)
			}
			plain, err := compress.Detect(bytes.NewReader(packed))
			if err != nil {
				t.Fatal(err)
			}
			var data bytes.Buffer
			if _, err := data.ReadFrom(plain); err != nil {
				t.Fatal(err)
			}
			if got := listed(t, data.Bytes()); !slices.Equal(got, []string{"state 1"}) {
				t.Errorf("/dev/shm holds %q", got)
			}
			for _, m := range s.spec.Mounts {
				if m.Destination == "/dev/shm" && m.Type != "tmpfs" || m.Destination == "/etc/hosts" && !slices.Contains(want, "/etc/hosts") {
					t.Errorf("the spec has %+v", m)
				}
			}
			if says := strings.Join(s.report.Left, "\n"); !strings.Contains(says, "a mount at /data") && !strings.Contains(says, "/data,") {
				t.Errorf("that /data is needed is not said: %s", says)
			}
		})
	}
}

// /dev/shm may hold as much as the rest of a source.
func TestOwnIsOfAnySize(t *testing.T) {
	d := dumpOf(t, podmanMounts())
	m, err := d.readMounts()
	if err != nil {
		t.Fatal(err)
	}
	const large = maxImage + 1
	if err := m.own(mountAt(5, 4, "/dev/shm", "/dev/shm"), io.LimitReader(zeroes{}, large)); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(filepath.Join(d.dir, "tmpfs-dev-105.tar.gz.img"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	plain, err := compress.Detect(f)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, plain); err != nil || n != large {
		t.Errorf("it holds %d bytes, %v", n, err)
	}
}

type zeroes struct{}

func (zeroes) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// What only our shim offers must not be needed after an export.
func TestExportAdapts(t *testing.T) {
	mounts := []*mnt.MntEntry{mountAt(3, 2, "/run/crac", "/run/crac"), mountAt(2, 1, "/run", ""), mountAt(4, 1, "/data", "/data"), mountAt(1, 0, "/", "")}
	for _, established := range []bool{false, true} {
		state := uint32(10)
		if established {
			state = 1
		}
		conn := &fdinfo.FileEntry{Type: fdinfo.FdTypes_INETSK.Enum(), Id: proto.Uint32(2), Isk: socket(6, state)}
		d := dumpOf(t, mounts, openIn(1, "/"), conn)
		put(t, d.dir, "netns-10.img", []byte("external"))
		put(t, d.dir, "core-1.img", coreImage(t, 5))
		e := &export{report: &Report{}, dump: d, m: facts("/run/crac", "/run", "/data"), spec: &specs.Spec{
			Linux: &specs.Linux{}, Mounts: []specs.Mount{{Destination: "/run", Type: "tmpfs"}, {Destination: "/data", Type: "bind"}},
		}}
		if err := e.adapt(); err != nil {
			t.Fatal(err)
		}
		m, err := d.readMounts()
		if err != nil {
			t.Fatal(err)
		}
		for _, o := range m.entries {
			if external(o) != (o.GetMountpoint() == "/data") {
				t.Errorf("%s is external: %v", o.GetMountpoint(), external(o))
			}
		}
		if i := slices.IndexFunc(e.spec.Mounts, func(m specs.Mount) bool { return m.Destination == "/run/crac" }); i < 0 || e.spec.Mounts[i].Type != "tmpfs" {
			t.Errorf("mounts of the spec: %+v", e.spec.Mounts)
		}
		if left, _ := filepath.Glob(filepath.Join(d.dir, "netns-*")); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
		i, err := d.inventory()
		if err != nil {
			t.Fatal(err)
		}
		if i.GetTcpClose() != established || i.GetRootCgSet() != 5 {
			t.Errorf("with connections %v: %+v", established, i)
		}
		parts, err := d.messages("files.img", criuimage.Files)
		if err != nil {
			t.Fatal(err)
		}
		files, err := unmarshal[fdinfo.FileEntry]("files.img", parts)
		if err != nil {
			t.Fatal(err)
		}
		if files[0].GetReg().Mode != nil || files[1].GetIsk().GetState() != state {
			t.Errorf("files %+v", files)
		}
		if says := strings.Join(e.report.Left, "\n"); !strings.Contains(says, "/data") || strings.Contains(says, "tcp-close") != established {
			t.Errorf("it says %s", says)
		}
	}
}

func socket(protocol, state uint32) *skinet.InetSkEntry {
	n := proto.Uint32(0)
	return &skinet.InetSkEntry{
		Id: proto.Uint32(2), Ino: n, Family: proto.Uint32(2), Type: proto.Uint32(1), Proto: &protocol, State: &state, SrcPort: n, DstPort: n,
		Flags: n, Backlog: n, Fown: fown(), Opts: sockOpts(),
	}
}

func TestDumpRefuses(t *testing.T) {
	good := dumpOf(t, podmanMounts())
	for name, change := range map[string]func(d dump){
		"two mount namespaces": func(d dump) { put(t, d.dir, "mountpoints-14.img", nil) },
		"no files":             func(d dump) { _ = d.remove("files.img") },
		"cut off":              func(d dump) { put(t, d.dir, "mountpoints-13.img", []byte("12345678\xff\xff\xff\x00x")) },
		"no message":           func(d dump) { put(t, d.dir, "files.img", criuimage.New(criuimage.Files, []byte{0xff})) },
		"no ids":               func(d dump) { _ = d.remove("ids-1.img") },
		"no inventory":         func(d dump) { _ = d.remove(inventoryName) },
		"a bad inventory":      func(d dump) { put(t, d.dir, inventoryName, []byte("xx")) },
	} {
		t.Run(name, func(t *testing.T) {
			d := dump{t.TempDir()}
			if err := os.CopyFS(d.dir, os.DirFS(good.dir)); err != nil {
				t.Fatal(err)
			}
			change(d)
			s := &source{report: &Report{}, dump: d, spec: &specs.Spec{}}
			if err := s.adapt(t.Context(), nil, silent); !errors.Is(err, ErrSource) {
				t.Errorf("got %v, want ErrSource", err)
			}
		})
	}
}

// The dump of another machine, and one that is none.
func TestManifest(t *testing.T) {
	spec := &specs.Spec{Linux: &specs.Linux{}, Process: &specs.Process{Args: []string{"app"}}}
	whole := filepath.Join("..", "inspect", "testdata", "dump")
	made := time.Date(2026, 1, 2, 3, 4, 5, 0, time.FixedZone("", 3600))
	s := &source{report: &Report{}, dump: dump{whole}, spec: spec, id: "c", created: made}
	m, err := s.manifest("ref")
	if goruntime.GOARCH != "amd64" {
		if !errors.Is(err, ErrSource) {
			t.Errorf("the dump of another architecture gives %v", err)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	if m.Container.ID != "c" || m.Name != "ref" || m.CRIU.Version < 40100 || m.TCPEstablished || m.Host.Kernel != "unknown" || m.Created.Format(time.RFC3339) != "2026-01-02T02:04:05Z" {
		t.Errorf("%+v", m)
	}
	large := dump{t.TempDir()}
	if err := os.CopyFS(large.dir, os.DirFS(whole)); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"pagemap-shmem-7.img", "mm-7.img"} {
		put(t, large.dir, name, nil)
		if err := os.Truncate(filepath.Join(large.dir, name), maxMaps/2); err != nil {
			t.Fatal(err)
		}
	}
	other := dump{t.TempDir()}
	put(t, other.dir, "core-1.img", criuimage.New(criuimage.Core, []byte{0x08, 0x06})) // march 6
	for name, s := range map[string]*source{
		"architecture": {report: &Report{}, dump: other, spec: spec, created: made},
		"page maps":    {report: &Report{}, dump: large, spec: spec, created: made},
		"no process":   {report: &Report{}, dump: dump{t.TempDir()}, spec: spec, created: made},
		"user namespace": {report: &Report{}, dump: dump{whole}, spec: &specs.Spec{
			Process: spec.Process, Linux: &specs.Linux{UIDMappings: []specs.LinuxIDMapping{{Size: 1}}},
		}, created: made},
		"no time": {report: &Report{}, dump: dump{whole}, spec: spec},
		"no spec": {report: &Report{}, dump: dump{whole}, spec: &specs.Spec{}, created: made},
	} {
		if _, err := s.manifest("ref"); !errors.Is(err, ErrSource) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzDump changes one file of a dump that is imported.
func FuzzDump(f *testing.F) {
	good := dumpOf(f, podmanMounts(), openIn(1, "/"))
	for _, name := range []string{"mountpoints-13.img", "files.img", "ids-1.img", inventoryName} {
		data, err := os.ReadFile(filepath.Join(good.dir, name))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(name, data)
	}
	f.Fuzz(func(t *testing.T, name string, data []byte) {
		if !slices.Contains([]string{"mountpoints-13.img", "files.img", "ids-1.img", inventoryName}, name) {
			return
		}
		top := t.TempDir()
		d := dump{filepath.Join(top, "dump")}
		if err := os.CopyFS(d.dir, os.DirFS(good.dir)); err != nil {
			t.Fatal(err)
		}
		put(t, d.dir, name, data)
		s := &source{report: &Report{}, dump: d, spec: &specs.Spec{}}
		if err := s.adapt(t.Context(), nil, silent); err != nil && !errors.Is(err, ErrSource) {
			t.Errorf("%v does not wrap ErrSource", err)
		}
		if left, err := os.ReadDir(top); err != nil || len(left) != 1 {
			t.Errorf("beside the dump lie %v, %v", left, err)
		}
	})
}
