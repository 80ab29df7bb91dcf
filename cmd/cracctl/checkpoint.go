package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strconv"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	coreimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/platforms"
	"github.com/containerd/ttrpc"
	"github.com/spf13/cobra"

	"github.com/crac-shim/crac/cmd/cracctl/check"
	"github.com/crac-shim/crac/cmd/cracctl/plain"
	"github.com/crac-shim/crac/images/build"
	"github.com/crac-shim/crac/images/inspect"
	"github.com/crac-shim/crac/images/registry"
	"github.com/crac-shim/crac/oci"
)

type checkpointFlags struct {
	exit        bool
	push        bool
	index       bool
	compression string
	encryptTo   []string
	parent      string
	keys        []string
	tcp         string
	preDump     string
	dryRun      bool
	state       string
	format      string // of the dry run
	quiet       bool
}

func newCheckpoint(t *target) *cobra.Command {
	var f checkpointFlags
	cmd := &cobra.Command{
		Use:   "checkpoint CONTAINER REF",
		Short: "Checkpoint a running container into an image",
		Long: `Checkpoint a running container into an image named REF: its base image, what it
changed in its files, and its memory. Any runtime can run the image; under
io.containerd.crac.v2 it continues where the container was. CONTAINER is an id, or
nerdctl's name for one.

The container runs on afterwards, unless --exit or its option checkpoint.exit asks for
its end. It stands still only while its memory and its changes are taken, not while
the image is packed. What flags do not say, the container's options do.

With --dry-run nothing is made: what the command asks for is checked, what the image
would be made of, and the container as cracctl check does, with its exit statuses and
in a --format.`,
		Example: `  cracctl checkpoint --push web registry.example/shop/web:warm
  ctr run -d --runtime io.containerd.crac.v2 registry.example/shop/web:warm web-2`,
		Args: func(cmd *cobra.Command, args []string) error {
			err := cobra.ExactArgs(2)(cmd, args)
			if f.dryRun {
				return notFound(err)
			}
			return err
		},
		ValidArgsFunction: completeContainers(t),
		RunE: func(cmd *cobra.Command, args []string) error {
			err := checkpoint(cmd.Context(), t, f, args[0], args[1], cmd.OutOrStdout(), cmd.ErrOrStderr())
			if f.dryRun && !errors.Is(err, errReported) {
				return notFound(err)
			}
			return err
		},
	}
	cmd.SetFlagErrorFunc(func(_ *cobra.Command, err error) error {
		if f.dryRun {
			return notFound(err)
		}
		return err
	})
	cmd.Flags().BoolVar(&f.exit, "exit", false, "stop the container after the checkpoint, as its option checkpoint.exit does")
	cmd.Flags().BoolVar(&f.push, "push", false, "push the image to the registry in its name, with your credentials and hosts")
	cmd.Flags().BoolVar(&f.index, "index", false, "put the image into an index, beside those that the container's image and REF have for other platforms, as its option checkpoint.index does")
	compressionFlag(cmd, &f.compression, "of the new layers: zstd or gzip (default: the container's option, else zstd, for encrypted layers gzip)")
	encryptToFlag(cmd, &f.encryptTo)
	keyFlag(cmd, &f.keys, "of an encrypted parent, or of the image that the container came from")
	cmd.Flags().StringVar(&f.parent, "parent", "", "a checkpoint image to continue: memory that it has is not stored again")
	_ = cmd.RegisterFlagCompletionFunc("parent", completeImages(t))
	cmd.Flags().StringVar(&f.tcp, "tcp", "", "what to do about established TCP connections: close (clones find them closed), established (kept, for one clone at the same address), error (default: the container's option, else close)")
	completions(cmd, "tcp", string(oci.TCPClose), string(oci.TCPEstablished), string(oci.TCPError))
	cmd.Flags().StringVar(&f.preDump, "pre-dump", "", "when to copy memory before the container stands still, on kernels that can tell what changes: auto (much memory), require (or no checkpoint), off (default: the container's option, else auto)")
	completions(cmd, "pre-dump", string(oci.PreDumpAuto), string(oci.PreDumpRequire), string(oci.PreDumpOff))
	cmd.Flags().BoolVar(&f.dryRun, "dry-run", false, "tell what would stop the checkpoint, of what cracctl check looks at and of what the image is made of, and make none")
	cmd.Flags().StringVar(&f.format, "format", formatTable, "of a dry run: "+formatHelp)
	completions(cmd, "format", formatTable, formatJSON)
	cmd.Flags().StringVar(&f.state, "state", "", "containerd's state directory (default: asked of the running shim, else "+defaults.DefaultStateDir+")")
	cmd.Flags().BoolVarP(&f.quiet, "quiet", "q", false, "print the image's digest only")
	return cmd
}

