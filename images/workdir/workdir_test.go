package workdir

import (
	"bufio"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// holder makes a directory, tells where, and waits to be killed.
const holder = "CRAC_WORKDIR_HOLDER"

func TestMain(m *testing.M) {
	if parent := os.Getenv(holder); parent != "" {
		d, err := New(parent)
		if err != nil {
			panic(err)
		}
		if err := os.WriteFile(filepath.Join(d.Path, "memory"), nil, 0o600); err != nil {
			panic(err)
		}
		println(d.Path)
		select {}
	}
	os.Exit(m.Run())
}

func hold(t *testing.T, parent string) (path string, kill func()) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), holder+"="+parent)
	out, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var once sync.Once
	kill = func() {
		once.Do(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait() // killed
		})
	}
	t.Cleanup(kill)
	lines := bufio.NewScanner(out)
	lines.Scan()
	if path = lines.Text(); path == "" {
		t.Fatal(lines.Err())
	}
	return path, kill
}

func there(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}

// What a process left that was killed the next removes, but nothing of one that lives, of
// another kind, or behind a link.
func TestSweep(t *testing.T) {
	parent, elsewhere := t.TempDir(), t.TempDir()
	living, _ := hold(t, parent)
	killed, kill := hold(t, parent)
	kill()
	other, link := filepath.Join(parent, "crac-other"), filepath.Join(parent, prefix+"link")
	if err := os.Mkdir(other, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(elsewhere, link); err != nil {
		t.Fatal(err)
	}
	d, err := New(parent)
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]bool{living: true, killed: false, other: true, link: true, elsewhere: true, d.Path: true} {
		if there(path) != want {
			t.Errorf("%s is there: %v, want %v", path, !want, want)
		}
	}
	if st, err := os.Stat(d.Path); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	if err := d.Remove(); err != nil || there(d.Path) {
		t.Errorf("removed: %v", err)
	}
	if _, err := New(filepath.Join(parent, "no-such")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no parent: %v", err)
	}
}

// Many at a time do not take each other's away.
func TestAtOnce(t *testing.T) {
	parent := t.TempDir()
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			for range 50 {
				d, err := New(parent)
				if err != nil {
					t.Error(err)
					return
				}
				if err := os.WriteFile(filepath.Join(d.Path, "memory"), nil, 0o600); err != nil {
					t.Error(err)
				}
				if err := d.Remove(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if left, err := os.ReadDir(parent); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// On some file systems what is made belongs to somebody else.
func TestMadeForAnother(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can make directories that belong to others")
	}
	parent, err := os.MkdirTemp("", "workdir-test-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(parent)
	if err := os.Chmod(parent, 0o777); err != nil { //nolint:gosec // for the other user
		t.Fatal(err)
	}
	const nobody = 65534
	done := make(chan struct{})
	go func() {
		defer close(done)
		goruntime.LockOSThread() // and no unlock: the thread ends with this
		if _, err := unix.SetfsuidRetUid(nobody); err != nil {
			t.Error(err)
			return
		}
		d, err := New(parent)
		if err != nil {
			t.Error(err)
			return
		}
		var st unix.Stat_t
		if err := unix.Stat(d.Path, &st); err != nil || st.Uid != nobody {
			t.Errorf("the test does not test: it is %d's, %v", st.Uid, err)
		}
		if err := d.Remove(); err != nil || there(d.Path) {
			t.Errorf("removed: %v", err)
		}
	}()
	<-done
}

// Where nothing can be had that is made, there is an error, and nothing left.
func TestNothingToBeHad(t *testing.T) {
	parent := t.TempDir()
	for _, why := range []error{errLocked, fs.ErrNotExist} {
		d, err := newIn(parent, func(string) (*os.File, error) { return nil, why })
		if err == nil || !strings.Contains(err.Error(), parent) || !strings.Contains(err.Error(), "--work-dir") {
			t.Errorf("%v: %v, %v", why, d, err)
		}
	}
	if left, err := os.ReadDir(parent); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
