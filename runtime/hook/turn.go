package hook

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Turn takes the turn to tell a container's participants something, and gives what
// ends it. The shim takes it for as long as a checkpoint is being made and cracctl
// check for its question, so that no participant hears two things at once, and
// nobody connects to one that is being dumped. When ctx ends it waits no longer.
//
// It is a lock on the bundle. The container cannot open that, and so not lock it.
func Turn(ctx context.Context, bundle string) (end func(), err error) {
	dir, err := os.OpenFile(bundle, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if errors.Is(err, unix.EWOULDBLOCK) {
			if err = sleep(ctx, pollEvery); err == nil {
				continue
			}
		}
		if err != nil {
			dir.Close()
			return nil, fmt.Errorf("lock %s: %w", bundle, err)
		}
		return func() { dir.Close() }, nil
	}
}
