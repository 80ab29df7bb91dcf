package main

import (
	"slices"
	"strings"
	"testing"
)

// scattered are forty values around a middle.
func scattered(middle, width float64) []float64 {
	var v []float64
	for i := range 40 {
		v = append(v, middle+width*(float64(i)-19.5)/20)
	}
	return v
}

// A ratio above 1 is an error when both medians are known well enough.
func TestVerdict(t *testing.T) {
	for name, c := range map[string]struct {
		crac, runc []float64
		aim, worse bool
	}{
		"faster":             {scattered(50, 10), scattered(90, 10), true, false},
		"slower":             {scattered(90, 10), scattered(50, 10), true, true},
		"a little slower":    {scattered(51, 10), scattered(50, 10), true, false},
		"slower, no aim":     {scattered(90, 10), scattered(50, 10), false, true},
		"five, all larger":   {[]float64{11, 12, 13, 14, 15}, []float64{6, 7, 8, 9, 10}, true, true},
		"five, one as large": {[]float64{10, 12, 13, 14, 15}, []float64{6, 7, 8, 9, 10}, true, false},
	} {
		l := compare("thing", "ms", c.aim, slices.Clone(c.crac), slices.Clone(c.runc), slices.Clone(c.runc))
		if l.worse() != c.worse {
			t.Errorf("%s: worse is %v: %+v", name, l.worse(), l)
		}
		err := verdict([]line{l})
		if (err != nil) != (c.worse && c.aim) || err != nil && !strings.Contains(err.Error(), "thing: ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
