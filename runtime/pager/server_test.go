package pager

import "testing"

// Everything that a restored process reads is what was dumped, however it comes.
func TestServe(t *testing.T) {
	w := newWorkload(t, "map 1 8192", "fill 1 0 8192", "map 2 100", "fill 2 50 10")
	s := w.restore(w.dump("dump"), nil)
	w.run("check 1 0 8192")
	w.run("check 2 50 10")
	w.run("zero 2 0 50")
	w.run("zero 2 60 40")
	drained(t, s)
	w.run("check 1 0 8192")
	w.run("check 2 50 10")
	t.Logf("%+v", s.Stats())
}
