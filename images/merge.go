package images

import (
	"bufio"
	"context"
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
// it continues, the nearest first. It tells how many pages came from those. Nothing
// else is changed, and dirs[0] is a whole dump or, after an error, to be thrown away.
// Errors wrap ErrDamaged.
func Merge(ctx context.Context, dirs []string, pageSize uint64) (fromParents uint64, err error) {
	files, err := DumpFiles(dirs[0])
	if err != nil {
		return 0, err
	}
	for _, f := range files {
		// Also of shared memory: CRIU writes all of that unless it is told otherwise.
		if !strings.HasPrefix(f.Name, "pagemap-") {
			continue
		}
		pages, err := mergeOne(ctx, dirs, f.Name, pageSize)
		if cerr := ctx.Err(); cerr != nil {
			return 0, cerr
		}
		if err != nil {
			return 0, fmt.Errorf("%w: %s: %w", ErrDamaged, filepath.Join(dirs[0], f.Name), err)
		}
		fromParents += pages
	}
	return fromParents, nil
}

// parentLink is CRIU's name for the dump that another one continues.
const parentLink = "parent"

// ContinuesPreDump tells whether a dump left out what its pre-dump has, so that Merge
// must make one of the two. It removes the dump's link to the other, which nothing
// shall follow. Without a pre-dump, or a link to it, the dump has to be whole.
func ContinuesPreDump(dir, preDump string) (bool, error) {
	link := filepath.Join(dir, parentLink)
	to, err := os.Readlink(link)
	if preDump != "" && err == nil {
		if filepath.Join(dir, to) != filepath.Clean(preDump) {
			return false, fmt.Errorf("%w: %s leads to %s and not to %s", ErrNotDump, link, to, preDump)
		}
		if err := os.Remove(link); err != nil {
			return false, err
		}
	}
	_, ferr := DumpFiles(dir)
	return preDump != "" && err == nil, ferr
}

func mergeOne(ctx context.Context, dirs []string, name string, pageSize uint64) (fromParents uint64, err error) {
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
			return 0, err
		}
		levels = append(levels, l)
	}
	top := levels[0]
	if !slices.ContainsFunc(top.runs, func(r Run) bool { return r.InParent() }) {
		return 0, nil
	}
	anonymous, err := anonymousMemoryOf(dirs[0], name)
	if err != nil {
		return 0, err
	}
	out, err := os.CreateTemp(dirs[0], ".merge-")
	if err != nil {
		return 0, err
	}
	defer os.Remove(out.Name()) // once it has its name, this finds nothing
	defer out.Close()

	merged := &Pagemap{ID: top.id, wide: top.wide}
	pages := bufio.NewWriterSize(out, 1<<20)
	page := make([]byte, pageSize)
	for _, r := range top.runs {
		if r.InParent() {
			fromParents += r.Pages
		} else if !r.Present() {
			merged.append(r.Start, r.Pages, r.flags, pageSize)
			continue
		}
		for i := range r.Pages {
			if i%1024 == 0 && ctx.Err() != nil {
				return 0, ctx.Err()
			}
			at := r.Start + i*pageSize
			flags, err := readPage(levels, at, page)
			if err != nil {
				return 0, err
			}
			// Memory that was locked since then is none to bring on demand.
			if own, ok := anonymous.find(at); r.InParent() && (!ok || own.locked) {
				flags &^= pageLazy
			}
			if _, err := pages.Write(page); err != nil {
				return 0, err
			}
			merged.append(at, 1, flags, pageSize)
		}
	}
	if err := errors.Join(pages.Flush(), out.Close()); err != nil {
		return 0, err
	}
	if err := os.Rename(out.Name(), filepath.Join(dirs[0], fmt.Sprintf("pages-%d.img", top.id))); err != nil {
		return 0, err
	}
	return fromParents, os.WriteFile(filepath.Join(dirs[0], name), merged.encode(), 0o600)
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
	data, err := readMap(dir, name)
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

// anonymousMemoryOf is that of the process which a page map is of, and none of memory
// that is shared.
func anonymousMemoryOf(dir, pagemap string) (areas, error) {
	pid, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimPrefix(pagemap, "pagemap-"), ".img"), 10, 32)
	if err != nil {
		return nil, nil
	}
	return anonymousMemory(dir, uint32(pid))
}

// readPage reads a page where it is: in the first dump that does not call it its
// parent's. It returns the flags that it has there.
func readPage(levels []*level, at uint64, page []byte) (flags uint64, err error) {
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
		return r.flags, err
	}
	return 0, fmt.Errorf("the page at %#x is in none of the dumps that it should be in", at)
}
