// Package fdpolicy carries out a descriptor policy on the processes of a frozen
// container, right before it is dumped.
//
// From outside a connection can be closed, and nothing else: files, pipes and
// the rest are CRIU's to carry, or the program's to close.
package fdpolicy

import (
	"errors"
	"fmt"
	"strings"

	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/runtime/inspect"
)

// Action is what a rule makes of one descriptor.
type Action struct {
	Process *inspect.Process
	FD      *inspect.FD
	Rule    oci.FDRule
	// Close tells that the connection is closed.
	Close bool
	// Note is what becomes of the descriptor, in a few words.
	Note string
}

// String says it in one line.
func (a Action) String() string {
	return fmt.Sprintf("process %d (%s, %d inside): descriptor %d, %s: %s by %s", a.Process.PID, inspect.Printable(a.Process.Name), a.Process.Inside, a.FD.Number, a.FD, a.Note, a.Rule)
}

// RefusedError is a policy that does not let the checkpoint be made.
type RefusedError struct {
	// Refused has in each Note why.
	Refused []Action
}

// maxRefused is how many descriptors an error names.
const maxRefused = 5

// Error implements error.
func (e *RefusedError) Error() string {
	var b strings.Builder
	b.WriteString("the descriptor policy refuses the checkpoint: ")
	for i, a := range e.Refused {
		if i == maxRefused {
			fmt.Fprintf(&b, "; and %d more", len(e.Refused)-i)
			break
		}
		if i > 0 {
			b.WriteString("; ")
		}
		b.WriteString(a.String())
	}
	return b.String()
}

// Plan tells what a policy would do: actions, and descriptors that it refuses a
// checkpoint for. It changes nothing. Descriptors that no rule matches are in
// neither, and so are those of processes that a dump leaves out.
func Plan(policy oci.FDPolicy, c *inspect.Container) (actions, refused []Action) {
	for i := range c.Processes {
		p := &c.Processes[i]
		if p.Outside {
			continue
		}
		for j := range p.FDs {
			fd := &p.FDs[j]
			rule, ok := policy.Match(fd.For())
			if !ok {
				continue
			}
			a := Action{Process: p, FD: fd, Rule: rule}
			if judge(&a) {
				actions = append(actions, a)
			} else {
				refused = append(refused, a)
			}
		}
	}
	return actions, refused
}

// The way out of what cannot be done from outside.
const remedy = "let the program do it at before-checkpoint (docs/hooks.md), or make the action ignore"

// judge says what becomes of a descriptor, or returns false with the reason.
func judge(a *Action) bool {
	fd, s := a.FD, a.FD.Socket
	switch a.Rule.Action {
	case oci.FDError:
		a.Note = "forbidden; let the program close it at before-checkpoint (docs/hooks.md)"
		return false
	case oci.FDIgnore:
		a.Note = "left to CRIU"
	case oci.FDClose:
		switch {
		case s == nil:
			a.Note = fmt.Sprintf("a %s cannot be closed from outside: %s", fd.Kind, remedy)
			return false
		case s.Listening():
			a.Note = "to close it would leave the program without its listener: make the action reopen or ignore, which both let a clone listen again"
			return false
		case s.Protocol != "tcp" && s.Protocol != "udp" && s.Protocol != "udplite":
			a.Note = "such a socket cannot be closed from outside: " + remedy
			return false
		case s.Connected():
			a.Close, a.Note = true, "closed"
		default:
			a.Note = "left as it is, without a connection"
		}
	case oci.FDReopen:
		switch {
		case s != nil && s.Connected():
			a.Note = "a connection cannot be made again from outside: " + remedy
			return false
		case s == nil && fd.Path == "":
			a.Note = fmt.Sprintf("a %s cannot be opened again from outside: %s", fd.Kind, remedy)
			return false
		default:
			a.Note = "CRIU opens it again in a clone"
		}
	}
	return true
}

// Enforce carries a policy out on processes that are frozen. It returns what it
// has closed, and everything else that a rule matches that does not say
// warn: false.
//
// If the policy refuses the checkpoint, the error is a RefusedError and nothing
// was closed. What was closed stays closed whatever becomes of the checkpoint.
func Enforce(policy oci.FDPolicy, c *inspect.Container) (done []Action, err error) {
	actions, refused := Plan(policy, c)
	if len(refused) > 0 {
		return nil, &RefusedError{refused}
	}
	closed := make(map[uint64]bool) // by cookie: processes share sockets
	for _, a := range actions {
		if a.Close && !closed[a.FD.Socket.Cookie] {
			if cerr := closeConnection(a.Process.PID, a.FD); cerr != nil {
				err = errors.Join(err, fmt.Errorf("close descriptor %d of process %d (%s), %s: %w", a.FD.Number, a.Process.PID, inspect.Printable(a.Process.Name), a.FD, cerr))
				continue
			}
			closed[a.FD.Socket.Cookie] = true
		}
		if a.Close || a.Rule.Warn {
			done = append(done, a)
		}
	}
	return done, err
}
