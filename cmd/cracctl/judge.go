package main

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/spf13/cobra"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/trust"
)

// fetchTimeout bounds how long a start waits for a registry's signatures.
const fetchTimeout = 15 * time.Second

// newJudge is for the shim, as build-image is: one images.PolicyRequest on standard
// input, one images.Verdict on standard output. A verdict that refuses is no error.
func newJudge(t *target) *cobra.Command {
	return &cobra.Command{
		Use:    "judge",
		Short:  "Tell the shim whether the node's policy allows a restore (JSON request on standard input)",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var r images.PolicyRequest
			dec := json.NewDecoder(cmd.InOrStdin())
			dec.DisallowUnknownFields()
			if err := dec.Decode(&r); err != nil {
				return fmt.Errorf("read the request on standard input: %w; this command is for the shim: use cracctl verify", err)
			}
			if r.Address == "" {
				r.Address = t.address
			}
			ctx, cancel := context.WithTimeout(namespaces.WithNamespace(cmd.Context(), r.Namespace), fetchTimeout)
			defer cancel()
			client, err := connect(ctx, r.Address)
			if err != nil {
				return err
			}
			defer client.Close()
			v, err := trust.Judge(ctx, client, r, fetchSignatures(client))
			if err != nil {
				return err
			}
			return json.NewEncoder(cmd.OutOrStdout()).Encode(v)
		},
	}
}
