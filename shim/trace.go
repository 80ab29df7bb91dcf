package shim

import (
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/log"

	"github.com/crac-shim/crac/runtime/trace"
)

// born is when this process began to run our code.
var born = time.Now()

// beginTrace begins the trace of a container's start. The first container's has the
// start of the shim as well.
func (s *service) beginTrace(id string) *trace.Recorder {
	r := trace.New(id)
	s.firstTrace.Do(func() { r.Add(trace.Shim, "start of the shim", born, time.Now()) })
	return r
}

// writeTrace writes the trace, as far as it has come, for `cracctl trace`. The
// workload is running, and does not wait for it.
func (c *container) writeTrace() {
	c.tracing.Lock()
	defer c.tracing.Unlock()
	err := writeJSON(filepath.Join(c.bundle, trace.FileName), c.trace.Start())
	if err != nil && !errors.Is(err, os.ErrNotExist) { // the container may be gone already
		log.L.WithError(err).WithField("id", c.id).Warn("failed to write the trace")
	}
}
