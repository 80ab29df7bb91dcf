package main

import (
	"fmt"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/build"
)

// makeImage runs what makes an image named ref. It shows how that gets on, and prints
// what was made: the digest alone if quiet, else also what work adds in lines of its own.
func makeImage(cmd *cobra.Command, quiet bool, ref string, work func(emit func(build.Event)) (_ ocispec.Descriptor, more string, _ error)) error {
	d := display{at: func(string, int64, int64) {}, end: func() {}}
	if !quiet {
		d = newDisplay(cmd.ErrOrStderr())
	}
	desc, more, err := work(func(e build.Event) {
		switch e.Event {
		case images.EventProgress:
			d.at(packing, e.Done, e.Total)
		case images.EventWarning:
			fmt.Fprintln(cmd.ErrOrStderr(), "cracctl: warning:", e.Error)
		}
	})
	d.end()
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
