package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/containerd/containerd/v2/defaults"
	"github.com/spf13/cobra"

	"github.com/crac-shim/crac/runtime/trace"
)

// maxTrace bounds a trace that is read, in bytes.
const maxTrace = 1 << 20

func newTrace(t *target) *cobra.Command {
	var state, output string
	cmd := &cobra.Command{
		Use:   "trace CONTAINER",
		Short: "Tell where the milliseconds of a container's start went",
		Long: `Tell where the milliseconds of a container's start went: what the runtime did at
Create and at Start, what CRIU did between the questions that it asks the runtime,
and how the memory came behind. Times count from the call of Create. What is in
between the two calls is the client's, which sets up the network there. CONTAINER is
an id, or nerdctl's name for one.

The pager's part of a lazy restore is there when all memory is. containerd's own
part, before Create (it starts the shim) and around the calls, is not in it.`,
		Example: `  cracctl trace web
  cracctl trace web --output trace.json    # for ui.perfetto.dev or chrome://tracing`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeContainers(t),
	}
	cmd.Flags().StringVar(&state, "state", "", "containerd's state directory (default: asked of the running shim, else "+defaults.DefaultStateDir+")")
	cmd.Flags().StringVarP(&output, "output", "o", "", "write a file for trace viewers (Chrome's trace event format) instead; - for standard output")
	t.shows(cmd, func(cmd *cobra.Command, s *session, format string, args []string) error {
		id := containerID(s.ctx, s.Client, args[0])
		_, bundle, err := findTask(s.ctx, s.Client, t, state, id)
		if err != nil {
			return err
		}
		start, err := readTrace(bundle, id)
		if err != nil {
			return err
		}
		switch output {
		case "":
			return show(cmd.OutOrStdout(), format, start, writeTrace)
		case "-":
			return writeChrome(cmd.OutOrStdout(), start)
		}
		f, err := os.Create(output)
		if err != nil {
			return err
		}
		if err := writeChrome(f, start); err != nil {
			f.Close()
			return err
		}
		return f.Close()
	})
	return cmd
}

func readTrace(bundle, id string) (*trace.Start, error) {
	f, err := os.Open(filepath.Join(bundle, trace.FileName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("container %s has no trace in %s: it was not started yet, or by another runtime; if containerd's state directory is another one, give it with --state", id, bundle)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var start trace.Start
	if err := json.NewDecoder(io.LimitReader(f, maxTrace)).Decode(&start); err != nil {
		return nil, fmt.Errorf("%s: %w", f.Name(), err)
	}
	return &start, nil
}

func writeChrome(out io.Writer, start *trace.Start) error {
	data, err := start.Chrome()
	if err != nil {
		return err
	}
	_, err = out.Write(append(data, '\n'))
	return err
}

func writeTrace(out io.Writer, start *trace.Start) error {
	kind := "cold"
	if start.Warm {
		kind = "warm, memory before the first instruction"
		if start.Lazy {
			kind = "warm, memory on demand"
		}
		kind += fmt.Sprintf(" (%s)", size(start.Memory))
	}
	fmt.Fprintf(out, "%s, started %s: %s\n", start.Container, start.Began.Local().Format("2006-01-02 15:04:05.000 MST"), kind)
	var tracks []string
	for _, s := range start.Steps {
		if !slices.Contains(tracks, s.Track) {
			tracks = append(tracks, s.Track)
		}
	}
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', tabwriter.AlignRight)
	for _, track := range tracks {
		fmt.Fprintf(w, "\n%s\n", strings.ToUpper(track))
		fmt.Fprintf(w, "AT ms\tTOOK ms\t\n")
		var within []trace.Step
		for _, s := range start.Steps {
			if s.Track != track {
				continue
			}
			for len(within) > 0 && within[len(within)-1].End() < s.End() {
				within = within[:len(within)-1]
			}
			fmt.Fprintf(w, "%s\t%s\t  %s%s\n", milliseconds(s.At), milliseconds(s.Took), strings.Repeat("  ", len(within)), s.Name)
			within = append(within, s)
		}
	}
	return w.Flush()
}

func milliseconds(d time.Duration) string {
	return fmt.Sprintf("%.2f", float64(d)/float64(time.Millisecond))
}
