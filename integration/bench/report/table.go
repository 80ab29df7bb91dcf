package report

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode/utf8"
)

// Peer is the contender whose medians the tables' ratios are to.
const Peer = "containerd-runc"

// width is what a line of a table may have.
const width = 120

// Print writes the results as tables that a person reads: for each workload and group of metrics,
// which is what a metric's name has before its last dot, a line for each contender.
func Print(out io.Writer, results []Result) error {
	var b strings.Builder
	for _, workload := range names(results, func(r Result) string { return r.Workload }) {
		ofWorkload := filter(results, func(r Result) bool { return r.Workload == workload && r.N > 0 })
		for _, group := range names(ofWorkload, func(r Result) string { return groupOf(r.Metric) }) {
			ofGroup := filter(ofWorkload, func(r Result) bool { return groupOf(r.Metric) == group })
			metrics := names(ofGroup, func(r Result) string { return r.Metric })
			for len(metrics) > 0 {
				// As many metrics side by side as there is room for.
				n := len(metrics)
				text, wide := table(workload, group, metrics, ofGroup)
				for wide > width && n > 1 {
					n--
					text, wide = table(workload, group, metrics[:n], ofGroup)
				}
				b.WriteString(text)
				metrics = metrics[n:]
			}
		}
	}
	if b.Len() > 0 {
		fmt.Fprintf(&b, "\nmedian (least–most), and the median's ratio to that of %s\n", Peer)
	}
	_, err := io.WriteString(out, b.String())
	return err
}

func groupOf(metric string) string {
	if at := strings.LastIndex(metric, "."); at >= 0 {
		return metric[:at]
	}
	return metric
}

// table returns a table and its width.
func table(workload, group string, metrics []string, results []Result) (text string, wide int) {
	rows := [][]string{{workload + " " + group}}
	for _, m := range metrics {
		unit := ""
		for _, r := range results {
			if r.Metric == m {
				unit = r.Unit
			}
		}
		rows[0] = append(rows[0], strings.TrimPrefix(m, group+".")+", "+unit)
	}
	for _, contender := range names(results, func(r Result) string { return r.Contender }) {
		row := []string{"  " + contender}
		for _, m := range metrics {
			row = append(row, cell(results, contender, m))
		}
		if strings.Join(row[1:], "") != "" {
			rows = append(rows, row)
		}
	}
	widths := make([]int, len(metrics)+1)
	for _, row := range rows {
		for i, c := range row {
			widths[i] = max(widths[i], utf8.RuneCountInString(c))
		}
	}
	var b strings.Builder
	b.WriteString("\n")
	for _, row := range rows {
		line := ""
		for i, c := range row {
			line += c + strings.Repeat(" ", widths[i]-utf8.RuneCountInString(c)+2)
		}
		line = strings.TrimRight(line, " ")
		wide = max(wide, utf8.RuneCountInString(line))
		b.WriteString(line + "\n")
	}
	return b.String(), wide
}

func cell(results []Result, contender, metric string) string {
	r, ok := find(results, Key{Contender: contender, Metric: metric})
	if !ok {
		return ""
	}
	text := fmt.Sprintf("%s (%s–%s)", number(r.Median), number(r.Min), number(r.Max))
	if peer, ok := find(results, Key{Contender: Peer, Metric: metric}); ok && contender != Peer && peer.Median > 0 {
		text += fmt.Sprintf(" %.2fx", r.Median/peer.Median)
	}
	if !r.OK {
		text += " WRONG"
	}
	return text
}

// number keeps three digits or so.
func number(v float64) string {
	switch {
	case v < 10:
		return fmt.Sprintf("%.2f", v)
	case v < 100:
		return fmt.Sprintf("%.1f", v)
	default:
		return fmt.Sprintf("%.0f", v)
	}
}

// find returns the result with this contender and metric, and workload, if that is not empty.
func find(results []Result, k Key) (Result, bool) {
	i := slices.IndexFunc(results, func(r Result) bool {
		return r.Contender == k.Contender && r.Metric == k.Metric && (k.Workload == "" || r.Workload == k.Workload)
	})
	if i < 0 {
		return Result{}, false
	}
	return results[i], true
}

func filter(results []Result, keep func(Result) bool) (some []Result) {
	for _, r := range results {
		if keep(r) {
			some = append(some, r)
		}
	}
	return some
}

// names returns what of says of the results, each once, in the order in which it first comes.
func names(results []Result, of func(Result) string) (all []string) {
	for _, r := range results {
		if n := of(r); !slices.Contains(all, n) {
			all = append(all, n)
		}
	}
	return all
}
