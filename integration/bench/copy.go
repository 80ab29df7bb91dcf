package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	goruntime "runtime"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// plainCopy is the machine's limit: as many bytes as the workload holds, from the page cache into
// new anonymous memory, by as many threads as there are CPUs. It brings back nothing that runs.
type plainCopy struct{ b *bench }

func (p *plainCopy) name() string { return "copy" }

func (p *plainCopy) can(w *workload) error {
	if w.mib == 0 {
		return cannot("it does not know how much memory %s holds", w.name)
	}
	return nil
}

func (p *plainCopy) prepare(_ context.Context, w *workload) (saved, error) {
	dir, err := p.b.d.Path("copy")
	if err != nil {
		return nil, err
	}
	f, err := os.Create(filepath.Join(dir, w.name))
	if err != nil {
		return nil, err
	}
	_, err = io.CopyN(f, rand.Reader, int64(w.mib)<<20)
	return &pageFile{f, int64(w.mib) << 20}, err
}

// pageFile stands for a dump's pages.
type pageFile struct {
	f    *os.File
	size int64
}

func (s *pageFile) was() *testimony { return nil }

func (s *pageFile) stage(context.Context, *network) (instance, error) {
	return &pageCopy{pages: s}, nil
}

func (s *pageFile) remove(context.Context) error {
	return errors.Join(s.f.Close(), os.Remove(s.f.Name()))
}

// pageCopy is one copy of the pages.
type pageCopy struct {
	pages *pageFile
	to    []byte
}

// copyChunk is as large as the batches in which memory is brought on demand.
const copyChunk = 2 << 20

func (c *pageCopy) run(context.Context) (err error) {
	if c.to, err = unix.Mmap(-1, 0, int(c.pages.size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS); err != nil {
		return os.NewSyscallError("mmap", err)
	}
	var g errgroup.Group
	threads := goruntime.NumCPU()
	for first := range threads {
		g.Go(func() error {
			for at := first * copyChunk; at < len(c.to); at += threads * copyChunk {
				if _, err := c.pages.f.ReadAt(c.to[at:min(at+copyChunk, len(c.to))], int64(at)); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

func (c *pageCopy) filled(context.Context) error { return nil }

// check compares the copy with the original.
func (c *pageCopy) check() error {
	sum := crc32.New(crc32.MakeTable(crc32.Castagnoli))
	if _, err := io.Copy(sum, io.NewSectionReader(c.pages.f, 0, c.pages.size)); err != nil {
		return err
	}
	if got, want := crc32.Checksum(c.to, crc32.MakeTable(crc32.Castagnoli)), sum.Sum32(); got != want {
		return fmt.Errorf("the copy's checksum is %08x, that of the pages %08x", got, want)
	}
	return nil
}

func (c *pageCopy) use(context.Context) (usage, error) { return usage{}, cannot("nothing runs") }

func (c *pageCopy) remove(context.Context) (time.Duration, error) {
	if c.to == nil {
		return 0, nil
	}
	return 0, unix.Munmap(c.to)
}
