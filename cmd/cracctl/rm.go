package main

import (
	"errors"
	"fmt"

	coreimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
)

func newRemove(t *target) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rm REF...",
		Short: "Remove checkpoint images",
		Long: `Remove checkpoint images. containerd then collects what nothing else uses: clones
that run keep what they need. Images without a checkpoint are left alone.`,
		Example:           `  cracctl rm registry.example/shop/web:warm registry.example/shop/web:warmer`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: completeImages(t),
	}
	async := cmd.Flags().Bool("async", false, "do not wait until containerd has freed the space")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		s, err := t.open(cmd.Context())
		if err != nil {
			return err
		}
		defer s.Close()
		var errs []error
		for i, ref := range args {
			if err := s.remove(ref, !*async && i == len(args)-1); err != nil {
				errs = append(errs, err)
				continue
			}
			fmt.Fprintln(cmd.OutOrStdout(), ref)
		}
		return errors.Join(errs...)
	}
	return cmd
}

// remove removes one image; wait makes containerd collect before it answers.
func (s *session) remove(ref string, wait bool) error {
	img, err := s.image(ref)
	if err != nil {
		return err
	}
	if img.Checkpoint < 0 {
		return fmt.Errorf("%s is no checkpoint image; remove it with ctr images rm or nerdctl rmi", ref)
	}
	var opts []coreimages.DeleteOpt
	if wait {
		opts = append(opts, coreimages.SynchronousDelete())
	}
	// Only what was looked at: the name may have been moved since.
	opts = append(opts, coreimages.DeleteTarget(&img.Target))
	if err := s.ImageService().Delete(s.ctx, ref, opts...); err != nil {
		if errdefs.IsNotFound(err) {
			return noImage(s.ctx, ref)
		}
		return fmt.Errorf("remove image %s: %w", ref, err)
	}
	return nil
}
