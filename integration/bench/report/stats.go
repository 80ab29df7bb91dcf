// Package report describes what a benchmark measured: numbers, whether they hold what is promised,
// and how both are shown. It measures nothing itself.
package report

import (
	"cmp"
	"slices"
	"sync"
)

// Result is all that was measured of one thing. The file of a run is a list of them.
type Result struct {
	Workload  string  `json:"workload"`
	Contender string  `json:"contender"`
	Metric    string  `json:"metric"`
	Unit      string  `json:"unit"`
	N         int     `json:"n"`
	Median    float64 `json:"median"`
	Min       float64 `json:"min"`
	Max       float64 `json:"max"`
	// OK says that every run was correct: the right answer from the right program, all of the
	// memory as it was. Numbers of a wrong result mean nothing.
	OK bool `json:"ok"`
	// Note says why it is not OK, or why there is nothing.
	Note string `json:"note,omitempty"`
}

// Key is what a result is about.
type Key struct{ Workload, Contender, Metric string }

// Samples collects values of a run. It may be used by several goroutines.
type Samples struct {
	// Contenders is the order in which they are shown, whoever came first.
	Contenders []string

	mu     sync.Mutex
	order  []Key
	values map[Key][]float64
	units  map[Key]string
	wrong  map[Key]string
}

// Add notes one value.
func (s *Samples) Add(k Key, unit string, value float64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.know(k)
	s.values[k] = append(s.values[k], value)
	s.units[k] = unit
}

// Wrong notes that a run of something failed or that its answer was wrong. The first reason is kept.
func (s *Samples) Wrong(k Key, reason string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.know(k)
	if s.wrong[k] == "" {
		s.wrong[k] = reason
	}
}

func (s *Samples) know(k Key) {
	if s.values == nil {
		s.values, s.units, s.wrong = map[Key][]float64{}, map[Key]string{}, map[Key]string{}
	}
	if _, known := s.values[k]; !known {
		s.order = append(s.order, k)
		s.values[k] = nil
	}
}

// Results returns what was collected, in the order in which it first came.
func (s *Samples) Results() []Result {
	s.mu.Lock()
	defer s.mu.Unlock()
	all := make([]Result, 0, len(s.order))
	for _, k := range s.order {
		r := Result{
			Workload: k.Workload, Contender: k.Contender, Metric: k.Metric, Unit: s.units[k],
			N: len(s.values[k]), OK: s.wrong[k] == "" && len(s.values[k]) > 0, Note: s.wrong[k],
		}
		r.Median, r.Min, r.Max = describe(s.values[k])
		all = append(all, r)
	}
	workloads := names(all, func(r Result) string { return r.Workload })
	groups := names(all, func(r Result) string { return groupOf(r.Metric) })
	slices.SortStableFunc(all, func(x, y Result) int {
		return cmp.Or(
			slices.Index(workloads, x.Workload)-slices.Index(workloads, y.Workload),
			slices.Index(groups, groupOf(x.Metric))-slices.Index(groups, groupOf(y.Metric)),
			slices.Index(s.Contenders, x.Contender)-slices.Index(s.Contenders, y.Contender),
		)
	})
	return all
}

// describe returns the median of the values, and their spread; zeroes of none.
func describe(values []float64) (median, lowest, highest float64) {
	if len(values) == 0 {
		return 0, 0, 0
	}
	v := slices.Sorted(slices.Values(values))
	mid := len(v) / 2
	median = v[mid]
	if len(v)%2 == 0 {
		median = (v[mid-1] + v[mid]) / 2
	}
	return median, v[0], v[len(v)-1]
}

// Wrong says what is not OK.
func Wrong(results []Result) (lines []string) {
	for _, r := range results {
		if !r.OK {
			lines = append(lines, r.Workload+", "+r.Contender+", "+r.Metric+": "+r.Note)
		}
	}
	return lines
}
