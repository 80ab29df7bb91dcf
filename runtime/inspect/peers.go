package inspect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/runtime/thread"
)

// resolvePeers finds what a socket does not tell about itself: the other end of
// a unix socket, and whom a TCP socket tries to connect to. The kernel's socket
// monitoring (sock_diag(7)) knows, in the socket's network namespace.
func resolvePeers(c *Container) error {
	type place struct {
		pid     int
		sockets []*FD
	}
	places := make(map[uint64]*place)
	for i := range c.Processes {
		p := &c.Processes[i]
		for j := range p.FDs {
			fd := &p.FDs[j]
			if fd.Socket == nil || fd.Socket.Family != "unix" && fd.Socket.State != "syn-sent" {
				continue
			}
			// A socket belongs to the namespace in which it was made; that of its
			// process is nearly always the same.
			ns := p.Namespaces["net"]
			if places[ns] == nil {
				places[ns] = &place{pid: p.PID}
			}
			places[ns].sockets = append(places[ns].sockets, fd)
		}
	}
	for _, at := range places {
		var d diagnosis
		err := thread.InNetwork(at.pid, func() error { return d.ask(at.sockets) })
		if errors.Is(gone(err), errGone) {
			continue
		}
		if err != nil {
			return fmt.Errorf("ask for the sockets of process %d's network namespace: %w", at.pid, err)
		}
		d.tell(at.sockets)
	}
	return nil
}

// diagnosis is what one network namespace answers, by inode.
type diagnosis struct {
	unix map[uint64]unixSocket
	tcp  map[uint64]*netlink.Socket
}

type unixSocket struct {
	inode uint64
	state uint8
	peer  uint64 // inode; 0: none
}

// attempts bound how often a list is asked for that changes while it is given.
const attempts = 5

func (d *diagnosis) ask(sockets []*FD) error {
	families := make(map[string]bool)
	for _, fd := range sockets {
		families[fd.Socket.Family] = true
	}
	d.unix, d.tcp = make(map[uint64]unixSocket), make(map[uint64]*netlink.Socket)
	if families["unix"] {
		list, err := again(unixSockets)
		if err != nil {
			return err
		}
		for _, s := range list {
			d.unix[s.inode] = s
		}
	}
	for name, family := range map[string]uint8{"ipv4": unix.AF_INET, "ipv6": unix.AF_INET6} {
		if !families[name] {
			continue
		}
		list, err := again(func() ([]*netlink.Socket, error) { return netlink.SocketDiagTCP(family) })
		if err != nil {
			return err
		}
		for _, s := range list {
			d.tcp[uint64(s.INode)] = s
		}
	}
	return nil
}

func again[T any](list func() ([]T, error)) (all []T, err error) {
	for range attempts {
		if all, err = list(); !errors.Is(err, netlink.ErrDumpInterrupted) {
			return all, err
		}
	}
	return all, nil // as good as it gets on a busy machine
}

func (d *diagnosis) tell(sockets []*FD) {
	for _, fd := range sockets {
		s := fd.Socket
		if t := d.tcp[fd.Inode]; t != nil && !s.Peer.IsValid() {
			if a, ok := netip.AddrFromSlice(t.ID.Destination); ok {
				s.Peer = netip.AddrPortFrom(a.Unmap(), t.ID.DestinationPort)
			}
		}
		u, ok := d.unix[fd.Inode]
		if !ok {
			continue
		}
		if s.State == "" {
			s.State = tcpState(u.state)
		}
		s.PeerInode = u.peer
		_, s.PeerHere = d.unix[s.PeerInode]
	}
}

// unixSockets lists the unix sockets of the thread's network namespace. The
// library's own function reads past the end of names.
func unixSockets() (all []unixSocket, err error) {
	req := nl.NewNetlinkRequest(nl.SOCK_DIAG_BY_FAMILY, unix.NLM_F_DUMP)
	req.AddData(unixDiagRequest{})
	err = req.ExecuteIter(unix.NETLINK_SOCK_DIAG, nl.SOCK_DIAG_BY_FAMILY, func(msg []byte) bool {
		s, ok := parseUnixDiag(msg)
		if ok {
			all = append(all, s)
		}
		return true
	})
	return all, err
}

// unixDiagRequest asks for all unix sockets with their peers: struct
// unix_diag_req of sock_diag(7).
type unixDiagRequest struct{}

func (unixDiagRequest) Len() int { return 24 }

func (r unixDiagRequest) Serialize() []byte {
	b := make([]byte, r.Len())
	b[0] = unix.AF_UNIX
	binary.NativeEndian.PutUint32(b[4:], ^uint32(0))                 // udiag_states: any
	binary.NativeEndian.PutUint32(b[12:], 1<<netlink.UNIX_DIAG_PEER) // udiag_show
	return b
}

// parseUnixDiag reads struct unix_diag_msg and the attribute behind it.
func parseUnixDiag(msg []byte) (s unixSocket, ok bool) {
	const header = 16
	if len(msg) < header || msg[0] != unix.AF_UNIX {
		return s, false
	}
	s.state, s.inode = msg[2], uint64(binary.NativeEndian.Uint32(msg[4:]))
	// The kernel pads every attribute to four bytes. The library counts on it
	// and panics where the last one is not.
	attrs, err := nl.ParseRouteAttr(msg[header : len(msg)&^(unix.RTA_ALIGNTO-1)])
	if err != nil {
		return s, false
	}
	for _, a := range attrs {
		if a.Attr.Type == netlink.UNIX_DIAG_PEER && len(a.Value) >= 4 {
			s.peer = uint64(binary.NativeEndian.Uint32(a.Value))
		}
	}
	return s, true
}
