// CRIU cannot dump Multipath TCP, which Go's servers listen on otherwise.

//go:debug multipathtcp=0

// Command holder is a workload for restores: a static program that holds memory of
// which it knows what must be in it, and that answers on TCP.
//
//	holder [-mb N] [-listen ADDRESS]
//	holder ask ADDRESS COMMAND...
//
// Commands, one line each, answered by one line:
//
//	hello         hello, after a look at a few pages
//	check         ok, after a look at all of the memory; or what is wrong
//	read N...     ok, after a look at these pages, in this order
//	marked        what has become of the memory that a fork must not have: "wipe=full drop=zero"
package main

import (
	"bufio"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
	"unsafe"
)

const (
	pageSize    = 4096
	pageWords   = pageSize / 8
	markedPages = 16

	madvWipeOnFork = 18
	mapDroppable   = 0x08 // Linux 6.11
)

func main() {
	var err error
	if len(os.Args) > 3 && os.Args[1] == "ask" {
		err = ask(os.Args[2], strings.Join(os.Args[3:], " "))
	} else {
		err = serve()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "holder:", err)
		os.Exit(1)
	}
}

func ask(address, command string) error {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	if _, err := fmt.Fprintln(conn, command); err != nil {
		return err
	}
	answer, err := bufio.NewReader(conn).ReadString('\n')
	fmt.Print(answer)
	return err
}

// holder has its memory as words.
type holder struct {
	words      []uint64
	wipe, drop []uint64 // nil if the kernel has no such memory
}

func serve() error {
	mb := flag.Int("mb", 64, "how much to hold, in MiB")
	listen := flag.String("listen", ":9000", "where to answer")
	flag.Parse()
	h, err := hold(*mb << 20 / pageSize)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go h.answer(conn)
	}
}

func hold(pages int) (*holder, error) {
	h := new(holder)
	var err error
	if h.words, err = mapped(pages, syscall.MAP_PRIVATE); err != nil {
		return nil, err
	}
	if h.wipe, err = mapped(markedPages, syscall.MAP_PRIVATE); err != nil {
		return nil, err
	}
	if _, _, errno := syscall.Syscall(syscall.SYS_MADVISE, uintptr(unsafe.Pointer(&h.wipe[0])), markedPages*pageSize, madvWipeOnFork); errno != 0 {
		return nil, os.NewSyscallError("madvise", errno)
	}
	if h.drop, err = mapped(markedPages, mapDroppable); err != nil && !errors.Is(err, syscall.EINVAL) {
		return nil, err
	}
	for _, words := range [][]uint64{h.words, h.wipe, h.drop} {
		for i := range words {
			words[i] = word(i)
		}
	}
	return h, nil
}

func mapped(pages, kind int) ([]uint64, error) {
	data, err := syscall.Mmap(-1, 0, pages*pageSize, syscall.PROT_READ|syscall.PROT_WRITE, kind|syscall.MAP_ANONYMOUS)
	if err != nil {
		return nil, os.NewSyscallError("mmap", err)
	}
	return unsafe.Slice((*uint64)(unsafe.Pointer(&data[0])), len(data)/8), nil
}

// word is what must be at an index: it does not compress, and is never zero.
func word(i int) uint64 { // splitmix64
	z := uint64(i)*0x9e3779b97f4a7c15 + 1
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return (z ^ z>>31) | 1
}

func (h *holder) answer(conn net.Conn) {
	defer conn.Close()
	lines := bufio.NewScanner(conn)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) == 0 {
			return
		}
		fmt.Fprintln(conn, h.do(fields[0], fields[1:]))
	}
}

func (h *holder) do(command string, args []string) string {
	pages := len(h.words) / pageWords
	switch command {
	case "hello":
		for i := range 8 {
			if err := h.page(i * (pages - 1) / 7); err != nil {
				return err.Error()
			}
		}
		return "hello"
	case "check":
		for i := range pages {
			if err := h.page(i); err != nil {
				return err.Error()
			}
		}
		return "ok"
	case "read":
		for _, a := range args {
			n, err := strconv.Atoi(a)
			if err == nil && (n < 0 || n >= pages) {
				err = fmt.Errorf("there are %d pages", pages)
			}
			if err == nil {
				err = h.page(n)
			}
			if err != nil {
				return err.Error()
			}
		}
		return "ok"
	case "marked":
		return "wipe=" + state(h.wipe) + " drop=" + state(h.drop)
	}
	return "unknown command " + command
}

// page looks at all of a page.
func (h *holder) page(n int) error {
	for i := n * pageWords; i < (n+1)*pageWords; i++ {
		if h.words[i] != word(i) {
			return fmt.Errorf("page %d has %#x at word %d instead of %#x", n, h.words[i], i%pageWords, word(i))
		}
	}
	return nil
}

// state is full, zero, none or mixed.
func state(words []uint64) string {
	full, zero := 0, 0
	for i, w := range words {
		switch w {
		case word(i):
			full++
		case 0:
			zero++
		}
	}
	switch {
	case words == nil:
		return "none"
	case full == len(words):
		return "full"
	case zero == len(words):
		return "zero"
	}
	return "mixed"
}
