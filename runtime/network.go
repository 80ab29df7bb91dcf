package runtime

import (
	"context"
	"fmt"
	"net"
	"os"

	"github.com/crac-shim/crac/runtime/thread"
)

// Dial connects to an address in the container's network namespace. The address
// is a literal one: there is nothing to resolve names with.
func (c *Container) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	p := c.Init()
	if p == nil {
		return nil, fmt.Errorf("connect in container %s: %w", c.cfg.ID, ErrNotRunning)
	}
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", p.Pid()))
	if err != nil {
		return nil, fmt.Errorf("connect in container %s: %w", c.cfg.ID, err)
	}
	defer ns.Close()
	select {
	case <-p.Done(): // its pid may be another's
		return nil, fmt.Errorf("connect in container %s: %w", c.cfg.ID, ErrNotRunning)
	default:
	}
	err = thread.InNetworkOf(int(ns.Fd()), func() error {
		// One address and no fallback: the socket is made on this thread.
		conn, err = (&net.Dialer{FallbackDelay: -1}).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}
