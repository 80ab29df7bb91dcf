package images

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// Merge makes a whole dump of one that continues others: in dirs[0] the pages that
// its page maps call the parent's become its own. dirs[1] and so on are those that
// it continues, the nearest first. Nothing else is changed, and dirs[0] is a whole
// dump or, after an error, to be thrown away. Errors wrap ErrDamaged.
func Merge(dirs []string, pageSize uint64) error {
	files, err := DumpFiles(dirs[0])
	if err != nil {
		return err
	}
	for _, f := range files {
		rest, ok := strings.CutPrefix(f.Name, "pagemap-")
		if !ok {
			continue
		}
		if _, err := strconv.ParseUint(strings.TrimSuffix(rest, ".img"), 10, 32); err != nil {
			continue // of shared memory, which is whole in every dump
		}
		if err := mergeOne(dirs, f.Name, pageSize); err != nil {
			return fmt.Errorf("%w: %s: %w", ErrDamaged, filepath.Join(dirs[0], f.Name), err)
		}
	}
	return nil
}

func mergeOne(dirs []string, name string, pageSize uint64) (err error) {
	var levels []*level
	defer func() {
		for _, l := range levels {
			err = errors.Join(err, l.pages.Close())
		}
	}()
	for _, dir := range dirs {
		l, err := openLevel(dir, name, pageSize)
		if errors.Is(err, os.ErrNotExist) && len(levels) > 0 {
			break // an earlier dump did not have this process
		}
		if err != nil {
			return err
		}
		levels = append(levels, l)
	}
	top := levels[0]
	if !slices.ContainsFunc(top.runs, func(r Run) bool { return r.InParent() }) {
		return nil
	}
	out, err := os.CreateTemp(dirs[0], ".merge-")
	if err != nil {
		return err
	}
	defer os.Remove(out.Name()) // once it has its name, this finds nothing
	defer out.Close()

	merged := &Pagemap{ID: top.id, wide: top.wide}
	page := make([]byte, pageSize)
	for _, r := range top.runs {
		flags := r.flags
		if r.InParent() {
			flags = pagePresent
		} else if !r.Present() {
			merged.append(r.Start, r.Pages, flags, pageSize)
			continue
		}
		for i := range r.Pages {
			at := r.Start + i*pageSize
			if err := readPage(levels, at, page); err != nil {
				return err
			}
			if _, err := out.Write(page); err != nil {
				return err
			}
			merged.append(at, 1, flags, pageSize)
		}
	}
	if err := out.Close(); err != nil {
		return err
	}
	if err := os.Rename(out.Name(), filepath.Join(dirs[0], fmt.Sprintf("pages-%d.img", top.id))); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dirs[0], name), merged.encode(), 0o600)
}

// level is the memory of a process in one dump.
type level struct {
	id      uint32
	wide    bool
	runs    []Run
	offsets []int64 // of the runs in pages
	pages   *os.File
	size    uint64 // of a page
}

func openLevel(dir, name string, pageSize uint64) (*level, error) {
	data, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return nil, err
	}
	p, err := ParsePagemap(data, pageSize)
	if err != nil {
		return nil, err
	}
	l := &level{id: p.ID, wide: p.wide, runs: p.Runs, size: pageSize}
	var offset int64
	for _, r := range p.Runs {
		l.offsets = append(l.offsets, offset)
		if r.Present() {
			offset += int64(r.Pages * pageSize)
		}
	}
	l.pages, err = os.Open(filepath.Join(dir, fmt.Sprintf("pages-%d.img", p.ID)))
	return l, err
}

// readPage reads a page where it is: in the first dump that does not call it its
// parent's.
func readPage(levels []*level, at uint64, page []byte) error {
	for _, l := range levels {
		i, _ := slices.BinarySearchFunc(l.runs, at, func(r Run, at uint64) int {
			if r.End(l.size) <= at {
				return -1
			}
			return 1
		})
		if i == len(l.runs) || l.runs[i].Start > at {
			break
		}
		r := l.runs[i]
		if r.InParent() {
			continue
		}
		if !r.Present() {
			break
		}
		_, err := l.pages.ReadAt(page, l.offsets[i]+int64(at-r.Start))
		return err
	}
	return fmt.Errorf("the page at %#x is in none of the dumps that it should be in", at)
}
