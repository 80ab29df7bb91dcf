package pager

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// insideEnv marks the test program that runs in namespaces of its own: nobody
// else's process can have the id that a restore needs, /run is a tmpfs, where
// CRIU keeps what it has learned about the kernel, and nothing survives.
const insideEnv = "CRAC_PAGER_TEST_INSIDE"

// programs are what the tests need; see TestMain.
var programs struct {
	criu     string
	workload string
	err      error
}

func TestMain(m *testing.M) {
	Main() // this program is also the pager of its tests
	switch os.Getenv(insideEnv) {
	case "":
		code, err := isolated()
		if err == nil {
			os.Exit(code)
		}
		// Some of the tests need nothing.
		programs.err = fmt.Errorf("this needs root, to make namespaces and to run CRIU: %w", err)
		os.Exit(m.Run())
	case "init":
		os.Exit(initProcess())
	default:
		os.Exit(inside(m))
	}
}

// initProcess is the first process of the namespace: it reaps orphans, so that
// their ids are free for a restore, while the tests wait for their own children.
func initProcess() int {
	_ = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), insideEnv+"=tests")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		if err == nil && pid == cmd.Process.Pid {
			if status.Signaled() {
				return 1
			}
			return status.ExitStatus()
		}
	}
}

func isolated() (code int, err error) {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), insideEnv+"=init")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = nil, os.Stdout, os.Stderr
	cmd.SysProcAttr = &unix.SysProcAttr{
		Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS,
		Pdeathsig:  unix.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	if err := cmd.Wait(); err != nil {
		return max(cmd.ProcessState.ExitCode(), 1), nil
	}
	return 0, nil
}

func inside(m *testing.M) int {
	dir, err := os.MkdirTemp("", "crac-pager-*")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	programs.err = prepare(dir)
	return m.Run()
}

func prepare(dir string) error {
	// Files that were opened outside of this mount namespace are nothing that
	// CRIU can find: the workload is not to inherit any.
	if err := unix.CloseRange(3, ^uint(0), unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return os.NewSyscallError("close_range", err)
	}
	for _, mount := range []struct {
		source, target, fstype string
		flags                  uintptr
	}{
		{"tmpfs", "/run", "tmpfs", 0},
	} {
		if err := unix.Mount(mount.source, mount.target, mount.fstype, mount.flags, ""); err != nil {
			return &os.PathError{Op: "mount", Path: mount.target, Err: err}
		}
	}
	build := os.Getenv("CRAC_BUILD")
	if build == "" {
		build = filepath.Join("..", "..", "build")
	}
	var err error
	if programs.criu, err = filepath.Abs(filepath.Join(build, "tools", "criu", "bin", "criu")); err != nil {
		return err
	}
	if _, err := os.Stat(programs.criu); err != nil {
		if programs.criu, err = exec.LookPath("criu"); err != nil {
			return fmt.Errorf("`make tools` makes it: %w", err)
		}
	}
	programs.workload = filepath.Join(dir, "workload")
	out, err := exec.Command("cc", "-O2", "-static", "-pthread", "-o", programs.workload, "testdata/workload.c").CombinedOutput()
	if err != nil {
		return fmt.Errorf("compile the workload: %w\n%s", err, out)
	}
	return nil
}

// needPrograms skips what cannot run, except where it must; and what takes minutes, as root, with
// real restores, unless it is asked for: make test-e2e does.
func needPrograms(t testing.TB) {
	t.Helper()
	switch {
	case os.Getenv("CRAC_PAGER_TEST") == "":
		t.Skip("set CRAC_PAGER_TEST=1 to restore real processes (root, CRIU)")
	case programs.err == nil:
	case os.Getenv("CRAC_PAGER_TEST") == "require":
		t.Fatal(programs.err)
	default:
		t.Skip(programs.err)
	}
}

// A workload is a running testdata/workload.
type workload struct {
	t     testing.TB
	dir   string // with its pipes, and dumps
	pid   int
	group string // its cgroup
}

// newWorkload starts one and has it run commands.
func newWorkload(t testing.TB, commands ...string) *workload {
	t.Helper()
	needPrograms(t)
	w := &workload{t: t, dir: t.TempDir(), group: newCgroup(t)}
	w.makePipes("w")
	cmd := exec.Command(programs.workload, w.dir, "w")
	cmd.Dir = "/"
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	w.pid = cmd.Process.Pid
	t.Cleanup(w.kill)
	if err := os.WriteFile(filepath.Join(w.group, "cgroup.procs"), []byte(strconv.Itoa(w.pid)), 0); err != nil {
		t.Fatal(err)
	}
	for _, c := range commands {
		w.run(c)
	}
	return w
}

func (w *workload) makePipes(name string) {
	w.t.Helper()
	for _, end := range []string{".in", ".out"} {
		if err := unix.Mkfifo(filepath.Join(w.dir, name+end), 0o600); err != nil {
			w.t.Fatal(err)
		}
	}
}

// kill ends the workload, wherever it is.
func (w *workload) kill() {
	// Their ids must be free for the next restore, which has the same.
	pids := append(processes(w.group), w.pid)
	cgroups{w.group}.kill()
	w.reaped(pids)
}

// reaped returns when processes that end are gone.
func (w *workload) reaped(pids []int) {
	w.t.Helper()
	_, _ = unix.Wait4(w.pid, nil, 0, nil) // a child of ours, up to its first dump
	for _, pid := range pids {
		for start := time.Now(); unix.Kill(pid, 0) == nil; time.Sleep(100 * time.Microsecond) {
			if time.Since(start) > 10*time.Second {
				w.t.Fatalf("process %d does not end", pid)
			}
		}
	}
}

var errWorkloadDead = errors.New("the workload is dead")

