package inspect

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/oci"
)

func TestJudge(t *testing.T) {
	end := netip.MustParseAddrPort
	socket := func(s SocketInfo) []FD { return []FD{{Number: 5, Kind: Socket, Socket: &s}} }
	tcp := SocketInfo{Family: "ipv4", Type: "stream", Protocol: "tcp", State: "established", Local: end("10.0.0.2:40000"), Peer: end("10.0.0.9:5432")}
	listener := SocketInfo{Family: "ipv6", Type: "stream", Protocol: "tcp", State: "listen", Local: end("[::]:80")}
	with := func(s SocketInfo, change func(*SocketInfo)) SocketInfo { change(&s); return s }
	unixOut := SocketInfo{Family: "unix", Type: "dgram", PeerInode: 7, External: true, PeerHere: true, PeerPath: "/dev/log"}
	file := func(f FD) []FD { f.Number = 5; f.Path = "/f"; return []FD{f} }

	for _, tt := range []struct {
		name    string
		process Process
		on      Conditions
		want    string // "level code", separated by commas; empty: nothing
		says    string
	}{
		{name: "nothing"},
		{name: "ordinary descriptors", process: Process{FDs: []FD{
			{Kind: File, Path: "/x", Links: 1},
			{Kind: Directory, Path: "/x", Deleted: true},
			{Kind: FIFO, Path: "/x"},
			{Kind: Pipe},
			{Kind: Terminal, Path: "/dev/pts/0"},
			{Kind: Memfd},
			{Kind: Namespace},
			{Kind: Eventfd},
			{Kind: Epoll},
			{Kind: Timerfd},
			{Kind: Signalfd},
			{Kind: Inotify},
			{Kind: Fanotify},
			{Kind: Pidfd},
			{Kind: Symlink, Path: "/x"},
			{Kind: Device, Path: "/dev/null", Rdev: unix.Mkdev(1, 3)},
			{Kind: Device, Path: "/dev/net/tun", Rdev: unix.Mkdev(10, 200)},
		}}},
		{name: "io_uring", process: Process{FDs: []FD{{Kind: IOUring}}}, want: "error io_uring", says: "kernel.io_uring_disabled=2"},
		{name: "io_uring without a descriptor", process: Process{Mapped: []Mapping{{Path: "anon_inode:[io_uring]", Anon: true}}}, want: "error io_uring"},
		{name: "userfaultfd", process: Process{FDs: []FD{{Kind: Userfault}}}, want: "error kind", says: "before-checkpoint"},
		{name: "perf", process: Process{FDs: []FD{{Kind: Perf}}}, want: "error kind"},
		{name: "what nobody knows", process: Process{FDs: []FD{{Kind: "kvm-vm"}}}, want: "error kind"},
		{name: "BPF", process: Process{FDs: []FD{{Kind: BPFMap}}}, want: "error bpf"},
		{name: "device", process: Process{FDs: file(FD{Kind: Device, Rdev: unix.Mkdev(10, 229)})}, want: "error device", says: "10:229"},
		{name: "block device", process: Process{FDs: file(FD{Kind: Block})}, want: "error device"},
		{name: "terminal of outside", process: Process{FDs: file(FD{Kind: Terminal, Foreign: true})}, want: "error terminal"},
		{name: "file of outside", process: Process{FDs: file(FD{Kind: File, Foreign: true, Deleted: true})}, want: "error foreign"},

		{name: "deleted", process: Process{FDs: file(FD{Kind: File, Deleted: true, Size: 3 << 20})}, want: "info deleted", says: "3.0 MiB"},
		{name: "deleted at the limit", process: Process{FDs: file(FD{Kind: File, Deleted: true, Size: GhostLimit})}, want: "info deleted"},
		{name: "deleted and large", process: Process{FDs: file(FD{Kind: File, Deleted: true, Size: GhostLimit + 1})}, want: "error deleted", says: "1024.0 MiB"},
		{name: "deleted with another name", process: Process{FDs: file(FD{Kind: File, Deleted: true, Links: 1})}, want: "error linked"},
		{name: "mapped and deleted", process: Process{Mapped: []Mapping{{Path: "/x", Deleted: true}}}},
		{name: "mapped and deleted with another name", process: Process{Mapped: []Mapping{{Path: "/x", Deleted: true, Links: 1}}}, want: "error linked"},
		{name: "mapped device", process: Process{Mapped: []Mapping{{Path: "/dev/gpu", Device: true}}}, want: "error mapping"},
		{name: "mapped object", process: Process{Mapped: []Mapping{{Path: "anon_inode:[perf_event]", Anon: true}}}, want: "error mapping"},
		{name: "System V memory", process: Process{Mapped: []Mapping{{Path: "/SYSV0", SysV: true}}, Namespaces: map[string]uint64{"ipc": 7}}, on: Conditions{HostIPC: 8}},
		{name: "System V memory of the host", process: Process{Mapped: []Mapping{{Path: "/SYSV0", SysV: true}}, Namespaces: map[string]uint64{"ipc": 7}}, on: Conditions{HostIPC: 7}, want: "error sysv"},

		{name: "connection, by default", process: Process{FDs: socket(tcp)}, want: "warning connection", says: "tcp to 10.0.0.9:5432"},
		{name: "connection, close", process: Process{FDs: socket(tcp)}, on: Conditions{TCP: oci.TCPClose}, want: "warning connection", says: "a clone finds it closed"},
		{name: "connection, error", process: Process{FDs: socket(tcp)}, on: Conditions{TCP: oci.TCPError}, want: "error connection", says: "fd-policy"},
		{name: "connection, established", process: Process{FDs: socket(tcp)}, on: Conditions{TCP: oci.TCPEstablished}, want: "warning connection", says: "10.0.0.2"},
		{name: "connection that a policy closes", process: Process{FDs: socket(tcp)}, on: Conditions{TCP: oci.TCPError, Closed: func(fd *FD) bool { return fd.Number == 5 }}},
		{name: "listener", process: Process{FDs: socket(listener)}},
		{name: "listener of one address", process: Process{FDs: socket(with(listener, func(s *SocketInfo) { s.Family, s.Local = "ipv4", end("10.0.0.2:80") }))}, want: "warning address", says: "10.0.0.2"},
		{name: "listener of the loopback", process: Process{FDs: socket(with(listener, func(s *SocketInfo) { s.Family, s.Local = "ipv4", end("127.0.0.1:80") }))}},
		{name: "listener with a queue", process: Process{FDs: socket(with(listener, func(s *SocketInfo) { s.Pending = 3 }))}, want: "error pending", says: "3 connections"},
		{name: "UDP with a peer", process: Process{FDs: socket(SocketInfo{Family: "ipv4", Type: "dgram", Protocol: "udp", Local: end("10.0.0.2:4"), Peer: end("10.0.0.9:53")})}, want: "warning address"},
		{name: "UDP", process: Process{FDs: socket(SocketInfo{Family: "ipv4", Type: "dgram", Protocol: "udp", Local: end("0.0.0.0:53")})}},
		{name: "MPTCP", process: Process{FDs: socket(with(tcp, func(s *SocketInfo) { s.Protocol = "mptcp" }))}, want: "error mptcp", says: "GODEBUG"},
		{name: "SCTP", process: Process{FDs: socket(SocketInfo{Family: "ipv4", Type: "seqpacket", Protocol: "sctp"})}, want: "error protocol"},
		{name: "raw and ping", process: Process{FDs: append(socket(SocketInfo{Family: "ipv4", Type: "raw", Protocol: "raw"}), socket(SocketInfo{Family: "ipv4", Type: "dgram", Protocol: "icmp"})...)}},
		{name: "packet and netlink", process: Process{FDs: append(socket(SocketInfo{Family: "packet"}), socket(SocketInfo{Family: "netlink"})...)}},
		{name: "vsock", process: Process{FDs: socket(SocketInfo{Family: "vsock", Type: "stream"})}, want: "error family"},

		{name: "unix inside", process: Process{FDs: socket(SocketInfo{Family: "unix", Type: "stream", PeerInode: 7})}},
		{name: "unix stream outside", process: Process{FDs: socket(with(unixOut, func(s *SocketInfo) { s.Type = "stream" }))}, want: "error external", says: "half of a connection"},
		{name: "unix datagrams outside", process: Process{FDs: socket(unixOut)}, want: "warning external", says: "/dev/log"},
		{name: "unix datagrams of another namespace", process: Process{FDs: socket(with(unixOut, func(s *SocketInfo) { s.PeerHere = false }))}, want: "error external"},
		{name: "unix datagrams without a name", process: Process{FDs: socket(with(unixOut, func(s *SocketInfo) { s.PeerPath = "" }))}, want: "error external"},

		{name: "control socket", process: Process{FDs: socket(SocketInfo{Family: "unix", Type: "stream", PeerInode: 7, External: true})}, on: Conditions{Runtime: func(inode uint64) bool { return inode == 7 }}},
		{name: "names that trick a terminal", process: Process{FDs: []FD{{Kind: Block, Path: "/a\x1b[2J"}}}, want: "error device", says: `"/a\x1b[2J"`},

		{name: "traced", process: Process{Tracer: 99}, want: "error traced", says: "process 99"},
		{name: "session", process: Process{Detached: true}, want: "error session"},
		{name: "another user", process: Process{Users: []uint32{1000}, Groups: []uint32{0}}, want: "error limits", says: "CAP_SYS_RESOURCE"},
		{name: "another group", process: Process{Users: []uint32{0}, Groups: []uint32{0, 0, 5}}, want: "error limits"},
		{name: "another user, allowed", process: Process{Users: []uint32{1000}}, on: Conditions{Limits: true}},
		{name: "another user of a user namespace", process: Process{Users: []uint32{1000}, Namespaces: map[string]uint64{"user": 5}}, on: Conditions{UserNS: 4}},
		{name: "exec", process: Process{Outside: true, Tracer: 9, FDs: []FD{{Kind: IOUring}}}, want: "info exec"},
		{name: "zombie", process: Process{Zombie: true, Tracer: 9}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.process.PID, tt.process.Inside, tt.process.Name = 700, 7, "prog"
			c := &Container{Init: 700, Processes: []Process{tt.process}}
			var got []string
			text := ""
			for _, f := range c.Judge(tt.on) {
				got = append(got, string(f.Level)+" "+f.Code)
				text += f.What + " " + f.Why + " " + f.Fix
				if f.PID != 700 || f.Inside != 7 || f.Program != "prog" || f.What == "" || f.Why == "" || f.Level == Error && f.Fix == "" {
					t.Errorf("incomplete: %+v", f)
				}
			}
			if s := strings.Join(got, ", "); s != tt.want || !strings.Contains(text, tt.says) {
				t.Errorf("got %q, want %q: %s", s, tt.want, text)
			}
		})
	}
}

