package check

import (
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/crac-shim/crac/cmd/cracctl/plain"
	"github.com/crac-shim/crac/runtime/inspect"
)

// Table writes the report for people.
func Table(w io.Writer, r *Report) error {
	var b strings.Builder
	for _, f := range r.Findings {
		fmt.Fprintf(&b, "%-7s  %s\n", f.Level, plain.Line(subject(f)))
		fmt.Fprintf(&b, "%-7s  %s\n", "", plain.Line(f.Why))
		if f.Fix != "" {
			fmt.Fprintf(&b, "%-7s  → %s\n", "", plain.Line(f.Fix))
		}
		b.WriteByte('\n')
	}
	fmt.Fprintf(&b, "%s: %s", r.Container, count(r.Processes, "process", "processes"))
	if r.Participants > 0 {
		fmt.Fprintf(&b, ", %s", count(r.Participants, "participant", "participants"))
	}
	errors, warnings := r.count(inspect.Error), r.count(inspect.Warning)
	switch {
	case errors > 0:
		fmt.Fprintf(&b, ". %s in the way of a checkpoint.", plural(errors, "thing stands", "things stand"))
		if r.Participants > 0 {
			b.WriteString(" What participants would close at before-checkpoint is counted, too.")
		}
	case warnings > 0:
		fmt.Fprintf(&b, ". Nothing stands in the way of a checkpoint; a clone would meet what is marked warning.")
	default:
		b.WriteString(". Nothing stands in the way of a checkpoint.")
	}
	b.WriteByte('\n')
	_, err := io.WriteString(w, b.String())
	return err
}

// subject is who holds what.
func subject(f inspect.Finding) string {
	if f.PID == 0 {
		return f.What
	}
	var b strings.Builder
	fmt.Fprintf(&b, "process %d (%s, %d inside)", f.PID, f.Program, f.Inside)
	if f.Others > 0 {
		fmt.Fprintf(&b, " and %s", count(f.Others, "other", "others"))
	}
	if len(f.FDs) > 0 {
		fmt.Fprintf(&b, ", %s", descriptors(f.FDs))
	}
	if f.What != "the process" {
		fmt.Fprintf(&b, ": %s", f.What)
	}
	return b.String()
}

// maxShown is how many numbers a line lists.
const maxShown = 8

func descriptors(fds []int) string {
	if len(fds) == 1 {
		return "descriptor " + strconv.Itoa(fds[0])
	}
	shown := make([]string, 0, maxShown)
	for _, n := range fds[:min(len(fds), maxShown)] {
		shown = append(shown, strconv.Itoa(n))
	}
	if more := len(fds) - len(shown); more > 0 {
		return fmt.Sprintf("descriptors %s and %d more", strings.Join(shown, ", "), more)
	}
	last := len(shown) - 1
	return fmt.Sprintf("descriptors %s and %s", strings.Join(shown[:last], ", "), shown[last])
}

func count(n int, one, many string) string { return strconv.Itoa(n) + " " + pick(n, one, many) }

// plural begins a sentence.
func plural(n int, one, many string) string {
	if n == 1 {
		return "One " + one
	}
	return strconv.Itoa(n) + " " + many
}

func pick(n int, one, many string) string {
	if n == 1 {
		return one
	}
	return many
}
