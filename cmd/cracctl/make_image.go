package main

import (
	"fmt"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/crac-shim/crac/images/build"
	"github.com/crac-shim/crac/oci"
)

// compressionFlag adds --compression to a command that stores something.
func compressionFlag(cmd *cobra.Command, name *string, what string) {
	cmd.Flags().StringVar(name, "compression", "", what)
	completions(cmd, "compression", string(oci.CompressionZstd), string(oci.CompressionGzip))
}

// compressionOf checks it before anything is done for it; nothing said is nothing said.
func compressionOf(name string) (oci.Compression, error) {
	if name == "" {
		return "", nil
	}
	return oci.Compression(name), oci.CheckCompression(oci.Compression(name))
}

// makeImage runs what makes an image named ref. It shows how that gets on, and prints
// what was made: the digest alone if quiet, else also what work adds in lines of its own.
func makeImage(cmd *cobra.Command, quiet bool, ref string, work func(emit func(build.Event)) (_ ocispec.Descriptor, more string, _ error)) error {
	emit, stop := follow(cmd.ErrOrStderr(), quiet)
	desc, more, err := work(emit)
	stop()
	if err != nil {
		return err
	}
	if quiet {
		_, err = fmt.Fprintln(cmd.OutOrStdout(), desc.Digest)
	} else {
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "Image       %s\nDigest      %s\n%s", ref, desc.Digest, more)
	}
	return err
}