func TestJudgeNamespaces(t *testing.T) {
	own := map[string]uint64{"pid": 1, "pid_for_children": 1, "user": 2, "uts": 3, "ipc": 4, "time": 5, "time_for_children": 5, "cgroup": 6, "mnt": 7, "net": 8}
	for _, tt := range []struct {
		ns   string
		want bool
	}{{"pid", true}, {"user", true}, {"uts", true}, {"ipc", true}, {"time_for_children", true}, {"cgroup", true}, {"mnt", false}, {"net", false}, {"pid_for_children", false}} {
		child := make(map[string]uint64)
		for k, v := range own {
			child[k] = v
		}
		child[tt.ns] = 99
		c := &Container{Init: 1, Processes: []Process{{PID: 1, Namespaces: own}, {PID: 2, Namespaces: child}}}
		got := c.Judge(Conditions{Limits: true, HostIPC: 50})
		if (len(got) == 1) != tt.want || len(got) > 1 {
			t.Errorf("%s: %+v", tt.ns, got)
		}
	}
}

// What is the same becomes one finding.
func TestJudgeGroups(t *testing.T) {
	peer := func(n int, inode uint64, to string) FD {
		return FD{Number: n, Kind: Socket, Inode: inode, Socket: &SocketInfo{Family: "ipv4", Protocol: "tcp", State: "established", Peer: netip.MustParseAddrPort(to)}}
	}
	a, b, other := peer(5, 50, "10.0.0.9:5432"), peer(6, 60, "10.0.0.9:5432"), peer(7, 70, "10.0.0.8:80")
	c := &Container{Init: 1, Processes: []Process{
		{PID: 1, FDs: []FD{a, b, other}},
		{PID: 2, FDs: []FD{a, b}},                         // a child shares them
		{PID: 3, FDs: []FD{peer(5, 51, "10.0.0.9:5432")}}, // a connection of its own
	}}
	got := c.Judge(Conditions{Limits: true})
	if len(got) != 3 {
		t.Fatalf("%d findings: %+v", len(got), got)
	}
	if f := got[0]; !slices.Equal(f.FDs, []int{5, 6}) || f.PID != 1 || f.Others != 1 {
		t.Errorf("first: %+v", f)
	}
	if f := got[1]; !slices.Equal(f.FDs, []int{7}) || f.Others != 0 {
		t.Errorf("second: %+v", f)
	}
	if f := got[2]; !slices.Equal(f.FDs, []int{5}) || f.PID != 3 || f.Others != 0 {
		t.Errorf("third: %+v", f)
	}
}
