package hook

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/oci"
)

const (
	// maxParticipants bounds how many are told. MakeDir has room for more names, so
	// that one too many is told of and not just missing.
	maxParticipants = 256
	// maxTimeouts bounds how long they can take together, in time-outs: a workload
	// should not be closed for a checkpoint for longer.
	maxTimeouts = 32
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
	// User is the init's user and group, as this process sees them.
	User() (uid, gid int, err error)
	// Done is closed when the init has ended.
	Done() <-chan struct{}
}

// Notifier tells a container's participants and adapters. It keeps nothing between
// calls; the contract wants one at a time.
type Notifier struct {
	Dir       string            // the host's path of the container's /run/crac; "" for none
	Timeout   time.Duration     // for each one's answer; 0 stands for oci.DefaultHookTimeout
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
	Name string        // the socket's name, or the adapter's value
	Took time.Duration // until the answer and the end of the connection
	Err  error         // nil if it agreed; a time-out is context.DeadlineExceeded

	kind string // for messages
}

// Notify tells everyone, one after another: before-checkpoint and check in
// descending order of names and the adapter last, other events the adapter first
// and then in ascending order. Each has the whole of Timeout, and everyone is told
// whatever the others answer, unless 32 time-outs are over before. When it returns,
// no connection of it is open.
//
// When ctx ends, nobody is waited for any more: give after-resume a context that
// outlives the failed checkpoint's.
func (n *Notifier) Notify(ctx context.Context, m Message) Report {
	m.V, m.DeadlineMS = Version, max(1, n.timeout().Milliseconds())
	if m.ID == "" {
		m.ID = NewID()
	}
	line, err := m.line()
	if err != nil {
		return Report{Problem: err}
	}
	ctx, cancel := context.WithTimeoutCause(ctx, maxTimeouts*n.timeout(), fmt.Errorf("all together took %v", maxTimeouts*n.timeout()))
	defer cancel()
	var r Report
	if m.Event.before() {
		n.tellSockets(ctx, &r, m.Event, line)
		n.tellAdapter(ctx, &r, m, line)
	} else {
		n.tellAdapter(ctx, &r, m, line)
		n.tellSockets(ctx, &r, m.Event, line)
	}
	return r
}

func (n *Notifier) tellSockets(ctx context.Context, r *Report, e Event, line []byte) {
	if n.Dir == "" {
		return
	}
	dir, err := openDirectory(n.Dir)
	if err != nil {
		r.Problem = fmt.Errorf("find participants: %w", err)
		return
	}
	defer dir.Close()
	names, err := dir.sockets()
	if err != nil {
		r.Problem = fmt.Errorf("find participants in %s: %w", n.Dir, err)
		return
	}
	if e.before() {
		slices.Reverse(names)
	}
	told := 0
	for _, name := range names {
		if told == maxParticipants {
			r.Problem = fmt.Errorf("there are more than %d participants: %s and those after it were not told", maxParticipants, printable(name))
			return
		}
		if n.tell(ctx, r, "participant", printable(name), func(ctx context.Context) error { return dir.tell(ctx, name, line) }) {
			told++
		}
	}
}

func (n *Notifier) tellAdapter(ctx context.Context, r *Report, m Message, line []byte) {
	if a := n.Adapters[m.Event]; a != nil {
		n.tell(ctx, r, "adapter", a.String(), func(ctx context.Context) error { return a.tell(ctx, n, m, line) })
	}
}

// tell tells one, and reports it unless nobody was there.
func (n *Notifier) tell(ctx context.Context, r *Report, kind, name string, tell func(context.Context) error) (told bool) {
	started := time.Now()
	own, cancel := context.WithTimeout(ctx, n.timeout())
	defer cancel()
	err := tell(own)
	switch {
	case errors.Is(err, errNobody):
		return false
	case !isTimeout(err): // it answered, one way or another
	case ctx.Err() != nil:
		err = fmt.Errorf("not waited for any longer: %w", context.Cause(ctx))
	default: // its own deadline, whichever clock noticed first
		err = lateError(n.timeout())
	}
	r.Results = append(r.Results, Result{Name: name, Took: time.Since(started), Err: err, kind: kind})
	return true
}

func (n *Notifier) timeout() time.Duration {
	if n.Timeout > 0 {
		return n.Timeout
	}
	return oci.DefaultHookTimeout
}

func isTimeout(err error) bool {
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.Canceled)
}

// lateError is a time-out after so long. errors.Is takes it for what it is.
type lateError time.Duration

func (e lateError) Error() string   { return "no answer within " + time.Duration(e).String() }
func (e lateError) Is(t error) bool { return t == context.DeadlineExceeded }

// Told is how many participants and adapters there were to tell.
func (r Report) Told() int { return len(r.Results) }

// Agreed is how many of them agreed.
func (r Report) Agreed() (n int) {
	for _, result := range r.Results {
		if result.Err == nil {
			n++
		}
	}
	return n
}

// Err is nil if everyone agreed and nothing else went wrong, or all failures
// together, each with the name of the participant or adapter.
func (r Report) Err() error {
	var all failures
	for _, result := range r.Results {
		if result.Err != nil {
			all = append(all, fmt.Errorf("%s %s: %w", result.kind, result.Name, result.Err))
		}
	}
	if r.Problem != nil {
		all = append(all, r.Problem)
	}
	if len(all) == 0 {
		return nil
	}
	return all
}

// failures are joined in one line: it ends in a status message and in logs.
type failures []error

func (f failures) Unwrap() []error { return f }

func (f failures) Error() string {
	texts := make([]string, len(f))
	for i, err := range f {
		texts[i] = err.Error()
	}
	return strings.Join(texts, "; ")
}

// printable is a name as it is shown: quoted if it is one that could deceive.
func printable(name string) string {
	if quoted := strconv.Quote(name); quoted != `"`+name+`"` || strings.ContainsAny(name, " :;") {
		return quoted
	}
	return name
}

// Participants gives the names of the sockets in the directory at which a
// participant may listen, sorted. Whether somebody does, only connecting can tell,
// which this does not.
func Participants(dir string) ([]string, error) {
	d, err := openDirectory(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.sockets()
}
