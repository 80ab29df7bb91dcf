package main

import (
	"context"
	"encoding/json"
	"errors"
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
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/crac-shim/crac/images/build"
	"github.com/crac-shim/crac/images/inspect"
	"github.com/crac-shim/crac/images/registry"
	"github.com/crac-shim/crac/oci"
)

type checkpointFlags struct {
	exit        bool
	push        bool
	compression string
	parent      string
	state       string
	quiet       bool
}

func newCheckpoint(t *target) *cobra.Command {
	var f checkpointFlags
	cmd := &cobra.Command{
		Use:   "checkpoint CONTAINER REF",
		Short: "Checkpoint a running container into an image",
		Long: `Checkpoint a running container into an image named REF: its base image, what it
changed in its files, and its memory. Any runtime can run the image; under
io.containerd.crac.v2 it continues where the container was.

The container runs on afterwards, unless --exit is given. It stands still only
while its memory and its changes are taken, not while the image is packed.`,
		Example: `  cracctl checkpoint --push web registry.example/shop/web:warm
  ctr run -d --runtime io.containerd.crac.v2 registry.example/shop/web:warm web-2`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: completeContainers(t),
		RunE: func(cmd *cobra.Command, args []string) error {
			return checkpoint(cmd.Context(), *t, f, args[0], args[1], cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	cmd.Flags().BoolVar(&f.exit, "exit", false, "stop the container after the checkpoint")
	cmd.Flags().BoolVar(&f.push, "push", false, "push the image to the registry in its name")
	cmd.Flags().StringVar(&f.compression, "compression", "", "of the new layers: zstd or gzip (default: the container's option, else zstd)")
	completions(cmd, "compression", string(oci.CompressionZstd), string(oci.CompressionGzip))
	cmd.Flags().StringVar(&f.parent, "parent", "", "a checkpoint image to continue: memory that it has is not stored again")
	_ = cmd.RegisterFlagCompletionFunc("parent", completeImages(t))
	cmd.Flags().StringVar(&f.state, "state", "", "containerd's state directory (default: asked of the running shim, else "+defaults.DefaultStateDir+")")
	cmd.Flags().BoolVarP(&f.quiet, "quiet", "q", false, "print the image's digest only")
	return cmd
}

func checkpoint(ctx context.Context, t target, f checkpointFlags, id, ref string, out, errOut io.Writer) error {
	// Before anything stands still for it.
	check := oci.CheckRef
	if f.push {
		check = oci.CheckPushRef
	}
	if err := check(ref); err != nil {
		return err
	}
	compression := oci.Compression(f.compression)
	switch compression {
	case "", oci.CompressionZstd, oci.CompressionGzip:
	default:
		return fmt.Errorf("unknown compression %q; known are zstd and gzip", compression)
	}
	registries, err := registry.DefaultConfig()
	if err != nil && f.push {
		return err
	}
	ctx = namespaces.WithNamespace(ctx, t.namespace)
	client, err := connect(ctx, t.address)
	if err != nil {
		return err
	}
	defer client.Close()

	if f.parent != "" {
		img, err := (&session{client, ctx}).image(f.parent)
		if err != nil {
			return fmt.Errorf("parent: %w", err)
		}
		if img.Checkpoint < 0 {
			return fmt.Errorf("parent: %w: %s; leave --parent out to make a whole checkpoint", inspect.ErrNoCheckpoint, f.parent)
		}
	}
	c, err := findContainer(ctx, client, t, id)
	if err != nil {
		return err
	}
	if c.Image == "" {
		return fmt.Errorf("container %s was not made from an image, so there is none to put a checkpoint on; use ctr tasks checkpoint --image-path", id)
	}

	shim, err := dialShim(ctx, client, t, f.state, id)
	if err != nil {
		return err
	}
	defer shim.Close()

	done := watch(ctx, client.ContentStore(), build.IngestRef(id), errOut, f.quiet)
	start := time.Now()
	err = shim.checkpoint(ctx, id, oci.CheckpointOptions{Ref: ref, Exit: f.exit, Compression: compression, Parent: f.parent})
	took := time.Since(start)
	done()
	if err != nil {
		return fmt.Errorf("checkpoint of container %s: %w", id, explain(err))
	}
	if err := report(ctx, client, ref, took, f.quiet, out); err != nil || !f.push {
		return err
	}
	// Here and not in the shim: whoever asks has the credentials, and waits.
	return pushImage(ctx, client, registries, ref, f.quiet, out, errOut)
}

// findContainer finds a container of this runtime.
func findContainer(ctx context.Context, client *containerd.Client, t target, id string) (containers.Container, error) {
	c, err := client.ContainerService().Get(ctx, id)
	if err != nil {
		if errdefs.IsNotFound(err) {
			return c, fmt.Errorf("no container %s in namespace %s; see ctr -n %s containers ls (nerdctl uses the namespace default, Kubernetes k8s.io)", id, t.namespace, t.namespace)
		}
		return c, fmt.Errorf("find container %s: %w", id, err)
	}
	if !isOurs(c.Runtime.Name) {
		return c, fmt.Errorf("container %s runs under %s, which cannot make checkpoint images; run it with --runtime %s", id, c.Runtime.Name, oci.RuntimeName)
	}
	return c, nil
}

// isOurs knows the runtime by name or by its binary's path: containerd takes
// either.
func isOurs(runtime string) bool {
	return runtime == oci.RuntimeName || filepath.Base(runtime) == "containerd-shim-crac-v2"
}

// explain adds the way out to errors that say nothing but a code.
func explain(err error) error {
	err = errgrpc.ToNative(err)
	switch {
	case errdefs.IsNotImplemented(err):
		return fmt.Errorf("%w; the shim is older than this cracctl: install both from one release and start the container again", err)
	case errdefs.IsNotFound(err):
		return fmt.Errorf("%w; is it running? See ctr tasks ls", err)
	case errors.Is(err, ttrpc.ErrClosed):
		return fmt.Errorf("the shim went away: %w; see containerd's log", err)
	}
	return err
}

// report prints what was made.
func report(ctx context.Context, client *containerd.Client, ref string, took time.Duration, quiet bool, out io.Writer) error {
	img, err := client.ImageService().Get(ctx, ref)
	if err != nil {
		return fmt.Errorf("the shim reported success, but image %s is not there: %w", ref, err)
	}
	if quiet {
		_, err := fmt.Fprintln(out, img.Target.Digest)
		return err
	}
	data, err := content.ReadBlob(ctx, client.ContentStore(), img.Target)
	if err != nil {
		return fmt.Errorf("read image %s: %w", ref, err)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return fmt.Errorf("read image %s: %w", ref, err)
	}
	total, layer := img.Target.Size+m.Config.Size, int64(0)
	for _, l := range m.Layers {
		total += l.Size
		if l.Annotations[oci.LayerAnnotation] == oci.LayerCheckpoint {
			layer = l.Size
		}
	}
	dump, _ := strconv.ParseInt(m.Annotations[oci.AnnotationDumpBytes], 10, 64)

	fmt.Fprintf(out, "Image       %s\n", ref)
	fmt.Fprintf(out, "Digest      %s\n", img.Target.Digest)
	fmt.Fprintf(out, "Size        %s, of which checkpoint %s (%s unpacked)\n", size(total), size(layer), size(dump))
	fmt.Fprintf(out, "Took        %s\n", took.Round(time.Millisecond))
	if frozen := img.Labels[build.LabelFrozen]; frozen != "" {
		fmt.Fprintf(out, "Stood still %s\n", frozen)
	}
	return nil
}

// size writes bytes as people do.
func size(n int64) string {
	const units = "KMGT"
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	v, u := float64(n)/1024, 0
	for v >= 1024 && u < len(units)-1 {
		v, u = v/1024, u+1
	}
	return fmt.Sprintf("%.1f %ciB", v, units[u])
}

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
func findTask(ctx context.Context, client *containerd.Client, t target, state, id string) (*task.Process, string, error) {
	tr, err := client.TaskService().Get(ctx, &tasks.GetRequest{ContainerID: id})
	if err != nil {
		err = errgrpc.ToNative(err)
		if errdefs.IsNotFound(err) {
			return nil, "", fmt.Errorf("container %s is not running; start it first", id)
		}
		return nil, "", fmt.Errorf("find the task of container %s: %w", id, err)
	}
	if state == "" {
		state = stateOf(int(tr.Process.Pid), t.namespace)
	}
	return tr.Process, filepath.Join(bundles(state, t.namespace), id), nil
}

func dialShim(ctx context.Context, client *containerd.Client, t target, state, id string) (*shimClient, error) {
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
func stateOf(pid int, namespace string) string {
	ppid, err := parent(pid)
	if err != nil {
		return defaults.DefaultStateDir
	}
	bundle, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(ppid), "cwd"))
	if err != nil {
		return defaults.DefaultStateDir
	}
	state, ok := strings.CutSuffix(filepath.Dir(bundle), bundles("/", namespace))
	if !ok {
		return defaults.DefaultStateDir
	}
	return state
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
