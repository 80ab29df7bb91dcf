package hook

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// ControlName is the name of the shim's own socket in the directory.
const ControlName = "control.sock"

// Status is what a container may know about itself.
type Status struct {
	Container  string           `json:"container"`
	Hostname   string           `json:"hostname,omitempty"`
	Start      string           `json:"start"`                // cold or warm
	Image      string           `json:"image,omitempty"`      // the image it came from
	Reason     string           `json:"reason,omitempty"`     // why cold
	Code       string           `json:"code,omitempty"`       // the reason's code
	Generation string           `json:"generation,omitempty"` // this start's
	Checkpoint CheckpointStatus `json:"checkpoint"`
}

// CheckpointStatus tells whether the workload may ask for its own checkpoint, and
// how the last one went.
type CheckpointStatus struct {
	Allowed bool            `json:"allowed"`
	Last    *LastCheckpoint `json:"last,omitempty"`
}

// LastCheckpoint is how the last checkpoint went.
type LastCheckpoint struct {
	ID      string  `json:"id"`
	Outcome Outcome `json:"outcome"`
	Error   string  `json:"error,omitempty"`
}

// Handler answers the workload's requests. Its methods are called concurrently.
// Their context ends when Suspend or Close is called, and those wait for them: a
// method that waits for anything else than its context waits for ever if its caller
// holds that while it suspends.
type Handler interface {
	// Status tells the container what it is.
	Status(ctx context.Context) Status
	// Checkpoint starts one and returns its identifier at once, or why it will not.
	Checkpoint(ctx context.Context) (id string, err error)
	// Outcome tells how a checkpoint ended. While it is pending, it waits until ctx
	// ends, and then says so. An empty outcome stands for an unknown identifier.
	Outcome(ctx context.Context, id string) (outcome Outcome, errText string)
}

// Control serves control.sock. Its methods may be called concurrently, but not by a
// Handler.
type Control struct {
	handler Handler
	dir     directory
	wait    time.Duration // for a request

	mu      sync.Mutex
	serving *server // nil while suspended
	closed  bool
}

// ListenControl makes the socket in the directory, in the place of what the
// workload may have put there, and serves it until Suspend or Close.
func ListenControl(dir string, h Handler) (*Control, error) {
	d, err := openDirectory(dir)
	if err != nil {
		return nil, err
	}
	c := &Control{handler: h, dir: d, wait: defaultRequestWait}
	if err := c.Resume(); err != nil {
		d.Close()
		return nil, err
	}
	return c, nil
}

// Suspend closes the listener, removes the socket, closes every connection, and
// waits for the handlers to end: after it the container has no socket with anything
// of ours at its other end. A request whose handler has begun is still answered. It may be
// called again.
func (c *Control) Suspend() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.serving == nil {
		return
	}
	// First the name: what comes now finds no socket rather than one that closes.
	_ = c.dir.remove(ControlName)
	c.serving.stop()
	c.serving = nil
}

// Resume listens again after Suspend; without one it does nothing.
func (c *Control) Resume() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return fmt.Errorf("listen on %s: %w", ControlName, net.ErrClosed)
	}
	if c.serving != nil {
		return nil
	}
	listener, err := c.dir.listen(ControlName)
	if err != nil {
		return fmt.Errorf("listen on %s in %s: %w", ControlName, c.dir.Name(), err)
	}
	c.serving = serve(listener, c.handler, c.wait)
	return nil
}

// Close ends the service for good, as Suspend does. It may be called again.
func (c *Control) Close() error {
	c.Suspend()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return nil
	}
	c.closed = true
	return c.dir.Close()
}

// listen makes a socket that everyone may connect to and listens on it. It is made
// under a name that nobody knows and then takes the place of whatever the workload
// has under the right one.
func (d directory) listen(name string) (*net.UnixListener, error) {
	draft := hidden(name)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: d.path(draft)})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // it gets another name, and that is Suspend's to remove
	if err := errors.Join(d.share(draft), d.replace(draft, name)); err != nil {
		l.Close()
		_ = d.remove(draft)
		return nil, err
	}
	return l, nil
}

// share lets everyone connect to a socket, whatever the umask. A mode is set by
// path, and the workload may put a link there at any moment: so by the path of the
// open file.
func (d directory) share(name string) error {
	f, mode, err := d.find(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if mode.Type() != fs.ModeSocket {
		return fmt.Errorf("%s is %s now", name, kind(mode))
	}
	return os.Chmod(fdPath(f), 0o666)
}

// replace gives a file another name, also if there is a directory of that name: that is moved
// out of the way, because it may hold anything.
func (d directory) replace(draft, name string) (err error) {
	for range 16 { // the workload may make one again
		if err = d.rename(draft, name); !errors.Is(err, unix.EISDIR) {
			return err
		}
		_ = d.rename(name, hidden(name))
	}
	return err
}
