package inspect

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParseStatus(t *testing.T) {
	p, err := parseStatus([]byte("Name:\tevil\\nPid:\t7\\\\\nState:\tS (sleeping)\nTgid:\t70\nPid:\t70\nPPid:\t60\nTracerPid:\t5\nUid:\t1000\t1001\t1002\t1003\nGid:\t7\t8\t9\t10\nNSpid:\t70\t12\t3\nNSsid:\t70\t0\n"))
	if err != nil {
		t.Fatal(err)
	}
	if p.Name != "evil\nPid:\t7\\" || p.PID != 70 || p.Inside != 3 || p.Parent != 60 || p.Tracer != 5 || !slices.Equal(p.Users, []uint32{1000, 1001, 1002, 1003}) || !slices.Equal(p.Groups, []uint32{7, 8, 9, 10}) || !p.Detached || p.Zombie {
		t.Errorf("got %+v", p)
	}
	p, err = parseStatus([]byte("Name:\tx\nState:\tZ (zombie)\nPid:\t7\nPPid:\t1\n"))
	if err != nil || !p.Zombie || p.Inside != 7 {
		t.Errorf("zombie: %+v, %v", p, err)
	}
	if _, err := parseStatus([]byte("Name: x\n")); err == nil {
		t.Error("a status without a pid")
	}
}

func TestParseMaps(t *testing.T) {
	all := parseMaps([]byte(`00400000-00452000 r-xp 00000000 08:02 173521      /usr/bin/dbus-daemon
00651000-00652000 r--p 00051000 08:02 173521                             /a b (deleted)
00e03000-00e24000 rw-p 00000000 00:00 0                                  [heap]
35b1a21000-35b1a22000 rw-p 00000000 00:00 0
7f1000-7f2000 rw-s 00000000 00:01 32769                                  /SYSV00000000 (deleted)
7f3000-7f4000 rw-s 00000000 00:0f 1042                                   anon_inode:[io_uring]
7f4000-7f5000 rw-s 00000000 00:01 7                                      /dev/zero (deleted)
7f5000-7f6000 rw-s 00000000 00:01 8                                      /memfd:x (deleted)
7f6000-7f7000 rw-s 00000000 00:01 8                                      /[aio] (deleted)
7f7000-7f8000 rw-s 00000000 00:01 8                                      socket:[123]
7ffd1000-7ffd2000 r-xp 00000000 00:00 0                                  [vdso]
nonsense
`))
	want := []Mapping{
		{Range: "00400000-00452000", Path: "/usr/bin/dbus-daemon"},
		{Range: "00651000-00652000", Path: "/a b", Deleted: true},
		{Range: "7f1000-7f2000", Path: "/SYSV00000000", Deleted: true, SysV: true},
		{Range: "7f3000-7f4000", Path: "anon_inode:[io_uring]", Anon: true},
	}
	if !reflect.DeepEqual(all, want) {
		t.Errorf("got  %+v\nwant %+v", all, want)
	}
	for in, want := range map[string]string{"00400000-00452000": "400000-452000", "0-0001": "0-1", "ffff-10000": "ffff-10000"} {
		if got := trimRange(in); got != want {
			t.Errorf("%s becomes %s, want %s", in, got, want)
		}
	}
}

func TestKindOf(t *testing.T) {
	for _, tt := range []struct {
		link string
		mode uint32
		rdev uint64
		want Kind
	}{
		{"/x", unix.S_IFREG, 0, File},
		{"/memfd:x (deleted)", unix.S_IFREG, 0, Memfd},
		{"net:[4026531840]", unix.S_IFREG, 0, Namespace},
		{"dma-buf:/x", unix.S_IFREG, 0, Unknown},
		{"anon_inode:[eventfd]", 0, 0, Eventfd},
		{"anon_inode:[eventfd]", unix.S_IFREG, 0, Eventfd}, // kernels since 6.16, inside
		{"anon_inode:inotify", 0, 0, Inotify},
		{"anon_inode:kvm-vm", 0, 0, "kvm-vm"},
		{"pidfd:[123]", 0, 0, Pidfd},
		{"/dev/null", unix.S_IFCHR, unix.Mkdev(1, 3), Device},
		{"/dev/pts/0", unix.S_IFCHR, unix.Mkdev(136, 0), Terminal},
		{"/dev/ttyUSB0", unix.S_IFCHR, unix.Mkdev(188, 0), Terminal},
		{"/dev/fuse", unix.S_IFCHR, unix.Mkdev(10, 229), Device},
		{"/dev/sda", unix.S_IFBLK, unix.Mkdev(8, 0), Block},
		{"pipe:[7]", unix.S_IFIFO, 0, Pipe},
		{"/run/fifo", unix.S_IFIFO, 0, FIFO},
		{"what", 0, 0, Unknown},
	} {
		if got := kindOf(tt.link, fileStat{Mode: tt.mode, Rdev: tt.rdev}); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.link, got, tt.want)
		}
	}
}

// The names of programs and files are the workload's to choose.
func FuzzParseProc(f *testing.F) {
	f.Add([]byte("Name:\ta\nState:\tS\nPid:\t1\nPPid:\t0\nNSpid:\t1\t2\n"))
	f.Add([]byte("0040-0045 r-xp 00000000 08:02 173521      /usr/bin (deleted)\n"))
	f.Add([]byte("pos:\t0\nflags:\t0100002\nmnt_id:\t15\n"))
	// An attribute that is not padded: 10 bytes, of which 6 are its value.
	f.Add([]byte("\x01\x01\x01\x00\x07\x00\x00\x00aaaaaaaa\x0a\x00\x02\x00bbbbbb"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if p, err := parseStatus(data); (p == nil) == (err == nil) {
			t.Errorf("process %v beside error %v", p, err)
		}
		for _, m := range parseMaps(data) {
			if m.Path == "" || strings.Contains(m.Path, "\n") || !strings.Contains(string(data), m.Path) {
				t.Errorf("mapping %+v", m)
			}
			trimRange(m.Range)
		}
		parseFdinfo(data)
		parseUnixDiag(data)
		kindOf(string(data), fileStat{Mode: unix.S_IFREG})
	})
}
