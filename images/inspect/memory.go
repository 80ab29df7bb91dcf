package inspect

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/containerd/containerd/v2/core/content"

	"github.com/crac-shim/crac/images"
)

// ReadChain reads the image's checkpoint layer and those of the dumps that it
// continues, the nearest first, within one budget. With o.Extract the files of the first go into its
// directory 0, those of the next into 1, and so on.
func (i *Image) ReadChain(ctx context.Context, store content.Provider, o Options) ([]*Layer, error) {
	if o.Budget == nil {
		o.Budget = NewBudget()
	}
	extract := o.Extract
	level := func(n int) error {
		if extract == "" {
			return nil
		}
		o.Extract = filepath.Join(extract, strconv.Itoa(n))
		return os.Mkdir(o.Extract, 0o700)
	}
	if err := level(0); err != nil {
		return nil, err
	}
	top, err := i.Read(ctx, store, o)
	if err != nil {
		return nil, err
	}
	chain := []*Layer{top}
	o.parent = true
	for n, want := i.Checkpoint-1, top.Manifest.Parent; want != nil; n-- {
		for n >= 0 && !i.isCheckpoint(n) {
			n--
		}
		if n < 0 {
			return nil, fmt.Errorf("%s: %w", i.Name, images.NoParent(want))
		}
		if err := level(len(chain)); err != nil {
			return nil, err
		}
		l, err := i.read(ctx, store, n, o)
		if err != nil {
			return nil, err
		}
		if l.ManifestDigest != want.Manifest {
			return nil, fmt.Errorf("%s: %w", i.Name, images.NoParent(want))
		}
		if err := images.Continues(chain[len(chain)-1].Manifest, l.Manifest); err != nil {
			return nil, fmt.Errorf("%s: %w", i.Name, err)
		}
		chain = append(chain, l)
		want = l.Manifest.Parent
	}
	return chain, nil
}

// ReadWhole is ReadChain, checked, for a restore: the directory whole, below dir, holds
// one dump then with all of the memory. dir has to be empty.
func (i *Image) ReadWhole(ctx context.Context, store content.Provider, dir string, o Options) (chain []*Layer, whole string, err error) {
	if i.Covered() {
		return nil, "", fmt.Errorf("%s: %w: its memory does not match the files", i.Name, images.ErrCovered)
	}
	o.Digests, o.Extract = true, dir
	if chain, err = i.ReadChain(ctx, store, o); err != nil {
		return nil, "", err
	}
	// What is put together here is not looked at again before it is restored.
	if err := VerifyChain(chain); err != nil {
		return nil, "", fmt.Errorf("%s: %w", i.Name, err)
	}
	dirs := make([]string, len(chain))
	for n := range chain {
		dirs[n] = filepath.Join(dir, strconv.Itoa(n))
	}
	if _, err := images.Merge(ctx, dirs, uint64(chain[0].Manifest.Host.PageSize)); err != nil {
		return nil, "", fmt.Errorf("%s: %w", i.Name, err)
	}
	return chain, dirs[0], nil
}

// CheckpointSize is how many bytes a registry stores of all checkpoint layers.
func (i *Image) CheckpointSize() (size int64) {
	for n, l := range i.Manifest.Layers {
		if i.isCheckpoint(n) {
			size += l.Size
		}
	}
	return size
}

// CheckpointLayers are the indexes of the layers that a chain of this length was
// read from, the nearest first.
func (i *Image) CheckpointLayers(length int) []int {
	var all []int
	for n := i.Checkpoint; n >= 0 && len(all) < length; n-- {
		if i.isCheckpoint(n) {
			all = append(all, n)
		}
	}
	return all
}

// Memory is the memory of the processes of a chain of dumps, as hashes. It is
// read-only, and safe for concurrent use.
type Memory struct {
	processes map[uint32][]summed
	parent    *Memory
}

var _ images.ParentMemory = (*Memory)(nil)

// summed is a run of pages with their hashes; none of pages that are the parent's, which
// has all of them.
type summed struct {
	start, end uint64
	sums       []images.PageSum
}

// NewMemory takes the memory out of a chain of layers that were read with Pages.
func NewMemory(chain []*Layer) (*Memory, error) {
	var m *Memory
	for _, l := range slices.Backward(chain) {
		above := &Memory{processes: make(map[uint32][]summed), parent: m}
		if err := above.read(l); err != nil {
			return nil, damaged(err)
		}
		m = above
	}
	return m, nil
}

// pagemapPID is the process whose page map a file of this name is.
func pagemapPID(name string) (uint32, bool) {
	var pid uint32
	n, err := fmt.Sscanf(name, "pagemap-%d.img", &pid)
	return pid, n == 1 && err == nil && name == fmt.Sprintf("pagemap-%d.img", pid)
}

func (m *Memory) read(l *Layer) error {
	pageSize := uint64(l.Manifest.Host.PageSize)
	taken := make(map[uint32]bool)
	for name, data := range l.Images {
		pid, ok := pagemapPID(name)
		if !ok {
			continue
		}
		p, err := images.ParsePagemap(data, pageSize)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		file := fmt.Sprintf("pages-%d.img", p.ID)
		if taken[p.ID] {
			return fmt.Errorf("%s belongs to two processes", file)
		}
		taken[p.ID] = true
		sums := l.Pages[file]
		var runs []summed
		for _, r := range p.Runs {
			s := summed{start: r.Start, end: r.End(pageSize)}
			if r.Present() {
				n := (s.end - s.start) / images.SumSize
				if n > uint64(len(sums)) {
					return fmt.Errorf("%s speaks of more pages than %s has", name, file)
				}
				s.sums, sums = sums[:n], sums[n:]
			} else if !r.InParent() {
				continue
			}
			runs = append(runs, s)
		}
		if len(sums) > 0 {
			return fmt.Errorf("%s has more pages than %s speaks of", file, name)
		}
		// A run is a few bytes of the page map, however long it claims to be. So those
		// that go through the pages have no more to do than there are pages.
		if at, ok := m.parent.lacks(pid, runs); ok {
			return fmt.Errorf("%s calls the page at %#x the parent's, which does not have it", name, at)
		}
		m.processes[pid] = runs
	}
	return nil
}

// lacks finds the first page of a process that runs above say is in m, and is not.
func (m *Memory) lacks(pid uint32, above []summed) (at uint64, lacks bool) {
	var own []summed
	if m != nil {
		own = m.processes[pid]
	}
	for _, s := range above {
		for at := s.start; s.sums == nil && at < s.end; {
			for len(own) > 0 && own[0].end <= at {
				own = own[1:]
			}
			if len(own) == 0 || own[0].start > at {
				return at, true
			}
			at = own[0].end
		}
	}
	return 0, false
}

// Sum implements images.ParentMemory.
func (m *Memory) Sum(pid uint32, address uint64) (images.PageSum, bool) {
	for ; m != nil; m = m.parent {
		runs := m.processes[pid]
		i, _ := slices.BinarySearchFunc(runs, address, func(s summed, at uint64) int {
			if s.end <= at {
				return -1
			}
			return 1 // the first that ends behind it is looked for
		})
		if i >= len(runs) || runs[i].start > address {
			return images.PageSum{}, false
		}
		if runs[i].sums != nil {
			return runs[i].sums[(address-runs[i].start)/images.SumSize], true
		}
	}
	return images.PageSum{}, false
}
