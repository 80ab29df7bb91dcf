package inspect

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// SocketInfo is what is known of a socket.
type SocketInfo struct {
	Family   string // ipv4, ipv6, unix, netlink, packet, …
	Type     string // stream, dgram, seqpacket, raw
	Protocol string // of ipv4 and ipv6: tcp, udp, mptcp, …
	State    string // of TCP and unix: as ss(8) names them

	Local, Peer         netip.AddrPort // of ipv4 and ipv6, if it has one
	LocalPath, PeerPath string         // of unix; "@…" for an abstract name
	Pending             int            // of a listening TCP socket: connections that wait to be accepted

	// Inbound tells that the container listens on the local port: a client of the
	// container is at the other end.
	Inbound bool

	Cookie    uint64 // the kernel's unique number for it
	Device    int    // the interface that it is bound to; 0: none
	PeerInode uint64 // of unix: the socket at the other end
	// PeerHere tells that the other end is in the same network namespace.
	PeerHere bool
	// External tells that no process of the container holds the other end.
	External bool
}

// Listening tells whether it waits for connections.
func (s *SocketInfo) Listening() bool { return s.State == "listen" }

// Connected tells whether there is another end: of TCP in any state between the
// first and the last packet, of UDP a fixed peer.
func (s *SocketInfo) Connected() bool {
	switch {
	case s.Protocol == "tcp" || s.Protocol == "mptcp":
		return s.State != "listen" && s.State != "close"
	case s.Family == "unix":
		return s.PeerInode != 0
	}
	return s.Peer.IsValid()
}

// String tells the essence.
func (s *SocketInfo) String() string {
	var b strings.Builder
	name := s.Protocol
	if name == "" {
		name = s.Family + " " + s.Type
	}
	b.WriteString(name)
	local, peer := Printable(s.LocalPath), Printable(s.PeerPath)
	if s.Local.IsValid() {
		local = plainAddr(s.Local)
	}
	if s.Peer.IsValid() {
		peer = plainAddr(s.Peer)
	}
	if local != "" {
		b.WriteString(" " + local)
	}
	switch {
	case s.Listening():
		b.WriteString(" listening")
	case peer != "":
		b.WriteString(" -> " + peer)
	}
	if s.Protocol != "" && s.State != "" && !s.Listening() && s.State != "established" {
		b.WriteString(" (" + s.State + ")")
	}
	return b.String()
}

// Connection names what TCP connections have in common that go to one server, or
// come from one client: a client's port is of no interest.
func (s *SocketInfo) Connection() string {
	switch {
	case !s.Peer.IsValid():
		return s.Protocol + " with a peer"
	case s.Inbound:
		return fmt.Sprintf("%s from %s to port %d", s.Protocol, s.Peer.Addr().Unmap(), s.Local.Port())
	}
	return s.Protocol + " to " + plainAddr(s.Peer)
}

// plainAddr writes an IPv4 address inside an IPv6 one as what it is.
func plainAddr(a netip.AddrPort) string {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()).String()
}

// Duplicate gives this process a descriptor of its own for a socket of another
// one. The caller closes it. It needs the right to ptrace(2) the other process,
// and Linux 5.6.
func Duplicate(pid, n int) (int, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return -1, gone(os.NewSyscallError("pidfd_open", err))
	}
	defer unix.Close(pidfd)
	return duplicate(pidfd, n)
}

func duplicate(pidfd, n int) (int, error) {
	fd, err := unix.PidfdGetfd(pidfd, n, 0)
	if errors.Is(err, unix.EBADF) || errors.Is(err, unix.ESRCH) {
		return -1, fmt.Errorf("%w: %w", errGone, err)
	}
	return fd, os.NewSyscallError("pidfd_getfd", err)
}

func (d *procDir) socket(n int) (*SocketInfo, error) {
	fd, err := duplicate(d.pidfd, n)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	return socketOf(fd)
}

