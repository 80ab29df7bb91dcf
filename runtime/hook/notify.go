package hook

import (
	"context"
	"errors"
	"net"
	"time"

	"golang.org/x/sys/unix"
)

// Container is what adapters need of a running container.
type Container interface {
	// Exec runs a process in the container as its init's user, in its working
	// directory and with its environment, to which env (NAME=value) is added. It
	// waits for the process and gives the end of what that wrote to stderr and its
	// exit status. When ctx ends, it ends the process and returns soon, with an
	// error.
	Exec(ctx context.Context, args, env []string, stdin []byte) (stderr []byte, status int, err error)
	// Dial connects within the container's network namespace.
	Dial(ctx context.Context, network, address string) (net.Conn, error)
	// Signal sends a signal to the container's init.
	Signal(sig unix.Signal) error
}

// Notifier tells a container's participants and adapters. It keeps nothing
// between calls, and is used for one call at a time.
type Notifier struct {
	Dir       string            // the host's path of the container's /run/crac; "" for none
	Timeout   time.Duration     // for each participant's answer; 0 for oci.DefaultHookTimeout
	Adapters  map[Event]Adapter // counted as registered first
	Container Container         // needed if there are adapters
}

// Report is who was told, in the order told, and what came back.
type Report struct {
	Results []Result
	// Problem is why participants could not be found, or not all be told.
	Problem error
}

// Result is one participant's or adapter's answer.
type Result struct {
	Name string        // the socket's name, or the adapter as it was written
	Took time.Duration // from the connection to the answer
	Err  error         // nil if it agreed
}

// Notify tells everyone, one after another: before-checkpoint and check in
// descending order of names and the adapter last, other events the adapter first
// and then in ascending order. Each has the whole of Timeout, and everyone is told
// whatever the others answer. When it returns, no connection is open.
//
// When ctx ends, nobody is waited for any more: give after-resume a context that
// lives on after a failed checkpoint.
func (n *Notifier) Notify(ctx context.Context, m Message) Report {
	return Report{Problem: errors.ErrUnsupported}
}

// Told is how many participants and adapters there were to tell.
func (r Report) Told() int { return len(r.Results) }

// Err is nil if everyone agreed, or all failures together, each with the name of
// the participant.
func (r Report) Err() error { return r.Problem }

// Participants gives the names of the sockets in the directory at which a
// participant may listen, sorted. Whether somebody does only connecting can tell.
func Participants(dir string) ([]string, error) { return nil, errors.ErrUnsupported }
