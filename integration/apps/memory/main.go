// Command memory is a workload for benchmarks: it holds as many MiB of random memory as its first
// argument says, and answers on TCP. A client sends one word, gets one line and finds the
// connection closed:
//
//	id     a number that no other start of the program has
//	sum    a checksum over all of the memory, read for it
//	watch  watching; from now on it looks at the clock every millisecond
//	gap    the longest time, in microseconds, that it did not get to look; ends the watch
//
// The image sets GODEBUG=multipathtcp=0: CRIU cannot dump listeners that speak Multipath TCP.
package main

import (
	"bufio"
	crand "crypto/rand"
	"encoding/binary"
	"fmt"
	"log"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

func main() {
	if len(os.Args) != 2 {
		log.Fatal("usage: memory MIB")
	}
	mib, err := strconv.Atoi(os.Args[1])
	if err != nil || mib < 1 {
		log.Fatalf("%q is no number of MiB", os.Args[1])
	}
	var seed [32]byte
	if _, err := crand.Read(seed[:]); err != nil {
		log.Fatal(err)
	}
	memory, err := fill(mib<<20, seed)
	if err != nil {
		log.Fatal(err)
	}
	id := binary.LittleEndian.Uint64(seed[:])
	l, err := net.Listen("tcp4", ":8080")
	if err != nil {
		log.Fatal(err)
	}
	var w watch
	for {
		c, err := l.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go func() {
			defer func() { _ = c.Close() }()
			word, err := bufio.NewReader(c).ReadString('\n')
			if err != nil {
				return
			}
			switch strings.TrimSpace(word) {
			case "id":
				_, _ = fmt.Fprintln(c, id)
			case "sum":
				_, _ = fmt.Fprintf(c, "%016x\n", sum(memory))
			case "watch":
				w.start()
				_, _ = fmt.Fprintln(c, "watching")
			case "gap":
				_, _ = fmt.Fprintln(c, w.stop().Microseconds())
			default:
				_, _ = fmt.Fprintln(c, "unknown")
			}
		}()
	}
}

// fill returns memory that neither compresses nor has two equal pages. It is not the Go heap's:
// that would be twice as large, and the collector's to move.
func fill(size int, seed [32]byte) ([]uint64, error) {
	b, err := syscall.Mmap(-1, 0, size, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_PRIVATE|syscall.MAP_ANON)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes: %w", size, err)
	}
	if _, err := rand.NewChaCha8(seed).Read(b); err != nil {
		return nil, err
	}
	return unsafe.Slice((*uint64)(unsafe.Pointer(&b[0])), size/8), nil
}

// sum depends on every word and on its place.
func sum(words []uint64) (s uint64) {
	for _, w := range words {
		s = (s<<1 | s>>63) ^ w
	}
	return s
}

// watch finds the longest time that the program did not run.
type watch struct{ current atomic.Pointer[look] }

type look struct {
	stop chan struct{}
	gap  chan time.Duration
}

func (w *watch) start() {
	k := &look{make(chan struct{}), make(chan time.Duration, 1)}
	if old := w.current.Swap(k); old != nil {
		close(old.stop)
	}
	go func() {
		var longest time.Duration
		for last := time.Now(); ; {
			select {
			case <-k.stop:
				k.gap <- longest
				return
			case <-time.After(time.Millisecond):
			}
			now := time.Now()
			longest, last = max(longest, now.Sub(last)), now
		}
	}()
}

func (w *watch) stop() time.Duration {
	k := w.current.Swap(nil)
	if k == nil {
		return 0
	}
	close(k.stop)
	return <-k.gap
}
