package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/crac-shim/crac/cmd/cracctl/plain"
	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/build"
	"github.com/crac-shim/crac/images/crypt"
	"github.com/crac-shim/crac/images/inspect"
	"github.com/crac-shim/crac/images/trust"
	"github.com/crac-shim/crac/oci"
)

// verdict is what verify tells.
type verdict struct {
	Name string `json:"name"`
	// OK: the image is whole and this host can restore it.
	OK bool `json:"ok"`
	// Whole: every digest is right. Damage says what is not.
	Whole  bool   `json:"whole"`
	Damage string `json:"damage,omitempty"`
	// Here is what this host says to it.
	Here inspect.Fit `json:"here"`
	// Policy is what the node's policy says; nothing if there is none.
	Policy *images.Verdict `json:"policy,omitempty"`
	Files  int             `json:"files"`
	Bytes  int64           `json:"bytes"`
}

func newVerify(t *target) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "verify REF",
		Short: "Check that a checkpoint image is whole, and that this host can restore it",
		Long: `Check that a checkpoint image is whole: the layer's digests, as stored and as
unpacked, and every file of the dump against the manifest in it, memory included.
Then ask what a start asks: whether this host can restore it. What depends on the
request (its command, user, mounts and privileges) only a start can tell.

Where this node has a policy (/etc/crac/policy.json, or CRAC_POLICY), tell what that
says, too; signatures that are not here are fetched from the registry.

The exit status is 0 when the image is whole, fits and is allowed, else 1.`,
		Example:           `  cracctl verify registry.example/shop/web:warm`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeImages(t),
	}
	var keys []string
	keyFlag(cmd, &keys, "of an encrypted image")
	t.shows(cmd, func(cmd *cobra.Command, s *session, format string, args []string) error {
		k, err := build.ReadKeys(keys)
		if err != nil {
			return err
		}
		v, err := s.verify(args[0], k, cmd.ErrOrStderr())
		if err != nil {
			return err
		}
		if err := show(cmd.OutOrStdout(), format, v, writeVerdict); err != nil {
			return err
		}
		if !v.OK {
			return errReported
		}
		return nil
	})
	return cmd
}

// verify gives an error when there is nothing to verify; what is wrong with an
// image is in the verdict.
func (s *session) verify(ref string, keys *crypt.Keys, errOut io.Writer) (*verdict, error) {
	img, err := s.image(ref)
	if err != nil {
		return nil, err
	}
	v, host := &verdict{Name: ref}, s.thisHost()
	chain, err := s.readChain(img, inspect.Options{Digests: true, Keys: keys}, errOut)
	if err == nil {
		err = inspect.VerifyChain(chain)
	}
	if err == nil {
		_, err = chain[0].Processes()
	}
	if err == nil && img.Covered() {
		err = fmt.Errorf("%w: its memory does not match the files; make a new checkpoint of the newer image", images.ErrCovered)
	}
	switch {
	case errors.Is(err, images.ErrDamaged), errors.Is(err, images.ErrCovered):
		v.Damage = err.Error()
	case err != nil:
		return nil, err
	}
	v.Whole = v.Damage == ""
	if len(chain) > 0 {
		v.Here = inspect.FitOf(chain[0].Manifest, host)
	}
	for _, l := range chain {
		for _, f := range l.Found {
			v.Files++
			v.Bytes += f.Size
		}
	}
	v.OK = v.Whole && v.Here.OK
	policy, err := images.LoadPolicy(images.PolicyPath())
	switch {
	case err != nil:
		v.Policy = &images.Verdict{Reason: err.Error(), Image: ref}
	case policy != nil && policy.Signature == oci.SignatureRequire:
		said := trust.OfImage(s.ctx, s.ContentStore(), policy, img, fetchSignatures(s.Client))
		v.Policy = &said
	}
	v.OK = v.OK && (v.Policy == nil || v.Policy.Allowed)
	return v, nil
}

func writeVerdict(out io.Writer, v *verdict) error {
	if v.Whole {
		fmt.Fprintf(out, "whole: %d files, %s\n", v.Files, size(v.Bytes))
	} else {
		fmt.Fprintf(out, "not whole: %s\n", plain.Line(v.Damage))
	}
	switch {
	case v.Here.OK:
		fmt.Fprintln(out, "fits this host")
	case len(v.Here.Reasons) > 0:
		fmt.Fprintln(out, "does not fit this host:")
	}
	for _, r := range v.Here.Reasons {
		fmt.Fprintf(out, "  %s: %s\n", r.Code, plain.Line(r.Text))
	}
	if v.Policy != nil {
		fmt.Fprintln(out, plain.Line(v.Policy.Words()))
	}
	return nil
}
