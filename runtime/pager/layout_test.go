package pager

import (
	"math/rand/v2"
	"slices"
	"testing"
)

// A task of areas and contents as in a dump: a page's contents begin with its
// number.
func testTask(areas []area, extents ...[2]uint64) *task {
	t := &task{pid: 7, areas: areas}
	for _, e := range extents {
		data := make([]byte, e[1]*pageSize)
		for i := range e[1] {
			data[i*pageSize], data[i*pageSize+1] = byte(e[0]+i), byte((e[0]+i)>>8)
		}
		t.add(e[0]*pageSize, data)
	}
	return t
}

func pages(first, n uint64) area { return area{start: first * pageSize, end: (first + n) * pageSize} }

// Whatever happens to an address space, the layout agrees with a plain list of
// what every page holds.
func TestLayoutAgainstModel(t *testing.T) {
	const size = 256
	for seed := range uint64(200) {
		random := rand.New(rand.NewPCG(seed, 1))
		wiped := pages(200, 20)
		wiped.madv = madvWipeOnFork
		task := testTask([]area{pages(10, 90), pages(100, 50), wiped}, [2]uint64{20, 100}, [2]uint64{130, 3}, [2]uint64{205, 5})
		l := newLayout(task)
		// The model: for each page of the address space the page of the dump whose
		// contents it has, 0 for zeroes, -1 for no memory.
		model := make([]int, 2*size)
		for i := range model {
			model[i] = -1
		}
		for _, a := range task.areas {
			for p := a.start / pageSize; p < a.end/pageSize; p++ {
				model[p] = 0
				if !a.wiped() && (p >= 20 && p < 120 || p >= 130 && p < 133) {
					model[p] = int(p)
				}
			}
		}
		for range 30 {
			from, n := random.Uint64N(size), 1+random.Uint64N(40)
			switch random.IntN(4) {
			case 0:
				l.unmap(from*pageSize, (from+n)*pageSize)
				for p := from; p < from+n; p++ {
					model[p] = -1
				}
			case 1:
				l.remove(from*pageSize, (from+n)*pageSize)
				for p := from; p < from+n; p++ {
					model[p] = min(model[p], 0)
				}
			case 2:
				to := size + random.Uint64N(size-50)
				l.remap(from*pageSize, to*pageSize, n*pageSize)
				copy(model[to:to+n], model[from:from+n])
				for p := from; p < from+n; p++ {
					if p < to {
						model[p] = -1
					}
				}
			case 3:
				l = l.clone()
			}
		}
		checkLayout(t, seed, l, model)
	}
}

func checkLayout(t *testing.T, seed uint64, l *layout, model []int) {
	t.Helper()
	if !slices.IsSortedFunc(l.pieces, func(a, b piece) int { return int(a.end) - int(b.start) - 1 }) {
		t.Fatalf("seed %d: not sorted: %v", seed, l.pieces)
	}
	want := 0
	for p, holds := range model {
		addr := uint64(p) * pageSize
		b, _, ok := l.page(addr)
		if got := number(b); ok != (holds > 0) || ok && got != holds {
			t.Fatalf("seed %d: page %d has %d (%v) instead of %d", seed, p, got, ok, holds)
		}
		if _, ok := l.find(addr); ok != (holds >= 0) {
			t.Fatalf("seed %d: page %d: memory %v instead of %d", seed, p, ok, holds)
		}
		if holds == 0 {
			from, to := l.hole(addr, 0, 1<<40)
			if from > addr || to <= addr {
				t.Fatalf("seed %d: the hole of page %d is %#x-%#x", seed, p, from, to)
			}
			for q := from / pageSize; q < to/pageSize; q++ {
				if model[q] != 0 {
					t.Fatalf("seed %d: the hole of page %d has page %d", seed, p, q)
				}
			}
		}
		if holds > 0 {
			want++
		}
	}
	// The drain finds every page once; twice mapped ones twice.
	got := 0
	for cursor := uint64(0); ; {
		b, ok := l.next(cursor, 7*pageSize)
		if !ok {
			break
		}
		for ; len(b.data) > 0; b = b.from(pageSize) {
			if number(b) != model[b.addr/pageSize] {
				t.Fatalf("seed %d: the drain puts %d where %d is", seed, number(b), model[b.addr/pageSize])
			}
			got++
			cursor = b.addr
		}
	}
	if got != want || l.lacks() {
		t.Fatalf("seed %d: the drain brings %d pages of %d", seed, got, want)
	}
}

func number(b batch) int {
	if len(b.data) == 0 {
		return 0
	}
	return int(b.data[0]) | int(b.data[1])<<8
}

// A fault brings its neighbours, in its own area, and no page twice.
func TestAround(t *testing.T) {
	l := newLayout(testTask([]area{pages(0, 12), pages(12, 20)}, [2]uint64{4, 20}))
	var got []int
	collect := func(batches []batch) {
		for _, b := range batches {
			for ; len(b.data) > 0; b = b.from(pageSize) {
				got = append(got, number(b))
			}
		}
	}
	collect(l.around(6*pageSize, 0, 16*pageSize))
	if want := []int{6, 7, 8, 9, 10, 11, 4, 5}; !slices.Equal(got, want) {
		t.Errorf("%v instead of %v", got, want)
	}
	got = nil
	collect(l.around(6*pageSize, 0, 16*pageSize))
	collect(l.around(15*pageSize, 0, 16*pageSize))
	if want := []int{15, 12, 13, 14}; !slices.Equal(got, want) {
		t.Errorf("%v instead of %v", got, want)
	}
}

// A run of the working set comes in order, wherever its pages are now.
func TestClaimRun(t *testing.T) {
	s := &space{layout: newLayout(testTask([]area{pages(0, 64)}, [2]uint64{1, 60}))}
	s.layout.remap(16*pageSize, 100*pageSize, 8*pageSize)
	s.layout.remove(24*pageSize, 26*pageSize)
	next := s.claimRun(pageRun{pid: 7, page: 17, pages: 20})
	var got []int
	for {
		b, ok := next(5 * pageSize)
		if !ok {
			break
		}
		for ; len(b.data) > 0; b = b.from(pageSize) {
			got = append(got, number(b))
		}
	}
	var want []int
	for p := 16; p < 48; p++ {
		if p != 24 && p != 25 {
			want = append(want, p)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("%v instead of %v", got, want)
	}
}
