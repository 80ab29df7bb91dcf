package runtime

import (
	"errors"
	"fmt"
	"net"
	"os"
	goruntime "runtime"
	"strings"
	"sync"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// heldNamespaces are the network and UTS namespaces that a restored container
// will have. They are made at Create, before there is a process to have them:
// clients set the network up between Create and Start, and find the namespace by
// the pid that Create returned. That pid is the id of a thread of ours, which
// does nothing but be in them.
//
// The files stay open as long as the container lives: libcontainer's record of
// the container names them, and exec joins them by that name.
type heldNamespaces struct {
	tid      int
	net, uts *os.File

	done chan struct{}
	once sync.Once
}

// holdNamespaces makes the namespaces that the spec wants new, and sets them up
// as libcontainer would: loopback up, net.* sysctls, host and domain name.
func holdNamespaces(spec *specs.Spec) (*heldNamespaces, error) {
	var flags int
	if private(spec, specs.NetworkNamespace) {
		flags |= unix.CLONE_NEWNET
	}
	if private(spec, specs.UTSNamespace) {
		flags |= unix.CLONE_NEWUTS
	}
	if flags == 0 {
		return nil, nil
	}
	h := &heldNamespaces{done: make(chan struct{})}
	ready := make(chan error)
	go h.hold(flags, spec, ready)
	if err := <-ready; err != nil {
		return nil, fmt.Errorf("make namespaces for the restore: %w", err)
	}
	return h, nil
}

func (h *heldNamespaces) hold(flags int, spec *specs.Spec, ready chan<- error) {
	// Never unlocked: the thread ends with this goroutine, and with it the
	// namespaces' hold on nothing but the files below.
	goruntime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The first thread cannot end, and /proc/PID shows its namespaces as
		// the whole process's. Keep it busy while another thread is found.
		done := make(chan struct{})
		go func() {
			defer close(done)
			h.hold(flags, spec, ready)
		}()
		<-done
		goruntime.UnlockOSThread()
		return
	}
	err := h.setUp(flags, spec)
	if err != nil {
		h.close()
	}
	ready <- err
	if err == nil {
		<-h.done
	}
}

func (h *heldNamespaces) setUp(flags int, spec *specs.Spec) (err error) {
	if err := unix.Unshare(flags); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	h.tid = unix.Gettid()
	if flags&unix.CLONE_NEWNET != 0 {
		if h.net, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		if err := raiseLoopback(); err != nil {
			return err
		}
		for key, value := range spec.Linux.Sysctl {
			if !strings.HasPrefix(key, "net.") {
				continue // of another namespace: the dump has it
			}
			path := "/proc/sys/" + strings.ReplaceAll(key, ".", "/")
			if err := os.WriteFile(path, []byte(value), 0o644); err != nil {
				return fmt.Errorf("sysctl %s: %w", key, err)
			}
		}
	}
	if flags&unix.CLONE_NEWUTS != 0 {
		if h.uts, err = os.Open("/proc/thread-self/ns/uts"); err != nil {
			return err
		}
		if spec.Hostname != "" {
			if err := unix.Sethostname([]byte(spec.Hostname)); err != nil {
				return os.NewSyscallError("sethostname", err)
			}
		}
		if spec.Domainname != "" {
			if err := unix.Setdomainname([]byte(spec.Domainname)); err != nil {
				return os.NewSyscallError("setdomainname", err)
			}
		}
	}
	return nil
}

// raiseLoopback brings lo up in the calling thread's network namespace
// (netdevice(7), SIOCSIFFLAGS).
func raiseLoopback() error {
	lo, err := net.InterfaceByName("lo")
	if err != nil {
		return err
	}
	if lo.Flags&net.FlagUp != 0 {
		return nil
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, req); err != nil {
		return os.NewSyscallError("ioctl SIOCGIFFLAGS lo", err)
	}
	req.SetUint16(req.Uint16() | unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, req); err != nil {
		return os.NewSyscallError("ioctl SIOCSIFFLAGS lo", err)
	}
	return nil
}

// apply points the spec at the held namespaces.
func (h *heldNamespaces) apply(spec *specs.Spec) {
	if h == nil {
		return
	}
	for _, n := range []struct {
		t specs.LinuxNamespaceType
		f *os.File
	}{{specs.NetworkNamespace, h.net}, {specs.UTSNamespace, h.uts}} {
		if ns, ok := namespace(spec, n.t); ok && n.f != nil {
			ns.Path = fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), n.f.Fd())
		}
	}
}

// pid is what stands for the container until it has a process.
func (h *heldNamespaces) pid() int {
	if h == nil {
		return 0
	}
	return h.tid
}

// retire ends the thread; the namespaces stay. It may be called again, and on nil.
func (h *heldNamespaces) retire() {
	if h != nil {
		h.once.Do(func() { close(h.done) })
	}
}

// release gives the namespaces up as well.
func (h *heldNamespaces) release() {
	if h != nil {
		h.retire()
		h.close()
	}
}

func (h *heldNamespaces) close() {
	var err error
	for _, f := range []*os.File{h.net, h.uts} {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
	}
	h.net, h.uts = nil, nil
	_ = err // closing an O_PATH-like file of nsfs has nothing to lose
}
