package harness

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// markerEnv is in the environment of every process of a daemon: its directory.
	markerEnv = "CRAC_HARNESS"
	// maxDir keeps a shim's socket, DIR/s/ and 64 hex digits, within the 108 bytes of sun_path.
	maxDir = 108 - 1 - len("/s/") - 64
	// namespacePrefix begins the name of every daemon's containerd namespace, and so its cgroups'.
	namespacePrefix = "crac-e2e-"
)

// Options says how a daemon is started. The zero value works.
type Options struct {
	Base  string   // where its directory is made; default $CRAC_TMP, then the system's temporary directory
	Debug bool     // containerd and the shims log at debug level
	Env   []string // more environment for containerd, and so for its shims
	Wrap  []string // a command that starts containerd by exec, such as setpriv
	Need  []Tool   // tools that must be there, besides containerd and ctr
	// OwnShims starts copies of the shims. Memory that is measured is then not shared with shims of
	// other daemons, which run from the same files.
	OwnShims bool
	Keep     bool // Stop leaves the directory with the logs in place
	// StateInMemory keeps what does not outlive a boot in a tmpfs, as hosts do whose /run is one.
	StateInMemory bool
	// CRI is the image of a pod's sandbox; empty for a containerd without CRI. Its runtime handlers
	// are crac and runc, its network is Daemon.Network's, and it uses the namespace k8s.io.
	CRI string
}

// Daemon is a private containerd.
type Daemon struct {
	Tools     *Tools
	Dir       string // everything of it lies below
	Address   string // its gRPC socket
	Namespace string // the containerd namespace to use; its cgroups are below /NAMESPACE
	Client    *containerd.Client

	opts       Options
	proc       *process
	view       *view
	janitor    *janitor
	registries []*RegistryServer
	network    *Network
	netns      map[string]struct{}
	stopping   sync.Mutex
	hostDirs   []string // of clients, not there when the daemon was started

	hostFilesMu sync.Mutex
	hostFiles   []hostFile
}

// StartContainerd starts a private containerd. The caller must call Stop, also after a failure of
// anything else.
func StartContainerd(ctx context.Context, opts Options) (_ *Daemon, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("a private containerd needs root: run this as root")
	}
	tools, err := FindTools(append([]Tool{Containerd, Ctr}, opts.Need...)...)
	if err != nil {
		return nil, err
	}
	base := opts.Base
	if base == "" {
		base = os.Getenv("CRAC_TMP")
	}
	if base == "" {
		base = os.TempDir()
	}
	id := make([]byte, 4)
	if _, err := rand.Read(id); err != nil {
		return nil, err
	}
	d := &Daemon{
		Tools:     tools,
		Dir:       filepath.Join(base, "crac-"+hex.EncodeToString(id)),
		Namespace: namespacePrefix + hex.EncodeToString(id),
		opts:      opts,
		netns:     map[string]struct{}{},
	}
	if d.Dir, err = filepath.Abs(d.Dir); err != nil {
		return nil, err
	}
	if len(d.Dir) > maxDir {
		return nil, fmt.Errorf("directory %s is too long for unix sockets below it (%d bytes at most): set CRAC_TMP to a shorter one", d.Dir, maxDir)
	}
	d.Address = d.path("c.sock")
	// 0711: a container in a user namespace must reach its root file system as an unprivileged user.
	if err := os.Mkdir(d.Dir, 0o711); err != nil { //nolint:gosec // see above
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.Stop(context.WithoutCancel(ctx)))
		}
	}()
	for _, p := range []string{"/var/lib/cni/results", "/var/lib/cni", "/run/nerdctl", "/etc/cni/net.d", "/etc/cni"} {
		if _, err := os.Stat(p); errors.Is(err, os.ErrNotExist) {
			d.hostDirs = append(d.hostDirs, p)
		}
	}
	if d.janitor, err = d.startJanitor(); err != nil {
		return nil, err
	}
	if err := d.configure(); err != nil {
		return nil, err
	}
	if d.view, err = newView(d.Dir, tools.CNI); err != nil {
		return nil, err
	}
	if d.Client, err = containerd.New(d.Address, containerd.WithDefaultNamespace(d.Namespace), containerd.WithTimeout(5*time.Second)); err != nil {
		return nil, err
	}
	return d, d.start(ctx)
}

func (d *Daemon) path(p string) string { return filepath.Join(d.Dir, p) }

// Path makes a directory of this name below the daemon's and returns its path. It goes with the daemon.
func (d *Daemon) Path(name string) (string, error) {
	p := d.path(filepath.Join("x", name))
	return p, os.MkdirAll(p, 0o755)
}

// StatePath is that of a directory for what a program would keep in /run.
func (d *Daemon) StatePath(name string) string { return d.path(filepath.Join("state", name)) }

// KeyDir is where containerd looks for keys when it unpacks encrypted layers: a node's own.
func (d *Daemon) KeyDir() string { return d.path("keys") }

// PolicyPath is where the node's policy would be: the host's own decides nothing here.
func (d *Daemon) PolicyPath() string { return d.path("policy.json") }

func (d *Daemon) configure() error {
	for _, p := range []string{"root", "state", "opt", "fifo", "x", "cni/net.d", "cni/lib", "certs.d", "nerdctl", "keys"} {
		if err := os.MkdirAll(d.path(p), 0o711); err != nil {
			return err
		}
	}
	if d.opts.StateInMemory {
		if err := unix.Mount("crac-state", d.path("state"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=711"); err != nil {
			return &os.PathError{Op: "mount a tmpfs on", Path: d.path("state"), Err: err}
		}
	}
	if err := os.Mkdir(d.path("tmp"), 0o755); err != nil {
		return err
	}
	if err := os.Chmod(d.path("tmp"), 0o1777); err != nil { //nolint:gosec // a TMPDIR has to be writable
		return err
	}
	if d.opts.OwnShims {
		if err := d.copyShims(); err != nil {
			return err
		}
	}
	level := "info"
	if d.opts.Debug {
		level = "debug"
	}
	without, cri := `
  "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime", "io.containerd.cri.v1.images",`, ""
	if d.opts.CRI != "" {
		without, cri = "", d.criConfig()
	}
	// Everything with a place of its own outside root and state is moved or switched off.
	conf := fmt.Sprintf(`version = 3
root = %q
state = %q
disabled_plugins = [%s
  "io.containerd.nri.v1.nri", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.erofs",
  "io.containerd.differ.v1.erofs", "io.containerd.internal.v1.tracing", "io.containerd.tracing.processor.v1.otlp",
]
[grpc]
  address = %q
[ttrpc]
  address = %q
[debug]
  level = %q
[stream_processors."io.containerd.ocicrypt.decoder.v1.tar.gzip"]
  accepts = ["application/vnd.oci.image.layer.v1.tar+gzip+encrypted"]
  returns = "application/vnd.oci.image.layer.v1.tar+gzip"
  path = "ctd-decoder"
  args = ["--decryption-keys-path", %q]
[plugins.'io.containerd.internal.v1.opt']
  path = %q
[plugins.'io.containerd.shim.v1.manager']
  socket_dir = %q
%s`, d.path("root"), d.path("state"), without, d.Address, d.Address+".ttrpc", level, d.KeyDir(), d.path("opt"), d.path("s"), cri)
	nerdctl := fmt.Sprintf(`address = %q
namespace = %q
data_root = %q
cni_path = %q
cni_netconfpath = %q
cgroup_manager = "cgroupfs"
hosts_dir = [%q]
insecure_registry = true
`, d.Address, d.Namespace, d.path("nerdctl"), d.Tools.CNI, d.path("cni/net.d"), d.path("certs.d"))
	return errors.Join(
		os.WriteFile(d.path("containerd.toml"), []byte(conf), 0o600),
		os.WriteFile(d.path("nerdctl.toml"), []byte(nerdctl), 0o600),
	)
}

// criConfig configures the runtimes as the README does.
func (d *Daemon) criConfig() string {
	return fmt.Sprintf(`[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = %q
[plugins.'io.containerd.cri.v1.runtime']
  netns_mounts_under_state_dir = true
  # where that needs a capability that we lack
  restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = [%q]
  conf_dir = %q
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.crac]
  runtime_type = 'io.containerd.crac.v2'
  pod_annotations = ['io.containerd.crac.*']
  [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.crac.options]
    SystemdCgroup = false
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
  runtime_type = 'io.containerd.runc.v2'
`, d.opts.CRI, d.Tools.CNI, d.path("cni/net.d"))
}

func (d *Daemon) copyShims() error {
	if err := os.Mkdir(d.path("bin"), 0o755); err != nil {
		return err
	}
	for _, dir := range []string{d.Tools.Bin, d.Tools.Tools} {
		shims, err := filepath.Glob(filepath.Join(dir, "containerd-shim-*"))
		if err != nil {
			return err
		}
		for _, s := range shims {
			b, err := os.ReadFile(s)
			if err != nil {
				return err
			}
			if err := os.WriteFile(d.path("bin/"+filepath.Base(s)), b, 0o755); err != nil { //nolint:gosec // a program
				return err
			}
		}
	}
	return nil
}

func (d *Daemon) start(ctx context.Context) error {
	args := append(append([]string{}, d.opts.Wrap...), "containerd", "--config", d.path("containerd.toml"))
	cmd := d.Command(context.Background(), args[0], args[1:]...)
	cmd.Env = append(cmd.Env, d.opts.Env...)
	var err error
	if d.proc, err = startProcess(cmd, d.path("containerd.log")); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 2*WaitLimit)
	defer cancel()
	err = d.proc.waitFor(ctx, func(ctx context.Context) error {
		try, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		ok, err := d.Client.IsServing(try)
		if err == nil && !ok {
			err = errors.New("not serving")
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("start containerd: %w\n%s", err, tail(d.Log(), 4000))
	}
	return nil
}

// Context returns ctx with the daemon's namespace.
func (d *Daemon) Context(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, d.Namespace)
}

// Restart ends containerd, with SIGKILL when crash is set, and starts it again. The shims live on.
func (d *Daemon) Restart(ctx context.Context, crash bool) error {
	return d.RestartAfter(ctx, crash, nil)
}

// RestartAfter is Restart with something done while containerd is away.
func (d *Daemon) RestartAfter(ctx context.Context, crash bool, between func() error) error {
	var err error
	if crash {
		err = d.proc.kill()
	} else {
		err = d.proc.stop(WaitLimit)
	}
	if err == nil && between != nil {
		err = between()
	}
	if err2 := d.start(ctx); err2 != nil {
		return errors.Join(err, err2)
	}
	return errors.Join(err, d.Client.Reconnect())
}

// PID returns containerd's process id.
func (d *Daemon) PID() int { return d.proc.cmd.Process.Pid }

// Log returns what containerd and, through it, the shims have logged.
func (d *Daemon) Log() string { return d.readLog("containerd.log") }

func (d *Daemon) readLog(name string) string {
	b, err := os.ReadFile(d.path(name))
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// Stop stops everything, removes everything, and names in its error what should not have been
// there once every container was deleted. It is safe to call more than once.
func (d *Daemon) Stop(ctx context.Context) error {
	d.stopping.Lock() // a signal may come while a program stops by itself
	defer d.stopping.Unlock()
	if d.Dir == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 4*WaitLimit)
	defer cancel()
	var errs []error
	if d.proc != nil {
		errs = append(errs, d.deleteContainers(ctx))
		// A shim ends by itself, a moment after its last task.
		shims, _ := waitGone(WaitLimit, func() ([]string, error) { return describe(d.shims()), nil })
		for _, s := range shims {
			errs = append(errs, fmt.Errorf("a shim is left after all containers were deleted: %s", s))
		}
	}
	for _, r := range d.registries {
		_ = r.proc.stop(5 * time.Second)
	}
	if d.network != nil {
		errs = append(errs, d.network.remove(ctx))
	}
	for ns := range d.netns {
		errs = append(errs, d.DeleteNetNS(ctx, ns))
	}
	if d.Client != nil {
		_ = d.Client.Close()
	}
	if d.proc != nil {
		errs = append(errs, d.proc.stop(WaitLimit))
	}
	if d.view != nil {
		d.view.close()
	}
	// What has ended without a parent is its init's to reap, and some take seconds.
	left, _ := waitGone(WaitLimit/3, func() ([]string, error) { return d.leftovers(), nil })
	for _, l := range left {
		errs = append(errs, errors.New("left behind: "+l))
	}
	errs = append(errs, d.purge())
	if d.janitor != nil {
		errs = append(errs, d.janitor.dismiss())
	}
	d.Dir = ""
	return errors.Join(errs...)
}

// deleteContainers kills and deletes what is there. That something is there is no error: a
// program that was interrupted stops the same way as one that ended well.
func (d *Daemon) deleteContainers(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*WaitLimit)
	defer cancel()
	select {
	case <-d.proc.done:
		return fmt.Errorf("containerd had ended: %w\n%s", d.proc.err, tail(d.Log(), 4000))
	default:
	}
	all, err := d.Client.NamespaceService().List(ctx)
	if err != nil {
		return fmt.Errorf("list namespaces: %w", err)
	}
	var errs []error
	for _, ns := range all {
		ctx := namespaces.WithNamespace(ctx, ns)
		containers, err := d.Client.Containers(ctx)
		if err != nil {
			errs = append(errs, fmt.Errorf("list containers of %s: %w", ns, err))
			continue
		}
		for _, c := range containers {
			if err := d.deleteContainer(ctx, c); err != nil {
				errs = append(errs, fmt.Errorf("delete container %s: %w", c.ID(), err))
			}
		}
	}
	return errors.Join(errs...)
}

