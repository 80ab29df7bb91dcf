// Package thread runs code on an operating system thread of its own, so that it
// may change what belongs to a thread: namespaces, and the root.
package thread

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Own runs fn on a thread that ends with it.
func Own(fn func() error) error {
	result := make(chan error, 1)
	go func() {
		// Never unlocked, but on the first thread, which cannot end, and whose
		// namespaces /proc/PID shows as the whole process's: keep it busy while
		// another is found.
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			result <- Own(fn)
			runtime.UnlockOSThread()
			return
		}
		result <- fn()
	}()
	return <-result
}

// InNetwork runs fn on a thread of its own, in the network namespace of a
// process.
func InNetwork(pid int, fn func() error) error {
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return err
	}
	defer ns.Close()
	return InNetworkOf(int(ns.Fd()), fn)
}

// InNetworkOf is InNetwork for the namespace that a descriptor is open on.
func InNetworkOf(ns int, fn func() error) error {
	return Own(func() error {
		if err := unix.Setns(ns, unix.CLONE_NEWNET); err != nil {
			return os.NewSyscallError("setns", err)
		}
		return fn()
	})
}