// socketOf asks a socket about itself.
func socketOf(fd int) (*SocketInfo, error) {
	domain, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
	if errors.Is(err, unix.ENOTSOCK) || errors.Is(err, unix.EBADF) {
		return nil, fmt.Errorf("%w: %w", errGone, err) // another file has the number by now
	}
	if err != nil {
		return nil, os.NewSyscallError("getsockopt SO_DOMAIN", err)
	}
	kind, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil {
		return nil, os.NewSyscallError("getsockopt SO_TYPE", err)
	}
	s := &SocketInfo{Family: familyName(domain), Type: typeName(kind)}
	s.Cookie, _ = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	listening, _ := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ACCEPTCONN)
	if listening != 0 {
		s.State = "listen"
	}
	// No address, and none that the library knows, are the same here.
	local, _ := unix.Getsockname(fd)
	peer, _ := unix.Getpeername(fd)
	switch domain {
	case unix.AF_INET, unix.AF_INET6:
		s.Local, s.Peer = addrOf(local), addrOf(peer)
		protocol, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PROTOCOL)
		if err != nil {
			return nil, os.NewSyscallError("getsockopt SO_PROTOCOL", err)
		}
		s.Protocol = protocolName(protocol, kind)
		if s.Protocol == "raw" { // its port is the number of the protocol
			s.Local, s.Peer = withoutPort(s.Local), withoutPort(s.Peer)
		}
		s.Device, _ = unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX)
		if s.Protocol == "tcp" || s.Protocol == "mptcp" {
			s.tcp(fd)
		}
	case unix.AF_UNIX:
		s.LocalPath, s.PeerPath = pathOf(local), pathOf(peer)
	}
	return s, nil
}

func (s *SocketInfo) tcp(fd int) {
	info, err := unix.GetsockoptTCPInfo(fd, unix.SOL_TCP, unix.TCP_INFO)
	if err != nil {
		return
	}
	s.State = tcpState(info.State)
	if s.Listening() {
		s.Pending = int(info.Unacked) // tcp(7) does not say it: the length of the queue
	}
}

func addrOf(sa unix.Sockaddr) netip.AddrPort {
	var a netip.Addr
	port := 0
	switch sa := sa.(type) {
	case *unix.SockaddrInet4:
		a, port = netip.AddrFrom4(sa.Addr), sa.Port
	case *unix.SockaddrInet6:
		a, port = netip.AddrFrom16(sa.Addr), sa.Port
	}
	if port == 0 && (!a.IsValid() || a.IsUnspecified()) {
		return netip.AddrPort{} // not bound
	}
	return netip.AddrPortFrom(a, uint16(port))
}

func withoutPort(a netip.AddrPort) netip.AddrPort {
	if !a.IsValid() || a.Addr().IsUnspecified() {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(a.Addr(), 0)
}

func pathOf(sa unix.Sockaddr) string {
	if sa, ok := sa.(*unix.SockaddrUnix); ok && sa.Name != "@" { // which has no name
		return sa.Name
	}
	return ""
}

func familyName(domain int) string {
	switch domain {
	case unix.AF_UNIX:
		return "unix"
	case unix.AF_INET:
		return "ipv4"
	case unix.AF_INET6:
		return "ipv6"
	case unix.AF_NETLINK:
		return "netlink"
	case unix.AF_PACKET:
		return "packet"
	case unix.AF_VSOCK:
		return "vsock"
	case unix.AF_XDP:
		return "xdp"
	case unix.AF_ALG:
		return "alg"
	case unix.AF_CAN:
		return "can"
	case unix.AF_BLUETOOTH:
		return "bluetooth"
	case unix.AF_TIPC:
		return "tipc"
	case unix.AF_SMC:
		return "smc"
	case unix.AF_RDS:
		return "rds"
	case unix.AF_KCM:
		return "kcm"
	}
	return "family-" + strconv.Itoa(domain)
}

func typeName(kind int) string {
	switch kind {
	case unix.SOCK_STREAM:
		return "stream"
	case unix.SOCK_DGRAM:
		return "dgram"
	case unix.SOCK_RAW:
		return "raw"
	case unix.SOCK_SEQPACKET:
		return "seqpacket"
	case unix.SOCK_RDM:
		return "rdm"
	}
	return "type-" + strconv.Itoa(kind)
}

func protocolName(protocol, kind int) string {
	if kind == unix.SOCK_RAW {
		return "raw"
	}
	switch protocol {
	case unix.IPPROTO_TCP:
		return "tcp"
	case unix.IPPROTO_UDP:
		return "udp"
	case unix.IPPROTO_UDPLITE:
		return "udplite"
	case unix.IPPROTO_MPTCP:
		return "mptcp"
	case unix.IPPROTO_SCTP:
		return "sctp"
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		return "icmp"
	}
	return "protocol-" + strconv.Itoa(protocol)
}

// tcpState names the kernel's states (include/net/tcp_states.h) as ss(8) does.
func tcpState(n uint8) string {
	names := []string{
		"", "established", "syn-sent", "syn-recv", "fin-wait-1", "fin-wait-2", "time-wait", "close",
		"close-wait", "last-ack", "listen", "closing", "syn-recv", "bound-inactive",
	}
	if int(n) < len(names) {
		return names[n]
	}
	return "state-" + strconv.Itoa(int(n))
}
