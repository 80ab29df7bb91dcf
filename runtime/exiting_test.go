package runtime

import (
	"bufio"
	"os"
	"os/exec"
	goruntime "runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// leaderlessEnv has this program end its first thread, and live on.
const leaderlessEnv = "CRAC_TEST_LEADERLESS"

// init and not TestMain, because here the goroutine is on the first thread.
func init() {
	if os.Getenv(leaderlessEnv) == "" {
		return
	}
	goruntime.LockOSThread()
	go func() {
		for !isZombie(os.Getpid()) {
			time.Sleep(time.Millisecond)
		}
		os.Stdout.WriteString("alone\n")
		time.Sleep(time.Hour)
	}()
	_, _, _ = unix.RawSyscall(unix.SYS_EXIT, 0, 0, 0)
}

func TestIsExiting(t *testing.T) {
	for name, env := range map[string][]string{"plain": nil, "its first thread has ended": {leaderlessEnv + "=1"}} {
		cmd := exec.Command("/bin/sh", "-c", "echo ready; exec sleep 1000")
		if env != nil {
			cmd = exec.Command("/proc/self/exe")
		}
		cmd.Env = append(os.Environ(), env...)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		pid := cmd.Process.Pid
		if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
			t.Error(err)
		}
		if isExiting(pid) {
			t.Errorf("%s: it lives, and is said to end", name)
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		waitFor(t, name+": its end, which nobody has taken notice of", func() bool { return isExiting(pid) })
		_ = cmd.Wait()
		if !isExiting(pid) {
			t.Errorf("%s: it has gone, and is said to live", name)
		}
	}
}
