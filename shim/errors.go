package shim

import (
	"errors"
	"os"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"

	"github.com/crac-shim/crac/runtime"
)

// toGRPC turns an error into what a client of the task API understands. It is
// called once for each request, as it returns.
func toGRPC(err error) error {
	if err == nil {
		return nil
	}
	return errgrpc.ToGRPC(classify(err))
}

// classified gives an error one of errdefs' classes without changing its words.
type classified struct{ err, class error }

func (c classified) Error() string   { return c.err.Error() }
func (c classified) Unwrap() []error { return []error{c.err, c.class} }

func classify(err error) error {
	var state *runtime.StateError
	switch {
	case errors.As(err, &state):
		return classified{err, errdefs.ErrFailedPrecondition}
	case errors.Is(err, runtime.ErrNotStarted):
		return classified{err, errdefs.ErrFailedPrecondition}
	case errors.Is(err, runtime.ErrExists):
		return classified{err, errdefs.ErrAlreadyExists}
	case errors.Is(err, runtime.ErrNotRunning), errors.Is(err, os.ErrProcessDone):
		// runc's shim answers this way, and clients take it for success
		// when they kill.
		return classified{err, errdefs.ErrNotFound}
	}
	return err
}
