package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/image-spec/identity"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/integration/harness"
)

// bareCRIU is the floor for stock CRIU: `criu restore` of processes that are in no container, only
// in a process, mount and network namespace that were made before, so that every one can have the
// process ids of the original.
type bareCRIU struct{ b *bench }

func (r *bareCRIU) name() string { return "criu" }

func (r *bareCRIU) can(w *workload) error {
	if !w.watched {
		return cannot("it is measured with programs that need no root file system of their own")
	}
	return nil
}

func (r *bareCRIU) prepare(ctx context.Context, w *workload) (saved, error) {
	return r.b.prepareRuntime(ctx, r, w)
}

func (r *bareCRIU) stageCold(ctx context.Context, w *workload, n *network) (instance, error) {
	s, err := r.b.newSandbox(ctx, w, n)
	if err != nil {
		return nil, err
	}
	program := filepath.Join(s.root, w.command[0])
	// High process ids, so that CRIU's own is not among them when it restores. And a file that was
	// opened outside this mount namespace is nothing that it can find.
	s.command = `echo 1000 >/proc/sys/kernel/ns_last_pid; ( for fd in /proc/self/fd/*; do fd=${fd##*/}; [ "$fd" -le 2 ] || eval "exec $fd>&-"; done; ` +
		"GODEBUG=multipathtcp=0 exec setsid " + program + " " + strings.Join(w.command[1:], " ") + " ) </dev/null >/dev/null 2>&1 &"
	return s, nil
}

func (r *bareCRIU) save(ctx context.Context, w *workload, i instance, exit bool) (saved, error) {
	s := i.(*sandbox)
	dir, err := r.b.d.Path("criu-" + r.b.id())
	if err != nil {
		return nil, err
	}
	command := fmt.Sprintf("criu dump --shell-job --tree $! --images-dir %s --log-file dump.log", dir)
	if !exit {
		command += " --leave-running"
	}
	if err := s.do(ctx, command); err != nil {
		return nil, errors.Join(fmt.Errorf("criu dump: %w", err), lastLines(filepath.Join(dir, "dump.log")))
	}
	return &dumped{r, w, dir, s.root}, nil
}

// dumped is a directory with CRIU's files.
type dumped struct {
	r    *bareCRIU
	w    *workload
	dir  string
	root string
}

func (s *dumped) was() *testimony { return nil }

func (s *dumped) stage(ctx context.Context, n *network) (instance, error) {
	box, err := s.r.b.newSandbox(ctx, s.w, n)
	if err != nil {
		return nil, err
	}
	box.log = filepath.Join(s.dir, "restore.log")
	box.command = fmt.Sprintf("criu restore --shell-job --restore-detached --images-dir %s --log-file restore.log", s.dir)
	return box, nil
}

func (s *dumped) size(context.Context) (size int64, err error) { return directorySize(s.dir) }

func (s *dumped) remove(context.Context) error { return os.RemoveAll(s.dir) }

func directorySize(dir string) (size int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		info, err := e.Info()
		if err == nil {
			size += info.Size()
		}
		return err
	})
	return size, err
}

// lastLines is the end of a log, as an error.
func lastLines(file string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	return errors.New(string(b[max(0, len(b)-1500):]))
}

// sandbox is a shell in namespaces of its own, which does what it is told. It is the init of its
// process namespace: with it all ends.
type sandbox struct {
	b       *bench
	root    string
	command string // what run does
	log     string // of the command
	shell   *exec.Cmd
	in      io.WriteCloser
	out     *bufio.Reader
}

// sandboxScript executes its input line by line, and says how each line ended.
const sandboxScript = `while read -r line; do
	eval "$line"
	echo "ended $?"
done`

func (b *bench) newSandbox(ctx context.Context, w *workload, n *network) (*sandbox, error) {
	root, err := b.rootfs(ctx, w)
	if err != nil {
		return nil, err
	}
	s := &sandbox{b: b, root: root}
	s.shell = b.d.Command(context.WithoutCancel(ctx), "nsenter", "--net="+n.path,
		"unshare", "--pid", "--mount", "--fork", "--kill-child", "--mount-proc", "bash", "-c", sandboxScript)
	s.shell.Stderr = nil
	if s.in, err = s.shell.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := s.shell.StdoutPipe()
	if err != nil {
		return nil, err
	}
	s.out = bufio.NewReader(out)
	if err := s.shell.Start(); err != nil {
		return nil, err
	}
	return s, s.do(ctx, "true")
}

