package runtime

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// ForceDelete kills and removes a container whose shim has died. It may be
// called from a process that never started the container, and for one that is
// gone already. It returns the pid that the container's init had, 0 if unknown. warn,
// unless nil, is told of poststop hooks that fail.
func ForceDelete(root, id string, warn func(error)) (pid int, err error) {
	// Nothing may be removed before: a restore that was cut short leaves the
	// container's root file system mounted there.
	if err := detachBelow(filepath.Join(root, id)); err != nil {
		return 0, fmt.Errorf("delete container %s: %w", id, err)
	}
	lc, err := libcontainer.Load(root, id)
	if errors.Is(err, libcontainer.ErrNotExist) {
		// A start that was cut short leaves a directory without a state.
		if err := removeNotedCgroup(filepath.Join(root, id)); err != nil {
			return 0, fmt.Errorf("delete container %s: %w", id, err)
		}
		return 0, os.RemoveAll(filepath.Join(root, id))
	}
	if err != nil {
		return 0, fmt.Errorf("load container %s: %w", id, err)
	}
	if state, err := lc.State(); err == nil {
		pid = max(0, state.InitProcessPid)
	}
	_ = lc.Signal(unix.SIGKILL) // not running is just as well
	err = insist(func() error { return destroy(lc, warn) }, func() { _ = lc.Signal(unix.SIGKILL) })
	if err != nil {
		return pid, fmt.Errorf("delete container %s: %w", id, err)
	}
	return pid, nil
}

// destroy removes libcontainer's part, and runs the poststop hooks. libcontainer would
// leave out those behind one that fails, and say that nothing was removed: the container could
// never be deleted (runtime-spec, runtime.md, Lifecycle: a warning, and on).
func destroy(lc *libcontainer.Container, warn func(error)) error {
	hooks := lc.Config().Hooks // not a copy
	poststop := hooks[configs.Poststop]
	delete(hooks, configs.Poststop)
	if err := lc.Destroy(); err != nil {
		if len(poststop) > 0 {
			hooks[configs.Poststop] = poststop // for the next try
		}
		return err
	}
	if len(poststop) == 0 {
		return nil
	}
	state, err := lc.OCIState()
	if err != nil {
		return err
	}
	state.Status = specs.StateStopped
	for i, h := range poststop {
		if err := h.Run(state); err != nil && warn != nil {
			warn(fmt.Errorf("poststop hook %d of container %s: %w", i, lc.ID(), err))
		}
	}
	return nil
}

// insist tries again what fails while processes that were killed end.
func insist(try func() error, again func()) error {
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := try()
		if err == nil || time.Now().After(deadline) {
			return err
		}
		again()
	}
}

// detachBelow takes off all that is mounted below dir, also what is in use.
func detachBelow(dir string) error {
	dir, err := filepath.EvalSymlinks(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return err
	}
	// The last one is on top.
	for _, m := range slices.Backward(mounts) {
		err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
		if err != nil && !errors.Is(err, unix.EINVAL) { // it has gone with another
			return &os.PathError{Op: "unmount", Path: m.Mountpoint, Err: err}
		}
	}
	return nil
}

// cgroupNote is a file beside libcontainer's state, from before a restore makes the
// container's cgroup until there is such a state.
const cgroupNote = "cgroup.json"

// noteCgroup notes in a container's state directory which cgroup it is about to get.
func noteCgroup(dir string, cg *cgroups.Cgroup) error {
	data, err := json.Marshal(cg)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, cgroupNote), data, 0o600)
}

// removeNotedCgroup kills what is in the cgroup that a container's state directory
// has a note of, and removes it.
func removeNotedCgroup(dir string) error {
	data, err := os.ReadFile(filepath.Join(dir, cgroupNote))
	if errors.Is(err, os.ErrNotExist) || len(data) == 0 { // it was about to be written
		return nil
	}
	if err != nil {
		return err
	}
	var config cgroups.Cgroup
	if err := json.Unmarshal(data, &config); err != nil {
		return fmt.Errorf("%s: %w", filepath.Join(dir, cgroupNote), err)
	}
	cg, err := manager.New(&config)
	if err != nil {
		return err
	}
	kill := func() {
		pids, _ := cg.GetAllPids()
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
		_ = cg.Freeze(cgroups.Thawed) // or they would not end, on v1
	}
	kill()
	return insist(cg.Destroy, kill)
}
