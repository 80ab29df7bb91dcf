package main

import (
	"context"
	"errors"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

var errUnheard = errors.New("nobody reads what this says any more")

// whileHeard gives a context that ends when the other end of out, a pipe, is closed. stop,
// which must be called, leaves the context as it is from then on.
func whileHeard(ctx context.Context, out *os.File) (_ context.Context, stop func(), err error) {
	wake, end, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		defer wake.Close()
		// Nothing is asked of out: its errors are told all the same.
		fds := []unix.PollFd{{Fd: int32(wake.Fd()), Events: unix.POLLIN}, {Fd: int32(out.Fd())}}
		for {
			switch _, err := unix.Poll(fds, -1); {
			case errors.Is(err, unix.EINTR):
			case err != nil, fds[0].Revents != 0:
				return
			default:
				cancel(errUnheard)
				return
			}
		}
	})
	return ctx, sync.OnceFunc(func() {
		_ = end.Close()
		wg.Wait()
	}), nil
}
