package main

import (
	"context"
	"fmt"
	"io"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/crac-shim/crac/cmd/cracctl/doctor"
	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/build"
	"github.com/crac-shim/crac/images/inspect"
	"github.com/crac-shim/crac/oci"
)

// session is a connection to containerd for one command.
type session struct {
	*containerd.Client
	ctx context.Context
}

// open connects; the context has the namespace.
func (t *target) open(ctx context.Context) (*session, error) {
	if t.unset != nil {
		return nil, t.unset
	}
	ctx = namespaces.WithNamespace(ctx, t.namespace)
	client, err := t.dial(ctx, t.address)
	if err != nil {
		return nil, err
	}
	return &session{client, ctx}, nil
}

// shows makes a command that shows something in a --format: run is called with a
// connection to containerd, once the format is known to be one.
func (t *target) shows(cmd *cobra.Command, run func(cmd *cobra.Command, s *session, format string, args []string) error) {
	format := formatFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := checkFormat(*format); err != nil {
			return err
		}
		s, err := t.open(cmd.Context())
		if err != nil {
			return err
		}
		defer s.Close()
		return run(cmd, s, *format, args)
	}
}

// find finds what an image's name means.
func (s *session) find(ref string) (ocispec.Descriptor, error) {
	record, err := s.ImageService().Get(s.ctx, ref)
	if errdefs.IsNotFound(err) {
		return ocispec.Descriptor{}, noImage(s.ctx, ref)
	}
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("find image %s: %w", ref, err)
	}
	return record.Target, nil
}

// image reads an image's metadata.
func (s *session) image(ref string) (*inspect.Image, error) {
	target, err := s.find(ref)
	if err != nil {
		return nil, err
	}
	return inspect.Open(s.ctx, s.ContentStore(), ref, target, platforms.Default())
}

// readChain reads an image's checkpoint layer and those that it continues, and
// shows how it gets on.
func (s *session) readChain(img *inspect.Image, o inspect.Options, errOut io.Writer) ([]*inspect.Layer, error) {
	progress, done := reading(img, errOut)
	defer done()
	o.Progress = progress
	return img.ReadChain(s.ctx, s.ContentStore(), o)
}

// patience is how long it takes until reading shows progress.
var patience = time.Second

// reading gives what shows how the reading of an image gets on, if that takes longer than a
// moment.
func reading(img *inspect.Image, errOut io.Writer) (progress func(n int64), stop func()) {
	emit, stop := follow(errOut, false)
	began := time.Now()
	o := build.Reading(img, nil, func(e build.Event) {
		if time.Since(began) >= patience {
			emit(e)
		}
	})
	return o.Progress, stop
}

// thisHost is what the gate compares with. From then on this process looks for what a node
// has, its policy too, where shims look: see doctor.AsShim.
func (s *session) thisHost() images.Host {
	if server, err := s.IntrospectionService().Server(s.ctx); err == nil {
		doctor.AsShim(int(server.Pid))
	}
	// Without CRIU there is no version, and the gate says so.
	_, version, _ := images.FindCRIU()
	return images.ThisHost(version)
}

// completeImages offers the checkpoint images of the namespace.
func completeImages(t *target) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
		s, err := t.open(cmd.Context())
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		defer s.Close()
		list, err := s.checkpoints()
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		names := make([]cobra.Completion, 0, len(list))
		for _, c := range list {
			names = append(names, c.Name)
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}

// completeContainers offers the containers that can be checkpointed.
func completeContainers(t *target) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, prefix string) ([]cobra.Completion, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		s, err := t.open(cmd.Context())
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		defer s.Close()
		list, err := s.ContainerService().List(s.ctx)
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		var names []cobra.Completion
		for _, c := range list {
			if isOurs(c.Runtime.Name) {
				names = append(names, c.ID)
			}
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}

// checkpointImage is a line of ls.
type checkpointImage struct {
	Name    string      `json:"name"`
	Digest  string      `json:"digest"`
	Created time.Time   `json:"created"`
	Size    int64       `json:"size"`     // bytes, as a registry stores it
	Dump    int64       `json:"dumpSize"` // bytes, unpacked
	Base    string      `json:"base,omitempty"`
	Here    inspect.Fit `json:"here"`
}

// checkpoints lists the checkpoint images of the namespace by their annotations:
// no layer is read.
func (s *session) checkpoints() ([]checkpointImage, error) {
	records, err := s.ImageService().List(s.ctx)
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	host := s.thisHost()
	var list []checkpointImage
	for _, r := range records {
		img, err := inspect.Open(s.ctx, s.ContentStore(), r.Name, r.Target, platforms.Default())
		if err != nil {
			continue // for another platform, not fetched whole, or no image at all
		}
		facts, ok := oci.FactsOf(img.Manifest.Annotations)
		if !ok {
			continue
		}
		c := checkpointImage{
			Name: r.Name, Digest: img.Desc.Digest.String(), Created: facts.Created, Size: img.Size(), Base: facts.Base.Name,
			Here: inspect.FitOf(facts, host),
		}
		for _, f := range facts.Files {
			c.Dump += f.Size
		}
		if img.Covered() {
			c.Here = inspect.Fit{Reasons: []inspect.Reason{{Code: "covered", Text: images.ErrCovered.Error()}}}
		}
		list = append(list, c)
	}
	return list, nil
}

func newList(t *target) *cobra.Command {
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list", "images"},
		Short:   "List the checkpoint images, and whether this host can restore them",
		Long: `List the checkpoint images of the namespace. HERE tells whether this host can
restore one, by what the image's annotations say it needs; cracctl inspect tells
why not.`,
		Example: `  cracctl ls
  cracctl ls --format '{{.Name}} {{size .Dump}}'`,
		Args: cobra.NoArgs,
	}
	quiet := cmd.Flags().BoolP("quiet", "q", false, "print the names only")
	t.shows(cmd, func(cmd *cobra.Command, s *session, format string, _ []string) error {
		list, err := s.checkpoints()
		if err != nil {
			return err
		}
		if *quiet {
			format = "{{.Name}}"
		}
		return showList(cmd.OutOrStdout(), format, list, []string{"IMAGE", "DIGEST", "CREATED", "SIZE", "DUMP", "BASE", "HERE"}, func(c checkpointImage) []string {
			here := "fits"
			if !c.Here.OK {
				here = c.Here.Reasons[0].Code
			}
			return []string{c.Name, short(c.Digest), ago(c.Created), size(c.Size), size(c.Dump), c.Base, here}
		})
	})
	return cmd
}

func newHistory(t *target) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "history REF",
		Short: "Tell what layers an image has, and where they come from",
		Long: `Tell what layers an image has, lowest first, and where they come from: its base
image, what the container changed in its files, or its checkpoints.`,
		Example:           `  cracctl history registry.example/shop/web:warm`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeImages(t),
	}
	t.shows(cmd, func(cmd *cobra.Command, s *session, format string, args []string) error {
		img, err := s.image(args[0])
		if err != nil {
			return err
		}
		return showList(cmd.OutOrStdout(), format, img.Stages(), []string{"LAYER", "KIND", "SIZE", "CREATED", "CREATED BY"}, func(st inspect.Stage) []string {
			created := ""
			if st.Created != nil {
				created = ago(*st.Created)
			}
			return []string{short(st.Digest), st.Kind, size(st.Size), created, st.CreatedBy}
		})
	})
	return cmd
}
