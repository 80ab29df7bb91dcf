package pager

import (
	"math/bits"
	"slices"
	"sort"
)

// A piece is a range of a process's memory that was at the address img when it
// was dumped. A piece that is empty has lost its contents since: the process gave
// them up, and finds zeroes.
type piece struct {
	start, end uint64
	img        uint64
	empty      bool
}

func (p piece) cut(start, end uint64) piece {
	start, end = max(start, p.start), min(end, p.end)
	return piece{start: start, end: end, img: p.img + start - p.start, empty: p.empty}
}

// layout says where a process's lazy memory is now, and which of its pages have
// come. It is a value without a lock; addresses are multiples of the page size.
type layout struct {
	task   *task
	pieces []piece  // sorted by address, without overlap
	moved  bool     // some are not where they were at the time of the dump
	done   []uint64 // one bit for each page of the task, if it is there or claimed
}

func newLayout(t *task) *layout {
	l := &layout{task: t, done: make([]uint64, (t.pages+63)/64)}
	for _, a := range t.areas {
		l.pieces = append(l.pieces, piece{start: a.start, end: a.end, img: a.start, empty: a.wiped()})
	}
	return l
}

// clone is the layout of a child at its fork.
func (l *layout) clone() *layout {
	return &layout{task: l.task, pieces: slices.Clone(l.pieces), moved: l.moved, done: slices.Clone(l.done)}
}

// at gives the index of the first piece that ends after addr.
func (l *layout) at(addr uint64) int {
	return sort.Search(len(l.pieces), func(i int) bool { return l.pieces[i].end > addr })
}

// find gives the piece that has addr.
func (l *layout) find(addr uint64) (piece, bool) {
	i := l.at(addr)
	if i == len(l.pieces) || l.pieces[i].start > addr {
		return piece{}, false
	}
	return l.pieces[i], true
}

// take removes [start, end) and gives what was there.
func (l *layout) take(start, end uint64) []piece {
	var taken, kept []piece
	i := l.at(start)
	j := i
	for ; j < len(l.pieces) && l.pieces[j].start < end; j++ {
		p := l.pieces[j]
		if p.start < start {
			kept = append(kept, p.cut(p.start, start))
		}
		taken = append(taken, p.cut(start, end))
		if p.end > end {
			kept = append(kept, p.cut(end, p.end))
		}
	}
	l.pieces = slices.Replace(l.pieces, i, j, kept...)
	return taken
}

// put adds pieces, sorted, where there are none.
func (l *layout) put(pieces []piece) {
	if len(pieces) == 0 {
		return
	}
	i := l.at(pieces[0].start)
	l.pieces = slices.Insert(l.pieces, i, pieces...)
}

// unmap: there is no memory at [start, end) any more.
func (l *layout) unmap(start, end uint64) { l.take(start, end) }

// remove: the process has given up what was in [start, end).
func (l *layout) remove(start, end uint64) {
	taken := l.take(start, end)
	for i := range taken {
		taken[i].empty = true
	}
	l.put(taken)
}

// remap: what was at from is now at to. What was there is unmapped, as with
// MREMAP_FIXED.
func (l *layout) remap(from, to, length uint64) {
	taken := l.take(from, from+length)
	l.take(to, to+length)
	l.moved = true
	for i := range taken {
		taken[i].start += to - from
		taken[i].end += to - from
	}
	l.put(taken)
}

// A batch is pages that lie together in the process now, at the time of the dump
// and in the file of pages.
type batch struct {
	addr  uint64
	data  []byte
	first int // number of the first page
}

func (b batch) pages() int { return len(b.data) / int(pageSize) }

// from is the batch without its first n bytes.
func (b batch) from(n uint64) batch {
	return batch{addr: b.addr + n, data: b.data[n:], first: b.first + int(n/pageSize)}
}

func (b batch) end() uint64 { return b.addr + uint64(len(b.data)) }

// extentAt gives the index of the first extent that ends after an address at the
// time of the dump.
func (t *task) extentAt(img uint64) int {
	return sort.Search(len(t.extents), func(i int) bool { return t.extents[i].end() > img })
}

// next gives the first pages at or after addr that have not come, at most limit
// bytes of them; and marks them.
func (l *layout) next(addr, limit uint64) (batch, bool) {
	for i := l.at(addr); i < len(l.pieces); i++ {
		p := l.pieces[i]
		if b, ok := l.inside(p.cut(addr, p.end), limit); ok {
			return b, true
		}
	}
	return batch{}, false
}

