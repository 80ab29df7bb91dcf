package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/crac-shim/crac/images/convert"
	"github.com/crac-shim/crac/oci"
)

func newExport(t *target) *cobra.Command {
	var (
		r                   convert.ExportRequest
		format, compression string
	)
	cmd := &cobra.Command{
		Use:   "export --format FORMAT REF DEST",
		Short: "Write a checkpoint image so that another tool can restore it",
		Long: `Write a checkpoint image so that another tool can restore it, with memory and files
as they were. FORMAT says what DEST becomes:

  podman      an archive for podman container restore --import DEST
  containerd  an image in containerd for ctr containers restore --live --rw ID DEST,
              under containerd's own shim for runc
  bundle      a directory for runc restore --image-path DEST/images
              --bundle DEST/bundle ID

podman and containerd need the image that the container came from, under its name.
The restored container has a network namespace with nothing but lo. The directory
/run/crac is empty in it: it is no longer told of checkpoints.`,
		Example:           `  cracctl export --format podman registry.example/shop/web:warm web.tar.zst`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: completeImages(t),
		RunE: func(cmd *cobra.Command, args []string) error {
			r.Ref, r.Dest = args[0], args[1]
			r.Format, r.Compression = convert.Format(format), oci.Compression(compression)
			s, err := t.open(cmd.Context())
			if err != nil {
				return err
			}
			defer s.Close()
			if _, err := s.find(r.Ref); err != nil {
				return err
			}
			report, err := convert.Export(s.ctx, s.Client, r)
			if err != nil {
				return fmt.Errorf("export %s: %w", r.Ref, err)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "Made        %s, %s\n%s", r.Dest, report.From, carried(report))
			return err
		},
	}
	cmd.Flags().StringVar(&format, "format", "", "what to write: "+strings.Join(convert.Formats(), ", "))
	_ = cmd.MarkFlagRequired("format")
	completions(cmd, "format", convert.Formats()...)
	cmd.Flags().StringVar(&compression, "compression", "", "of an archive: zstd (the default) or gzip")
	completions(cmd, "compression", string(oci.CompressionZstd), string(oci.CompressionGzip))
	keyFlag(cmd, &r.Keys, "of an encrypted image")
	cmd.Flags().StringVar(&r.WorkDir, "work-dir", "", "where to unpack the dump (default: TMPDIR, else /tmp)")
	return cmd
}
