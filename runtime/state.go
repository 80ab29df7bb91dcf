package runtime

import (
	"fmt"
	"slices"
	"sync/atomic"
)

// State is where a container is in its life.
type State int

// The states of a container.
const (
	// Created has its namespaces, cgroup and root file system, and a process
	// that waits to become the workload (cold) or a dump that waits to be
	// restored (warm).
	Created State = iota
	// Running has a workload that the scheduler runs.
	Running
	// Paused has a workload that a client froze.
	Paused
	// Quiesced has a workload that we hold still: it is being dumped, or it is
	// being restored and has not run yet.
	Quiesced
	// Stopped has no workload any more. It is final.
	Stopped
)

var stateNames = [...]string{"created", "running", "paused", "quiesced", "stopped"}

// String names the state as containerd's task API does, but for Quiesced, which
// containerd does not know.
func (s State) String() string {
	if s < 0 || int(s) >= len(stateNames) {
		return fmt.Sprintf("state(%d)", int(s))
	}
	return stateNames[s]
}

// successors is the one transition table. A state that is not listed behind
// another cannot follow it.
var successors = map[State][]State{
	Created:  {Running, Quiesced, Stopped},
	Running:  {Paused, Quiesced, Stopped},
	Paused:   {Running, Quiesced, Stopped},
	Quiesced: {Created, Running, Paused, Stopped},
	Stopped:  {},
}

// StateError says that a container cannot go from one state to another.
type StateError struct {
	ID       string
	From, To State
}

// Error implements error.
func (e *StateError) Error() string {
	return fmt.Sprintf("container %s is %s and cannot become %s", e.ID, e.From, e.To)
}

// machine is a container's state and the only code that changes it. It is not
// safe for concurrent use, but for seen: Container.mu guards it. It starts as
// Created.
type machine struct {
	id    string
	state State
	seen  atomic.Int32 // the state, for those who do not wait for the lock
}

// to moves to the next state, or returns a *StateError and does not move.
func (m *machine) to(next State) error {
	if err := m.can(next); err != nil {
		return err
	}
	m.set(next)
	return nil
}

// set changes the state to one that was found, not asked for.
func (m *machine) set(s State) {
	m.state = s
	m.seen.Store(int32(s))
}

// can tells what to would do.
func (m *machine) can(next State) error {
	if !slices.Contains(successors[m.state], next) {
		return &StateError{ID: m.id, From: m.state, To: next}
	}
	return nil
}
