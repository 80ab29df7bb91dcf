package inspect

import (
	"fmt"
	"math"

	"google.golang.org/protobuf/encoding/protowire"
)

// Run is a run of pages in a process's memory.
type Run struct {
	Start uint64 // address
	Pages uint64
	// Present pages are in this dump. Parent pages are in an earlier one; other
	// pages are zero, or the file's that is mapped there.
	Present, Parent bool
}

// End is the address behind the run, for pages of this size.
func (r Run) End(pageSize uint64) uint64 { return r.Start + r.Pages*pageSize }

// Flags of pagemap.proto.
const (
	pageInParent = 1
	pageLazy     = 2
	pagePresent  = 4
)

// Pagemap is a pagemap-*.img: which pages of a process or a shared memory are in
// the file pages-ID.img, in this order.
type Pagemap struct {
	ID   uint32
	Runs []Run
}

// parsePagemap reads one. By hand: go-criu does not know the field that CRIU has
// kept the number of pages in since 4.2.
func parsePagemap(data []byte, pageSize uint64) (*Pagemap, error) {
	all, err := messages(data)
	if err != nil {
		return nil, err
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("has no head")
	}
	head, err := numbers(all[0])
	if err != nil {
		return nil, err
	}
	if head[1] > math.MaxUint32 {
		return nil, fmt.Errorf("belongs to pages %d", head[1])
	}
	p := &Pagemap{ID: uint32(head[1])}
	for _, m := range all[1:] {
		f, err := numbers(m)
		if err != nil {
			return nil, err
		}
		run := Run{Start: f[1], Pages: f[2]}
		if n, ok := f[5]; ok {
			run.Pages = n
		}
		flags, ok := f[4]
		run.Parent = flags&pageInParent != 0 || f[3] != 0
		// Before there were flags, what was not in the parent was present.
		run.Present = flags&pagePresent != 0 || !ok && !run.Parent
		const space = math.MaxUint64
		if run.Start%pageSize != 0 || run.Pages == 0 || run.Pages > (space-run.Start)/pageSize {
			return nil, fmt.Errorf("has a run of %d pages at %#x", run.Pages, run.Start)
		}
		if n := len(p.Runs); n > 0 && run.Start < p.Runs[n-1].End(pageSize) {
			return nil, fmt.Errorf("has runs out of order at %#x", run.Start)
		}
		p.Runs = append(p.Runs, run)
	}
	return p, nil
}

// numbers reads a message of nothing but numbers.
func numbers(data []byte) (map[protowire.Number]uint64, error) {
	f := make(map[protowire.Number]uint64)
	for len(data) > 0 {
		num, kind, n := protowire.ConsumeTag(data)
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		data = data[n:]
		if kind != protowire.VarintType {
			n = protowire.ConsumeFieldValue(num, kind, data)
		} else {
			f[num], n = protowire.ConsumeVarint(data)
		}
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		data = data[n:]
	}
	return f, nil
}
