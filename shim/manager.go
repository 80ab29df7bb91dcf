package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/errdefs"
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

// Manager cleans up behind dead shims, and says what they can do.
type Manager struct{}

var _ shim.Shim = Manager{}

// Name implements shim.Shim.
func (Manager) Name() string { return Name }

// Start implements shim.Shim. It is never called: Begin takes its place.
func (Manager) Start(context.Context, *bootapi.BootstrapParams) (*bootapi.BootstrapResult, error) {
	return nil, errdefs.ErrNotImplemented
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
	pid, err := runtime.ForceDelete(root, id, func(err error) { log.G(ctx).WithError(err).Warn("delete the container") })
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
	if err := removeSocket(bundle); err != nil {
		log.G(ctx).WithError(err).Warn("failed to remove the shim's socket")
	}
	if e, err := readExit(bundle); err == nil {
		return shim.StopStatus{Pid: e.Pid, ExitStatus: e.Status, ExitedAt: e.At}, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		log.G(ctx).WithError(err).Warn("failed to read the recorded exit status")
	}
	return shim.StopStatus{Pid: pid, ExitStatus: 128 + int(unix.SIGKILL), ExitedAt: killed}, nil
}

// removeSocket removes the socket of the shim that a bundle is of, unless one listens
// there: that of a pod has more containers than one.
func removeSocket(bundle string) error {
	var params struct { // containerd's, core/runtime/v2/shim_manager.go
		Address string `json:"address"`
	}
	err := readJSON(filepath.Join(bundle, "bootstrap.json"), &params)
	if errors.Is(err, fs.ErrNotExist) || err == nil && (params.Address == "" || shim.CanConnect(params.Address)) {
		return nil
	}
	if err == nil {
		err = shim.RemoveSocket(params.Address)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
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
