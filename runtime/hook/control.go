package hook

import (
	"context"
	"errors"
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

// Handler answers the workload's requests. Its methods are called concurrently,
// and their context ends at Suspend and Close, which wait for them: they must not
// wait for whoever calls those.
type Handler interface {
	// Status tells the container what it is.
	Status(ctx context.Context) Status
	// Checkpoint starts one and returns its identifier at once, or why it will not.
	Checkpoint(ctx context.Context) (id string, err error)
	// Outcome tells how a checkpoint ended. While it is pending, it waits until ctx
	// ends. An empty outcome stands for an identifier that is not known.
	Outcome(ctx context.Context, id string) (outcome Outcome, errText string)
}

// Control serves control.sock. Its methods may be called concurrently.
type Control struct{}

// ListenControl makes the socket in the directory and serves it.
func ListenControl(dir string, h Handler) (*Control, error) { return nil, errors.ErrUnsupported }

// Suspend closes the listener, removes the socket, closes every connection, and
// waits for the handlers to end: nothing of ours is in the container's sockets
// after it. It may be called again.
func (c *Control) Suspend() {}

// Resume listens again after Suspend; it does nothing without one.
func (c *Control) Resume() error { return nil }

// Close ends the service for good. It may be called again.
func (c *Control) Close() error { return nil }