// ask runs a command in the process that serves the named pipes.
func (w *workload) ask(name, command string) (answer string, err error) {
	// Not blocking: opened for both, a pipe of a dead process reads nothing.
	in, err := os.OpenFile(filepath.Join(w.dir, name+".in"), os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	defer in.Close()
	out, err := os.OpenFile(filepath.Join(w.dir, name+".out"), os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	defer out.Close()
	if _, err := fmt.Fprintln(in, command); err != nil {
		return "", err
	}
	lines := bufio.NewReader(out)
	for start := time.Now(); time.Since(start) < time.Minute; {
		if err := out.SetReadDeadline(time.Now().Add(20 * time.Millisecond)); err != nil {
			return "", err
		}
		answer, err := lines.ReadString('\n')
		if err == nil {
			return strings.TrimSpace(answer), nil
		}
		if !w.alive() {
			return "", errWorkloadDead
		}
	}
	return "", fmt.Errorf("no answer to %q in a minute", command)
}

// askOnce runs a command that ends the process, and gives an answer only if there
// is one all the same.
func (w *workload) askOnce(name, command string) (answer string, err error) {
	in, err := os.OpenFile(filepath.Join(w.dir, name+".in"), os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer in.Close()
	out, err := os.OpenFile(filepath.Join(w.dir, name+".out"), os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return "", err
	}
	defer out.Close()
	if _, err := fmt.Fprintln(in, command); err != nil {
		return "", err
	}
	if err := out.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
		return "", err
	}
	return bufio.NewReader(out).ReadString('\n')
}

// run wants a command of the first process to succeed.
func (w *workload) run(command string) {
	w.t.Helper()
	w.runIn("w", command)
}

func (w *workload) runIn(name, command string) {
	w.t.Helper()
	if answer, err := w.ask(name, command); err != nil || answer != "ok" {
		w.t.Fatalf("%s: %s: %s %v", name, command, answer, err)
	}
}

// alive tells whether the first process runs.
func (w *workload) alive() bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", w.pid))
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

// dump makes a dump in the workload's directory, which ends it.
func (w *workload) dump(name string) (images string) {
	w.t.Helper()
	images = filepath.Join(w.dir, name)
	if err := os.Mkdir(images, 0o700); err != nil {
		w.t.Fatal(err)
	}
	pids := processes(w.group)
	w.criu("dump", "-D", images, "-t", strconv.Itoa(w.pid))
	w.reaped(pids)
	return images
}

// criu runs it in the workload's cgroup.
func (w *workload) criu(verb string, args ...string) {
	w.t.Helper()
	if err := w.criuCommand(verb, args...).Run(); err != nil {
		w.t.Fatalf("criu %s: %v\n%s", verb, err, w.log(verb))
	}
}

func (w *workload) criuCommand(verb string, args ...string) *exec.Cmd {
	args = append([]string{
		"-c", `echo $$ > "$0/cgroup.procs" && exec "$@"`, w.group,
		programs.criu, verb, "-v4", "-W", w.dir, "-o", verb + ".log", "--manage-cgroups=ignore",
	}, args...)
	cmd := exec.Command("sh", args...)
	cmd.Dir = "/"
	return cmd
}

func (w *workload) log(verb string) string {
	data, _ := os.ReadFile(filepath.Join(w.dir, verb+".log"))
	var errs []string
	for line := range strings.Lines(string(data)) {
		if strings.Contains(line, "Error") || strings.Contains(line, "Warn") {
			errs = append(errs, line)
		}
	}
	return strings.Join(errs, "")
}

// config serves a dump of the workload.
func (w *workload) config(images string) Config {
	w.t.Helper()
	dir, err := os.Open(images)
	if err != nil {
		w.t.Fatal(err)
	}
	listener, err := Listen(w.dir)
	if err != nil {
		w.t.Fatal(err)
	}
	return Config{Images: dir, Listener: listener, Cgroups: []string{w.group}}
}

// restore restores a dump with a server in this process.
func (w *workload) restore(images string, change func(*Config)) *Server {
	w.t.Helper()
	cfg := w.config(images)
	if change != nil {
		change(&cfg)
	}
	s, err := Serve(w.t.Context(), cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		s.fail(errors.New("the test is over"))
		<-s.Done()
	})
	w.criuRestore(images, "--lazy-pages")
	return s
}

// criuRestore lets CRIU restore; --lazy-pages is up to the caller.
func (w *workload) criuRestore(images string, args ...string) {
	w.t.Helper()
	pidfile := filepath.Join(w.dir, "pid")
	_ = os.Remove(pidfile)
	w.criu("restore", append([]string{"-d", "-D", images, "--pidfile", pidfile}, args...)...)
	w.readPid(pidfile)
}

func (w *workload) readPid(pidfile string) {
	w.t.Helper()
	data, err := os.ReadFile(pidfile)
	if err == nil {
		w.pid, err = strconv.Atoi(strings.TrimSpace(string(data)))
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// newCgroup makes a cgroup, of version 2 if the host has it.
func newCgroup(t testing.TB) string {
	t.Helper()
	for _, top := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		if _, err := os.Stat(filepath.Join(top, "cgroup.procs")); err == nil {
			return newCgroupIn(t, top)
		}
	}
	return newCgroupIn(t, "/sys/fs/cgroup/freezer")
}

func newCgroupIn(t testing.TB, top string) string {
	t.Helper()
	dir, err := os.MkdirTemp(top, "crac-pager-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cgroups{dir}.kill()
		removed(t, dir)
	})
	return dir
}

func drained(t testing.TB, s *Server) {
	t.Helper()
	select {
	case <-s.Done():
		if err := s.Wait(); err != nil {
			t.Fatal(err)
		}
	case <-time.After(time.Minute):
		t.Fatal("not drained in a minute")
	}
}
