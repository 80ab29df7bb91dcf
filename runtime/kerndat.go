package runtime

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/runtime/thread"
)

// kerndatDir is where CRIU keeps what it has found out about the kernel. It takes
// tens of milliseconds to find it out, which is a large part of a small restore.
const (
	kerndatDir  = "/run"
	kerndatName = "criu.kdat"
)

// KeepKerndat makes sure that the CRIU at this path finds what it, or another call
// of it, has found out about the running kernel. It keeps that by itself only where
// /run is a tmpfs, which does not outlive the kernel; elsewhere it asks the kernel
// anew each time, but takes what it finds. So it is asked once with a tmpfs in the
// place of /run, which nobody else sees, and what it has kept there goes into the
// real one. CRIU knows by itself what was made by another version.
//
// What was made before this boot is removed at once, and new in a moment.
func KeepKerndat(criu string, reaper *Subreaper) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(kerndatDir, &fs); err != nil || fs.Type == unix.TMPFS_MAGIC {
		return err
	}
	path := kerndatDir + "/" + kerndatName
	if fresh, err := madeSinceBoot(path); err != nil || fresh {
		return err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	data, err := makeKerndat(criu, reaper)
	if err != nil {
		return fmt.Errorf("find out once what CRIU asks the kernel: %w", err)
	}
	// Another shim may be doing the same.
	f, err := os.CreateTemp(kerndatDir, kerndatName+".*") // 0600, as CRIU makes it
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

func madeSinceBoot(path string) (bool, error) {
	st, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	stat, err := os.ReadFile("/proc/stat")
	if err != nil {
		return false, err
	}
	booted, err := bootTime(string(stat))
	return err == nil && st.ModTime().After(booted), err
}

// bootTime reads the time of the boot from /proc/stat (proc(5)).
func bootTime(stat string) (time.Time, error) {
	for line := range strings.Lines(stat) {
		if value, ok := strings.CutPrefix(line, "btime "); ok {
			seconds, err := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
			return time.Unix(seconds, 0), err
		}
	}
	return time.Time{}, errors.New("/proc/stat says no btime")
}

func makeKerndat(criu string, reaper *Subreaper) (data []byte, err error) {
	defer reaper.Hold()()
	err = thread.Own(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return os.NewSyscallError("unshare", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return os.NewSyscallError("mount", err)
		}
		// Its path may lead through /run.
		program, err := os.Open(criu)
		if err != nil {
			return err
		}
		defer program.Close()
		if err := unix.Mount("tmpfs", kerndatDir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "size=1m,mode=0700"); err != nil {
			return &os.PathError{Op: "mount", Path: kerndatDir, Err: err}
		}
		// It is of no interest whether the kernel has this feature.
		cmd := exec.Command(fmt.Sprintf("/proc/self/fd/%d", program.Fd()), "check", "--feature", "uffd")
		cmd.Args[0], cmd.Dir = "criu", "/"
		out, runErr := cmd.CombinedOutput()
		data, err = os.ReadFile(kerndatDir + "/" + kerndatName)
		if err != nil {
			return errors.Join(fmt.Errorf("criu check: %w: %s", err, strings.TrimSpace(string(out))), runErr)
		}
		return nil
	})
	return data, err
}
