package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"unicode"

	"github.com/spf13/cobra"

	"github.com/crac-shim/crac/cmd/cracctl/plain"
	"github.com/crac-shim/crac/images/build"
	"github.com/crac-shim/crac/images/inspect"
	"github.com/crac-shim/crac/oci"
)

func newInspect(t *target) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "inspect REF",
		Short: "Tell what is inside a checkpoint image, and which hosts it fits",
		Long: `Tell what is inside a checkpoint image: its processes with their memory, open
files and sockets, its layers, and what a host needs to restore it. The image need
not be unpacked, and this host need not be able to restore it.

The contents of the memory, arguments and environment of processes are not shown.`,
		Example: `  cracctl inspect registry.example/shop/web:warm
  cracctl inspect --format json registry.example/shop/web:warm
  cracctl inspect --format '{{join .Manifest.Host.CPU.Features " "}}' registry.example/shop/web:warm`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeImages(t),
	}
	full := cmd.Flags().Bool("full", false, "list every mapping and every open file in the table")
	var keys []string
	keyFlag(cmd, &keys, "of an encrypted image")
	t.shows(cmd, func(cmd *cobra.Command, s *session, format string, args []string) error {
		img, err := s.image(args[0])
		if err != nil {
			return err
		}
		var o inspect.Options
		if o.Keys, err = build.ReadKeys(keys); err != nil {
			return err
		}
		progress, done := reading(img, cmd.ErrOrStderr())
		o.Progress = progress
		r, err := inspect.Inspect(s.ctx, s.ContentStore(), img, s.thisHost(), o)
		done()
		if err != nil {
			return err
		}
		return show(cmd.OutOrStdout(), format, r, func(w io.Writer, r *inspect.Report) error { return writeReport(w, r, *full) })
	})
	return cmd
}

func writeReport(out io.Writer, r *inspect.Report, full bool) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	m := r.Manifest
	line := func(key, format string, a ...any) {
		fmt.Fprintf(w, "%s\t%s\n", key, plain.Line(fmt.Sprintf(format, a...)))
	}
	line("Image", "%s", r.Name)
	line("Digest", "%s", r.Digest)
	line("Created", "%s (%s)", m.Created.Format("2006-01-02 15:04:05 MST"), ago(m.Created))
	line("Size", "%s, of which checkpoint %s (%s unpacked)", size(r.Size), size(r.CheckpointSize), size(r.DumpSize))
	line("Base", "%s %s", cmp.Or(m.Base.Name, "unknown"), short(m.Base.Digest))
	line("Container", "%s", containerOf(m.Container))
	line("Command", "%s", strings.Join(quoted(m.Container.Args), " "))
	if m.TCPEstablished {
		line("Connections", "established ones are kept: for a clone that takes over the address")
	}
	for i, need := range needs(m) {
		key := ""
		if i == 0 {
			key = "Needs"
		}
		line(key, "%s", need)
	}
	here := "fits this host"
	if r.Covered {
		here = "is not restored anywhere: layers were put above the checkpoint"
	}
	if !r.Here.OK {
		here = "does not fit this host:"
	}
	line("Here", "%s", here)
	for _, reason := range r.Here.Reasons {
		line("", "%s: %s", reason.Code, reason.Text)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(out, "\nPROCESSES")
	if err := writeProcesses(out, r.Processes); err != nil {
		return err
	}
	fmt.Fprintln(out, "\nMEMORY")
	if err := writeMemory(out, r.Processes, full); err != nil {
		return err
	}
	if sockets := r.Sockets(); len(sockets) > 0 {
		fmt.Fprintln(out, "\nSOCKETS")
		w := tabwriter.NewWriter(out, 0, 8, 3, ' ', 0)
		fmt.Fprintln(w, "PROTOCOL\tLOCAL\tREMOTE\tSTATE")
		for _, s := range sockets {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", s.Protocol, s.Local, s.Remote, s.State)
		}
		if err := w.Flush(); err != nil {
			return err
		}
	}
	fmt.Fprintln(out, "\nFILES")
	return writeFiles(out, r.Processes, full)
}

func containerOf(c oci.Container) string {
	s := fmt.Sprintf("%s, user %d:%d", cmp.Or(c.ID, "unnamed"), c.UID, c.GID)
	if c.Hostname != "" {
		s += ", host name " + c.Hostname
	}
	if c.Terminal {
		s += ", with a terminal"
	}
	return s
}

func quoted(args []string) []string {
	out := make([]string, len(args))
	for i, a := range args {
		out[i] = a
		if a == "" || strings.ContainsFunc(a, func(r rune) bool { return r == ' ' || r == '"' || unicode.IsControl(r) }) {
			out[i] = fmt.Sprintf("%q", a)
		}
	}
	return out
}

