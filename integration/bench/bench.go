package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"

	containerd "github.com/containerd/containerd/v2/client"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/integration/bench/report"
	"github.com/crac-shim/crac/integration/harness"
)

// bench is one run of the benchmark.
type bench struct {
	d    *harness.Daemon
	nets *networks
	// registry is started when it is first needed.
	registry *harness.RegistryServer
	samples  *report.Samples
	closers  []func(context.Context) error
	config   config
	roots    map[string]string // where rootfs has mounted an image
	ids      int
	say      func(format string, args ...any)
}

// config says what is measured, and how often.
type config struct {
	out        string // the results' files, without what their names end with
	workloads  []string
	contenders []string // names; empty: all
	runs       int
	saves      int   // checkpoints of a workload that runs on
	clones     []int // how many at once
	cloneRuns  int
	parts      []string // of the measurement; empty: all
}

// id is a name for a container that nothing else on the host has.
func (b *bench) id() string {
	b.ids++
	random := make([]byte, 3)
	_, _ = rand.Read(random) // it does not fail
	return fmt.Sprintf("bench-%s-%d", hex.EncodeToString(random), b.ids)
}

// image imports a workload's image, once.
func (b *bench) image(ctx context.Context, w *workload) (containerd.Image, error) {
	return b.d.ImportImage(ctx, w.image)
}

// checkpointRef is the name of a new checkpoint image.
func (b *bench) checkpointRef(id string) string { return "bench.test/" + id + ":warm" }

// contenders are all that there are, in the order of the tables.
func (b *bench) contenders() []contender {
	podmans := &podmanHost{b: b}
	b.closers = append(b.closers, podmans.close)
	return []contender{
		&fromImage{b},
		&fromPath{fromImage{b}},
		&underRunc{b: b, title: "containerd-runc"},
		&underRunc{b: b, title: "containerd-crun", binary: "crun"},
		&bareRunc{b},
		&podman{b: b, title: "podman-import", export: true, host: podmans},
		&podman{b: b, title: "podman-local", host: podmans},
		&bareCRIU{b},
		&plainCopy{b},
		&archive{b: b, title: "cds", training: "-XX:ArchiveClassesAtExit=", use: "-XX:SharedArchiveFile="},
		&archive{b: b, title: "aot", training: "-Djdk.lang.Process.launchMechanism=FORK -XX:AOTCacheOutput=", use: "-XX:AOTCache=", jdk25: true},
	}
}

// chosen are the contenders that take part.
func (b *bench) chosen() ([]contender, error) {
	all := b.contenders()
	if len(b.config.contenders) == 0 {
		return all, nil
	}
	var some []contender
	for _, name := range b.config.contenders {
		i := slices.IndexFunc(all, func(c contender) bool { return c.name() == name })
		if i < 0 {
			var known []string
			for _, c := range all {
				known = append(known, c.name())
			}
			return nil, fmt.Errorf("there is no contender %q: there are %v", name, known)
		}
		some = append(some, all[i])
	}
	return some, nil
}

// run measures all workloads, one after the other.
func (b *bench) run(ctx context.Context) error {
	contenders, err := b.chosen()
	if err != nil {
		return err
	}
	for _, c := range contenders {
		b.samples.Contenders = append(b.samples.Contenders, c.name())
	}
	dir, err := b.d.Path("java")
	if err != nil {
		return err
	}
	all := workloads(dir)
	for i, name := range b.config.workloads {
		w := all[slices.IndexFunc(all, func(w *workload) bool { return w.name == name })]
		b.say("workload %s (%d of %d)", w.name, i+1, len(b.config.workloads))
		if w.make != nil {
			if err := w.make(ctx); err != nil {
				return fmt.Errorf("%s: %w", w.name, err)
			}
		}
		if err := b.workload(ctx, w, contenders); err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
	}
	return nil
}

// entry is a contender with what it has saved.
type entry struct {
	contender
	saved saved
}

// workload measures all contenders on one workload. A contender that fails is wrong, and is left
// out from there on; what fails here is the benchmark itself.
func (b *bench) workload(ctx context.Context, w *workload, contenders []contender) (err error) {
	var entries []*entry
	defer func() {
		ctx := context.WithoutCancel(ctx)
		for _, e := range entries {
			if e.saved != nil {
				err = errors.Join(err, e.saved.remove(ctx))
			}
		}
	}()
	for _, c := range contenders {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := c.can(w); err != nil {
			b.say("  %s: %v", c.name(), err)
			continue
		}
		if w.coldOnly {
			entries = append(entries, &entry{c, nil})
			continue
		}
		b.say("  %s: start, warm, save", c.name())
		s, err := c.prepare(ctx, w)
		if err != nil {
			b.wrong(ctx, w, c, "prepare", err)
			continue
		}
		entries = append(entries, &entry{c, s})
	}
	// What was just written would be written back while we measure.
	unix.Sync()
	for _, part := range parts {
		if len(b.config.parts) > 0 && !slices.Contains(b.config.parts, part.name) {
			continue
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := part.measure(ctx, b, w, entries); err != nil {
			return fmt.Errorf("%s: %w", part.name, err)
		}
	}
	return nil
}

// wrong notes that something of a contender failed.
func (b *bench) wrong(ctx context.Context, w *workload, c contender, metric string, err error) {
	if ctx.Err() != nil {
		return // it was stopped
	}
	if errors.Is(err, errCannot) {
		b.say("  %s: %v", c.name(), err)
		return
	}
	b.say("  WRONG: %s %s %s: %v", w.name, c.name(), metric, err)
	b.samples.Wrong(report.Key{Workload: w.name, Contender: c.name(), Metric: metric}, err.Error())
}

func (b *bench) add(w *workload, c contender, metric, unit string, value float64) {
	b.samples.Add(report.Key{Workload: w.name, Contender: c.name(), Metric: metric}, unit, value)
}

// close removes what the benchmark has made beside its daemon's own parts.
func (b *bench) close(ctx context.Context) error {
	var errs []error
	for _, f := range b.closers {
		errs = append(errs, f(ctx))
	}
	for _, image := range slices.Collect(maps.Keys(b.roots)) {
		errs = append(errs, b.unmountRoot(ctx, "bench-rootfs-"+image, b.roots[image]))
	}
	return errors.Join(errs...)
}
