package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/crac-shim/crac/integration/harness"
	"github.com/crac-shim/crac/runtime/thread"
)

// network is a network namespace that was made before a container and given to it, as CRI's and
// podman's are. All contenders get one, with nothing in it but the loopback: what a bridge costs is
// the same for all, and hides what is measured.
type network struct {
	name, path string
	ns         *os.File
	// real is where the container really is, if its runtime would not have this one.
	real *network
}

func newNetwork(ctx context.Context, d *harness.Daemon, name string) (*network, error) {
	path, err := d.NetNS(ctx, name)
	if err != nil {
		return nil, err
	}
	n := &network{name: name, path: path}
	if n.ns, err = os.Open(path); err != nil {
		return nil, err
	}
	_, err = harness.Run(ctx, d.Command(ctx, "ip", "-n", d.Namespace+"-"+name, "link", "set", "lo", "up"))
	return n, err
}

// dial connects to a port on the namespace's loopback. It tries once.
func (n *network) dial(ctx context.Context, port int) (conn net.Conn, err error) {
	if n.real != nil {
		n = n.real
	}
	err = thread.InNetworkOf(int(n.ns.Fd()), func() error {
		// Short: a SYN that is lost, because CRIU keeps the network locked, is sent again after a second only.
		d := net.Dialer{Timeout: 100 * time.Millisecond}
		conn, err = d.DialContext(ctx, "tcp4", fmt.Sprintf("127.0.0.1:%d", port))
		return err
	})
	return conn, err
}

// networks keeps namespaces for those who come next: making one is no part of any measurement.
type networks struct {
	d    *harness.Daemon
	made int
	free []*network
}

func (p *networks) take(ctx context.Context) (*network, error) {
	if n := len(p.free); n > 0 {
		last := p.free[n-1]
		p.free = p.free[:n-1]
		return last, nil
	}
	p.made++
	return newNetwork(ctx, p.d, fmt.Sprintf("bench%d", p.made))
}

func (p *networks) give(n *network) {
	n.real = nil
	p.free = append(p.free, n)
}

// drop removes a namespace that nobody can use again: CRIU leaves the network of what ended with
// its dump locked, by rules that drop all packets.
func (p *networks) drop(ctx context.Context, n *network) error {
	_ = n.ns.Close()
	return p.d.DeleteNetNS(ctx, n.name)
}
