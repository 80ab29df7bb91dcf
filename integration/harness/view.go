package harness

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// view is a thread with its own mount namespace in which the daemon's CNI files are where ctr
// looks for them. ctr has no option for these places (/etc/cni/net.d, /opt/cni/bin,
// /var/lib/cni), and writing there would change the host. A command that is started from the
// thread inherits its mount namespace, without one more program in between whose start-up
// would be in the times that the demo measures.
type view struct {
	jobs chan func()
	done chan struct{}
}

func newView(dir, plugins string) (*view, error) {
	v := &view{jobs: make(chan func()), done: make(chan struct{})}
	ready := make(chan error, 1)
	go func() {
		// Never unlocked: the thread dies with the goroutine, and its mount namespace with it.
		runtime.LockOSThread()
		defer close(v.done)
		err := enterView(dir, plugins)
		ready <- err
		if err != nil {
			return
		}
		for job := range v.jobs {
			job()
		}
	}()
	if err := <-ready; err != nil {
		return nil, fmt.Errorf("private mount namespace for clients: %w", err)
	}
	return v, nil
}

func enterView(dir, plugins string) error {
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	// An overlay adds the directories without making mount points on the host.
	for host, link := range map[string][2]string{
		"/etc":     {"cni/net.d", filepath.Join(dir, "cni/net.d")},
		"/opt":     {"cni/bin", plugins},
		"/var/lib": {"cni", filepath.Join(dir, "cni/lib")},
	} {
		upper := filepath.Join(dir, "view", host, "upper")
		work := filepath.Join(dir, "view", host, "work")
		at := filepath.Join(upper, link[0])
		for _, p := range []string{filepath.Dir(at), work} {
			if err := os.MkdirAll(p, 0o755); err != nil {
				return err
			}
		}
		if err := os.Symlink(link[1], at); err != nil {
			return err
		}
		data := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", host, upper, work)
		if err := unix.Mount("overlay", host, "overlay", 0, data); err != nil {
			return fmt.Errorf("overlay on %s: %w", host, err)
		}
	}
	return nil
}

func (v *view) do(f func() error) error {
	err := errors.New("the daemon was stopped")
	ran := make(chan struct{})
	select {
	case v.jobs <- func() { err = f(); close(ran) }:
		<-ran
	case <-v.done:
	}
	return err
}

func (v *view) close() {
	close(v.jobs)
	<-v.done
}

// Start starts a command in the view of the daemon's network configuration.
func (d *Daemon) Start(cmd *exec.Cmd) error {
	return d.view.do(cmd.Start)
}
