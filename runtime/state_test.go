package runtime

import (
	"errors"
	"testing"
)

// Every pair of states, and the state that results from each.
func TestTransitions(t *testing.T) {
	all := []State{Created, Running, Paused, Quiesced, Stopped}
	legal := map[[2]State]bool{
		{Created, Running}:   true,
		{Created, Quiesced}:  true,
		{Created, Stopped}:   true,
		{Running, Paused}:    true,
		{Running, Quiesced}:  true,
		{Running, Stopped}:   true,
		{Paused, Running}:    true,
		{Paused, Quiesced}:   true,
		{Paused, Stopped}:    true,
		{Quiesced, Created}:  true, // a restore that failed, before the cold start
		{Quiesced, Running}:  true,
		{Quiesced, Paused}:   true,
		{Quiesced, Stopped}:  true,
		{Running, Created}:   false,
		{Stopped, Running}:   false,
		{Stopped, Quiesced}:  false,
		{Created, Paused}:    false,
		{Paused, Paused}:     false,
		{Stopped, Stopped}:   false,
		{Quiesced, Quiesced}: false,
	}
	for _, from := range all {
		for _, next := range all {
			m := machine{id: "c"}
			m.set(from)
			err := m.to(next)
			if legal[[2]State{from, next}] {
				if err != nil || m.state != next {
					t.Errorf("%s → %s: got %v, state %s", from, next, err, m.state)
				}
				continue
			}
			var se *StateError
			if !errors.As(err, &se) || se.From != from || se.To != next {
				t.Errorf("%s → %s: error is %v, want a StateError with both states", from, next, err)
			}
			if m.state != from {
				t.Errorf("%s → %s: refused, but the state is now %s", from, next, m.state)
			}
		}
	}
}

func TestStateString(t *testing.T) {
	for s, want := range map[State]string{Created: "created", Stopped: "stopped", State(9): "state(9)", State(-1): "state(-1)"} {
		if got := s.String(); got != want {
			t.Errorf("State(%d).String() = %q, want %q", int(s), got, want)
		}
	}
}