// inside does the same for one piece.
func (l *layout) inside(p piece, limit uint64) (batch, bool) {
	if p.empty {
		return batch{}, false
	}
	imgEnd := p.img + p.end - p.start
	for i := l.task.extentAt(p.img); i < len(l.task.extents) && l.task.extents[i].addr < imgEnd; i++ {
		e := l.task.extents[i]
		from, to := max(e.addr, p.img), min(e.end(), imgEnd)
		first := e.first + int((from-e.addr)/pageSize)
		last := e.first + int((to-e.addr)/pageSize)
		n := l.firstMissing(first, last)
		if n == last {
			continue
		}
		stop := min(last, n+int(limit/pageSize))
		end := n + 1
		for end < stop && !l.has(end) {
			end++
		}
		l.mark(n, end, true)
		offset := uint64(n-e.first) * pageSize
		length := uint64(end-n) * pageSize
		return batch{addr: p.start + e.addr + offset - p.img, data: e.data[offset : offset+length], first: n}, true
	}
	return batch{}, false
}

// page gives the one page with contents at addr, whether it has come or not, and
// where it was at the time of the dump. There is none where the process finds
// zeroes: because there was nothing at the time of the dump, or because the
// process has given it up.
func (l *layout) page(addr uint64) (b batch, img uint64, ok bool) {
	p, ok := l.find(addr)
	if !ok || p.empty {
		return batch{}, 0, false
	}
	img = p.img + addr - p.start
	i := l.task.extentAt(img)
	if i == len(l.task.extents) || l.task.extents[i].addr > img {
		return batch{}, 0, false
	}
	e := l.task.extents[i]
	offset := img - e.addr
	return batch{addr: addr, data: e.data[offset : offset+pageSize], first: e.first + int(offset/pageSize)}, img, true
}

// around gives the missing pages with contents in [start, end) around addr, and
// marks them: those from addr on first.
func (l *layout) around(addr, start, end uint64) []batch {
	p, ok := l.find(addr)
	if !ok {
		return nil
	}
	var batches []batch
	for _, part := range []piece{p.cut(addr, end), p.cut(start, addr)} {
		for part.start < part.end {
			b, ok := l.inside(part, part.end-part.start)
			if !ok {
				break
			}
			batches = append(batches, b)
			part = part.cut(b.end(), part.end)
		}
	}
	return batches
}

// hole gives the range without contents that has addr, at most up to the ends
// given.
func (l *layout) hole(addr, start, end uint64) (from, to uint64) {
	p, ok := l.find(addr)
	if !ok {
		return addr, addr + pageSize
	}
	p = p.cut(start, end)
	if p.empty {
		return p.start, p.end
	}
	img := p.img + addr - p.start
	i := l.task.extentAt(img)
	if i < len(l.task.extents) {
		if e := l.task.extents[i]; e.addr < p.img+p.end-p.start {
			p = p.cut(p.start, p.start+e.addr-p.img)
		}
	}
	if i > 0 {
		if e := l.task.extents[i-1]; e.end() > p.img {
			p = p.cut(p.start+e.end()-p.img, p.end)
		}
	}
	return p.start, p.end
}

// current gives where a page of the dump is now.
func (l *layout) current(img uint64) (piece, bool) {
	if p, ok := l.find(img); ok && p.img == p.start {
		return p.cut(img, p.end), true
	}
	if !l.moved {
		return piece{}, false
	}
	for _, p := range l.pieces {
		if p.img <= img && img-p.img < p.end-p.start {
			return p.cut(p.start+img-p.img, p.end), true
		}
	}
	return piece{}, false
}

// lacks tells whether pages are still to come.
func (l *layout) lacks() bool {
	b, ok := l.next(0, pageSize)
	l.mark(b.first, b.first+b.pages(), false)
	return ok
}

func (l *layout) has(page int) bool { return l.done[page/64]&(1<<(page%64)) != 0 }

func (l *layout) mark(first, last int, done bool) {
	for page := first; page < last; page++ {
		if done {
			l.done[page/64] |= 1 << (page % 64)
		} else {
			l.done[page/64] &^= 1 << (page % 64)
		}
	}
}

// firstMissing gives the first page in [first, last) that has not come, or last.
func (l *layout) firstMissing(first, last int) int {
	for page := first; page < last; {
		word := ^l.done[page/64] >> (page % 64)
		if word != 0 {
			return min(last, page+bits.TrailingZeros64(word))
		}
		page += 64 - page%64
	}
	return last
}
