package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/crac-shim/crac/cmd/cracctl/doctor"
)

func newDoctor(t *target) *cobra.Command {
	var format string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Tell what this host can and cannot do, and how to fix it",
		Long: `Tell what this host can and cannot do for checkpoint and restore, and how to fix
each thing. The exit status is 0 when restore works and 1 when something that it
needs is missing.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if format != "table" && format != "json" {
				return fmt.Errorf("unknown format %q; known are table and json", format)
			}
			report := doctor.Run(cmd.Context(), doctor.Options{Address: t.address})
			write := report.Table
			if format == "json" {
				write = report.JSON
			}
			if err := write(cmd.OutOrStdout()); err != nil {
				return err
			}
			if !report.OK {
				return errReported
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&format, "format", "table", "table or json")
	completions(cmd, "format", "table", "json")
	return cmd
}