// do executes one command.
func (s *sandbox) do(ctx context.Context, command string) error {
	stop := context.AfterFunc(ctx, func() { _ = s.shell.Process.Kill() })
	defer stop()
	if _, err := io.WriteString(s.in, command+"\n"); err != nil {
		return err
	}
	for {
		line, err := s.out.ReadString('\n')
		if err != nil {
			return errors.Join(fmt.Errorf("%s: the shell ended: %w", command, err), context.Cause(ctx))
		}
		if code, ok := strings.CutPrefix(strings.TrimSpace(line), "ended "); ok {
			if code != "0" {
				return fmt.Errorf("%s: exit code %s", command, code)
			}
			return nil
		}
	}
}

func (s *sandbox) run(ctx context.Context) error {
	err := s.do(ctx, s.command)
	if err != nil && s.log != "" {
		err = errors.Join(err, lastLines(s.log))
	}
	return err
}

func (s *sandbox) filled(context.Context) error { return nil }

func (s *sandbox) use(context.Context) (u usage, err error) {
	// nsenter becomes unshare, whose only child is the shell, whose children are the workload.
	var pids []int
	for _, shell := range children(s.shell.Process.Pid) {
		pids = append(pids, children(shell)...)
	}
	u.pss, err = pssOf(pids)
	return u, err
}

func (s *sandbox) remove(context.Context) (time.Duration, error) {
	// The shell's end is the end of all in its process namespace.
	for _, shell := range children(s.shell.Process.Pid) {
		if err := unix.Kill(shell, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return 0, fmt.Errorf("kill the sandbox %s: %w", strconv.Itoa(shell), err)
		}
	}
	_ = s.in.Close()
	_ = s.shell.Wait() // killed, or told by the end of its input
	return 0, nil
}

// rootfs mounts a workload's image once, for who runs it without containerd.
func (b *bench) rootfs(ctx context.Context, w *workload) (string, error) {
	if at, ok := b.roots[w.image]; ok {
		return at, nil
	}
	at, err := b.d.Path("rootfs-" + w.image)
	if err != nil {
		return "", err
	}
	if err := b.mountRoot(ctx, w, "bench-rootfs-"+w.image, at); err != nil {
		return "", err
	}
	b.roots[w.image] = at
	return at, nil
}

// mountRoot mounts a new writable snapshot of a workload's image.
func (b *bench) mountRoot(ctx context.Context, w *workload, key, at string) error {
	img, err := b.image(ctx, w)
	if err != nil {
		return err
	}
	layers, err := img.RootFS(ctx)
	if err != nil {
		return err
	}
	mounts, err := b.d.Client.SnapshotService("").Prepare(ctx, key, identity.ChainID(layers).String(),
		// Nothing else holds it: containerd would collect it.
		snapshots.WithLabels(map[string]string{"containerd.io/gc.root": time.Now().UTC().Format(time.RFC3339)}))
	if err != nil {
		return err
	}
	return mount.All(mounts, at)
}

// unmountRoot undoes mountRoot.
func (b *bench) unmountRoot(ctx context.Context, key, at string) error {
	return errors.Join(mount.UnmountAll(at, 0), b.d.Client.SnapshotService("").Remove(ctx, key))
}

// kernelCache gives CRIU what it has found out about this kernel, as it keeps it where /run is a
// tmpfs: elsewhere, on machines like those that tests run on, it probes the kernel on every
// start, which would make all peers slower than they are where they are used. It returns what
// undoes it.
func kernelCache(ctx context.Context, d *harness.Daemon) (undo func() error, err error) {
	const cache = "/run/criu.kdat"
	nothing := func() error { return nil }
	if _, err := os.Stat(cache); err == nil {
		return nothing, nil
	}
	var fs unix.Statfs_t
	if err := unix.Statfs("/run", &fs); err != nil || fs.Type == unix.TMPFS_MAGIC {
		return nothing, err
	}
	made := filepath.Join(d.Dir, "x", "criu.kdat")
	script := `mount -t tmpfs tmpfs /run && criu check >/dev/null && cp /run/criu.kdat "$1"`
	if _, err := harness.Run(ctx, d.Command(ctx, "unshare", "--mount", "sh", "-c", script, "sh", made)); err != nil {
		return nothing, fmt.Errorf("make CRIU's cache of kernel features: %w", err)
	}
	data, err := os.ReadFile(made)
	if err != nil {
		return nothing, err
	}
	return func() error { return os.Remove(cache) }, os.WriteFile(cache, data, 0o600)
}
