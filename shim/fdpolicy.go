package shim

import (
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"

	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/runtime/fdpolicy"
	"github.com/crac-shim/crac/runtime/inspect"
)

// maxPolicyLines bounds what one checkpoint logs of its policy.
const maxPolicyLines = 100

// fdPolicy reads the container's descriptor policy. The image's file is read
// again for each checkpoint: the container may have written it meanwhile.
func (c *container) fdPolicy() (oci.FDPolicy, error) {
	p, err := fdpolicy.For(c.options, c.rt.Spec().Process, c.rt.Spec().Root.Path)
	if err != nil {
		return p, classified{err, errdefs.ErrFailedPrecondition}
	}
	return p, nil
}

// enforceFDPolicy carries the policy out on the container's processes, which are
// frozen. A policy without rules does nothing and looks at nothing.
func (c *container) enforceFDPolicy(p oci.FDPolicy, pids []int) error {
	if len(p.Rules) == 0 {
		return nil
	}
	init := c.init.getPid()
	held, err := inspect.Inspect(init, pids, inspect.Options{})
	if err == nil && held.Process(init) == nil {
		// Whom a dump holds is told by descent from it.
		err = fmt.Errorf("the container's first process, %d, is not among its processes %v", init, pids)
	}
	if err != nil {
		return fmt.Errorf("carry out the descriptor policy: %w", err)
	}
	done, err := fdpolicy.Enforce(p, held)
	for i, a := range done {
		if i == maxPolicyLines {
			log.L.WithField("id", c.id).Warnf("descriptor policy: %d more", len(done)-i)
			break
		}
		write := log.L.WithField("id", c.id).Info
		if a.Rule.Warn {
			write = log.L.WithField("id", c.id).Warn
		}
		write("descriptor policy: " + a.String())
	}
	if err != nil {
		return classified{err, errdefs.ErrFailedPrecondition}
	}
	return nil
}
