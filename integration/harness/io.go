package harness

import (
	"context"
	"fmt"

	"github.com/containerd/containerd/v2/pkg/cio"
)

// WaitIO waits until all output of a process has arrived, as long as ctx lasts. A runtime that
// keeps a stream open after the end of its writers would make cio.IO.Wait wait for ever.
func WaitIO(ctx context.Context, io cio.IO) error {
	done := make(chan struct{})
	go func() {
		io.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the output of a process has no end: %w", ctx.Err())
	}
}
