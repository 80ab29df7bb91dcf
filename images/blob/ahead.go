package blob

import (
	"cmp"
	"io"
)

// aheadWriter hands what is written to it on to another writer, in large pieces and while the
// next are made: each write to containerd's content store is a message that waits for its
// answer, and compressors write 64 KiB at a time. It is used by one goroutine.
type aheadWriter struct {
	full, free chan []byte
	buf        []byte
	closed     bool
	done       chan struct{}
	err        error // of the writer behind it; to be read after done
}

const (
	aheadPiece  = 1 << 20 // bytes
	aheadPieces = 3
)

// newAheadWriter starts to write to w; close must be called, and w must not be used until then.
func newAheadWriter(w io.Writer) *aheadWriter {
	a := &aheadWriter{full: make(chan []byte, aheadPieces), free: make(chan []byte, aheadPieces), done: make(chan struct{})}
	for range aheadPieces {
		a.free <- make([]byte, 0, aheadPiece)
	}
	a.buf = <-a.free
	go func() {
		defer close(a.done)
		for p := range a.full {
			if _, a.err = w.Write(p); a.err != nil {
				return
			}
			a.free <- p[:0]
		}
	}()
	return a
}

func (a *aheadWriter) Write(p []byte) (n int, err error) {
	select {
	case <-a.done:
		return 0, cmp.Or(a.err, io.ErrClosedPipe)
	default:
	}
	for len(p) > 0 {
		k := min(len(p), cap(a.buf)-len(a.buf))
		a.buf = append(a.buf, p[:k]...)
		p, n = p[k:], n+k
		if len(a.buf) < cap(a.buf) {
			break
		}
		a.full <- a.buf // there is room for all of them
		a.buf = nil
		select {
		case a.buf = <-a.free:
		case <-a.done:
			return n, a.err
		}
	}
	return n, nil
}

// close writes the rest, and returns when nothing is written any more. It may be called again.
func (a *aheadWriter) close() error {
	if !a.closed {
		a.closed = true
		a.full <- a.buf
		close(a.full)
	}
	<-a.done
	return a.err
}
