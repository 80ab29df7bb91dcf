package convert

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/crac-shim/crac/images/blob"
	"github.com/crac-shim/crac/images/compress"
)

// DefaultMaxSize bounds what a source may be when it is unpacked.
const DefaultMaxSize = 256 << 30

const (
	// maxEntries bounds how many files a source names, maxNames how long their names are
	// together: they are kept.
	maxEntries = 1 << 20
	maxNames   = 256 << 20

	tarBlock = 512
)

// allowance is how much of a source may still come, over all of its tars.
type allowance struct {
	// stream is what they are as tars, with what is passed over; files what is taken out of
	// them, which is more where a file has holes.
	stream, files  int64
	entries, names int64
}

// newAllowance allows so many bytes; 0 is DefaultMaxSize.
func newAllowance(size int64) *allowance {
	if size == 0 {
		size = DefaultMaxSize
	}
	return &allowance{stream: size, files: size, entries: maxEntries, names: maxNames}
}

// errCutOff is about a tar that ends between two entries, as one does of which the rest is
// missing.
var errCutOff = fmt.Errorf("%w: no whole tar: it ends without an end-of-archive mark; get it again", ErrSource)

// readTar gives take every entry of a tar that somebody else made, compressed or not. The
// sizes count as they are read, not as the tar claims.
func readTar(ctx context.Context, r io.Reader, a *allowance, take func(*tar.Header, io.Reader) error) error {
	plain, err := compress.Detect(r)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrSource, err)
	}
	defer plain.Close()
	broken := func(err error) error {
		if errors.Is(err, ErrSource) || ctx.Err() != nil {
			return err
		}
		return fmt.Errorf("%w: no whole tar: %w", ErrSource, err)
	}
	stream := newMeter(ctx, plain, &a.stream)
	tr := tar.NewReader(stream)
	for {
		end := (stream.read + tarBlock - 1) / tarBlock * tarBlock // of the entry before
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			if stream.read < end+tarBlock {
				return errCutOff
			}
			break
		}
		if err != nil {
			return broken(err)
		}
		a.entries--
		if a.names -= int64(len(h.Name) + len(h.Linkname)); a.entries < 0 || a.names < 0 {
			return fmt.Errorf("%w: it has more than %d entries, or their names more than %d bytes", ErrSource, maxEntries, maxNames)
		}
		content := newMeter(ctx, tr, &a.files)
		if err := take(h, content); err != nil {
			return err
		}
		if _, err := io.Copy(io.Discard, content); err != nil {
			return broken(err)
		}
	}
	// The checksum of what is compressed comes last.
	if _, err := io.Copy(io.Discard, stream); err != nil {
		return broken(err)
	}
	return nil
}

// meter counts what is read, and stops when its context ends or nothing is allowed any
// more.
type meter struct {
	blob.Reader
	left *int64
	read int64
}

func newMeter(ctx context.Context, r io.Reader, left *int64) *meter {
	return &meter{Reader: blob.Reader{Ctx: ctx, R: r}, left: left}
}

func (m *meter) Read(p []byte) (int, error) {
	n, err := m.Reader.Read(p)
	m.read += int64(n)
	if *m.left -= int64(n); *m.left < 0 {
		return n, fmt.Errorf("%w: unpacked it is larger than allowed; say --max-size if that is right", ErrSource)
	}
	return n, err
}

// pipeError is why a writer into piped stopped.
type pipeError struct{ error }

// piped gives take what write writes. It returns when both are done.
func piped(write func(io.Writer) error, take func(io.Reader) error) error {
	r, w := io.Pipe()
	written := make(chan struct{})
	go func() {
		defer close(written)
		if err := write(w); err != nil {
			_ = w.CloseWithError(pipeError{err}) // never fails
			return
		}
		_ = w.Close()
	}()
	err := take(r)
	_ = r.Close()
	<-written
	var own pipeError
	if errors.As(err, &own) {
		return own.error
	}
	return err
}
