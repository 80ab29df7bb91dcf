package report

import (
	"bytes"
	"fmt"
	"slices"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// panels are the metrics that are drawn side by side, over the size of the workload's memory.
var panels = []struct{ metric, title string }{
	{"restore.answer", "Restore until the first correct answer"},
	{"restore.memory", "Restore until all memory is there"},
}

// Plot draws, for every contender, how the time of a restore grows with memory: medians, with bars
// from the least to the most. sizes says how many MiB a workload holds; others are left out. Both
// axes are logarithmic. It writes nothing when there is nothing to draw.
func Plot(file string, results []Result, sizes map[string]int) error {
	drawn := filter(results, func(r Result) bool { return r.OK && r.Median > 0 && r.Min > 0 && sizes[r.Workload] > 0 })
	contenders := names(drawn, func(r Result) string { return r.Contender })
	row := make([]*plot.Plot, len(panels))
	empty := true
	for i, panel := range panels {
		p := plot.New()
		p.Title.Text = panel.title
		p.X.Label.Text, p.Y.Label.Text = "memory, MiB", "milliseconds"
		p.X.Scale, p.Y.Scale = plot.LogScale{}, plot.LogScale{}
		p.X.Tick.Marker, p.Y.Tick.Marker = plot.LogTicks{Prec: -1}, plot.LogTicks{Prec: -1}
		p.Add(plotter.NewGrid())
		p.Legend.Top, p.Legend.Left = true, true
		for k, c := range contenders {
			l := lineOf(drawn, c, panel.metric, sizes)
			if len(l.XYs) == 0 {
				continue
			}
			empty = false
			if err := l.add(p, c, k); err != nil {
				return fmt.Errorf("draw %s of %s: %w", panel.metric, c, err)
			}
		}
		row[i] = p
	}
	if empty {
		return nil
	}
	canvas := vgsvg.New(30*vg.Centimeter, 14*vg.Centimeter)
	tiles := draw.Tiles{Rows: 1, Cols: len(panels), PadX: vg.Centimeter, PadTop: vg.Millimeter, PadBottom: vg.Millimeter, PadLeft: vg.Millimeter, PadRight: vg.Centimeter}
	for i, c := range plot.Align([][]*plot.Plot{row}, tiles, draw.New(canvas))[0] {
		row[i].Draw(c)
	}
	var svg bytes.Buffer
	if _, err := canvas.WriteTo(&svg); err != nil {
		return err
	}
	return write(file, svg.Bytes())
}

// line is a contender's line of a panel.
type line struct {
	plotter.XYs
	plotter.YErrors
}

func lineOf(results []Result, contender, metric string, sizes map[string]int) (l line) {
	some := filter(results, func(r Result) bool { return r.Contender == contender && r.Metric == metric })
	slices.SortFunc(some, func(x, y Result) int { return sizes[x.Workload] - sizes[y.Workload] })
	for _, r := range some {
		l.XYs = append(l.XYs, plotter.XY{X: float64(sizes[r.Workload]), Y: r.Median})
		l.YErrors = append(l.YErrors, struct{ Low, High float64 }{r.Median - r.Min, r.Max - r.Median})
	}
	return l
}

func (l line) add(p *plot.Plot, name string, number int) error {
	lines, points, err := plotter.NewLinePoints(l.XYs)
	if err != nil {
		return err
	}
	bars, err := plotter.NewYErrorBars(l)
	if err != nil {
		return err
	}
	lines.Color, points.Color, bars.Color = plotutil.Color(number), plotutil.Color(number), plotutil.Color(number)
	points.Shape = plotutil.Shape(number)
	p.Add(lines, points, bars)
	p.Legend.Add(name, lines, points)
	return nil
}
