// Command bench measures how this project brings workloads back, beside everything else that does:
// `make bench` runs it. docs/performance.md says what is measured, and how.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/crac-shim/crac/integration/bench/report"
	"github.com/crac-shim/crac/integration/harness"
)

func main() {
	conf, err := parse(os.Args[1:])
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err == nil {
		ctx, stop := interruptible()
		err = run(ctx, conf)
		stop()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// interruptible ends its context at the first Ctrl-C. Cleaning up goes on through a second one: it
// takes seconds, and what it does not remove would stay.
func interruptible() (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(context.Background())
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		for s := range signals {
			fmt.Fprintf(os.Stderr, "bench: %v: cleaning up\n", s)
			cancel(fmt.Errorf("stopped by signal %v", s))
		}
	}()
	return ctx, func() { signal.Stop(signals) }
}

func parse(args []string) (config, error) {
	all := workloads("")
	var names, partNames []string
	for _, w := range all {
		names = append(names, w.name)
	}
	for _, p := range parts {
		partNames = append(partNames, p.name)
	}
	var conf config
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	chosen := f.String("workloads", "", "some of "+strings.Join(names, ","))
	contenders := f.String("contenders", "", "some of those that a run without this names")
	some := f.String("parts", "", "some of "+strings.Join(partNames, ","))
	clones := f.String("clones", "1,4,8,16", "how many clones at once")
	quick := f.Bool("quick", false, "few workloads and runs: minutes, and numbers that say little")
	f.StringVar(&conf.out, "out", "", "where the results go, without .json and .svg (default: bench in the build directory)")
	f.IntVar(&conf.runs, "runs", 5, "restores and cold starts of each contender, after one that does not count")
	f.IntVar(&conf.saves, "checkpoints", 3, "checkpoints of each contender, after one that does not count")
	f.IntVar(&conf.cloneRuns, "clone-runs", 3, "times that clones are started at once, after one that does not count")
	if err := f.Parse(args); err != nil {
		return conf, err
	}
	if f.NArg() > 0 {
		return conf, fmt.Errorf("there are no arguments beside the options: %q", f.Args())
	}
	if *quick {
		conf.runs, conf.saves, conf.cloneRuns = min(conf.runs, 2), 1, 1
		if *chosen == "" {
			*chosen = "mem-10m,mem-100m,mem-1g"
		}
	}
	if conf.runs < 1 || conf.saves < 1 || conf.cloneRuns < 1 {
		return conf, errors.New("everything has to be measured once at least")
	}
	conf.contenders, conf.parts = split(*contenders), split(*some)
	for _, p := range conf.parts {
		if !slices.Contains(partNames, p) {
			return conf, fmt.Errorf("there is no part %q: there are %v", p, partNames)
		}
	}
	for _, name := range split(*chosen) {
		if !slices.Contains(names, name) {
			return conf, fmt.Errorf("there is no workload %q: there are %v", name, names)
		}
		conf.workloads = append(conf.workloads, name)
	}
	if len(conf.workloads) == 0 {
		conf.workloads = names
	}
	for _, c := range split(*clones) {
		k, err := strconv.Atoi(c)
		if err != nil || k < 1 {
			return conf, fmt.Errorf("-clones: %q is no number of clones", c)
		}
		conf.clones = append(conf.clones, k)
	}
	return conf, nil
}

// sizes says how much memory the workloads hold that hold nothing else.
func sizes() map[string]int {
	all := map[string]int{}
	for _, w := range workloads("") {
		if w.mib > 0 {
			all[w.name] = w.mib
		}
	}
	return all
}

func split(list string) []string {
	if list == "" {
		return nil
	}
	return strings.Split(list, ",")
}

func run(ctx context.Context, conf config) (err error) {
	start := time.Now()
	d, err := harness.StartContainerd(ctx, harness.Options{
		Need:          []harness.Tool{harness.Shim, harness.RuncShim, harness.Runc, harness.Registry, harness.CRIU, harness.Cracctl},
		OwnShims:      true,
		StateInMemory: true,
	})
	if err != nil {
		return err
	}
	b := &bench{
		d: d, nets: &networks{d: d}, samples: &report.Samples{}, config: conf, roots: map[string]string{},
		say: func(format string, args ...any) {
			fmt.Fprintf(os.Stderr, "%6.0fs  %s\n", time.Since(start).Seconds(), fmt.Sprintf(format, args...))
		},
	}
	undo, err := kernelCache(ctx, d)
	if err == nil {
		err = b.run(d.Context(ctx))
	}
	err = errors.Join(err, undo(), b.close(d.Context(context.WithoutCancel(ctx))), d.Stop(ctx))
	results := b.samples.Results()
	outcomes := report.Evaluate(report.Aims(), results)
	// What was measured until something went wrong is worth seeing too.
	if conf.out == "" {
		conf.out = filepath.Join(d.Tools.Build, "bench")
	}
	file := conf.out + ".json"
	err = errors.Join(err, report.Save(file, results), report.Print(os.Stdout, results), report.PrintAims(os.Stdout, outcomes),
		report.Plot(conf.out+".svg", results, sizes()))
	if err != nil {
		return err
	}
	fmt.Printf("\nThe same numbers are in %s, and a plot beside it\n", file)
	if wrong := report.Wrong(results); len(wrong) > 0 {
		return fmt.Errorf("not everything was right:\n%s", strings.Join(wrong, "\n"))
	}
	return nil
}
