package report

import (
	"fmt"
	"io"
	"strings"
)

// Aim is a promise about the ratio of two medians of one run.
type Aim struct {
	Name string
	// Ours is divided by Theirs, or by their sum.
	Ours   Key
	Theirs []Key
	// AtMost is what the ratio may be. With AtLeast set it is Theirs that is divided by Ours, and
	// the ratio must not be less than that.
	AtMost, AtLeast float64
}

// Outcome is what became of an aim.
type Outcome struct {
	Aim
	Ratio    float64
	Measured bool // false: the run did not have what it takes, or it was wrong
}

// Met tells whether the aim was reached.
func (o Outcome) Met() bool {
	if o.AtLeast > 0 {
		return o.Measured && o.Ratio >= o.AtLeast
	}
	return o.Measured && o.Ratio <= o.AtMost
}

// Evaluate looks at what a run says of every aim.
func Evaluate(aims []Aim, results []Result) (outcomes []Outcome) {
	for _, a := range aims {
		o := Outcome{Aim: a}
		ours, ok := right(results, a.Ours)
		theirs := 0.0
		for _, k := range a.Theirs {
			v, there := right(results, k)
			theirs, ok = theirs+v, ok && there
		}
		if ok && ours > 0 && theirs > 0 {
			o.Measured, o.Ratio = true, ours/theirs
			if a.AtLeast > 0 {
				o.Ratio = theirs / ours
			}
		}
		outcomes = append(outcomes, o)
	}
	return outcomes
}

func right(results []Result, k Key) (median float64, ok bool) {
	r, ok := find(results, k)
	return r.Median, ok && r.OK
}

// PrintAims writes what became of the aims. It leaves out those that the run did not measure.
func PrintAims(out io.Writer, outcomes []Outcome) error {
	var b strings.Builder
	unmeasured := 0
	for _, o := range outcomes {
		if !o.Measured {
			unmeasured++
			continue
		}
		verdict := "MISSED"
		if o.Met() {
			verdict = "met"
		}
		demand := fmt.Sprintf("≤ %.3g", o.AtMost)
		if o.AtLeast > 0 {
			demand = fmt.Sprintf("≥ %.3g", o.AtLeast)
		}
		fmt.Fprintf(&b, "  %-72s %8s %8.3g  %s\n", o.Name, demand, o.Ratio, verdict)
	}
	text := b.String()
	if text != "" {
		text = fmt.Sprintf("\n%-74s %8s %8s\n", "Aims, as ratios of medians", "aim", "reached") + text
		if unmeasured > 0 {
			text += fmt.Sprintf("  and %d that this run did not measure\n", unmeasured)
		}
	}
	_, err := io.WriteString(out, text)
	return err
}

const ours = "crac"

// Aims are what this project promises of speed.
func Aims() (aims []Aim) {
	add := func(name string, ours Key, atMost float64, theirs ...Key) {
		aims = append(aims, Aim{Name: name, Ours: ours, Theirs: theirs, AtMost: atMost})
	}
	peer := func(workload, metric string) Key { return Key{workload, Peer, metric} }
	our := func(workload, metric string) Key { return Key{workload, ours, metric} }

	add("1 GB: running, to "+Peer, our("mem-1g", "restore.running"), 1.0/12, peer("mem-1g", "restore.running"))
	add("1 GB: first answer, to "+Peer, our("mem-1g", "restore.answer"), 1.0/8, peer("mem-1g", "restore.answer"))
	add("1 GB: all memory, to "+Peer, our("mem-1g", "restore.memory"), 1.0/4, peer("mem-1g", "restore.memory"))
	add("1 GB: all memory, to a plain copy and the restore of 10 MB", our("mem-1g", "restore.memory"), 1.25,
		Key{"mem-1g", "copy", "restore.memory"}, our("mem-10m", "restore.running"))
	add("2 GB: running, to that of 100 MB", our("mem-2g", "restore.running"), 1.2, our("mem-100m", "restore.running"))
	add("10 MB: first answer, to "+Peer, our("mem-10m", "restore.answer"), 0.5, peer("mem-10m", "restore.answer"))
	add("10 MB: first answer, to bare runc", our("mem-10m", "restore.answer"), 1, Key{"mem-10m", "runc", "restore.answer"})
	// To a cold start under containerd's own shim: ours does not count against itself.
	for _, c := range []struct {
		name, contender string
		atLeast         float64
	}{{"a cold start", Peer, 25}, {"one with a CDS archive", "cds", 10}, {"one with an AOT cache", "aot", 10}} {
		aims = append(aims, Aim{
			Name: "Tomcat: first answer after a restore, times sooner than after " + c.name,
			Ours: our("tomcat", "restore.answer"), Theirs: []Key{{"tomcat", c.contender, "cold.answer"}}, AtLeast: c.atLeast,
		})
	}
	add("16 clones of 100 MB: all answer, to bare runc", our("mem-100m", "clones.16.answer"), 0.5, Key{"mem-100m", "runc", "clones.16.answer"})
	add("16 clones of 100 MB: memory, to 16 cold ones", our("mem-100m", "clones.16.pss"), 1, our("mem-100m", "colds.16.pss"))
	for _, w := range []string{"mem-10m", "mem-100m", "mem-500m", "mem-1g", "mem-2g"} {
		add(strings.TrimPrefix(w, "mem-")+": time frozen by a checkpoint, to bare criu", our(w, "checkpoint.frozen"), 1.2, Key{w, "criu", "checkpoint.frozen"})
	}
	add("cold start to first answer, to "+Peer, our("hello", "cold.answer"), 0.75, peer("hello", "cold.answer"))
	add("delete, to "+Peer, our("hello", "cold.delete"), 0.75, peer("hello", "cold.delete"))
	add("20 cold starts at once, to "+Peer, our("hello", "colds.20.answer"), 0.75, peer("hello", "colds.20.answer"))
	return aims
}
