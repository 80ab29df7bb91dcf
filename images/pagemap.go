package images

import (
	"fmt"
	"math"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/crac-shim/crac/oci/criuimage"
)

// Run is a run of pages in a process's memory.
type Run struct {
	Start uint64 // address
	Pages uint64
	flags uint64
}

// End is the address behind the run, for pages of this size in bytes.
func (r Run) End(pageSize uint64) uint64 { return r.Start + r.Pages*pageSize }

// Present tells that the pages are in this dump. Pages that are neither present
// nor the parent's are zero, or those of the file that is mapped there.
func (r Run) Present() bool { return r.flags&pagePresent != 0 }

// InParent tells that the pages are in the dump that this one continues.
func (r Run) InParent() bool { return r.flags&pageInParent != 0 }

// Flags of pagemap.proto.
const (
	pageInParent = 1
	pageLazy     = 2 // a restore on demand may leave it out
	pagePresent  = 4
)

// Pagemap is a pagemap-*.img: which pages of a process, or of a shared memory,
// are in the file pages-ID.img, in this order.
type Pagemap struct {
	ID   uint32
	Runs []Run
	// wide: the numbers of pages are where CRIU has kept them since 4.2.
	wide bool
}

// Wide tells that the dump was made by CRIU 4.2 or newer: the numbers of pages are
// where older ones do not look.
func (p *Pagemap) Wide() bool { return p.wide }

// ParsePagemap reads one. Runs go up the addresses, do not overlap, are of whole pages,
// and not both here and in the parent; anything else is an error.
func ParsePagemap(data []byte, pageSize uint64) (*Pagemap, error) {
	p := new(Pagemap)
	first := true
	for message, err := range criuimage.Messages(data, criuimage.Pagemap) {
		if err != nil {
			return nil, err
		}
		f, err := pagemapEntry(message)
		if err != nil {
			return nil, err
		}
		if first {
			if f[1] > math.MaxUint32 {
				return nil, fmt.Errorf("belongs to pages %d", f[1])
			}
			p.ID, first = uint32(f[1]), false
			continue
		}
		if err := p.add(f, pageSize); err != nil {
			return nil, err
		}
	}
	if first {
		return nil, criuimage.ErrCutOff
	}
	return p, nil
}

// Fields of pagemap_entry.
const (
	pagemapAddress = 1
	pagemapPages   = 2 // before CRIU 4.2; 0 since
	pagemapParent  = 3 // before there were flags
	pagemapFlags   = 4
	pagemapWide    = 5
)

func (p *Pagemap) add(f [6]uint64, pageSize uint64) error {
	run := Run{Start: f[pagemapAddress], Pages: f[pagemapPages], flags: f[pagemapFlags]}
	if f[pagemapWide] != 0 {
		run.Pages, p.wide = f[pagemapWide], true
	}
	switch {
	case f[pagemapParent] != 0:
		run.flags |= pageInParent
	case run.flags == 0:
		run.flags = pagePresent
	}
	if run.Start%pageSize != 0 || run.Pages == 0 || run.Pages > (math.MaxUint64-run.Start)/pageSize {
		return fmt.Errorf("has a run of %d pages at %#x", run.Pages, run.Start)
	}
	if run.InParent() && run.Present() {
		return fmt.Errorf("has a run at %#x that is here and in the parent", run.Start)
	}
	if n := len(p.Runs); n > 0 && run.Start < p.Runs[n-1].End(pageSize) {
		return fmt.Errorf("has runs out of order at %#x", run.Start)
	}
	p.Runs = append(p.Runs, run)
	return nil
}

// pagemapEntry reads a message's numbers by their fields. Of a field that is there
// twice the last counts, as it does for CRIU.
func pagemapEntry(data []byte) (f [6]uint64, err error) {
	for len(data) > 0 {
		num, kind, n := protowire.ConsumeTag(data)
		if n < 0 {
			return f, protowire.ParseError(n)
		}
		data = data[n:]
		if kind != protowire.VarintType || int(num) >= len(f) {
			n = protowire.ConsumeFieldValue(num, kind, data)
		} else {
			f[num], n = protowire.ConsumeVarint(data)
		}
		if n < 0 {
			return f, protowire.ParseError(n)
		}
		data = data[n:]
	}
	return f, nil
}

// encode writes the page map as the CRIU does that wrote it.
func (p *Pagemap) encode() []byte {
	out := criuimage.New(criuimage.Pagemap)
	add := func(fields ...uint64) {
		var m []byte
		for i := 0; i < len(fields); i += 2 {
			m = protowire.AppendTag(m, protowire.Number(fields[i]), protowire.VarintType)
			m = protowire.AppendVarint(m, fields[i+1])
		}
		out = criuimage.Append(out, m)
	}
	add(1, uint64(p.ID))
	for _, r := range p.Runs {
		if p.wide {
			add(pagemapAddress, r.Start, pagemapPages, 0, pagemapFlags, r.flags, pagemapWide, r.Pages)
		} else {
			add(pagemapAddress, r.Start, pagemapPages, r.Pages, pagemapFlags, r.flags)
		}
	}
	return out
}

// append adds pages of one kind behind what is there, to the last run if they
// continue it.
func (p *Pagemap) append(start, pages, flags, pageSize uint64) {
	if n := len(p.Runs); n > 0 && p.Runs[n-1].flags == flags && p.Runs[n-1].End(pageSize) == start {
		p.Runs[n-1].Pages += pages
		return
	}
	p.Runs = append(p.Runs, Run{Start: start, Pages: pages, flags: flags})
}
