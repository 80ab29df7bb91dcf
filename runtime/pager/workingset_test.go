package pager

import (
	"bytes"
	"errors"
	"slices"
	"testing"
)

func TestWorkingSet(t *testing.T) {
	var w workingSet
	for _, p := range []uint64{100, 101, 102, 50, 1 << 30, 51} {
		w.add(3, p)
	}
	w.add(9, 52)
	want := workingSet{{3, 100, 3}, {3, 50, 1}, {3, 1 << 30, 1}, {3, 51, 1}, {9, 52, 1}}
	if !slices.Equal(w, want) {
		t.Errorf("%v instead of %v", w, want)
	}
	var file bytes.Buffer
	if err := w.write(&file); err != nil {
		t.Fatal(err)
	}
	got, err := readWorkingSet(&file)
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v (%v) instead of %v", got, err, want)
	}
}

func TestWorkingSetInvalid(t *testing.T) {
	for name, data := range map[string]string{
		"empty":             "",
		"other marks":       "CRACWS\x00\x02",
		"no process":        workingSetMagic + "\x00\x02\x01",
		"no pages":          workingSetMagic + "\x01\x02\x00",
		"before the start":  workingSetMagic + "\x01\x01\x01",
		"beyond the end":    workingSetMagic + "\x01\x02\xff\xff\xff\xff\xff\xff\xff\x7f",
		"cut off":           workingSetMagic + "\x01\x02",
		"too long a varint": workingSetMagic + "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
	} {
		if w, err := readWorkingSet(bytes.NewReader([]byte(data))); !errors.Is(err, errWorkingSet) {
			t.Errorf("%s: %v %v", name, w, err)
		}
	}
}

func FuzzWorkingSet(f *testing.F) {
	f.Add([]byte(workingSetMagic + "\x01\x02\x03\x00\x05\x01"))
	f.Fuzz(func(t *testing.T, data []byte) {
		w, err := readWorkingSet(bytes.NewReader(data))
		if err != nil {
			return
		}
		l := newLayout(testTask([]area{pages(0, 64)}, [2]uint64{1, 60}))
		for _, run := range w {
			// A run may be anything; it is gone through in bounded time.
			s := &space{layout: l}
			for next := s.claimRun(run); ; {
				if _, ok := next(pageSize); !ok {
					break
				}
			}
		}
		var again bytes.Buffer
		if err := w.write(&again); err != nil {
			t.Fatal(err)
		}
		if w2, err := readWorkingSet(&again); err != nil || !slices.Equal(w, w2) {
			t.Fatalf("%v became %v (%v)", w, w2, err)
		}
	})
}
