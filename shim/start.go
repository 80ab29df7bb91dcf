package shim

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	goruntime "runtime"

	"github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/schedcore"
	"github.com/containerd/containerd/v2/pkg/shim"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// groupLabels are the annotations that put several containers into one shim, in
// order of precedence: the same as runc's shim knows.
var groupLabels = []string{
	"io.containerd.runc.v2.group",
	"io.kubernetes.cri.sandbox-id",
}

// protocolVersion is that of the task API over the shim's socket.
const protocolVersion = 3

// maxBootstrap bounds what containerd sends on standard input, in bytes.
const maxBootstrap = 10 << 20

// startCall is containerd's call `start`.
type startCall struct {
	bootapi.BootstrapParams
	// legacy is one of containerd before 2.3, which sends no bootstrap message but
	// flags, an environment, and the runtime's options, and wants its answer in JSON.
	legacy bool
}

// Begin serves containerd's call `start` in the process that is to be the shim, in the
// bundle. It finds the shim of the container's group, which is all then; or makes this
// process one, for shim.RunShim, which finds its socket and its arguments as if it had
// been executed for nothing else.
func Begin(ctx context.Context, args []string, answer *os.File) (serve bool, err error) {
	defer answer.Close()
	dontCollect()
	call, err := readStart(args, os.Stdin)
	if err != nil {
		return false, err
	}
	ctx = namespaces.WithNamespace(ctx, call.GetNamespace())
	group, err := groupOf("config.json", call.GetInstanceID())
	if err != nil {
		return false, err
	}
	dir, err := socketDir(call.GetSocketDir())
	if err != nil {
		return false, err
	}
	socket, address, err := listen(ctx, dir, call.GetContainerdGrpcAddress(), group, false)
	if err != nil {
		return false, err
	}
	if socket == nil {
		return false, call.answer(answer, address) // the group's shim is there already
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
	if call.debug() {
		// pkg/shim serves profiles on the second descriptor.
		if s, _, err := listen(ctx, dir, call.GetContainerdGrpcAddress(), group, true); err == nil && s != nil {
			sockets = append(sockets, s)
		}
	}
	if err := call.settle(address); err != nil {
		return false, err
	}
	if err := call.become(sockets); err != nil {
		return false, err
	}
	return true, call.answer(answer, address)
}

// readStart reads the call. The message repeats what the flags say, which tells it from
// options that parse as one.
func readStart(args []string, stdin io.Reader) (*startCall, error) {
	c := &startCall{}
	flags := flag.NewFlagSet("start", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	debug := flags.Bool("debug", false, "")
	id := flags.String("id", "", "")
	namespace := flags.String("namespace", "", "")
	address := flags.String("address", "", "")
	for _, ignored := range []string{"publish-binary", "bundle", "socket", "debug-socket"} {
		flags.String(ignored, "", "")
	}
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	if flags.NArg() > 0 || *id == "" || *namespace == "" {
		return nil, fmt.Errorf("start: %q names no container: containerd starts this program", args)
	}
	input, err := io.ReadAll(io.LimitReader(stdin, maxBootstrap))
	if err != nil {
		return nil, fmt.Errorf("read standard input: %w", err)
	}
	if len(input) > 0 && proto.Unmarshal(input, &c.BootstrapParams) == nil && c.InstanceID == *id && c.Namespace == *namespace {
		return c, nil
	}
	c = &startCall{legacy: true}
	c.InstanceID, c.Namespace, c.ContainerdGrpcAddress = *id, *namespace, *address
	c.LogLevel = bootapi.LogLevel_LOG_LEVEL_INFO
	if *debug {
		c.LogLevel = bootapi.LogLevel_LOG_LEVEL_DEBUG
	}
	if len(input) == 0 {
		return c, nil
	}
	var options anypb.Any
	if err := proto.Unmarshal(input, &options); err != nil {
		return nil, fmt.Errorf("runtime options on standard input: %w", err)
	}
	o, err := runtimeOptions(&options)
	if err != nil {
		return nil, err
	}
	return c, c.AddExtension(o)
}

func (c *startCall) debug() bool { return c.GetLogLevel() <= bootapi.LogLevel_LOG_LEVEL_DEBUG }

// answer tells containerd where a shim listens. Nothing may fail afterwards.
func (c *startCall) answer(to io.Writer, address string) error {
	result := &bootapi.BootstrapResult{Version: protocolVersion, Protocol: "ttrpc", Address: address}
	if c.legacy {
		return json.NewEncoder(to).Encode(struct {
			Version  int32  `json:"version"`
			Address  string `json:"address"`
			Protocol string `json:"protocol"`
		}{result.Version, result.Address, result.Protocol})
	}
	data, err := proto.Marshal(result)
	if err != nil {
		return err
	}
	_, err = to.Write(data)
	return err
}

// settle does what the kernel and whoever comes later need to know of this shim.
func (c *startCall) settle(address string) error {
	if err := unix.Setpgid(0, 0); err != nil {
		return os.NewSyscallError("setpgid", err)
	}
	if os.Getenv("SCHED_CORE") != "" {
		if err := schedcore.Create(schedcore.ProcessGroup); err != nil {
			return fmt.Errorf("enable core scheduling: %w", err)
		}
	}
	cgroup, err := shimCgroup(&c.BootstrapParams)
	if err != nil {
		return err
	}
	if cgroup != "" {
		if err := joinCgroup(cgroup); err != nil {
			return err
		}
	}
	// The shim removes its socket by this name when it ends.
	if err := os.WriteFile("address", []byte(address), 0o600); err != nil {
		return err
	}
	// Without CAP_SYS_RESOURCE the shim keeps containerd's score. A warning has
	// nowhere to go: containerd takes all that `start` writes for the address.
	if err := shim.AdjustOOMScore(os.Getpid()); err != nil && !errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("adjust the shim's OOM score: %w", err)
	}
	return nil
}

// shimProcs is how many of its threads run Go at once: as many as in containerd's shim, but no
// more than there are CPUs. More would look for work on them that others have.
var shimProcs = min(4, goruntime.NumCPU())

// become gives this process what shim.RunShim expects: sockets from descriptor 3 on,
// which are reserved for them, and nothing of containerd's that is open.
func (c *startCall) become(sockets []*os.File) error {
	for i, s := range sockets {
		if err := unix.Dup3(int(s.Fd()), 3+i, unix.O_CLOEXEC); err != nil {
			return os.NewSyscallError("dup3", err)
		}
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer null.Close()
	for fd := range 3 {
		if err := unix.Dup3(int(null.Fd()), fd, 0); err != nil {
			return os.NewSyscallError("dup3", err)
		}
	}
	goruntime.GOMAXPROCS(shimProcs)
	for name, value := range map[string]string{"GOMAXPROCS": fmt.Sprint(shimProcs), "OTEL_SERVICE_NAME": "containerd-shim-" + c.GetInstanceID()} {
		if err := os.Setenv(name, value); err != nil {
			return err
		}
	}
	os.Args = []string{os.Args[0], "-namespace", c.GetNamespace(), "-id", c.GetInstanceID(), "-address", c.GetContainerdGrpcAddress()}
	if c.debug() {
		os.Args = append(os.Args, "-debug")
	}
	return nil
}

// socketDirLink is where shim.RunShim looks for the directory of its socket when it ends.
const socketDirLink = "s"

// socketDir is the directory for the shim's socket, if containerd says which.
func socketDir(dir string) (string, error) {
	if dir == "" {
		return filepath.Join(defaults.DefaultStateDir, "s"), nil
	}
	if err := os.Remove(socketDirLink); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	return dir, os.Symlink(dir, socketDirLink)
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

// joinCgroup moves this process into an existing cgroup.
func joinCgroup(path string) error {
	pid := os.Getpid()
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
