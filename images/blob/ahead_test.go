package blob

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"
)

// limited fails when it has taken so many bytes, and keeps what it took.
type limited struct {
	bytes.Buffer
	left int
}

var errFull = errors.New("full")

func (l *limited) Write(p []byte) (int, error) {
	if len(p) > l.left {
		return 0, errFull
	}
	l.left -= len(p)
	return l.Buffer.Write(p)
}

func TestAheadWriter(t *testing.T) {
	const all = 5*aheadPiece + 17
	data := make([]byte, all)
	_, _ = rand.NewChaCha8([32]byte{}).Read(data)
	for _, size := range []int{1 << 10, 64 << 10, aheadPiece - 1, aheadPiece, aheadPiece + 1, all} {
		for _, room := range []int{0, 2 * aheadPiece, all} {
			w := &limited{left: room}
			a := newAheadWriter(w)
			var err error
			for rest := data; len(rest) > 0 && err == nil; rest = rest[min(size, len(rest)):] {
				_, err = a.Write(rest[:min(size, len(rest))])
			}
			for range 2 {
				if cerr := a.close(); err == nil {
					err = cerr
				} else if cerr != nil && !errors.Is(cerr, errFull) {
					t.Errorf("close: %v", cerr)
				}
			}
			if room < all {
				if !errors.Is(err, errFull) {
					t.Errorf("pieces of %d, room for %d: got %v", size, room, err)
				}
				if _, err := a.Write([]byte("more")); !errors.Is(err, errFull) {
					t.Errorf("a write after that: %v", err)
				}
			} else if err != nil || !bytes.Equal(w.Bytes(), data) {
				t.Errorf("pieces of %d: %v, %d bytes of %d are not those that were written", size, err, w.Len(), all)
			}
		}
	}
	if err := newAheadWriter(&limited{left: 1}).close(); err != nil {
		t.Errorf("nothing was written: %v", err)
	}
}
