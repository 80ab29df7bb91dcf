package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/crac-shim/crac/images/build"
	"github.com/crac-shim/crac/images/registry"
	"github.com/crac-shim/crac/oci"
)

func newPush(t *target) *cobra.Command {
	var index, quiet bool
	cmd := &cobra.Command{
		Use:   "push REF",
		Short: "Push a checkpoint image to its registry",
		Long: `Push an image to the registry in its name, with what the registry lacks of it, and
with its signatures.

Credentials are those of docker login and nerdctl login (DOCKER_CONFIG). Hosts are
configured as for nerdctl and containerd: hosts.toml below the hosts_dir of
nerdctl.toml (NERDCTL_TOML), else below /etc/containerd/certs.d and
/etc/docker/certs.d. Plain http is for loopback addresses, and where a hosts.toml
or insecure_registry in nerdctl.toml says so.

With --index the name means an index afterwards, here and in the registry: this
image for its platform, and for others what the registry has, or else what the
name means here. So a checkpoint for each architecture can have one name, made
and pushed on one machine after the other.

Memory holds secrets: whoever may pull the image can read all that the container
had in its memory.`,
		Example:           `  cracctl push registry.example/shop/web:warm`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeImages(t),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := oci.CheckPushRef(args[0]); err != nil {
				return err
			}
			config, err := registry.DefaultConfig()
			if err != nil {
				return err
			}
			s, err := t.open(cmd.Context())
			if err != nil {
				return err
			}
			defer s.Close()
			pushed, sent, err := s.push(config, args[0], index, quiet, cmd.ErrOrStderr())
			if err != nil || quiet {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "Digest      %s\n%s", pushed.Digest, sent)
			return err
		},
	}
	cmd.Flags().BoolVar(&index, "index", false, "put the image into the index that the registry has under this name, or make one")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print nothing but errors")
	return cmd
}

// push shows how it gets on. It tells what the name means now, and what was sent.
func (s *session) push(config registry.Config, ref string, index, quiet bool, errOut io.Writer) (image ocispec.Descriptor, sent string, err error) {
	if image, err = s.find(ref); err != nil {
		return image, "", err
	}
	if index {
		all, err := build.MakeIndex(s.ctx, s.Client, config, ref)
		if err != nil {
			return image, "", err
		}
		image = all
	}
	var report func(registry.Progress)
	if !quiet {
		show := newDisplay(errOut)
		defer show.end()
		report = func(p registry.Progress) { show.at(pushing, p.Done, p.Total) }
	}
	start := time.Now()
	p, err := registry.Push(s.ctx, config, s.ContentStore(), ref, image, report)
	if err != nil {
		return image, "", fmt.Errorf("%w; the image stays in containerd: cracctl push %s tries again", err, ref)
	}
	if err := pushSignatures(s.ctx, s.Client, config, ref, image); err != nil {
		return image, "", fmt.Errorf("%w; the image itself is pushed", err)
	}
	return image, fmt.Sprintf("Pushed      %s in %s; the registry had the other %s\n", size(p.Uploaded), time.Since(start).Round(time.Millisecond), size(p.Total-p.Uploaded)), nil
}

// noImage says where to look.
func noImage(ctx context.Context, ref string) error {
	ns, _ := namespaces.Namespace(ctx)
	return fmt.Errorf("no image %s in namespace %s; see cracctl ls and ctr -n %s images ls (nerdctl uses the namespace default, Kubernetes k8s.io)", ref, ns, ns)
}
