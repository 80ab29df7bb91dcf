// Command start measures how fast a container starts and what its shim costs, under our runtime,
// under ours without hooks, and under containerd's own, side by side on one private containerd
// through a resident client.
//
// One measurement is the time from the call that creates the task to the first byte that the
// workload writes. The contenders take turns, so that what else the machine does hits both.
// Every run is checked: right output, right exit code, nothing left behind. It ends with an error
// when ours is slower to the first output, or its shim larger, by more than what was measured scatters.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"text/tabwriter"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"

	"github.com/crac-shim/crac/integration/harness"
)

// hooksOff is our runtime without /run/crac in the container: what coordination costs where
// nobody takes part in it.
const hooksOff = ours + " hooks=off"

const ours = "io.containerd.crac.v2"

var runtimes = []string{ours, "io.containerd.runc.v2", hooksOff}

func main() {
	n := flag.Int("n", 40, "runs of each runtime")
	samples := flag.Int("shims", 5, "shims of each runtime whose memory is measured")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *n, *samples); err != nil {
		fmt.Fprintln(os.Stderr, "bench-start:", err)
		os.Exit(1)
	}
}

// times are the durations of one run.
type times struct {
	Create      time.Duration // the Create call itself
	FirstOutput time.Duration // from the call to the first byte of output
	Exit        time.Duration // from the call to the exit's report
	Delete      time.Duration // the Delete call itself
}

// memory is the proportional set size of one shim, in KiB.
type memory struct {
	Running, AfterExec, AfterTenExecs int
	Anonymous                         int // the part of the last that no other shim would share
}

func run(ctx context.Context, n, samples int) (err error) {
	if n < 1 || samples < 1 {
		return errors.New("-n and -shims have to be at least 1")
	}
	d, err := harness.StartContainerd(ctx, harness.Options{Need: []harness.Tool{harness.Shim, harness.RuncShim, harness.Runc}, OwnShims: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Stop(ctx)) }()
	img, err := d.ImportImage(ctx, "busybox")
	if err != nil {
		return err
	}
	b := &bench{d: d, img: img, ctx: d.Context(ctx)}

	all := map[string][]times{}
	const warmups = 3
	for i := -warmups; i < n; i++ {
		order := slices.Clone(runtimes)
		if i%2 != 0 { // none is always the first
			slices.Reverse(order)
		}
		first := (i + warmups) % len(order)
		order = append(order[first:], order[:first]...)
		for _, r := range order {
			t, err := b.start(r, i+warmups)
			if err != nil {
				return fmt.Errorf("run %d of %s: %w", i+1, r, err)
			}
			if i >= 0 {
				all[r] = append(all[r], t)
			}
		}
		if i >= 0 && (i+1)%10 == 0 {
			fmt.Fprintf(os.Stderr, "%d of %d runs of each\n", i+1, n)
		}
	}
	mem := map[string][]memory{}
	for range samples {
		for _, r := range runtimes {
			m, err := b.memory(r)
			if err != nil {
				return fmt.Errorf("memory of %s: %w", r, err)
			}
			mem[r] = append(mem[r], m)
		}
	}
	return report(d.Tools.Build, all, mem)
}

type bench struct {
	d   *harness.Daemon
	img containerd.Image
	ctx context.Context
	ids int
}

// firstByte notes when the first output came, and keeps all of it.
type firstByte struct {
	mu  sync.Mutex
	at  time.Time
	all []byte
}

func (f *firstByte) Write(p []byte) (int, error) {
	now := time.Now()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.at.IsZero() {
		f.at = now
	}
	f.all = append(f.all, p...)
	return len(p), nil
}

func (f *firstByte) get() (time.Time, string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.at, string(f.all)
}

func (b *bench) container(runtime string, args ...string) (containerd.Container, error) {
	b.ids++
	id := fmt.Sprintf("bench-%s-%d", b.d.Namespace[len(b.d.Namespace)-8:], b.ids)
	spec := []oci.SpecOpts{oci.WithImageConfig(b.img), oci.WithProcessArgs(args...)}
	if runtime == hooksOff {
		runtime = ours
		spec = append(spec, oci.WithAnnotations(map[string]string{"io.containerd.crac.hooks": "off"}))
	}
	return b.d.Client.NewContainer(b.ctx, id,
		containerd.WithRuntime(runtime, nil),
		containerd.WithImage(b.img),
		containerd.WithNewSnapshot(id, b.img),
		containerd.WithNewSpec(spec...))
}

