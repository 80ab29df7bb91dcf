package inspect

import (
	"context"
	"fmt"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/crac-shim/crac/images"
)

// Difference is what differs between two checkpoints. Sizes are bytes.
type Difference struct {
	From string `json:"from"`
	To   string `json:"to"`
	// SameLayers: all layers below the checkpoints are the same, so that the files
	// are, too.
	SameLayers bool     `json:"sameLayers"`
	Facts      []Change `json:"facts,omitempty"`
	Memory     Pages    `json:"memory"` // of all processes
	// Processes are matched by their IDs.
	Processes []ProcessDifference `json:"processes"`
}

// Change is a fact that differs.
type Change struct {
	What string `json:"what"`
	From string `json:"from"`
	To   string `json:"to"`
}

// Pages compares memory page by page: equal in both, changed, only in the second
// (added) and only in the first (removed).
type Pages struct {
	Equal   int64 `json:"equal"`
	Changed int64 `json:"changed"`
	Added   int64 `json:"added"`
	Removed int64 `json:"removed"`
}

func (p *Pages) add(o Pages) {
	p.Equal += o.Equal
	p.Changed += o.Changed
	p.Added += o.Added
	p.Removed += o.Removed
}

// ProcessDifference compares one process.
type ProcessDifference struct {
	PID     uint32 `json:"pid"`
	Command string `json:"command"`
	// In is both, from or to.
	In     string           `json:"in"`
	Memory Pages            `json:"memory"`
	Kinds  map[string]Pages `json:"kinds,omitempty"` // by Mapping.Kind
}

// Diff compares two checkpoints: chains of layers that were read with Digests and Pages, and
// are whole.
func Diff(ctx context.Context, from, to *Image, x, y []*Layer) (*Difference, error) {
	a, b := x[0], y[0]
	if err := VerifyChain(x); err != nil {
		return nil, fmt.Errorf("%s: %w", from.Name, err)
	}
	if err := VerifyChain(y); err != nil {
		return nil, fmt.Errorf("%s: %w", to.Name, err)
	}
	before, err := NewMemory(x)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", from.Name, err)
	}
	after, err := NewMemory(y)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", to.Name, err)
	}
	d := &Difference{From: from.Name, To: to.Name, SameLayers: sameLayers(from, to)}
	d.facts(a, b)
	first, err := a.Processes()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", from.Name, err)
	}
	second, err := b.Processes()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", to.Name, err)
	}
	ofFirst, ofSecond := byPID(first), byPID(second)
	for i := range first {
		if err := d.process(ctx, &first[i], ofSecond[first[i].PID], before, after); err != nil {
			return nil, err
		}
	}
	for i := range second {
		if ofFirst[second[i].PID] != nil {
			continue
		}
		if err := d.process(ctx, nil, &second[i], before, after); err != nil {
			return nil, err
		}
	}
	return d, nil
}

func byPID(all []Process) map[uint32]*Process {
	m := make(map[uint32]*Process, len(all))
	for i := range all {
		m[all[i].PID] = &all[i]
	}
	return m
}

func sameLayers(a, b *Image) bool {
	// As they are unpacked: the same layer may be stored in another compression, or encrypted.
	below := func(i *Image) []digest.Digest {
		var all []digest.Digest
		for n, id := range i.Config.RootFS.DiffIDs {
			if i.Kind(n) != "checkpoint" {
				all = append(all, id)
			}
		}
		return all
	}
	return slices.Equal(below(a), below(b))
}

func (d *Difference) facts(a, b *Layer) {
	add := func(what string, from, to any) {
		if x, y := fmt.Sprint(from), fmt.Sprint(to); x != y {
			d.Facts = append(d.Facts, Change{what, x, y})
		}
	}
	m, n := a.Manifest, b.Manifest
	add("base", m.Base.Digest, n.Base.Digest)
	add("container", m.Container.ID, n.Container.ID)
	add("host name", m.Container.Hostname, n.Container.Hostname)
	add("arguments", fmt.Sprintf("%q", m.Container.Args), fmt.Sprintf("%q", n.Container.Args))
	add("platform", m.Platform, n.Platform)
	add("kernel", m.Host.Kernel, n.Host.Kernel)
	add("CPU", m.Host.CPU.Model, n.Host.CPU.Model)
	add("CPU features", m.Host.CPU.Features, n.Host.CPU.Features)
	add("cgroup version", m.Host.CgroupVersion, n.Host.CgroupVersion)
	add("CRIU needed", m.CRIU.Minimum, n.CRIU.Minimum)
	add("requires", m.Requires, n.Requires)
	add("mounts", m.Mounts, n.Mounts)
}

func (d *Difference) process(ctx context.Context, p, q *Process, before, after *Memory) error {
	out := ProcessDifference{In: "both", Kinds: make(map[string]Pages)}
	x, y := before.pages(p), after.pages(q)
	switch {
	case q == nil:
		out.PID, out.Command, out.In = p.PID, p.Command, "from"
	case p == nil:
		out.PID, out.Command, out.In = q.PID, q.Command, "to"
	default:
		out.PID, out.Command = q.PID, q.Command
	}
	// Both go up the addresses.
	for n := 0; x.ok || y.ok; n++ {
		if n%(1<<16) == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		var (
			pages Pages
			kind  string
		)
		switch {
		case !y.ok || x.ok && x.address < y.address:
			pages.Removed, kind = images.SumSize, x.kind()
			x.next()
		case !x.ok || y.address < x.address:
			pages.Added, kind = images.SumSize, y.kind()
			y.next()
		default:
			if x.hash == y.hash {
				pages.Equal = images.SumSize
			} else {
				pages.Changed = images.SumSize
			}
			kind = y.kind()
			x.next()
			y.next()
		}
		sum := out.Kinds[kind]
		sum.add(pages)
		out.Kinds[kind] = sum
		out.Memory.add(pages)
	}
	d.Memory.add(out.Memory)
	d.Processes = append(d.Processes, out)
	return nil
}

// pageCursor goes through the pages of a process that are in a chain of dumps.
type pageCursor struct {
	ok      bool
	address uint64
	hash    images.PageSum

	memory   *Memory
	pid      uint32
	run      int
	mappings []Mapping
	mapping  int
}

// pages starts at the first page of p, which may be nil.
func (m *Memory) pages(p *Process) *pageCursor {
	c := &pageCursor{memory: m}
	if p != nil {
		c.pid, c.mappings = p.PID, p.Mappings
		c.next()
	}
	return c
}

func (c *pageCursor) next() {
	runs := c.memory.processes[c.pid]
	next := c.address + images.SumSize
	for c.ok = false; c.run < len(runs); c.run++ {
		for next = max(next, runs[c.run].start); next < runs[c.run].end; next += images.SumSize {
			if sum, ok := c.memory.Sum(c.pid, next); ok {
				c.ok, c.address, c.hash = true, next, sum
				return
			}
		}
	}
}

// kind is that of the mapping with the page.
func (c *pageCursor) kind() string {
	for c.mapping < len(c.mappings) && c.mappings[c.mapping].end <= c.address {
		c.mapping++
	}
	if c.mapping < len(c.mappings) && c.mappings[c.mapping].start <= c.address {
		return c.mappings[c.mapping].Kind
	}
	return "other"
}
