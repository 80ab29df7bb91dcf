package main

import (
	"io"

	"github.com/spf13/cobra"

	"github.com/crac-shim/crac/cmd/cracctl/doctor"
)

func newDoctor(t *target) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Tell what this host can and cannot do, and how to fix it",
		Long: `Tell what this host can and cannot do for checkpoint and restore, and how to fix
each thing. The exit status is 0 when restore works and 1 when something that it
needs is missing.`,
		Example: `  cracctl doctor
  cracctl doctor --format '{{range .Checks}}{{.Status}} {{.Name}}{{"\n"}}{{end}}'`,
		Args: cobra.NoArgs,
	}
	format := formatFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if err := checkFormat(*format); err != nil {
			return err
		}
		if t.unset != nil {
			return t.unset
		}
		socket, err := socketOf(t.address)
		if err != nil {
			return err
		}
		report := doctor.Run(cmd.Context(), doctor.Options{Address: socket})
		if err := show(cmd.OutOrStdout(), *format, report, func(w io.Writer, r doctor.Report) error { return r.Table(w) }); err != nil {
			return err
		}
		if !report.OK {
			return errReported
		}
		return nil
	}
	return cmd
}
