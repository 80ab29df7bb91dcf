package shim

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/runtime"
)

// preDumpFrom is the memory from which a pre-dump pays: below, the freeze is short
// without, and starting CRIU once more takes longer than it saves.
const preDumpFrom = 64 << 20

// preDump copies the memory of a workload that runs, so that a dump need only write
// what changes from then on, and returns where it is; empty when there is none, for
// unless it is required it is not needed.
func (c *container) preDump(ctx context.Context, r *checkpointRequest) (dir string, err error) {
	if r.preDump == oci.PreDumpOff {
		return "", nil
	}
	log := log.G(ctx).WithField("id", c.id)
	required := r.preDump == oci.PreDumpRequire
	if why := c.cannotPreDump(r, required); why != "" {
		if required {
			return "", fmt.Errorf("pre-dump=%s: %s: %w", r.preDump, why, errdefs.ErrFailedPrecondition)
		}
		log.WithField("reason", why).Debug("no pre-dump")
		return "", nil
	}
	// Beside the dump, on disk.
	if dir, err = os.MkdirTemp(c.work, "pre-dump-"); err == nil {
		began := time.Now()
		if err = c.rt.PreDump(dir, r.criu); err == nil {
			log.WithField("ms", time.Since(began).Milliseconds()).Info("copied the memory ahead of the freeze")
			return dir, nil
		}
		os.RemoveAll(dir)
	}
	if required {
		return "", fmt.Errorf("pre-dump=%s: %w", r.preDump, err)
	}
	// What is wrong, the dump will say, if it is more than this.
	log.WithError(err).Warn("no pre-dump")
	return "", nil
}

// cannotPreDump is why there is no pre-dump, or nothing to gain by one; empty if
// there is.
func (c *container) cannotPreDump(r *checkpointRequest, required bool) string {
	// In this order nothing is asked where the kernel cannot do it anyway.
	switch {
	case !runtime.TracksMemory():
		return "this kernel does not tell which memory changes (CONFIG_MEM_SOFT_DIRTY; see cracctl doctor), so none can be copied before the freeze"
	case r.dir != "":
		return "the checkpoint goes to a directory, which has to hold all of the memory when the workload runs again"
	case r.exit:
		return "the checkpoint ends the container, which stands still until its image is there"
	case c.rt.State() != runtime.Running:
		return fmt.Sprintf("the container is %s, and memory is copied ahead only while the workload runs", c.rt.State())
	}
	size, err := c.rt.MemorySize()
	if err != nil {
		return err.Error()
	}
	if size < preDumpFrom && !required {
		return "there is little memory"
	}
	if own, err := c.rt.OwnMarks(); err != nil {
		return err.Error()
	} else if own {
		return "a process has its /proc/PID/clear_refs open, with which it takes off the kernel's marks of changed memory that a pre-dump needs"
	}
	// All of it is there twice while the two halves are put together, and what has
	// changed a third time.
	var fs unix.Statfs_t
	if err := unix.Statfs(c.work, &fs); err != nil {
		return err.Error()
	}
	if free := fs.Bavail * uint64(fs.Bsize); free < 3*size {
		return fmt.Sprintf("%s has %d MiB free, and a pre-dump of %d MiB can take three times that", c.work, free>>20, size>>20)
	}
	return ""
}
