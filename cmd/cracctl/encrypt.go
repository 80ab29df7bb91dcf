package main

import (
	"fmt"
	"path/filepath"
	"slices"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/crac-shim/crac/images/build"
	"github.com/crac-shim/crac/images/crypt"
	"github.com/crac-shim/crac/oci"
)

// encryptToFlag adds --encrypt-to to a command that makes layers.
func encryptToFlag(cmd *cobra.Command, to *[]string) {
	cmd.Flags().StringArrayVar(to, "encrypt-to", nil, "encrypt the layers that are the container's own for somebody: "+oci.RecipientForms+"; may be repeated; none: for nobody, though what it is made of was encrypted")
}

// keyFlag adds --key to a command that reads layers.
func keyFlag(cmd *cobra.Command, keys *[]string, what string) {
	cmd.Flags().StringArrayVar(keys, "key", nil, "the private key "+what+": FILE or FILE:file=PASSWORD-FILE; may be repeated (default: those in "+crypt.NodeKeyDir+")")
}

// recipients checks who is named, before anything stands still for it, and makes the
// names of files absolute: the builder is the shim's child.
func recipients(list []string) ([]string, error) {
	if err := oci.CheckRecipients(list); err != nil {
		return nil, err
	}
	located := slices.Clone(list)
	for i, one := range located {
		scheme, file, ok := oci.NamesFile(one)
		if !ok {
			continue
		}
		abs, err := filepath.Abs(file)
		if err != nil {
			return nil, fmt.Errorf("recipient %s: %w", one, err)
		}
		located[i] = scheme + ":" + abs
	}
	if slices.Equal(located, []string{oci.NoRecipients}) {
		return located, nil
	}
	_, err := crypt.ParseRecipients(located)
	return located, err
}

// privateKeys does the same for keys.
func privateKeys(list []string) ([]string, error) {
	if _, err := crypt.ParseKeys(list); err != nil {
		return nil, err
	}
	return crypt.AbsoluteKeys(list)
}

func newEncrypt(t *target) *cobra.Command {
	var (
		r     build.EncryptRequest
		to    []string
		quiet bool
	)
	cmd := &cobra.Command{
		Use:   "encrypt REF NEW",
		Short: "Make an encrypted image of a checkpoint image",
		Long: `Make an image of a checkpoint image whose own layers, the memory and the files that
the container changed, are encrypted for the given recipients. The layers of its base
stay as they are, and are shared.

Nodes need a private key to unpack it: see docs/security.md. REF stays as it is;
remove it where it was pushed. What of REF is encrypted already takes its --key: the
new image is for the new recipients, and not for the old ones.

Of an index it is the image for this platform. If others in it are checkpoints that are
not encrypted, that is a warning.`,
		Example:           `  cracctl encrypt web:warm registry.example/shop/web:warm --encrypt-to jwe:node.pem`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: completeImages(t),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			r.From, r.Ref = args[0], args[1]
			if r.To, err = recipients(append(r.To, to...)); err != nil {
				return err
			}
			s, err := t.open(cmd.Context())
			if err != nil {
				return err
			}
			defer s.Close()
			if _, err := s.find(r.From); err != nil {
				return err
			}
			return makeImage(cmd, quiet, r.Ref, func(emit func(build.Event)) (ocispec.Descriptor, string, error) {
				desc, err := build.Encrypt(s.ctx, s.Client, r, emit)
				if err != nil {
					return desc, "", fmt.Errorf("encrypt %s: %w", r.From, err)
				}
				return desc, "", nil
			})
		},
	}
	cmd.Flags().StringArrayVar(&r.To, "encrypt-to", nil, "who can decrypt it: "+oci.RecipientForms+"; may be repeated")
	cmd.Flags().StringArrayVar(&to, "to", nil, "the same as --encrypt-to")
	keyFlag(cmd, &r.Keys, "of an image of which something is encrypted already")
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print the image's digest only")
	return cmd
}