// start runs one container from its creation to its end.
func (b *bench) start(runtime string, i int) (t times, err error) {
	want := fmt.Sprintf("run %d\n", i)
	c, err := b.container(runtime, "echo", strings.TrimSpace(want))
	if err != nil {
		return t, err
	}
	defer func() {
		err = errors.Join(err, c.Delete(b.ctx, containerd.WithSnapshotCleanup))
		if left := b.d.Leftovers(c.ID()); len(left) > 0 {
			err = errors.Join(err, fmt.Errorf("left behind: %s", strings.Join(left, "; ")))
		}
	}()
	out := &firstByte{}
	begin := time.Now()
	task, err := c.NewTask(b.ctx, cio.NewCreator(cio.WithStreams(nil, out, out), cio.WithFIFODir(b.d.FIFODir())))
	if err != nil {
		return t, err
	}
	t.Create = time.Since(begin)
	deleted := false
	defer func() {
		if !deleted {
			_, derr := task.Delete(b.ctx, containerd.WithProcessKill)
			err = errors.Join(err, derr)
		}
	}()
	exit, err := task.Wait(b.ctx)
	if err != nil {
		return t, err
	}
	if err := task.Start(b.ctx); err != nil {
		return t, err
	}
	var status containerd.ExitStatus
	select {
	case status = <-exit:
	case <-b.ctx.Done():
		return t, b.ctx.Err()
	}
	t.Exit = time.Since(begin)
	if code, _, err := status.Result(); err != nil || code != 0 {
		return t, errors.Join(fmt.Errorf("the container ended with code %d", code), err)
	}
	if err := harness.WaitIO(b.ctx, task.IO()); err != nil {
		return t, err
	}
	at, text := out.get()
	if text != want {
		return t, fmt.Errorf("the output is %q, want %q", text, want)
	}
	t.FirstOutput = at.Sub(begin)
	deleteAt := time.Now()
	_, err = task.Delete(b.ctx)
	t.Delete, deleted = time.Since(deleteAt), err == nil
	return t, err
}

// memory measures the shim of a container that runs, and again after execs.
func (b *bench) memory(runtime string) (m memory, err error) {
	c, err := b.container(runtime, "sleep", "1000")
	if err != nil {
		return m, err
	}
	task, err := c.NewTask(b.ctx, cio.NewCreator(cio.WithStreams(nil, &firstByte{}, &firstByte{}), cio.WithFIFODir(b.d.FIFODir())))
	if err != nil {
		return m, errors.Join(err, c.Delete(b.ctx, containerd.WithSnapshotCleanup))
	}
	defer func() {
		_, derr := task.Delete(b.ctx, containerd.WithProcessKill)
		err = errors.Join(err, derr, c.Delete(b.ctx, containerd.WithSnapshotCleanup))
		if left := b.d.Leftovers(c.ID()); len(left) > 0 {
			err = errors.Join(err, fmt.Errorf("left behind: %s", strings.Join(left, "; ")))
		}
	}()
	if err := task.Start(b.ctx); err != nil {
		return m, err
	}
	pid, err := b.d.ShimPID(c.ID())
	if err != nil {
		return m, err
	}
	settle := func(key string) (int, error) {
		// A shim that has just worked is still giving memory back; both get the same time.
		time.Sleep(settleTime)
		return rollup(pid, key)
	}
	if m.Running, err = settle("Pss"); err != nil {
		return m, err
	}
	for i := range 10 {
		if err := b.exec(c, task, i); err != nil {
			return m, err
		}
		if i == 0 {
			if m.AfterExec, err = settle("Pss"); err != nil {
				return m, err
			}
		}
	}
	if m.AfterTenExecs, err = settle("Pss"); err != nil {
		return m, err
	}
	m.Anonymous, err = rollup(pid, "Pss_Anon")
	return m, err
}

func (b *bench) exec(c containerd.Container, task containerd.Task, i int) error {
	spec, err := c.Spec(b.ctx)
	if err != nil {
		return err
	}
	spec.Process.Args = []string{"echo", "exec"}
	out := &firstByte{}
	p, err := task.Exec(b.ctx, fmt.Sprintf("e%d", i), spec.Process, cio.NewCreator(cio.WithStreams(nil, out, out), cio.WithFIFODir(b.d.FIFODir())))
	if err != nil {
		return err
	}
	exit, err := p.Wait(b.ctx)
	if err != nil {
		return err
	}
	if err := p.Start(b.ctx); err != nil {
		return err
	}
	status := <-exit
	if _, err := p.Delete(b.ctx); err != nil {
		return err
	}
	if _, text := out.get(); text != "exec\n" || status.ExitCode() != 0 {
		return fmt.Errorf("the exec ended with code %d and output %q", status.ExitCode(), text)
	}
	return nil
}

// settleTime is between what a shim does and the measurement of its memory.
const settleTime = 500 * time.Millisecond

// rollup reads one value, in KiB, of the sum of a process's memory maps.
func rollup(pid int, key string) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, key+":"); ok {
			return strconv.Atoi(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")))
		}
	}
	return 0, fmt.Errorf("no %s in smaps_rollup of process %d", key, pid)
}

