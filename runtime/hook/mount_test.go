package hook

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// needsMount skips without the right to mount, which the package's user has.
func needsMount(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
}

func TestDir(t *testing.T) {
	needsMount(t)
	path := filepath.Join(t.TempDir(), "crac")
	if err := MakeDir(path, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = RemoveDir(path) })

	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		t.Fatal(err)
	}
	const flags = unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC
	if fs.Type != unix.TMPFS_MAGIC || fs.Flags&flags != flags || fs.Blocks*uint64(fs.Bsize) != 1<<20 || fs.Files != 1024 {
		t.Errorf("%+v", fs)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != os.ModeDir|os.ModeSticky|0o777 {
		t.Errorf("%v, %v", info, err)
	}
	nothingIn(t, path)

	// It fills up, and does not take the host's memory.
	full := func() error {
		for i := range 1100 {
			if err := os.WriteFile(filepath.Join(path, fmt.Sprint(i)), nil, 0o600); err != nil {
				return err
			}
		}
		return nil
	}
	if err := full(); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("names without end: %v", err)
	}
	if err := MakeDir(path, ""); !errors.Is(err, os.ErrExist) {
		t.Errorf("made twice: %v", err)
	}

	// A full one is no reason for no checkpoint: nothing but adapters by signal
	// writes there.
	n := Notifier{Dir: path, Timeout: long}
	wantErr(t, n.Notify(t.Context(), Message{Event: Check}).Err())
	n.Adapters = map[Event]Adapter{Check: adapter(t, "signal:SIGUSR2")}
	n.Container = &fakeContainer{}
	wantErr(t, n.Notify(t.Context(), Message{Event: Check}).Err(), "leave the message", "no space left on device")
	if c, err := ListenControl(path, &fakeHandler{}); err == nil {
		c.Close()
		t.Error("listened where there is no room")
	} else {
		wantErr(t, err, "listen on control.sock in "+path, "no space left on device")
	}

	// It is removed also while somebody has it open.
	held, err := os.Open(filepath.Join(path, "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	for range 2 {
		if err := RemoveDir(path); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("still there: %v", err)
		}
	}
}

// TestRemoveDirUnmounted: nothing but what MakeDir makes is removed.
func TestRemoveDirUnmounted(t *testing.T) {
	needsMount(t)
	dir := t.TempDir()
	empty, filled, link := filepath.Join(dir, "empty"), filepath.Join(dir, "filled"), filepath.Join(dir, "link")
	if err := errors.Join(os.Mkdir(empty, 0o700), os.MkdirAll(filepath.Join(filled, "x"), 0o700), os.Symlink(filled, link)); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{empty, link, filepath.Join(dir, "absent"), filepath.Join(dir, "absent", "crac")} {
		if err := RemoveDir(path); err != nil {
			t.Error(err)
		}
	}
	wantErr(t, RemoveDir(filled), "filled", "not empty")
	nothingIn(t, dir, "filled")
}

func TestMakeDirFails(t *testing.T) {
	if err := MakeDir(filepath.Join(t.TempDir(), "absent", "crac"), ""); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
}
