package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/crac-shim/crac/images/convert"
)

func newExport(t *target) *cobra.Command {
	var (
		r                   convert.ExportRequest
		format, compression string
		quiet               bool
	)
	cmd := &cobra.Command{
		Use:   "export --to FORM REF DEST",
		Short: "Write a checkpoint image so that another tool can restore it",
		Long: `Write a checkpoint image so that another tool can restore it, with memory and files
as they were. FORM says what DEST becomes:

  podman      an archive for podman container restore --import DEST
  containerd  an image in containerd for ctr containers restore --live --rw ID DEST,
              under containerd's own shim for runc
  bundle      a directory for runc restore --image-path DEST/images
              --bundle DEST/bundle ID

podman and containerd need the image that the container came from, under its name.
The restored container has a network namespace with nothing but lo. The directory
/run/crac is empty in it: it is no longer told of checkpoints.`,
		Example: `  cracctl export --to podman registry.example/shop/web:warm web.tar.zst
  cracctl export --to bundle registry.example/shop/web:warm web`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: completeImages(t),
		RunE: func(cmd *cobra.Command, args []string) error {
			r.Ref, r.Dest = args[0], args[1]
			r.Format, r.Snapshotter = convert.Format(format), t.snapshotter
			err := r.Format.Check()
			if err != nil {
				return err
			}
			if r.Compression, err = compressionOf(compression); err != nil {
				return err
			}
			s, err := t.open(cmd.Context())
			if err != nil {
				return err
			}
			defer s.Close()
			if _, err := s.find(r.Ref); err != nil {
				return err
			}
			emit, stop := follow(cmd.ErrOrStderr(), quiet)
			report, err := convert.Export(s.ctx, s.Client, r, emit)
			stop()
			if err != nil {
				return fmt.Errorf("export %s: %w", r.Ref, err)
			}
			if quiet {
				return nil
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "Made        %s, %s\n%s", r.Dest, report.From, carried(report))
			return err
		},
	}
	cmd.Flags().StringVar(&format, "to", "", "what to write: "+strings.Join(convert.Formats(), ", "))
	cmd.Flags().StringVar(&format, "format", "", "the same as --to; for other commands it is how they show what they tell")
	cmd.MarkFlagsMutuallyExclusive("to", "format")
	for _, flag := range []string{"to", "format"} {
		completions(cmd, flag, convert.Formats()...)
	}
	compressionFlag(cmd, &compression, "of an archive: zstd (the default) or gzip")
	keyFlag(cmd, &r.Keys, "of an encrypted image")
	cmd.Flags().StringVar(&r.WorkDir, "work-dir", "", "where to unpack the dump (default: TMPDIR, else /tmp)")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print nothing but errors")
	return cmd
}
