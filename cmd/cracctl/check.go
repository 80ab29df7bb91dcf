package main

import (
	"errors"

	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/spf13/cobra"

	"github.com/crac-shim/crac/cmd/cracctl/check"
	"github.com/crac-shim/crac/oci"
)

func newCheck(t *target) *cobra.Command {
	var state string
	cmd := &cobra.Command{
		Use:   "check CONTAINER",
		Short: "Tell what would stop a checkpoint of a container, and why",
		Long: `Tell what would stop a checkpoint of a running container, or make its clones
differ: which process holds what, why CRIU cannot carry it, and the way out. It
asks the participants whether they could, and changes nothing. CONTAINER is an id, or
nerdctl's name for one.

error: a checkpoint would fail. warning: a clone would differ, or needs something
to start. info: good to know. What a container holds changes as it runs, and so
does the answer.

The exit status is 0 when nothing would stop a checkpoint, 1 when something
would, and 2 when that could not be found out.`,
		Example: `  cracctl check web
  cracctl check web --format json | jq -r '.findings[] | select(.level == "error") | .what'`,
		Args: func(cmd *cobra.Command, args []string) error {
			return notFound(cobra.ExactArgs(1)(cmd, args))
		},
		ValidArgsFunction: completeContainers(t),
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return notFound(err) })
	cmd.Flags().StringVar(&state, "state", "", "containerd's state directory (default: asked of the running shim, else "+defaults.DefaultStateDir+")")
	format := formatFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkFormat(*format); err != nil {
			return notFound(err)
		}
		s, err := t.open(cmd.Context())
		if err != nil {
			return notFound(err)
		}
		defer s.Close()
		r, err := runCheck(s, t, state, args[0], "")
		if err == nil {
			err = show(cmd.OutOrStdout(), *format, r, check.Table)
		}
		if err != nil {
			return notFound(err)
		}
		if !r.OK {
			return errReported
		}
		return nil
	}
	return cmd
}

// runCheck looks at a container as a checkpoint with this mode for connections
// would (empty: the container's own option).
func runCheck(s *session, t *target, state, id string, tcp oci.TCPMode) (*check.Report, error) {
	id = containerID(s.ctx, s.Client, id)
	c, err := findContainer(s.ctx, s.Client, t, id)
	if err != nil {
		return nil, err
	}
	p, bundle, err := findTask(s.ctx, s.Client, t, state, id)
	if err != nil {
		return nil, err
	}
	switch p.Status {
	case tasktypes.Status_RUNNING, tasktypes.Status_PAUSED:
	case tasktypes.Status_PAUSING:
		return nil, errors.New("a checkpoint of this container is being made; wait for it")
	default:
		return nil, errors.New("container " + id + " is not running; start it first")
	}
	shim, err := parent(int(p.Pid))
	if err != nil {
		return nil, err
	}
	socket, err := socketOf(t.address)
	if err != nil {
		return nil, err
	}
	return check.Run(s.ctx, check.Container{
		ID: id, Init: int(p.Pid), Shim: shim, Bundle: bundle, Image: c.Image,
		Paused: p.Status == tasktypes.Status_PAUSED, Address: socket, TCP: tcp,
	})
}

// statusError is an error with an exit status of its own.
type statusError struct {
	error
	status int
}

func (e statusError) Unwrap() error { return e.error }

// notFound is an error of a command whose status 1 is an answer.
func notFound(err error) error {
	if err == nil {
		return nil
	}
	return statusError{err, 2}
}