// stat describes the values of one thing.
type stat struct {
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	// Between Low and High is the median of all that could have been measured, with 95 % certainty.
	Low  float64 `json:"low"`
	High float64 `json:"high"`
}

func describe(values []float64) stat {
	slices.Sort(values)
	n := len(values)
	m := values[n/2]
	if n%2 == 0 {
		m = (values[n/2-1] + values[n/2]) / 2
	}
	// How many of n values are below the median is binomial; its normal approximation leaves out this
	// many at each end. Of less than eight values all are within.
	out := max(0, int(float64(n)/2-0.98*math.Sqrt(float64(n))))
	return stat{m, values[0], values[n-1], values[out], values[n-1-out]}
}

// line is one line of the table: the same thing under both runtimes.
type line struct {
	Name  string  `json:"name"`
	Unit  string  `json:"unit"`
	Crac  stat    `json:"crac"`
	Runc  stat    `json:"runc"`
	Off   stat    `json:"hooks_off"`
	Ratio float64 `json:"ratio"`       // of the medians, ours to runc's
	Hooks float64 `json:"hooks_ratio"` // of the medians, ours to ours without hooks
	// Spread is how far above 1 the ratio may be by chance, as both medians scatter.
	Spread float64 `json:"spread"`
	Aim    bool    `json:"aim"` // the ratio is to be no more than 1
}

// worse tells whether ours is slower or larger, and not by chance.
func (l line) worse() bool { return l.Ratio > 1+l.Spread }

// compare makes a line of the values of the three runtimes.
func compare(name, unit string, aim bool, crac, runc, off []float64) line {
	c, r, o := describe(crac), describe(runc), describe(off)
	return line{name, unit, c, r, o, c.Median / r.Median, c.Median / o.Median, (c.Median - c.Low + r.High - r.Median) / r.Median, aim}
}

// verdict is an error that names each aim that was missed.
func verdict(lines []line) error {
	var errs []error
	for _, l := range lines {
		if l.Aim && l.worse() {
			errs = append(errs, fmt.Errorf("%s: %.2f times runc's (%.1f %s, runc's %.1f); it may be 1, and %.2f more by chance", l.Name, l.Ratio, l.Crac.Median, l.Unit, l.Runc.Median, l.Spread))
		}
	}
	return errors.Join(errs...)
}

func report(build string, all map[string][]times, mem map[string][]memory) error {
	var lines []line
	add := func(name, unit string, aim bool, of func(runtime string) []float64) {
		lines = append(lines, compare(name, unit, aim, of(runtimes[0]), of(runtimes[1]), of(runtimes[2])))
	}
	for _, m := range []struct {
		name string
		aim  bool
		of   func(times) time.Duration
	}{
		{"create call", false, func(t times) time.Duration { return t.Create }},
		{"to first output", true, func(t times) time.Duration { return t.FirstOutput }},
		{"to exit", false, func(t times) time.Duration { return t.Exit }},
		{"delete call", false, func(t times) time.Duration { return t.Delete }},
	} {
		add(m.name, "ms", m.aim, func(r string) (v []float64) {
			for _, t := range all[r] {
				v = append(v, float64(m.of(t).Microseconds())/1000)
			}
			return v
		})
	}
	for _, m := range []struct {
		name string
		aim  bool
		of   func(memory) int
	}{
		{"shim's PSS, running", true, func(m memory) int { return m.Running }},
		{"after one exec", true, func(m memory) int { return m.AfterExec }},
		{"after ten execs", true, func(m memory) int { return m.AfterTenExecs }},
		{"of it anonymous", false, func(m memory) int { return m.Anonymous }},
	} {
		add(m.name, "MiB", m.aim, func(r string) (v []float64) {
			for _, s := range mem[r] {
				v = append(v, float64(m.of(s))/1024)
			}
			return v
		})
	}
	n, shims := len(all[runtimes[0]]), len(mem[runtimes[0]])
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "\t\tcrac\t(min\tmax)\trunc\t(min\tmax)\tcrac/runc\tby chance\thooks=off\ton/off\t\n")
	for _, l := range lines {
		fmt.Fprintf(w, "%s\t%s\t%.1f\t%.1f\t%.1f\t%.1f\t%.1f\t%.1f\t%.2f\t± %.2f\t%.1f\t%.2f\t\n", l.Name, l.Unit, l.Crac.Median, l.Crac.Min, l.Crac.Max, l.Runc.Median, l.Runc.Min, l.Runc.Max, l.Ratio, l.Spread, l.Off.Median, l.Hooks)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	fmt.Printf("medians of %d runs of each, taking turns; memory of %d shims of each\n", n, shims)
	b, err := json.MarshalIndent(map[string]any{"runs": n, "shims": shims, "lines": lines}, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(build, "bench-start.json"), append(b, '\n'), 0o644); err != nil { //nolint:gosec // a report to be read
		return err
	}
	return verdict(lines)
}
