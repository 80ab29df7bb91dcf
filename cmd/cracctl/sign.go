package main

import (
	"context"
	"fmt"

	containerd "github.com/containerd/containerd/v2/client"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/crac-shim/crac/images/registry"
	"github.com/crac-shim/crac/images/trust"
	"github.com/crac-shim/crac/oci"
)

func newSign(t *target) *cobra.Command {
	var (
		key, cert   string
		push, quiet bool
	)
	cmd := &cobra.Command{
		Use:   "sign REF",
		Short: "Sign an image, so that nodes can tell whose it is",
		Long: `Sign an image in the form of the Notary Project, with its library.
The signature is kept in containerd for as long as the image, and with --push sent to
the registry as a referrer of the image, which has to be there. cracctl push sends the
signatures of an image with it.

A signature is of the image's digest, so of all that is in it. Sign an encrypted image
after it is encrypted. What nodes do with signatures says their policy: see
docs/security.md.`,
		Example:           `  cracctl sign --push --key signer.key --cert signer.crt registry.example/shop/web:warm`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeImages(t),
		RunE: func(cmd *cobra.Command, args []string) error {
			ref := args[0]
			if push {
				if err := oci.CheckPushRef(ref); err != nil {
					return err
				}
			}
			s, err := t.open(cmd.Context())
			if err != nil {
				return err
			}
			defer s.Close()
			image, err := s.find(ref)
			if err != nil {
				return err
			}
			ctx, done, err := s.WithLease(s.ctx)
			if err != nil {
				return fmt.Errorf("get a lease: %w", err)
			}
			defer func() { _ = done(context.WithoutCancel(ctx)) }()
			if err := trust.Sign(ctx, s.ContentStore(), image, key, cert); err != nil {
				return fmt.Errorf("sign %s: %w", ref, err)
			}
			if !quiet {
				fmt.Fprintf(cmd.OutOrStdout(), "Signed      %s\n", image.Digest)
			}
			if !push {
				return nil
			}
			config, err := registry.DefaultConfig()
			if err != nil {
				return err
			}
			return pushSignatures(ctx, s.Client, config, ref, image)
		},
	}
	cmd.Flags().StringVar(&key, "key", "", "the private key's file (PEM)")
	cmd.Flags().StringVar(&cert, "cert", "", "the file with its certificate, and those between it and the one that nodes trust (PEM)")
	cmd.Flags().BoolVar(&push, "push", false, "send the image's signatures to its registry")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print nothing but errors")
	_ = cmd.MarkFlagRequired("key")
	_ = cmd.MarkFlagRequired("cert")
	return cmd
}

// pushSignatures sends the signatures of an image that is in its registry.
func pushSignatures(ctx context.Context, client *containerd.Client, config registry.Config, ref string, image ocispec.Descriptor) error {
	have, err := trust.Signatures(ctx, client.ContentStore(), image)
	if err != nil {
		return fmt.Errorf("find the signatures of %s: %w", ref, err)
	}
	if len(have) == 0 {
		return nil
	}
	repository, err := config.Repository(ctx, ref)
	if err != nil {
		return err
	}
	if _, err := trust.Push(ctx, client.ContentStore(), repository, image); err != nil {
		return fmt.Errorf("push the signatures of %s: %w", ref, err)
	}
	return nil
}

// fetchSignatures gets the signatures of images from the registry in their name. The
// images themselves are here.
func fetchSignatures(client *containerd.Client) func(ctx context.Context, name string, all ...ocispec.Descriptor) error {
	return func(ctx context.Context, name string, all ...ocispec.Descriptor) error {
		config, err := registry.DefaultConfig()
		if err != nil {
			return err
		}
		repository, err := config.Repository(ctx, name)
		if err != nil {
			return err
		}
		ctx, done, err := client.WithLease(ctx)
		if err != nil {
			return fmt.Errorf("get a lease: %w", err)
		}
		defer func() { _ = done(context.WithoutCancel(ctx)) }()
		for _, image := range all {
			if _, err := trust.Fetch(ctx, client.ContentStore(), repository, image); err != nil {
				return err
			}
		}
		return nil
	}
}
