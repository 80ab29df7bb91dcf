package pager

import (
	"encoding/binary"
	"unsafe"

	"golang.org/x/sys/unix"
)

// userfaultfd(2): ioctl_userfaultfd(2) and linux/userfaultfd.h. The numbers are
// the same on amd64 and arm64.
const (
	uffdioWake     = 0x8010aa02
	uffdioCopy     = 0xc028aa03
	uffdioZeropage = 0xc020aa04
)

// Events of struct uffd_msg.
const (
	eventPagefault = 0x12
	eventFork      = 0x13
	eventRemap     = 0x14
	eventRemove    = 0x15
	eventUnmap     = 0x16
)

// messageSize is the size of a struct uffd_msg.
const messageSize = 32

// uffdMessage is a struct uffd_msg.
type uffdMessage [messageSize]byte

func (m *uffdMessage) event() byte { return m[0] }

func (m *uffdMessage) word(i int) uint64 { return binary.NativeEndian.Uint64(m[8+8*i:]) }

func (m *uffdMessage) address() uint64 { return m.word(1) &^ (pageSize - 1) }
func (m *uffdMessage) child() int      { return int(binary.NativeEndian.Uint32(m[8:])) }

// uffd is a userfault file descriptor of another process.
type uffd int

func (u uffd) ioctl(request uintptr, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(u), request, uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}

// copy puts data at addr. It gives the bytes done, which may be less than all,
// and with none of them the reason: EEXIST if the first page is there, EAGAIN
// while an event waits to be read, ENOENT if the range is not within one
// registered area, ESRCH if the process is gone, EFAULT if data cannot be read.
func (u uffd) copy(addr uint64, data []byte) (uint64, error) {
	arg := struct {
		dst, src, len, mode uint64
		done                int64
	}{dst: addr, src: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(data)))), len: uint64(len(data))}
	err := u.ioctl(uffdioCopy, unsafe.Pointer(&arg))
	return outcome(arg.done, err)
}

// zero puts zeroes at [start, end), with the same outcomes.
func (u uffd) zero(start, end uint64) (uint64, error) {
	arg := struct {
		start, len, mode uint64
		done             int64
	}{start: start, len: end - start}
	err := u.ioctl(uffdioZeropage, unsafe.Pointer(&arg))
	return outcome(arg.done, err)
}

// outcome reads the last word of an argument, where the kernel writes the bytes
// done or the negative of what it returns anyway.
func outcome(done int64, err error) (uint64, error) {
	if done > 0 {
		return uint64(done), nil
	}
	return 0, err
}

// wake lets whoever waits for a page of the range try again.
func (u uffd) wake(start, end uint64) {
	arg := struct{ start, len uint64 }{start, end - start}
	_ = u.ioctl(uffdioWake, unsafe.Pointer(&arg))
}

// readMessages reads the events that are there, faults first.
func readMessages(u uffd, buffer []uffdMessage) (int, error) {
	n, err := unix.Read(int(u), unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(buffer))), len(buffer)*messageSize))
	if err != nil {
		return 0, err
	}
	return n / messageSize, nil
}
