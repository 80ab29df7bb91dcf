package runtime

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/opencontainers/runc/libcontainer"
	"golang.org/x/sys/unix"
)

// ForceDelete kills and removes a container whose shim has died. It may be
// called from a process that never started the container, and for one that is
// gone already. It returns the pid that the container's init had, 0 if unknown.
func ForceDelete(root, id string) (pid int, err error) {
	lc, err := libcontainer.Load(root, id)
	if errors.Is(err, libcontainer.ErrNotExist) {
		// A start that was cut short leaves a directory without a state.
		return 0, os.RemoveAll(filepath.Join(root, id))
	}
	if err != nil {
		return 0, fmt.Errorf("load container %s: %w", id, err)
	}
	if state, err := lc.State(); err == nil {
		pid = max(0, state.InitProcessPid)
	}
	_ = lc.Signal(unix.SIGKILL) // not running is just as well
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err = lc.Destroy()
		if err == nil || time.Now().After(deadline) {
			break
		}
		_ = lc.Signal(unix.SIGKILL)
	}
	if err != nil {
		return pid, fmt.Errorf("delete container %s: %w", id, err)
	}
	return pid, nil
}
