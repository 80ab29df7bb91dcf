package inspect

import (
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/oci"
)

// Kind is what a descriptor is open on.
type Kind string

// The kinds. What the kernel names anon_inode:[x] and has no constant here has
// the kind x.
const (
	File      Kind = "file"
	Directory Kind = "directory"
	Symlink   Kind = "symlink" // itself, by O_PATH
	FIFO      Kind = "fifo"    // a named pipe
	Pipe      Kind = "pipe"
	Socket    Kind = "socket"
	Device    Kind = "device" // character
	Block     Kind = "block device"
	Terminal  Kind = "terminal"
	Memfd     Kind = "memfd"
	Namespace Kind = "namespace"
	Eventfd   Kind = "eventfd"
	Epoll     Kind = "eventpoll"
	Timerfd   Kind = "timerfd"
	Signalfd  Kind = "signalfd"
	Inotify   Kind = "inotify"
	Fanotify  Kind = "fanotify"
	Pidfd     Kind = "pidfd"
	BPFMap    Kind = "bpf-map"
	IOUring   Kind = "io_uring"
	Userfault Kind = "userfaultfd"
	Perf      Kind = "perf_event"
	Unknown   Kind = "unknown"
)

// FD is one descriptor of a process.
type FD struct {
	Number  int
	Kind    Kind
	Link    string // what /proc names it by
	Path    string // of what has one, as the process sees it
	Deleted bool   // the path is no name of it any more
	Links   uint64 // names that the file has
	Size    int64  // bytes on disk or in memory: a file with holes has fewer than its length
	Flags   int    // open(2)'s
	Device  uint64 // st_dev
	Inode   uint64
	Rdev    uint64 // of a device: which

	// Foreign tells that the file is on no mount that the container can see: it
	// was opened outside the container.
	Foreign bool
	mount   int // the mount's id
	// Stdio tells that it is one of the streams that the container got from its
	// runtime.
	Stdio  bool
	Socket *SocketInfo // of a socket
}

const deletedMark = " (deleted)"

func newFD(n int, link string, st fileStat) *FD {
	fd := &FD{
		Number: n, Link: link, Kind: kindOf(link, st),
		Links: st.Nlink, Size: st.Blocks * 512, Device: st.Dev, Inode: st.Ino, Rdev: st.Rdev,
	}
	if strings.HasPrefix(link, "/") && fd.Kind != Memfd {
		fd.Path, fd.Deleted = strings.CutSuffix(link, deletedMark)
	}
	return fd
}

func kindOf(link string, st fileStat) Kind {
	if name, ok := strings.CutPrefix(link, "anon_inode:"); ok {
		return Kind(strings.Trim(name, "[]"))
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		switch {
		case strings.HasPrefix(link, "/memfd:"):
			return Memfd
		case !strings.HasPrefix(link, "/"):
			return namespaceOr(link, Unknown)
		}
		return File
	case unix.S_IFDIR:
		return Directory
	case unix.S_IFLNK:
		return Symlink
	case unix.S_IFSOCK:
		return Socket
	case unix.S_IFBLK:
		return Block
	case unix.S_IFCHR:
		if isTerminal(st.Rdev) {
			return Terminal
		}
		return Device
	case unix.S_IFIFO:
		if strings.HasPrefix(link, "pipe:[") {
			return Pipe
		}
		return FIFO
	}
	if strings.HasPrefix(link, "pidfd:[") {
		return Pidfd
	}
	return namespaceOr(link, Unknown)
}

// namespaceOr knows what nsfs(5) names net:[4026531840].
func namespaceOr(link string, otherwise Kind) Kind {
	switch name, rest, _ := strings.Cut(link, ":["); name {
	case "cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts":
		if strings.HasSuffix(rest, "]") {
			return Namespace
		}
	}
	return otherwise
}

// isTerminal knows the majors of terminals (devices.txt of the kernel) that CRIU
// knows.
func isTerminal(rdev uint64) bool {
	major := unix.Major(rdev)
	return major == 4 || major == 5 || major >= 128 && major <= 143 || major == 188 || major == 204
}

// For makes of the descriptor what the rules of a policy look at.
func (fd *FD) For() oci.FD {
	d := oci.FD{Number: fd.Number, Type: oci.FDOther, Path: fd.Path, Stdio: fd.Stdio, Description: fd.Description()}
	switch {
	case fd.Kind == Pipe:
		d.Type = oci.FDPipe
	case fd.Path != "":
		d.Type = oci.FDFile
	case fd.Socket != nil:
		s := fd.Socket
		d.Type = oci.FDSocket
		d.Family = oci.FDFamily(s.Family)
		if s.Family == "ipv6" && (s.Local.Addr().Is4In6() || s.Peer.Addr().Is4In6()) {
			d.Family = oci.FDIPv4
		}
		d.Local, d.Remote, d.LocalPath, d.RemotePath, d.Listening = s.Local, s.Peer, s.LocalPath, s.PeerPath, s.Listening()
	}
	return d
}

// Description is what a rule's regex is compared with. But for sockets it has
// CRaC's form.
func (fd *FD) Description() string {
	switch fd.Kind {
	case File, Memfd:
		return "regular: " + fd.Link
	case Directory, Symlink, Socket:
		if fd.Socket != nil {
			return "socket: " + fd.Socket.String()
		}
		return string(fd.Kind) + ": " + fd.Link
	case FIFO, Pipe:
		return "fifo: " + fd.Link
	case Device, Terminal:
		return "character: " + fd.Link
	case Block:
		return "block: " + fd.Link
	}
	return "unknown: " + fd.Link
}

// String names the descriptor for people.
func (fd *FD) String() string {
	switch {
	case fd.Socket != nil:
		return fd.Socket.String()
	case fd.Path != "" && fd.Deleted:
		return fmt.Sprintf("%s %s (deleted)", fd.Kind, Printable(fd.Path))
	case fd.Path != "":
		return fmt.Sprintf("%s %s", fd.Kind, Printable(fd.Path))
	case fd.Kind == Memfd, fd.Kind == Unknown, fd.Kind == Namespace:
		return fmt.Sprintf("%s %s", fd.Kind, Printable(fd.Link))
	}
	return Printable(string(fd.Kind))
}

// Printable is a text of the workload's choice, such as the name of a file or
// of a program, as it is shown: quoted if it could do something to a terminal or
// a log.
func Printable(text string) string {
	if strings.ContainsFunc(text, func(r rune) bool { return !strconv.IsPrint(r) }) || !utf8.ValidString(text) {
		return strconv.Quote(text)
	}
	return text
}
