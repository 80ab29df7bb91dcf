package fdpolicy

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/runtime/inspect"
	"github.com/crac-shim/crac/runtime/thread"
)

// closeConnection ends a TCP connection, or takes its peer from a UDP socket, so
// that the program sees an error and not silence. The kernel does it by
// SOCK_DESTROY (sock_diag(7)); where it was built without
// (CONFIG_INET_DIAG_DESTROY), we do on a duplicate what the program could do
// itself.
func closeConnection(pid int, fd *inspect.FD) error {
	own, err := inspect.Duplicate(pid, fd.Number)
	if err != nil {
		return err
	}
	defer unix.Close(own)
	cookie, err := unix.GetsockoptUint64(own, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err != nil || cookie != fd.Socket.Cookie {
		return fmt.Errorf("it is another socket by now (%w)", errors.Join(err, unix.ESTALE))
	}
	for _, closeIt := range []func(int, *inspect.SocketInfo) error{destroy, disconnect} {
		if err = closeIt(own, fd.Socket); err == nil {
			if err = isClosed(own, fd.Socket); err == nil {
				return nil
			}
		}
	}
	return err
}

// isClosed checks that the socket has no other end any more.
func isClosed(fd int, s *inspect.SocketInfo) error {
	if s.Protocol == "tcp" {
		info, err := unix.GetsockoptTCPInfo(fd, unix.SOL_TCP, unix.TCP_INFO)
		if err != nil {
			return os.NewSyscallError("getsockopt TCP_INFO", err)
		}
		const closed = 7 // TCP_CLOSE
		if info.State != closed {
			return fmt.Errorf("it is still connected, in state %d", info.State)
		}
		return nil
	}
	if _, err := unix.Getpeername(fd); !errors.Is(err, unix.ENOTCONN) {
		return fmt.Errorf("it still has a peer")
	}
	return nil
}

// destroy asks the kernel to abort the connection: whoever waits on the socket,
// or uses it next, gets ECONNABORTED, and the other end a reset.
func destroy(fd int, s *inspect.SocketInfo) error {
	// The socket's namespace is nearly always its process's, but need not be.
	ns, err := unix.IoctlRetInt(fd, unix.SIOCGSKNS)
	if err != nil {
		return os.NewSyscallError("ioctl SIOCGSKNS", err)
	}
	defer unix.Close(ns)
	return thread.InNetworkOf(ns, func() error {
		req := nl.NewNetlinkRequest(nl.SOCK_DESTROY, unix.NLM_F_ACK)
		req.AddData(&diagRequest{s})
		_, err := req.Execute(unix.NETLINK_SOCK_DIAG, 0)
		return os.NewSyscallError("SOCK_DESTROY", err)
	})
}

// diagRequest names one socket: struct inet_diag_req_v2 of sock_diag(7).
type diagRequest struct{ *inspect.SocketInfo }

func (*diagRequest) Len() int { return 56 }

func (r *diagRequest) Serialize() []byte {
	b := make([]byte, r.Len())
	b[0] = unix.AF_INET
	if r.Family == "ipv6" {
		b[0] = unix.AF_INET6
	}
	switch r.Protocol {
	case "tcp":
		b[1] = unix.IPPROTO_TCP
	case "udp":
		b[1] = unix.IPPROTO_UDP
	case "udplite":
		b[1] = unix.IPPROTO_UDPLITE
	}
	binary.NativeEndian.PutUint32(b[4:], ^uint32(0)) // idiag_states
	// idiag_id: ports, addresses, interface, cookie
	binary.BigEndian.PutUint16(b[8:], r.Local.Port())
	binary.BigEndian.PutUint16(b[10:], r.Peer.Port())
	copy(b[12:28], r.Local.Addr().AsSlice())
	copy(b[28:44], r.Peer.Addr().AsSlice())
	binary.NativeEndian.PutUint32(b[44:], uint32(r.Device))
	binary.NativeEndian.PutUint32(b[48:], uint32(r.Cookie))
	binary.NativeEndian.PutUint32(b[52:], uint32(r.Cookie>>32))
	return b
}

// disconnect does what a program does with connect(2) to AF_UNSPEC. TCP is reset
// by it and shows ECONNRESET. UDP would be silent: first it is shut down, which
// ends what waits for a packet.
func disconnect(fd int, s *inspect.SocketInfo) error {
	if s.Protocol != "tcp" {
		if err := unix.Shutdown(fd, unix.SHUT_RDWR); err != nil && !errors.Is(err, unix.ENOTCONN) {
			return os.NewSyscallError("shutdown", err)
		}
	}
	unspec := unix.RawSockaddr{Family: unix.AF_UNSPEC}
	_, _, errno := unix.Syscall(unix.SYS_CONNECT, uintptr(fd), uintptr(unsafe.Pointer(&unspec)), unsafe.Sizeof(unspec))
	if errno != 0 {
		return os.NewSyscallError("connect", errno)
	}
	return nil
}
