package main

import (
	"fmt"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/crac-shim/crac/images/build"
)

func newFlatten(t *target) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "flatten REF [NEW]",
		Short: "Make one whole checkpoint of one that continues others",
		Long: `Make a checkpoint image with a whole dump of one that continues others (checkpoint
--parent): with the same memory and files, in one checkpoint layer. Without NEW the
name REF is moved to it. In an index it takes the old one's place. The dumps are
unpacked for as long as it takes, so it needs as much room as their memory.`,
		Example: `  cracctl flatten registry.example/shop/web:delta registry.example/shop/web:whole`,
	}
	t.flattens(cmd, func(s *session, before ocispec.Descriptor, r build.FlattenRequest, emit func(build.Event)) (ocispec.Descriptor, string, error) {
		desc, err := build.Flatten(s.ctx, s.Client, r, emit)
		if err != nil {
			return desc, "", fmt.Errorf("flatten %s: %w", r.From, err)
		}
		if desc.Digest == before.Digest {
			return desc, "Unchanged   it continues no other checkpoint\n", nil
		}
		return desc, "", nil
	})
	return cmd
}

// flattens makes a command of one that writes a whole checkpoint in place of an image,
// or under another name. work is told what the image's name means, and also gives what is to be
// told besides.
func (t *target) flattens(cmd *cobra.Command, work func(_ *session, from ocispec.Descriptor, _ build.FlattenRequest, emit func(build.Event)) (_ ocispec.Descriptor, more string, _ error)) {
	var (
		r           build.FlattenRequest
		compression string
		quiet       bool
	)
	cmd.Args, cmd.ValidArgsFunction = cobra.RangeArgs(1, 2), completeImages(t)
	cmd.RunE = func(cmd *cobra.Command, args []string) (err error) {
		r.From, r.Ref = args[0], args[len(args)-1]
		if r.Compression, err = compressionOf(compression); err != nil {
			return err
		}
		if r.EncryptTo, err = recipients(r.EncryptTo); err != nil {
			return err
		}
		s, err := t.open(cmd.Context())
		if err != nil {
			return err
		}
		defer s.Close()
		from, err := s.find(r.From)
		if err != nil {
			return err
		}
		return makeImage(cmd, quiet, r.Ref, func(emit func(build.Event)) (ocispec.Descriptor, string, error) { return work(s, from, r, emit) })
	}
	compressionFlag(cmd, &compression, "of the checkpoint layer: zstd (the default) or gzip (the default if it is encrypted)")
	encryptToFlag(cmd, &r.EncryptTo)
	keyFlag(cmd, &r.Keys, "of an encrypted image")
	cmd.Flags().StringVar(&r.WorkDir, "work-dir", "", "where to unpack the dumps (default: TMPDIR, else /tmp)")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print the image's digest only")
}
