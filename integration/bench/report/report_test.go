package report

import (
	"encoding/json"
	"encoding/xml"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestDescribe(t *testing.T) {
	for _, c := range []struct {
		values                  []float64
		median, lowest, highest float64
	}{
		{nil, 0, 0, 0},
		{[]float64{7}, 7, 7, 7},
		{[]float64{3, 1}, 2, 1, 3},
		{[]float64{9, 1, 2}, 2, 1, 9},
		{[]float64{4, 1, 3, 2}, 2.5, 1, 4},
	} {
		given := append([]float64{}, c.values...)
		median, lowest, highest := describe(c.values)
		if median != c.median || lowest != c.lowest || highest != c.highest {
			t.Errorf("%v: %v (%v–%v), want %v (%v–%v)", c.values, median, lowest, highest, c.median, c.lowest, c.highest)
		}
		if !reflect.DeepEqual(given, append([]float64{}, c.values...)) {
			t.Errorf("describing %v changed it to %v", given, c.values)
		}
	}
}

func TestResults(t *testing.T) {
	s := Samples{Contenders: []string{"ours", "theirs"}}
	// As in a run: they take turns, and who begins changes.
	s.Add(Key{"small", "theirs", "restore.answer"}, "ms", 4)
	s.Add(Key{"small", "ours", "restore.answer"}, "ms", 1)
	s.Add(Key{"small", "ours", "restore.answer"}, "ms", 3)
	s.Wrong(Key{"small", "theirs", "restore.answer"}, "it answers 5")
	s.Wrong(Key{"small", "theirs", "restore.answer"}, "it answers 6")
	s.Wrong(Key{"large", "ours", "prepare"}, "it does not start")
	want := []Result{
		{"small", "ours", "restore.answer", "ms", 2, 2, 1, 3, true, ""},
		{"small", "theirs", "restore.answer", "ms", 1, 4, 4, 4, false, "it answers 5"},
		{"large", "ours", "prepare", "", 0, 0, 0, 0, false, "it does not start"},
	}
	got := s.Results()
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	wrong := strings.Join(Wrong(got), "\n")
	if wrong != "small, theirs, restore.answer: it answers 5\nlarge, ours, prepare: it does not start" {
		t.Errorf("wrong are\n%s", wrong)
	}
}

func TestSave(t *testing.T) {
	file := filepath.Join(t.TempDir(), "new", "bench.json")
	for _, results := range [][]Result{nil, {{"mem-1g", "crac", "restore.answer", "ms", 5, 20.5, 19, 30, true, ""}}} {
		if err := Save(file, results); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var got []map[string]any
		if err := json.Unmarshal(data, &got); err != nil || got == nil || len(got) != len(results) {
			t.Fatalf("%s: %v", data, err)
		}
		if len(got) == 1 {
			want := map[string]any{
				"workload": "mem-1g", "contender": "crac", "metric": "restore.answer", "unit": "ms",
				"n": 5.0, "median": 20.5, "min": 19.0, "max": 30.0, "ok": true,
			}
			if !reflect.DeepEqual(got[0], want) {
				t.Errorf("got %v, want %v", got[0], want)
			}
		}
	}
}

func TestPrint(t *testing.T) {
	results := []Result{
		{"mem-1g", "crac", "restore.running", "ms", 5, 15.2, 14.9, 16, true, ""},
		{"mem-1g", "crac", "restore.answer", "ms", 5, 120, 110, 1300, true, ""},
		{"mem-1g", Peer, "restore.running", "ms", 5, 1520, 1490, 1600, true, ""},
		{"mem-1g", Peer, "restore.answer", "ms", 5, 1200, 1100, 1300, false, "a wrong answer"},
		{"mem-1g", "copy", "restore.running", "ms", 5, 0.204, 0.2, 0.3, true, ""},
		{"mem-1g", "podman", "prepare", "", 0, 0, 0, 0, false, "it does not start"},
	}
	var b strings.Builder
	if err := Print(&b, results); err != nil {
		t.Fatal(err)
	}
	want := `
mem-1g restore     running, ms             answer, ms
  crac             15.2 (14.9–16.0) 0.01x  120 (110–1300) 0.10x
  containerd-runc  1520 (1490–1600)        1200 (1100–1300) WRONG
  copy             0.20 (0.20–0.30) 0.00x

median (least–most), and the median's ratio to that of containerd-runc
`
	if b.String() != want {
		t.Errorf("got\n%s\nwant\n%s", b.String(), want)
	}
}

// A terminal of 120 columns is wide enough for what is widest.
func TestTableFits(t *testing.T) {
	var results []Result
	for _, m := range []string{"running", "answer", "memory", "delete", "more"} {
		for _, c := range []string{"containerd-crun", Peer} {
			results = append(results, Result{"mem-100m", c, "clones.16." + m, "MiB", 5, 12345, 10000, 20000, true, ""})
		}
	}
	var b strings.Builder
	if err := Print(&b, results); err != nil {
		t.Fatal(err)
	}
	if strings.Count(b.String(), "containerd-crun") != 2 {
		t.Errorf("five metrics do not take two tables:\n%s", b.String())
	}
	for line := range strings.Lines(b.String()) {
		if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > 120 {
			t.Errorf("%d columns: %s", n, line)
		}
	}
}

func TestPlot(t *testing.T) {
	sizes := map[string]int{"mem-10m": 10, "mem-1g": 1000}
	file := filepath.Join(t.TempDir(), "bench.svg")
	if err := Plot(file, []Result{{"tomcat", "crac", "restore.answer", "ms", 1, 5, 5, 5, true, ""}}, sizes); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(file); !os.IsNotExist(err) {
		t.Errorf("a plot of nothing: %v", err)
	}
	results := []Result{
		{"mem-10m", "crac", "restore.answer", "ms", 2, 50, 40, 60, true, ""},
		{"mem-1g", "crac", "restore.answer", "ms", 2, 55, 55, 55, true, ""},
		{"mem-1g", "copy", "restore.memory", "ms", 2, 200, 190, 300, true, ""},
		{"mem-1g", "broken", "restore.memory", "ms", 2, 1, 1, 1, false, "a wrong answer"},
	}
	if err := Plot(file, results, sizes); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var svg struct {
		XMLName xml.Name `xml:"svg"`
	}
	if err := xml.Unmarshal(data, &svg); err != nil {
		t.Fatalf("the plot is no SVG: %v", err)
	}
	for text, want := range map[string]bool{">crac<": true, ">copy<": true, ">broken<": false, "first correct answer": true} {
		if got := strings.Contains(string(data), text); got != want {
			t.Errorf("the plot says %q: %v", text, got)
		}
	}
}
