package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	taskv2 "github.com/containerd/containerd/api/runtime/task/v2"
	taskv3 "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/services/tasks/v1"
	"github.com/containerd/containerd/api/types/task"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/crac-shim/crac/oci"
)

// shimClient talks to a container's shim without containerd between: the
// daemon accepts no options but its own.
type shimClient struct {
	*ttrpc.Client
	version int
}

// bootstrap is how a shim is reached, as containerd notes it in the bundle.
type bootstrap struct {
	Version  int    `json:"version"`
	Address  string `json:"address"`
	Protocol string `json:"protocol"`
}

// findTask finds a container's task and the directory of its bundle. An empty
// state directory is asked of the running shim.
func findTask(ctx context.Context, client *containerd.Client, t *target, state, id string) (*task.Process, string, error) {
	tr, err := client.TaskService().Get(ctx, &tasks.GetRequest{ContainerID: id})
	if err != nil {
		err = errgrpc.ToNative(err)
		if errdefs.IsNotFound(err) {
			return nil, "", fmt.Errorf("container %s is not running; start it first", id)
		}
		return nil, "", fmt.Errorf("find the task of container %s: %w", id, err)
	}
	if tr.Process.Status == task.Status_STOPPED && state == "" {
		return nil, "", fmt.Errorf("container %s has stopped; start it first", id)
	}
	if state == "" {
		if state, err = stateOf(int(tr.Process.Pid), t.namespace); err != nil {
			return nil, "", fmt.Errorf("find the shim of container %s: %w", id, err)
		}
	}
	return tr.Process, filepath.Join(bundles(state, t.namespace), id), nil
}

func dialShim(ctx context.Context, client *containerd.Client, t *target, state, id string) (*shimClient, error) {
	_, bundle, err := findTask(ctx, client, t, state, id)
	if err != nil {
		return nil, err
	}
	b, err := readBootstrap(bundle)
	if err != nil {
		return nil, fmt.Errorf("find the shim of container %s: %w; if containerd's state directory is another one, give it with --state", id, err)
	}
	if b.Protocol != "ttrpc" {
		return nil, fmt.Errorf("the shim of container %s speaks %q; this cracctl speaks ttrpc only", id, b.Protocol)
	}
	address := strings.TrimPrefix(b.Address, "unix://")
	conn, err := (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, "unix", address)
	if err != nil {
		return nil, fmt.Errorf("connect to the shim of container %s: %w; you may have to be root", id, err)
	}
	return &shimClient{Client: ttrpc.NewClient(conn), version: b.Version}, nil
}

func bundles(state, namespace string) string {
	return filepath.Join(state, "io.containerd.runtime.v2.task", namespace)
}

// stateOf finds containerd's state directory by the shim of a running
// container, which works in its bundle there. containerd itself does not tell.
// Where no process above the container's works in a bundle, it is containerd's
// default.
func stateOf(pid int, namespace string) (string, error) {
	// What runs the container is seldom further away than its parent.
	const generations = 4
	for n, p := 0, pid; n < generations; n++ {
		above, err := parent(p)
		switch {
		case err != nil && n == 0:
			return "", fmt.Errorf("its process %d has ended: %w", pid, err)
		case err != nil || above <= 1:
			return defaults.DefaultStateDir, nil
		}
		p = above
		bundle, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(p), "cwd"))
		if err != nil {
			continue // not ours to look at
		}
		if state, ok := strings.CutSuffix(filepath.Dir(bundle), bundles("/", namespace)); ok {
			return state, nil
		}
	}
	return defaults.DefaultStateDir, nil
}

func parent(pid int) (int, error) {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		return 0, err
	}
	// pid (name) state ppid …; the name may hold anything.
	_, rest, ok := strings.Cut(string(data[strings.LastIndexByte(string(data), ')')+1:]), " ")
	fields := strings.Fields(rest)
	if !ok || len(fields) < 2 {
		return 0, fmt.Errorf("cannot read /proc/%d/stat", pid)
	}
	return strconv.Atoi(fields[1])
}

func readBootstrap(bundle string) (b bootstrap, err error) {
	path := filepath.Join(bundle, "bootstrap.json")
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return b, err
	}
	defer f.Close()
	if err := json.NewDecoder(io.LimitReader(f, 1<<20)).Decode(&b); err != nil {
		return b, fmt.Errorf("%s: %w", path, err)
	}
	if b.Address == "" {
		return b, fmt.Errorf("%s gives no address", path)
	}
	return b, nil
}

func (s *shimClient) checkpoint(ctx context.Context, id string, o oci.CheckpointOptions) error {
	value, err := json.Marshal(o)
	if err != nil {
		return err
	}
	options := &anypb.Any{TypeUrl: oci.CheckpointOptionsType, Value: value}
	if s.version >= 3 {
		_, err = taskv3.NewTTRPCTaskClient(s.Client).Checkpoint(ctx, &taskv3.CheckpointTaskRequest{ID: id, Options: options})
	} else {
		_, err = taskv2.NewTTRPCTaskClient(s.Client).Checkpoint(ctx, &taskv2.CheckpointTaskRequest{ID: id, Options: options})
	}
	return err
}
