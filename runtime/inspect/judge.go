package inspect

import (
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/oci"
)

// GhostLimit is the largest deleted but still open file that goes into a dump,
// in bytes on disk. CRIU's own limit, 1 MiB, is less than databases and JVMs keep.
const GhostLimit = 1 << 30

// Conditions are those of the dump that is judged.
type Conditions struct {
	TCP oci.TCPMode
	// Limits tells that who dumps may read the resource limits of other users'
	// processes (CAP_SYS_RESOURCE), in the user namespace UserNS.
	Limits bool
	UserNS uint64
	// HostIPC is the IPC namespace of who dumps: if it is the container's, too, its
	// System V objects are in no dump.
	HostIPC uint64
	// Runtime, unless nil, knows the runtime's own sockets by their inodes: it
	// ends their connections before a dump.
	Runtime func(inode uint64) bool
	// Closed, unless nil, tells which descriptors a policy closes before.
	Closed func(*FD) bool
}

// Judge tells what of a container CRIU 4 cannot dump, and what will be different
// in a clone. It knows CRIU's limits as far as they can be seen from outside.
func (c *Container) Judge(on Conditions) []Finding {
	j := &judge{Container: c, on: on}
	if init := c.Process(c.Init); init != nil {
		j.namespaces = init.Namespaces
	}
	for i := range c.Processes {
		p := &c.Processes[i]
		switch {
		case p.Zombie:
			continue
		case p.Outside:
			j.add(p, nil, finding{Info, "exec", "the process", "it was started by exec and is no child of the container's first process: no dump holds it, and no clone has it", ""})
			continue
		}
		j.process(p)
		for n := range p.FDs {
			fd := &p.FDs[n]
			if on.Closed == nil || !on.Closed(fd) {
				j.fd(p, fd)
			}
		}
		for _, m := range p.Mapped {
			j.mapping(p, m)
		}
	}
	return j.All
}

type judge struct {
	*Container
	Findings
	on         Conditions
	namespaces map[string]uint64 // the init's
}

// finding is a Finding without who.
type finding struct {
	level                Level
	code, what, why, fix string
}

func (j *judge) add(p *Process, fd *FD, f finding) {
	j.Add(p, fd, Finding{Level: f.level, Code: f.code, What: f.what, Why: f.why, Fix: f.fix})
}

const (
	closeIt  = "let the program close it at before-checkpoint (docs/hooks.md)"
	noUring  = "run it where it has no io_uring: under a seccomp profile that forbids it, as containerd's own does (nerdctl, Kubernetes' RuntimeDefault, ctr run --seccomp), or with the host's sysctl kernel.io_uring_disabled=2; programs then do without (Node since 22 uses it whatever UV_USE_IO_URING says); or let it close its rings at before-checkpoint (docs/hooks.md)"
	reopenIt = "let the program open the file again, or close it at before-checkpoint (docs/hooks.md); restart what was updated in place"
)

func (j *judge) process(p *Process) {
	if p.Tracer != 0 {
		j.add(p, nil, finding{Error, "traced", "the process", fmt.Sprintf("it is traced by process %d (a debugger, strace), and nobody else can trace it meanwhile, as CRIU has to", p.Tracer), "detach the tracer"})
	}
	if p.Detached && p.Namespaces["pid"] == j.namespaces["pid"] {
		j.add(p, nil, finding{Error, "session", "the process", "its session has no leader in the container: it was started from a session or terminal outside", "start it with setsid"})
	}
	root := func(ids []uint32) bool { return !slices.ContainsFunc(ids, func(id uint32) bool { return id != 0 }) }
	if !j.on.Limits && p.Namespaces["user"] == j.on.UserNS && (!root(p.Users) || !root(p.Groups)) {
		j.add(p, nil, finding{
			Error, "limits", "the process",
			"it has another user than root, and CRIU needs CAP_SYS_RESOURCE to read its resource limits, which containerd does not have here",
			"grant it to containerd, or run the container as root or in a user namespace; see cracctl doctor",
		})
	}
	for _, ns := range []string{"pid", "user", "uts", "ipc", "time", "time_for_children", "cgroup"} {
		if own, ok := j.namespaces[ns]; ok && p.Namespaces[ns] != own && p.Namespaces[ns] != 0 {
			name := strings.TrimSuffix(ns, "_for_children")
			j.add(p, nil, finding{
				Error, "namespace", "its " + name + " namespace", "it is another one than that of the container's first process, and CRIU carries no nested ones of this kind",
				"run what makes it (a sandbox, unshare) without it",
			})
		}
	}
}

func (j *judge) fd(p *Process, fd *FD) {
	what := fd.String()
	fail := func(code, why, fix string) { j.add(p, fd, finding{Error, code, what, why, fix}) }
	switch {
	case fd.Socket != nil:
		j.socket(p, fd)
	case fd.Foreign && fd.Kind == Terminal:
		fail("terminal", "the terminal is one of outside the container", "run the container with a terminal of its own (-t) or with none, or let the program close it")
	case fd.Foreign:
		fail("foreign", "it was opened outside the container, on a mount that the container does not have", closeIt)
	}
	if fd.Socket != nil || fd.Foreign {
		return
	}
	switch fd.Kind {
	case File:
		j.deleted(p, fd)
	case Directory, Symlink, FIFO, Pipe, Terminal, Memfd, Namespace, Eventfd, Epoll, Timerfd, Signalfd, Inotify, Fanotify, Pidfd:
	case Device:
		if !dumpable(fd.Rdev) {
			fail("device", fmt.Sprintf("CRIU cannot carry this device (%d:%d): only terminals, tun and what is memory (null, zero, random, …)", unix.Major(fd.Rdev), unix.Minor(fd.Rdev)), closeIt)
		}
	case Block:
		fail("device", "CRIU cannot carry block devices", closeIt)
	case IOUring:
		fail("io_uring", "CRIU cannot carry io_uring", noUring)
	case BPFMap:
		fail("bpf", "CRIU carries BPF maps only if it was built for it, and arrays and hashes only", closeIt)
	default:
		fail("kind", "CRIU cannot carry this kind of descriptor", closeIt)
	}
}

