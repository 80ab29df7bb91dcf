package main

import (
	"errors"
	"fmt"
	"math"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/crac-shim/crac/cmd/cracctl/plain"
	"github.com/crac-shim/crac/images/build"
	"github.com/crac-shim/crac/images/convert"
)

func newImport(t *target) *cobra.Command {
	var (
		r           convert.ImportRequest
		compression string
		maxGiB      int64
		quiet       bool
	)
	cmd := &cobra.Command{
		Use:   "import [SOURCE] REF",
		Short: "Make a checkpoint image of another tool's checkpoint",
		Long: `Make a checkpoint image, which starts warm under io.containerd.crac.v2, of a
checkpoint that another tool made. SOURCE is one of

  FILE                      an archive of podman container checkpoint --export, of
                            CRI-O, or of containerd's CRI (crictl checkpoint)
  IMAGE                     an image in containerd that holds such an archive (podman
                            container checkpoint --create-image), or containerd's own
                            checkpoint (ctr containers checkpoint --task --image)
  --images DIR --bundle DIR what runc checkpoint or criu dump wrote, and the bundle
                            that the container was run from; needs --base

The image that the container came from has to be in containerd; its layers are the
new image's. It is the one that the source names, or --base.

Not carried over are the network and the files that an engine mounts into every
container (/etc/hosts, /etc/resolv.conf, …): a clone has those of its own request. What
else was not, and which mounts a request must have, is printed.

Memory holds secrets, and whoever makes a checkpoint decides what runs: import
checkpoints only from whom you trust.`,
		Example: `  cracctl import web.tar.zst registry.example/shop/web:warm
  cracctl import --base registry.example/shop/web:1 --images dump --bundle bundle web:warm`,
		Args:              cobra.RangeArgs(1, 2),
		ValidArgsFunction: completeImages(t),
		RunE: func(cmd *cobra.Command, args []string) error {
			r.Ref = args[len(args)-1]
			if len(args) == 2 {
				r.Source = args[0]
			}
			if bare := r.Images != "" || r.Bundle != ""; bare == (r.Source != "") {
				return errors.New("name an archive or an image to import and the image to make of it, or --images, --bundle and the image to make")
			}
			var err error
			if r.Compression, err = compressionOf(compression); err != nil {
				return err
			}
			if r.EncryptTo, err = recipients(r.EncryptTo); err != nil {
				return err
			}
			if maxGiB < 1 || maxGiB > math.MaxInt64>>30 {
				return fmt.Errorf("--max-size %d is no size; say how many GiB the source may be, at least 1", maxGiB)
			}
			r.MaxSize, r.Snapshotter = maxGiB<<30, t.snapshotter
			s, err := t.open(cmd.Context())
			if err != nil {
				return err
			}
			defer s.Close()
			return makeImage(cmd, quiet, r.Ref, func(emit func(build.Event)) (ocispec.Descriptor, string, error) {
				desc, report, err := convert.Import(s.ctx, s.Client, r, emit)
				if err != nil {
					return desc, "", fmt.Errorf("import %s: %w", orBundle(r), err)
				}
				return desc, fmt.Sprintf("From        %s\n", report.From) + carried(report), nil
			})
		},
	}
	cmd.Flags().StringVar(&r.Base, "base", "", "image that the container came from (default: the one that the source names)")
	cmd.Flags().StringVar(&r.Images, "images", "", "directory of a dump by runc or criu")
	cmd.Flags().StringVar(&r.Bundle, "bundle", "", "bundle that the dumped container was run from")
	cmd.Flags().StringArrayVar(&r.Keep, "keep", nil, "mount that stays in the dump, so that a request must have it, such as /sys/fs/cgroup or /etc/hosts (may be repeated)")
	cmd.Flags().Int64Var(&maxGiB, "max-size", convert.DefaultMaxSize>>30, "largest size of the unpacked source in GiB, files that are passed over included")
	compressionFlag(cmd, &compression, "of the new layers: zstd (the default) or gzip (the default if they are encrypted)")
	encryptToFlag(cmd, &r.EncryptTo)
	keyFlag(cmd, &r.Keys, "of a base that is an encrypted image")
	cmd.Flags().StringVar(&r.WorkDir, "work-dir", "", "where to unpack the source (default: TMPDIR, else /tmp)")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print the image's digest only")
	return cmd
}

func orBundle(r convert.ImportRequest) string {
	if r.Source != "" {
		return r.Source
	}
	return r.Images
}

// carried tells what a conversion took over, and what not.
func carried(report *convert.Report) (text string) {
	for _, s := range report.Taken {
		text += "Taken       " + plain.Line(s) + "\n"
	}
	for _, s := range report.Left {
		text += "Not taken   " + plain.Line(s) + "\n"
	}
	return text
}