// needs says what a host has to have, a line each.
func needs(m *oci.Manifest) []string {
	lines := []string{
		fmt.Sprintf("%s/%s with pages of %s and cgroup v%d; CRIU %s or newer", m.Platform.OS, m.Platform.Architecture,
			size(int64(m.Host.PageSize)), m.Host.CgroupVersion, oci.VersionString(m.CRIU.Minimum)),
		fmt.Sprintf("a CPU such as %s, with %d features: %s", cmp.Or(m.Host.CPU.Model, "unknown"), len(m.Host.CPU.Features), strings.Join(m.Host.CPU.Features, " ")),
	}
	if len(m.Requires) > 0 {
		lines = append(lines, "support for: "+strings.Join(m.Requires, " "))
	}
	if l := m.Container.LSM; l != nil {
		lines = append(lines, l.Name+": "+strings.Join(l.Profiles, ", "))
	}
	var mounts []string
	for _, mount := range m.Mounts {
		if mount.Type == "bind" && mount.Destination != oci.HooksDir {
			mounts = append(mounts, mount.Destination)
		}
	}
	if len(mounts) > 0 {
		lines = append(lines, "mounts at "+strings.Join(mounts, " "))
	}
	return lines
}

func writeProcesses(out io.Writer, all []inspect.Process) error {
	w := tabwriter.NewWriter(out, 0, 8, 3, ' ', 0)
	fmt.Fprintln(w, "PID\tUSER\tTHREADS\tMAPPED\tDUMPED\tFILES\tCOMMAND")
	children := make(map[uint32][]inspect.Process)
	known := make(map[uint32]bool)
	for _, p := range all {
		known[p.PID] = true
	}
	for _, p := range all {
		parent := p.Parent
		if !known[parent] || parent == p.PID {
			parent = 0
		}
		children[parent] = append(children[parent], p)
	}
	shown := make(map[uint32]bool) // a hostile tree may go in circles
	var walk func(p inspect.Process, indent, branch string)
	walk = func(p inspect.Process, indent, branch string) {
		if shown[p.PID] {
			return
		}
		shown[p.PID] = true
		command := p.Command
		if p.Executable != "" && !strings.HasSuffix(p.Executable, "/"+p.Command) {
			command += " (" + p.Executable + ")"
		}
		if p.State != "running" {
			command += " <" + p.State + ">"
		}
		fmt.Fprintf(w, "%d\t%d:%d\t%d\t%s\t%s\t%d\t%s%s\n", p.PID, p.UID, p.GID, p.Threads, size(p.Mapped), size(p.Dumped), len(p.Descriptors), indent+branch, command)
		switch branch {
		case "├─ ":
			indent += "│  "
		case "└─ ":
			indent += "   "
		}
		for i, c := range children[p.PID] {
			branch := "├─ "
			if i == len(children[p.PID])-1 {
				branch = "└─ "
			}
			walk(c, indent, branch)
		}
	}
	for _, p := range children[0] {
		walk(p, "", "")
	}
	for _, p := range all {
		walk(p, "", "") // what hangs on nothing
	}
	return w.Flush()
}

// largest is how many mappings and files of a process a table shows, if it is not
// to show all.
const largest = 10

func writeMemory(out io.Writer, all []inspect.Process, full bool) error {
	w := tabwriter.NewWriter(out, 0, 8, 3, ' ', 0)
	fmt.Fprintln(w, "PID\tADDRESS\tSIZE\tDUMPED\tIN PARENT\tMODE\tKIND\tFILE")
	for _, p := range all {
		maps, rest := slices.Clone(p.Mappings), 0
		if !full {
			slices.SortStableFunc(maps, func(a, b inspect.Mapping) int {
				return cmp.Compare(b.Dumped+b.InParent, a.Dumped+a.InParent)
			})
			if len(maps) > largest {
				maps, rest = maps[:largest], len(maps)-largest
			}
		}
		for _, m := range maps {
			fmt.Fprintf(w, "%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n", p.PID, m.Start, size(m.Size), size(m.Dumped), size(m.InParent), m.Permissions, m.Kind, m.Path)
		}
		if rest > 0 {
			fmt.Fprintf(w, "%d\t… and %d smaller ones (--full)\t\t\t\t\t\t\n", p.PID, rest)
		}
	}
	return w.Flush()
}

func writeFiles(out io.Writer, all []inspect.Process, full bool) error {
	w := tabwriter.NewWriter(out, 0, 8, 3, ' ', 0)
	fmt.Fprintln(w, "PID\tFD\tKIND\tNAME")
	for _, p := range all {
		fds, rest := p.Descriptors, 0
		if !full && len(fds) > largest {
			fds, rest = fds[:largest], len(fds)-largest
		}
		for _, d := range fds {
			fmt.Fprintf(w, "%d\t%d\t%s\t%s\n", p.PID, d.FD, d.Kind, d.Name)
		}
		if rest > 0 {
			fmt.Fprintf(w, "%d\t… and %d more (--full)\t\t\n", p.PID, rest)
		}
	}
	return w.Flush()
}
