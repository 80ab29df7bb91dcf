// Package doctor tells in plain words what a host can and cannot do for
// checkpoint and restore, by trying it.
package doctor

import (
	"context"
	"fmt"
	"io"
	"strings"
)

// Status of a check.
type Status string

// A host with a Fail cannot restore; a Warn costs something that Found and Fix
// name.
const (
	OK   Status = "ok"
	Warn Status = "warn"
	Fail Status = "fail"
)

// Check is one thing that was looked at.
type Check struct {
	Name   string `json:"name"`
	Status Status `json:"status"`
	// Found is what there is and what that means.
	Found string `json:"found"`
	// Fix is the way out, where one is needed.
	Fix string `json:"fix,omitempty"`
}

// Report is all checks of a host.
type Report struct {
	// OK tells that a restore works here.
	OK     bool    `json:"ok"`
	Checks []Check `json:"checks"`
}

// Options say where to look.
type Options struct {
	// Address is containerd's socket.
	Address string
}

// Run makes all checks. None of them changes the host, and what they start or
// mount is gone when it returns.
func Run(ctx context.Context, o Options) Report {
	p := &prober{Options: o}
	r := Report{OK: true}
	for _, probe := range []func(context.Context) []Check{
		p.privileges, p.kernel, p.containerd, p.shim, p.criu, p.cgroups, p.overlay, p.userNamespaces,
		p.security, p.userfault, p.runTmpfs, p.networkLock,
	} {
		r.Checks = append(r.Checks, probe(ctx)...)
	}
	for _, c := range r.Checks {
		if c.Status == Fail {
			r.OK = false
		}
	}
	return r
}

// Table writes the report for people.
func (r Report) Table(w io.Writer) error {
	width := 0
	for _, c := range r.Checks {
		width = max(width, len(c.Name))
	}
	var b strings.Builder
	warned := 0
	for _, c := range r.Checks {
		fmt.Fprintf(&b, "%-4s  %-*s  %s\n", c.Status, width, c.Name, c.Found)
		if c.Fix != "" {
			fmt.Fprintf(&b, "%-4s  %-*s  → %s\n", "", width, "", c.Fix)
		}
		if c.Status == Warn {
			warned++
		}
	}
	switch {
	case !r.OK:
		b.WriteString("\nThis host cannot restore checkpoints: see what is marked fail.\n")
	case warned > 0:
		b.WriteString("\nThis host can checkpoint and restore, within the limits marked warn.\n")
	default:
		b.WriteString("\nThis host can checkpoint and restore.\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func one(name string, s Status, found, fix string) []Check {
	return []Check{{Name: name, Status: s, Found: found, Fix: fix}}
}
