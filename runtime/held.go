package runtime

import (
	"fmt"
	"net"
	"os"
	"strings"
	"sync"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/runtime/thread"
)

// heldNetwork is the network namespace that a restored container will have. It
// is made at Create, before there is a process to have it: clients set the
// network up between Create and Start, and find the namespace by the pid that
// Create returned. That pid is the id of a thread of ours, which does nothing
// but be in it.
//
// The file stays open as long as the container lives: libcontainer's record of
// the container names it, and exec joins the namespace by that name.
//
// With a user namespace CRIU makes both, and the pid is that of the first process
// that it has restored. They are held for a cold start after a restore that has failed.
type heldNetwork struct {
	tid  int
	file *os.File
	user *os.File // the user namespace; nil if it is the host's

	done chan struct{}
	once sync.Once
}

// holdNetwork makes the network namespace that the spec wants new, and sets it
// up as libcontainer would: loopback up, net.* sysctls. It returns nil if the
// spec wants none.
func holdNetwork(spec *specs.Spec) (*heldNetwork, error) {
	if !private(spec, specs.NetworkNamespace) {
		return nil, nil
	}
	h := &heldNetwork{done: make(chan struct{})}
	ready := make(chan error)
	go h.hold(spec, ready)
	if err := <-ready; err != nil {
		return nil, fmt.Errorf("make a network namespace for the restore: %w", err)
	}
	return h, nil
}

// hold makes the namespace and stays in it until retire.
func (h *heldNetwork) hold(spec *specs.Spec, ready chan<- error) {
	_ = onOwnThread(func() error {
		err := h.setUp(spec)
		ready <- err
		if err == nil {
			<-h.done
		}
		return nil
	})
}

func (h *heldNetwork) setUp(spec *specs.Spec) (err error) {
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return os.NewSyscallError("unshare", err)
	}
	if err := setUpNetwork(spec); err != nil {
		return err
	}
	h.tid = unix.Gettid()
	h.file, err = os.Open("/proc/thread-self/ns/net")
	return err
}

// setUpNetwork sets up the calling thread's network namespace, which is new.
func setUpNetwork(spec *specs.Spec) error {
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
	return nil
}

// holdNetworkOf holds the namespaces of the first process that CRIU restores, when there
// is nothing else yet, and sets up the network.
func holdNetworkOf(pid int, spec *specs.Spec) (_ *heldNetwork, err error) {
	h := &heldNetwork{tid: pid, done: make(chan struct{})}
	defer func() {
		if err != nil {
			h.release()
		}
	}()
	for name, file := range map[string]**os.File{"net": &h.file, "user": &h.user} {
		if *file, err = os.Open(fmt.Sprintf("/proc/%d/ns/%s", pid, name)); err != nil {
			return nil, err
		}
	}
	err = thread.InNetworkOf(int(h.file.Fd()), func() error { return setUpNetwork(spec) })
	return h, err
}

// onOwnThread runs fn on a thread that ends with it, so that fn may change what
// belongs to a thread.
func onOwnThread(fn func() error) error { return thread.Own(fn) }

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

// apply points the spec at what is held.
func (h *heldNetwork) apply(spec *specs.Spec) {
	if h == nil {
		return
	}
	for kind, file := range map[specs.LinuxNamespaceType]*os.File{specs.NetworkNamespace: h.file, specs.UserNamespace: h.user} {
		if ns, ok := namespace(spec, kind); ok && file != nil {
			// The dot: runc 1.4.3 reads the map of a user namespace from process N when the
			// path begins with /proc/N (GetUserNamespaceMappings).
			ns.Path = fmt.Sprintf("/proc/./%d/fd/%d", os.Getpid(), file.Fd())
		}
	}
}

// pid is what stands for the container until it has a process.
func (h *heldNetwork) pid() int {
	if h == nil {
		return 0
	}
	return h.tid
}

// ofUser tells whether it belongs to a user namespace of the container's.
func (h *heldNetwork) ofUser() bool { return h != nil && h.user != nil }

// retire ends the thread; the namespace stays. It may be called again, and on nil.
func (h *heldNetwork) retire() {
	if h != nil {
		h.once.Do(func() { close(h.done) })
	}
}

// release gives the namespace up as well.
func (h *heldNetwork) release() {
	if h != nil {
		h.retire()
		h.file.Close() // it may be nil
		h.user.Close()
	}
}
