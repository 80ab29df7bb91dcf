package report

import (
	"strings"
	"testing"
)

func TestEvaluate(t *testing.T) {
	results := []Result{
		{Workload: "w", Contender: "ours", Metric: "m", N: 1, Median: 20, OK: true},
		{Workload: "w", Contender: "a", Metric: "m", N: 1, Median: 30, OK: true},
		{Workload: "w", Contender: "b", Metric: "m", N: 1, Median: 10, OK: true},
		{Workload: "w", Contender: "wrong", Metric: "m", N: 1, Median: 10, OK: false},
	}
	key := func(contender string) Key { return Key{"w", contender, "m"} }
	for _, c := range []struct {
		name     string
		aim      Aim
		ratio    float64
		measured bool
		met      bool
	}{
		{"at most, met", Aim{Ours: key("ours"), Theirs: []Key{key("a")}, AtMost: 0.7}, 20.0 / 30, true, true},
		{"at most, exactly", Aim{Ours: key("ours"), Theirs: []Key{key("b")}, AtMost: 2}, 2, true, true},
		{"at most, missed", Aim{Ours: key("ours"), Theirs: []Key{key("b")}, AtMost: 1.9}, 2, true, false},
		{"a sum", Aim{Ours: key("ours"), Theirs: []Key{key("a"), key("b")}, AtMost: 0.5}, 0.5, true, true},
		{"at least, met", Aim{Ours: key("b"), Theirs: []Key{key("a")}, AtLeast: 3}, 3, true, true},
		{"at least, missed", Aim{Ours: key("ours"), Theirs: []Key{key("a")}, AtLeast: 3}, 1.5, true, false},
		{"not there", Aim{Ours: key("ours"), Theirs: []Key{key("c")}, AtMost: 9}, 0, false, false},
		{"half of the sum not there", Aim{Ours: key("ours"), Theirs: []Key{key("c"), key("a")}, AtMost: 9}, 0, false, false},
		{"wrong", Aim{Ours: key("ours"), Theirs: []Key{key("wrong")}, AtMost: 9}, 0, false, false},
	} {
		o := Evaluate([]Aim{c.aim}, results)[0]
		if o.Ratio != c.ratio || o.Measured != c.measured || o.Met() != c.met {
			t.Errorf("%s: %+v, met %v", c.name, o, o.Met())
		}
	}
}

func TestPrintAims(t *testing.T) {
	var b strings.Builder
	err := PrintAims(&b, []Outcome{
		{Aim{Name: "fast", AtMost: 1.0 / 12}, 0.05, true},
		{Aim{Name: "faster", AtLeast: 25}, 7.5, true},
		{Aim{Name: "unknown", AtLeast: 25}, 0, false},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"≤ 0.0833     0.05  met\n", "≥ 25      7.5  MISSED\n", "1 that this run did not measure"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("no %q in\n%s", want, b.String())
		}
	}
	if strings.Contains(b.String(), "unknown") {
		t.Errorf("an aim that was not measured is shown:\n%s", b.String())
	}
	b.Reset()
	if err := PrintAims(&b, Evaluate(Aims(), nil)); err != nil || b.Len() > 0 {
		t.Errorf("of no results: %q, %v", b.String(), err)
	}
}

// What an aim names has to be what a run can measure.
func TestAims(t *testing.T) {
	seen := map[string]bool{}
	for _, a := range Aims() {
		if seen[a.Name] || (a.AtMost > 0) == (a.AtLeast > 0) || len(a.Theirs) == 0 {
			t.Errorf("%+v", a)
		}
		seen[a.Name] = true
	}
}