// dumpable knows the devices that CRIU opens again: of memory, tun and autofs.
func dumpable(rdev uint64) bool {
	const memory, misc, tun, autofs = 1, 10, 200, 235
	major, minor := unix.Major(rdev), unix.Minor(rdev)
	return major == memory || major == misc && (minor == tun || minor == autofs)
}

func (j *judge) deleted(p *Process, fd *FD) {
	if !fd.Deleted {
		return
	}
	f := finding{Info, "deleted", fd.String(), fmt.Sprintf("it goes into the dump, with %s", mebi(fd.Size)), ""}
	switch {
	case fd.Links > 0:
		f = finding{Error, "linked", fd.String(), "it has lost this name, but it has others or lies in a lower layer of the image, and CRIU would have to give it a name again", reopenIt}
	case fd.Size > GhostLimit:
		f.level, f.why, f.fix = Error, fmt.Sprintf("it has %s, and a dump takes %s of a deleted file", mebi(fd.Size), mebi(GhostLimit)), reopenIt
	}
	j.add(p, fd, f)
}

func (j *judge) mapping(p *Process, m Mapping) {
	what := "a mapping of " + Printable(m.Path)
	fail := func(code, why, fix string) { j.add(p, nil, finding{Error, code, what, why, fix}) }
	switch {
	case m.Anon && m.Path == "anon_inode:[io_uring]":
		fail("io_uring", "CRIU cannot carry io_uring", noUring)
	case m.Anon, m.Device:
		fail("mapping", "CRIU cannot carry memory that stands for a device or an object of the kernel", "let the program unmap it at before-checkpoint (docs/hooks.md)")
	case m.SysV && p.Namespaces["ipc"] == j.on.HostIPC:
		fail("sysv", "the System V memory is the host's, which no dump holds", "run the container in an IPC namespace of its own")
	case m.Deleted && m.Links > 0:
		fail("linked", "it has lost this name, but it has others or lies in a lower layer of the image, and CRIU would have to give it a name again", reopenIt)
	}
}

func (j *judge) socket(p *Process, fd *FD) {
	s := fd.Socket
	what := s.String()
	fail := func(code, why, fix string) { j.add(p, fd, finding{Error, code, what, why, fix}) }
	switch s.Family {
	case "unix":
		j.unixSocket(p, fd)
		return
	case "netlink", "packet":
		return
	case "ipv4", "ipv6":
	default:
		fail("family", "CRIU cannot carry sockets of this family", closeIt)
		return
	}
	switch s.Protocol {
	case "tcp", "udp", "udplite", "raw", "icmp":
	case "mptcp":
		fail("mptcp", "CRIU cannot carry Multipath TCP", "set the sysctl net.mptcp.enabled=0, or GODEBUG=multipathtcp=0 for a Go program")
		return
	default:
		fail("protocol", "CRIU cannot carry sockets of this protocol", closeIt)
		return
	}
	if s.Pending > 0 {
		fail("pending", fmt.Sprintf("%d connections wait to be accepted, and CRIU cannot carry those", s.Pending), "try again, or keep clients away for the checkpoint")
	}
	if s.Protocol == "tcp" && s.Connected() {
		j.connection(p, fd)
		return
	}
	// An IPv6 address need not be there for CRIU to bind to it.
	if a := s.Local.Addr(); a.Is4() && !a.IsUnspecified() && !a.IsLoopback() && !a.IsMulticast() && s.Local.Port() != 0 {
		j.add(p, fd, finding{Warning, "address", what, fmt.Sprintf("it is bound to %s: only a clone with this address can be restored", a), "bind it to all addresses, or " + closeIt})
	}
}

// connection tells of connections by their peer.
func (j *judge) connection(p *Process, fd *FD) {
	s := fd.Socket
	f := finding{Warning, "connection", s.Connection(), "", ""}
	const policy = "or close it by a rule of fd-policy (docs/fd-policy.md)"
	switch j.on.TCP {
	case oci.TCPError:
		f.level, f.why = Error, "it is connected, and with tcp=error there may be no connection"
		f.fix = closeIt + ", " + policy
	case oci.TCPEstablished:
		f.why = "a clone goes on with it, which needs the address " + s.Local.Addr().Unmap().String() + " and the original gone"
	default:
		f.why = "the original keeps it, and a clone finds it closed"
		f.fix = "nothing if the program connects again by itself; otherwise let it close the connection at before-checkpoint (docs/hooks.md)"
	}
	j.add(p, fd, f)
}

func (j *judge) unixSocket(p *Process, fd *FD) {
	s := fd.Socket
	if !s.External || j.on.Runtime != nil && j.on.Runtime(s.PeerInode) {
		return
	}
	f := finding{Error, "external", s.String(), "", closeIt}
	switch {
	case s.Type != "dgram":
		f.why = "its other end is outside the container, and CRIU cannot carry half of a connection"
	case !s.PeerHere:
		f.why = "its other end is in another network namespace, where CRIU does not find it"
	case s.PeerPath == "":
		f.why = "its other end is outside the container and has no name, by which a clone could find it"
	default:
		f.level, f.why, f.fix = Warning, "its other end is outside the container: a clone connects to "+Printable(s.PeerPath)+" again, which has to be there", ""
	}
	j.add(p, fd, f)
}

// mebi writes bytes in MiB.
func mebi(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }
