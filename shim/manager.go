package shim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"syscall"
	"time"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/api/types"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/schedcore"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/crac-shim/crac/runtime"
	"github.com/crac-shim/crac/runtime/hook"
)

// Name is the runtime's name in containerd.
const Name = "io.containerd.crac.v2"

// Version is what this runtime calls itself in -info. The program sets it.
var Version = "dev"

// groupLabels are the annotations that put several containers into one shim, in
// order of precedence: the same as runc's shim knows.
var groupLabels = []string{
	"io.containerd.runc.v2.group",
	"io.kubernetes.cri.sandbox-id",
}

// protocolVersion is that of the task API over the shim's socket.
const protocolVersion = 3

// Manager starts shims, cleans up behind dead ones, and says what they can do.
type Manager struct{}

var _ shim.Shim = Manager{}

// Name implements shim.Shim.
func (Manager) Name() string { return Name }

// Start implements shim.Shim: it starts the shim process for the bundle in the
// working directory, or finds the one of its group, and returns its address.
func (Manager) Start(ctx context.Context, p *bootapi.BootstrapParams) (_ *bootapi.BootstrapResult, err error) {
	dontCollect()
	group, err := groupOf("config.json", p.GetInstanceID())
	if err != nil {
		return nil, err
	}
	socketDir := p.GetSocketDir()
	if socketDir == "" {
		socketDir = filepath.Join(defaults.DefaultStateDir, "s")
	}
	result := &bootapi.BootstrapResult{Version: protocolVersion, Protocol: "ttrpc"}

	debug := p.GetLogLevel() <= bootapi.LogLevel_LOG_LEVEL_DEBUG
	socket, address, err := listen(ctx, socketDir, p.GetContainerdGrpcAddress(), group, false)
	if err != nil {
		return nil, err
	}
	result.Address = address
	if socket == nil {
		return result, nil // the group's shim is there already
	}
	sockets := []*os.File{socket}
	defer func() {
		for _, s := range sockets {
			s.Close()
		}
		if err != nil {
			_ = shim.RemoveSocket(address)
		}
	}()
	if debug {
		// pkg/shim serves profiles on the second descriptor.
		if s, _, err := listen(ctx, socketDir, p.GetContainerdGrpcAddress(), group, true); err == nil && s != nil {
			sockets = append(sockets, s)
		}
	}
	pid, err := spawn(ctx, p, debug, sockets)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}()
	cgroup, err := shimCgroup(p)
	if err != nil {
		return nil, err
	}
	if cgroup != "" {
		if err := joinCgroup(cgroup, pid); err != nil {
			return nil, err
		}
	}
	// The shim removes its socket by this name when it ends.
	if err := os.WriteFile("address", []byte(address), 0o600); err != nil {
		return nil, err
	}
	// Without CAP_SYS_RESOURCE the shim keeps containerd's score. A warning has
	// nowhere to go: containerd takes all that `start` writes for the address.
	if err := shim.AdjustOOMScore(pid); err != nil && !errors.Is(err, fs.ErrPermission) {
		return nil, fmt.Errorf("adjust the shim's OOM score: %w", err)
	}
	return result, nil
}

// groupOf reads which shim a container belongs to.
func groupOf(config, id string) (string, error) {
	data, err := os.ReadFile(config)
	if err != nil {
		return "", err
	}
	var spec struct {
		Annotations map[string]string `json:"annotations"`
	}
	if err := json.Unmarshal(data, &spec); err != nil {
		return "", fmt.Errorf("parse %s: %w", config, err)
	}
	for _, label := range groupLabels {
		if group := spec.Annotations[label]; group != "" {
			return group, nil
		}
	}
	return id, nil
}

// listen makes the shim's socket. A nil file says that a shim is listening there.
func listen(ctx context.Context, dir, containerd, id string, debug bool) (*os.File, string, error) {
	address, err := shim.CreateSocketAddress(ctx, dir, containerd, id, debug)
	if err != nil {
		return nil, "", err
	}
	l, err := shim.NewSocket(address)
	if err != nil && shim.SocketEaddrinuse(err) {
		if !debug && shim.CanConnect(address) {
			return nil, address, nil
		}
		// Left over from a shim that was killed.
		if err := shim.RemoveSocket(address); err != nil {
			return nil, "", fmt.Errorf("remove stale shim socket: %w", err)
		}
		l, err = shim.NewSocket(address)
	}
	if err != nil {
		return nil, "", fmt.Errorf("create shim socket: %w", err)
	}
	f, err := dupListener(l)
	if err != nil {
		_ = shim.RemoveSocket(address)
		return nil, "", err
	}
	return f, address, nil
}

func dupListener(l *net.UnixListener) (*os.File, error) {
	defer l.Close()
	l.SetUnlinkOnClose(false)
	return l.File()
}

// spawn starts this binary as the shim process.
func spawn(ctx context.Context, p *bootapi.BootstrapParams, debug bool, sockets []*os.File) (pid int, err error) {
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return 0, err
	}
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	cwd, err := os.Getwd()
	if err != nil {
		return 0, err
	}
	cmd := exec.Command(self, "-namespace", ns, "-id", p.GetInstanceID(), "-address", p.GetContainerdGrpcAddress())
	if debug {
		cmd.Args = append(cmd.Args, "-debug")
	}
	cmd.Dir = cwd
	cmd.Env = append(os.Environ(), "GOMAXPROCS=4", "OTEL_SERVICE_NAME=containerd-shim-"+p.GetInstanceID())
	cmd.ExtraFiles = sockets
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	// Core scheduling is inherited from the thread that forks.
	goruntime.LockOSThread()
	defer goruntime.UnlockOSThread()
	if os.Getenv("SCHED_CORE") != "" {
		if err := schedcore.Create(schedcore.ProcessGroup); err != nil {
			return 0, fmt.Errorf("enable core scheduling: %w", err)
		}
	}
	if err := cmd.Start(); err != nil {
		return 0, fmt.Errorf("start the shim process: %w", err)
	}
	pid = cmd.Process.Pid
	return pid, cmd.Process.Release()
}

// shimCgroup finds the cgroup that the options want for the shim itself.
func shimCgroup(p *bootapi.BootstrapParams) (string, error) {
	var opts runcoptions.Options
	if found, err := p.FindExtension(&opts); found || err != nil {
		return opts.ShimCgroup, err
	}
	var generic runtimeoptions.Options
	if found, err := p.FindExtension(&generic); !found || err != nil {
		return "", err
	}
	o, err := tomlOptions(&generic)
	if err != nil {
		return "", err
	}
	return o.ShimCgroup, nil
}

// joinCgroup moves the shim process into an existing cgroup.
func joinCgroup(path string, pid int) error {
	if cgroups.Mode() == cgroups.Unified {
		cg, err := cgroup2.Load(path)
		if err == nil {
			err = cg.AddProc(uint64(pid))
		}
		if err != nil {
			return fmt.Errorf("ShimCgroup %q: %w", path, err)
		}
		return nil
	}
	cg, err := cgroup1.Load(cgroup1.StaticPath(path))
	if err == nil {
		err = cg.AddProc(uint64(pid))
	}
	if err != nil {
		return fmt.Errorf("ShimCgroup %q: %w", path, err)
	}
	return nil
}

// Stop implements shim.Shim: containerd calls it when a shim has died, to kill
// and clean up what it left.
func (Manager) Stop(ctx context.Context, id string) (shim.StopStatus, error) {
	dontCollect()
	cwd, err := os.Getwd()
	if err != nil {
		return shim.StopStatus{}, err
	}
	bundle := filepath.Join(filepath.Dir(cwd), id)
	ns, err := namespaces.NamespaceRequired(ctx)
	if err != nil {
		return shim.StopStatus{}, err
	}
	root := filepath.Join(bundle, stateDir)
	if o, err := readOptions(bundle); err != nil {
		log.G(ctx).WithError(err).Warn("failed to read the container's options")
	} else {
		root = stateRoot(o, ns, bundle)
	}
	pid, err := runtime.ForceDelete(root, id)
	if err != nil {
		log.G(ctx).WithError(err).Warn("failed to delete the container")
	}
	killed := time.Now()
	if err := mount.UnmountRecursive(filepath.Join(bundle, "rootfs"), 0); err != nil {
		log.G(ctx).WithError(err).Warn("failed to unmount the root file system")
	}
	if err := hook.RemoveDir(filepath.Join(bundle, hooksDir)); err != nil {
		log.G(ctx).WithError(err).Warn("failed to remove the directory of hooks")
	}
	if e, err := readExit(bundle); err == nil {
		return shim.StopStatus{Pid: e.Pid, ExitStatus: e.Status, ExitedAt: e.At}, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		log.G(ctx).WithError(err).Warn("failed to read the recorded exit status")
	}
	return shim.StopStatus{Pid: pid, ExitStatus: 128 + int(unix.SIGKILL), ExitedAt: killed}, nil
}

// Info implements shim.Shim.
func (Manager) Info(_ context.Context, options io.Reader) (*types.RuntimeInfo, error) {
	info := &types.RuntimeInfo{
		Name:    Name,
		Version: &types.RuntimeVersion{Version: Version},
	}
	data, err := io.ReadAll(options)
	if err != nil {
		return nil, err
	}
	if len(data) > 0 {
		var asked anypb.Any
		if err := proto.Unmarshal(data, &asked); err != nil {
			return nil, fmt.Errorf("runtime options: %w", err)
		}
		o, err := runtimeOptions(&asked)
		if err != nil {
			return nil, err
		}
		if info.Options, err = typeurl.MarshalAnyToProto(o); err != nil {
			return nil, err
		}
	}
	if info.Features, err = typeurl.MarshalAnyToProto(runtime.Features()); err != nil {
		return nil, fmt.Errorf("runtime features: %w", err)
	}
	return info, nil
}