func (d *Daemon) deleteContainer(ctx context.Context, c containerd.Container) error {
	task, err := c.Task(ctx, nil)
	if err == nil {
		_, err = task.Delete(ctx, containerd.WithProcessKill)
	}
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	err = c.Delete(ctx, containerd.WithSnapshotCleanup)
	if errdefs.IsNotFound(err) { // the snapshot, or the container, is gone already
		err = c.Delete(ctx)
	}
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

// purge removes all that is left, whatever it is: the last resort after leftovers were counted.
func (d *Daemon) purge() error {
	var errs []error
	// A killed shim's children become someone else's, and a container's may still be forking.
	_, err := waitGone(WaitLimit/3, func() ([]string, error) {
		procs := d.processes()
		for _, p := range procs {
			_ = syscall.Kill(p.PID, syscall.SIGKILL)
		}
		return describe(procs), nil
	})
	errs = append(errs, err)
	errs = append(errs, unmountBelow(d.Dir), removeCgroups(d.Namespace), removeRunEntries(d.Namespace))
	if d.opts.Keep {
		for _, p := range []string{"root", "state", "opt", "fifo", "view", "registry", "docker-registry", "cni", "s", "nerdctl"} {
			errs = append(errs, os.RemoveAll(d.path(p)))
		}
	} else {
		errs = append(errs, os.RemoveAll(d.Dir))
	}
	for _, p := range d.hostDirs {
		_ = os.Remove(p) // when it is empty: another daemon may use it meanwhile
	}
	errs = append(errs, d.restoreHostFiles(func(hostFile) bool { return true }))
	return errors.Join(errs...)
}

// waitGone calls list until it is empty, for as long as grace, and returns the rest.
func waitGone(grace time.Duration, list func() ([]string, error)) ([]string, error) {
	deadline := time.Now().Add(grace)
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		left, err := list()
		if err != nil || len(left) == 0 {
			return nil, err
		}
		if time.Now().After(deadline) {
			return left, fmt.Errorf("still there after %v: %s", grace, strings.Join(left, "; "))
		}
		time.Sleep(wait)
	}
}

// FIFODir is where clients of the daemon should make their FIFOs, so that none stays in /run.
func (d *Daemon) FIFODir() string { return d.path("fifo") }
