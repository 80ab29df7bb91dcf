package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/crac-shim/crac/cmd/cracctl/plain"
	"github.com/crac-shim/crac/images/build"
	"github.com/crac-shim/crac/images/inspect"
)

func newDiff(t *target) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "diff REF1 REF2",
		Short: "Tell what differs between two checkpoint images",
		Long: `Tell what differs between two checkpoint images: what they need of a host, their
files, and their processes' memory, page by page. Changed and added pages are what
a checkpoint of the second continuing the first would store.`,
		Example: `  cracctl diff registry.example/shop/web:warm registry.example/shop/web:warmer
  cracctl diff --format '{{size .Memory.Changed}}' registry.example/shop/web:warm registry.example/shop/web:warmer`,
		Args:              cobra.ExactArgs(2),
		ValidArgsFunction: completeImages(t),
	}
	var keys []string
	keyFlag(cmd, &keys, "of encrypted images")
	t.shows(cmd, func(cmd *cobra.Command, s *session, format string, args []string) error {
		var (
			images [2]*inspect.Image
			layers [2][]*inspect.Layer
		)
		k, err := build.ReadKeys(keys)
		if err != nil {
			return err
		}
		budget := inspect.NewBudget() // for both
		for i, ref := range args {
			if images[i], err = s.image(ref); err != nil {
				return err
			}
			if layers[i], err = s.readChain(images[i], inspect.Options{Digests: true, Pages: true, Keys: k, Budget: budget}, cmd.ErrOrStderr()); err != nil {
				return err
			}
		}
		d, err := inspect.Diff(cmd.Context(), images[0], images[1], layers[0], layers[1])
		if err != nil {
			return err
		}
		return show(cmd.OutOrStdout(), format, d, writeDiff)
	})
	return cmd
}

func writeDiff(out io.Writer, d *inspect.Difference) error {
	for _, f := range d.Facts {
		fmt.Fprintf(out, "%s\n  - %s\n  + %s\n", f.What, plain.Line(f.From), plain.Line(f.To))
	}
	if !d.SameLayers {
		fmt.Fprintln(out, "files: the layers below the checkpoints differ; see cracctl history")
	}
	w := tabwriter.NewWriter(out, 0, 8, 3, ' ', 0)
	fmt.Fprintln(w, "PID\tCOMMAND\tMEMORY\tEQUAL\tCHANGED\tADDED\tREMOVED")
	row := func(pid, command, kind string, p inspect.Pages) {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", pid, command, kind, size(p.Equal), size(p.Changed), size(p.Added), size(p.Removed))
	}
	for _, p := range d.Processes {
		command := p.Command
		switch p.In {
		case "from":
			command = "- " + command
		case "to":
			command = "+ " + command
		}
		row(fmt.Sprint(p.PID), command, "all", p.Memory)
		for _, kind := range slices.Sorted(maps.Keys(p.Kinds)) {
			row("", "", kind, p.Kinds[kind])
		}
	}
	row("", "", "total", d.Memory)
	return w.Flush()
}
