package pager

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// A working set is the order in which the pages of a dump were asked for. As a
// file:
//
//	8 bytes   "CRACWS" 0x00 0x01
//	records   until the end of the file, each of three varints (encoding/binary):
//	            the process, as numbered in the dump; 0: the same as before
//	            the first page less the end of the run before; signed (zig-zag)
//	            the number of pages
//
// Pages count from address zero, in units of the page size, and stand where they
// were at the time of the dump.
type workingSet []pageRun

// A pageRun is pages that follow each other. page and pages are in pages.
type pageRun struct {
	pid         int
	page, pages uint64
}

const workingSetMagic = "CRACWS\x00\x01"

// What is read or recorded is bounded: MaxWorkingSet in bytes, maxRuns in records.
const (
	MaxWorkingSet = 4 << 20
	maxRuns       = 1 << 17
)

// errWorkingSet is a file that is no working set.
var errWorkingSet = errors.New("not a valid working set")

// add appends a page, joined to the last run if it follows it.
func (w *workingSet) add(pid int, page uint64) {
	if n := len(*w); n > 0 {
		last := &(*w)[n-1]
		if last.pid == pid && last.page+last.pages == page {
			last.pages++
			return
		}
	}
	if len(*w) < maxRuns {
		*w = append(*w, pageRun{pid: pid, page: page, pages: 1})
	}
}

// readWorkingSet reads the format above.
func readWorkingSet(r io.Reader) (workingSet, error) {
	in := bufio.NewReader(r)
	magic := make([]byte, len(workingSetMagic))
	if _, err := io.ReadFull(in, magic); err != nil || string(magic) != workingSetMagic {
		return nil, fmt.Errorf("%w: wrong marks at the start", errWorkingSet)
	}
	var w workingSet
	var last pageRun
	for {
		pid, err := binary.ReadUvarint(in)
		if errors.Is(err, io.EOF) {
			return w, nil
		}
		if err == nil && pid > math.MaxInt32 {
			err = fmt.Errorf("process %d", pid)
		}
		var skip int64
		if err == nil {
			skip, err = binary.ReadVarint(in)
		}
		var pages uint64
		if err == nil {
			pages, err = binary.ReadUvarint(in)
		}
		run := pageRun{pid: int(pid), page: last.page + last.pages + uint64(skip), pages: pages}
		if run.pid == 0 {
			run.pid = last.pid
		}
		limit := math.MaxInt64 / pageSize
		if err == nil && (run.pid == 0 || pages == 0 || run.page > limit || pages > limit-run.page) {
			err = fmt.Errorf("record %d", len(w))
		}
		if err == nil && len(w) == maxRuns {
			err = fmt.Errorf("more than %d records", maxRuns)
		}
		if err != nil {
			return nil, fmt.Errorf("%w: %w", errWorkingSet, err)
		}
		w = append(w, run)
		last = run
	}
}

// write writes the format above.
func (w workingSet) write(out io.Writer) error {
	data := []byte(workingSetMagic)
	var last pageRun
	for _, run := range w {
		pid := uint64(run.pid)
		if run.pid == last.pid {
			pid = 0
		}
		data = binary.AppendUvarint(data, pid)
		data = binary.AppendVarint(data, int64(run.page-last.page-last.pages))
		data = binary.AppendUvarint(data, run.pages)
		last = run
	}
	_, err := out.Write(data)
	return err
}

// CheckWorkingSet tells how many pages a working set names, and what is wrong with
// it if it is none.
func CheckWorkingSet(data []byte) (pages uint64, err error) {
	w, err := readWorkingSet(bytes.NewReader(data))
	for _, run := range w {
		pages += run.pages
	}
	return pages, err
}

func loadWorkingSet(path string) (workingSet, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > MaxWorkingSet {
		return nil, fmt.Errorf("%s: %w: not a file of at most %d bytes", path, errWorkingSet, MaxWorkingSet)
	}
	w, err := readWorkingSet(io.LimitReader(f, MaxWorkingSet))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return w, nil
}

// save writes a file that is whole or not there.
func (w workingSet) save(path string) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	if err := w.write(f); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