func checkpoint(ctx context.Context, t *target, f checkpointFlags, id, ref string, out, errOut io.Writer) error {
	// Before anything stands still for it.
	if err := checkFormat(f.format); err != nil {
		return err
	}
	if f.format != formatTable && !f.dryRun {
		return errors.New("--format is for --dry-run: say both, or leave it out")
	}
	checkRef := oci.CheckRef
	if f.push {
		checkRef = oci.CheckPushRef
	}
	if err := checkRef(ref); err != nil {
		return err
	}
	compression, err := compressionOf(f.compression)
	if err != nil {
		return err
	}
	tcp := oci.TCPMode(f.tcp)
	if tcp != "" {
		if err := oci.CheckTCPMode(tcp); err != nil {
			return err
		}
	}
	preDump := oci.PreDumpMode(f.preDump)
	if preDump != "" {
		if err := oci.CheckPreDumpMode(preDump); err != nil {
			return err
		}
	}
	encryptTo, err := recipients(f.encryptTo)
	if err != nil {
		return err
	}
	keys, err := privateKeys(f.keys)
	if err != nil {
		return err
	}
	registries, err := registry.DefaultConfig()
	if err != nil && f.push {
		return err
	}
	s, err := t.open(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	ctx, client := s.ctx, s.Client

	if f.parent != "" {
		img, err := s.image(f.parent)
		if err != nil {
			return fmt.Errorf("parent: %w", err)
		}
		if img.Checkpoint < 0 {
			return fmt.Errorf("there is no checkpoint in the parent %s; leave --parent out to make a whole one", f.parent)
		}
	}
	id = containerID(ctx, client, id)
	c, err := findContainer(ctx, client, t, id)
	if err != nil {
		return err
	}
	if c.Image == "" {
		return fmt.Errorf("container %s was not made from an image, so there is none to put a checkpoint on; use ctr tasks checkpoint --image-path", id)
	}

	o := oci.CheckpointOptions{
		Ref: ref, Exit: f.exit, Compression: compression, EncryptTo: encryptTo, Parent: f.parent, Keys: keys, TCP: tcp, PreDump: preDump, Index: f.index,
	}
	if f.dryRun {
		r, err := s.dryRun(t, f, id, o)
		if err != nil {
			return err
		}
		if err := show(out, f.format, r, check.Table); err != nil {
			return err
		}
		if !r.OK {
			return errReported
		}
		return nil
	}
	shim, err := dialShim(ctx, client, t, f.state, id)
	if err != nil {
		return err
	}
	defer shim.Close()

	done := watch(ctx, client.ContentStore(), build.IngestRef(id), errOut, f.quiet)
	start := time.Now()
	err = shim.checkpoint(ctx, id, o)
	took := time.Since(start)
	done()
	if err != nil {
		return explain(err)
	}
	img, err := client.ImageService().Get(ctx, ref)
	if err != nil {
		return fmt.Errorf("the shim reported success, but image %s is not there: %w", ref, err)
	}
	var (
		sent      string
		notPushed error
	)
	if f.push {
		// Here and not in the shim: whoever asks has the credentials, and waits. With --index
		// it makes another index.
		img.Target, sent, notPushed = s.push(registries, ref, f.index, f.quiet, errOut)
	}
	// What is made is told also where it was not pushed.
	if err := errors.Join(notPushed, s.report(img, f.parent, took, f.quiet, out, errOut)); err != nil || f.quiet {
		return err
	}
	_, err = io.WriteString(out, sent)
	return err
}

// dryRun tells what would stop a checkpoint: what the container holds, and what the shim's
// builder would refuse before it.
func (s *session) dryRun(t *target, f checkpointFlags, id string, o oci.CheckpointOptions) (*check.Report, error) {
	r, err := runCheck(s, t, f.state, id, o.TCP)
	if err != nil {
		return nil, err
	}
	host := s.thisHost()
	if host.CRIU == 0 {
		return r, nil // it says that there is none
	}
	_, bundle, err := findTask(s.ctx, s.Client, t, f.state, id)
	if err != nil {
		return nil, err
	}
	spec, err := check.LoadSpec(bundle)
	if err != nil {
		return nil, err
	}
	var env []string
	if spec.Process != nil {
		env = spec.Process.Env
	}
	own, err := oci.ParseOptions(spec.Annotations, env)
	if err != nil {
		return nil, err
	}
	request := build.Request{
		Container: id, Ref: o.Ref, SpecPath: filepath.Join(bundle, "config.json"), Parent: o.Parent, Keys: o.Keys, EncryptTo: o.EncryptTo,
		Compression: cmp.Or(o.Compression, own.CheckpointCompression), Index: o.Index || own.CheckpointIndex, Push: f.push || own.CheckpointPush,
	}
	if len(request.EncryptTo) == 0 {
		request.EncryptTo = own.CheckpointEncryptTo
	}
	request.Manifest = oci.Manifest{Name: o.Ref, Created: time.Now().UTC(), Container: oci.ContainerOf(spec), Mounts: oci.MountsOf(spec)}
	request.Manifest.Container.ID = id
	host.Describe(&request.Manifest)
	var warnings []string
	p, err := build.Prepare(s.ctx, s.Client, request, func(e build.Event) { warnings = append(warnings, e.Error) })
	if err == nil {
		p.Close(s.ctx, nil)
	}
	r.Image(o.Ref, warnings, err)
	return r, nil
}

// nerdctlName is the label by which nerdctl finds a container that it gave a name:
// the container's id is another one.
const nerdctlName = "nerdctl/name"

// containerID gives the id of the container that nerdctl calls so, unless there is one
// with this id.
func containerID(ctx context.Context, client *containerd.Client, name string) string {
	if _, err := client.ContainerService().Get(ctx, name); !errdefs.IsNotFound(err) {
		return name
	}
	found, err := client.ContainerService().List(ctx, fmt.Sprintf("labels.%q==%q", nerdctlName, name))
	if err != nil || len(found) != 1 {
		return name // whoever looks for it says what is wrong
	}
	return found[0].ID
}

// findContainer finds a container of this runtime.
func findContainer(ctx context.Context, client *containerd.Client, t *target, id string) (containers.Container, error) {
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

// report prints what was made, on top of parent, if there is one.
func (s *session) report(img coreimages.Image, parent string, took time.Duration, quiet bool, out, errOut io.Writer) error {
	made, err := inspect.Open(s.ctx, s.ContentStore(), img.Name, img.Target, platforms.Default())
	if err != nil {
		return err
	}
	reused, memory, continues := build.Reused(img.Labels)
	for _, warning := range []string{build.ReusedWarning(parent, reused, memory), build.InTheOpen(s.ctx, s.ContentStore(), made.Target, made.Desc)} {
		if warning != "" {
			fmt.Fprintln(errOut, "cracctl: warning:", plain.Line(warning))
		}
	}
	if quiet {
		_, err := fmt.Fprintln(out, img.Target.Digest)
		return err
	}
	layer := int64(0)
	if made.Checkpoint >= 0 {
		layer = made.Manifest.Layers[made.Checkpoint].Size
	}
	dump, _ := strconv.ParseInt(made.Manifest.Annotations[oci.AnnotationDumpBytes], 10, 64)

	fmt.Fprintf(out, "Image       %s\n", img.Name)
	fmt.Fprintf(out, "Digest      %s\n", img.Target.Digest)
	fmt.Fprintf(out, "Size        %s, of which checkpoint %s (%s unpacked)\n", size(made.Size()), size(layer), size(dump))
	fmt.Fprintf(out, "Took        %s\n", took.Round(time.Millisecond))
	if frozen := img.Labels[build.LabelFrozen]; frozen != "" {
		fmt.Fprintf(out, "Stood still %s\n", frozen)
	}
	if ahead, _ := strconv.ParseInt(img.Labels[build.LabelPreDumped], 10, 64); ahead > 0 {
		fmt.Fprintf(out, "Pre-dumped  %s of the memory\n", size(ahead))
	}
	if continues {
		fmt.Fprintf(out, "From parent %s of %s of memory\n", size(reused), size(memory))
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
