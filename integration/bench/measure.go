package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
)

// part is one of the things that are measured of every workload.
type part struct {
	name    string
	measure func(context.Context, *bench, *workload, []*entry) error
}

var parts = []part{
	{"restore", restores},
	{"checkpoint", checkpoints},
	{"clones", clones},
	{"cold", colds},
	// Last: it takes the images away and brings them back.
	{"image", registryTrips},
}

// rounds lets the contenders take turns, so that what else the machine does hits all of them. The
// first round is not counted: after it every file is in the page cache. None is always the first.
// Who fails takes no further part.
func (b *bench) rounds(ctx context.Context, w *workload, part string, entries []*entry, runs int, once func(e *entry, count bool) error) {
	if len(entries) == 0 {
		return
	}
	out := map[*entry]bool{}
	for round := range runs + 1 {
		for i := range entries {
			e := entries[(i+round)%len(entries)]
			if out[e] {
				continue
			}
			if ctx.Err() != nil {
				return
			}
			if err := once(e, round > 0); err != nil {
				out[e] = true
				b.wrong(ctx, w, e, part, err)
			}
		}
		b.say("  %s: round %d of %d", part, round, runs)
	}
}

func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func mebibytes(n int64) float64 { return float64(n) / (1 << 20) }

// restores brings the workload back, one at a time.
func restores(ctx context.Context, b *bench, w *workload, entries []*entry) error {
	entries = slices.DeleteFunc(slices.Clone(entries), func(e *entry) bool { return e.saved == nil })
	b.rounds(ctx, w, "restore", entries, b.config.runs, func(e *entry, count bool) error {
		return b.restoreOne(ctx, w, e, count)
	})
	return context.Cause(ctx)
}

func (b *bench) restoreOne(ctx context.Context, w *workload, e *entry, count bool) (err error) {
	n, err := b.nets.take(ctx)
	if err != nil {
		return err
	}
	defer b.nets.give(n)
	i, err := e.saved.stage(ctx, n)
	if err != nil {
		return err
	}
	var running, answered, filled, deleted time.Duration
	defer func() {
		var rerr error
		deleted, rerr = i.remove(ctx)
		if err = errors.Join(err, rerr); err != nil || !count {
			return
		}
		b.add(w, e, "restore.running", "ms", milliseconds(running))
		if answered > 0 {
			b.add(w, e, "restore.answer", "ms", milliseconds(answered))
		}
		b.add(w, e, "restore.memory", "ms", milliseconds(filled))
		if deleted > 0 {
			b.add(w, e, "restore.delete", "ms", milliseconds(deleted))
		}
	}()
	begin := time.Now()
	if err := i.run(ctx); err != nil {
		return err
	}
	running = time.Since(begin)
	was := e.saved.was()
	if was != nil {
		answer, err := w.answer(ctx, n)
		if err != nil {
			return err
		}
		answered = time.Since(begin)
		if answer != was.answer {
			return fmt.Errorf("it answers %q, and answered %q when it was saved", answer, was.answer)
		}
	}
	if err := i.filled(ctx); err != nil {
		return err
	}
	// Who gets the memory before it runs has it when it runs.
	if filled = time.Since(begin); !isLazy(i) {
		filled = running
	}
	if c, ok := i.(interface{ check() error }); ok {
		return c.check()
	}
	if was == nil {
		return errors.New("nobody can say whether it is right")
	}
	digest, err := w.readAll(ctx, n)
	if err == nil && digest != was.digest {
		err = fmt.Errorf("the digest of its memory is %s, and was %s when it was saved", digest, was.digest)
	}
	if err == nil && count {
		err = b.shimMemory(ctx, w, e, i)
	}
	return err
}

// shimMemory notes what the shim of a container takes when it has nothing to do.
func (b *bench) shimMemory(ctx context.Context, w *workload, e *entry, i instance) error {
	u, err := i.use(ctx)
	if err == nil && u.shim > 0 {
		b.add(w, e, "shim.pss", "MiB", mebibytes(u.shim))
	}
	return err
}

// isLazy tells whether an instance runs before it has its memory.
func isLazy(i instance) bool {
	l, ok := i.(interface{ lazy() bool })
	return ok && l.lazy()
}

// clones starts several at once: how long until all have answered, and what they take together.
func clones(ctx context.Context, b *bench, w *workload, entries []*entry) error {
	for _, k := range b.config.clones {
		if !w.fits(k) {
			b.say("  clones.%d: left out, they take more than %d MiB together", k, crowdLimit)
			continue
		}
		var some []*entry
		for _, e := range entries {
			if takesPart(e.contender, "clones") && e.saved != nil && e.saved.was() != nil {
				some = append(some, e)
			}
		}
		b.rounds(ctx, w, fmt.Sprintf("clones.%d", k), some, b.config.cloneRuns, func(e *entry, count bool) error {
			return b.cloneSome(ctx, w, e, k, count)
		})
	}
	return context.Cause(ctx)
}

func (b *bench) cloneSome(ctx context.Context, w *workload, e *entry, k int, count bool) error {
	return b.several(ctx, w, e, k, fmt.Sprintf("clones.%d", k), count, e.saved.was(), func(n *network) (instance, error) {
		return e.saved.stage(ctx, n)
	})
}

// several runs k instances at once and measures them together. was is what they have to answer; nil: anything.
func (b *bench) several(ctx context.Context, w *workload, c contender, k int, metric string, count bool, was *testimony, stage func(*network) (instance, error)) (err error) {
	all := make([]instance, 0, k)
	nets := make([]*network, 0, k)
	defer func() {
		for i, one := range all {
			_, rerr := one.remove(ctx)
			err = errors.Join(err, rerr)
			b.nets.give(nets[i])
		}
	}()
	for range k {
		n, err := b.nets.take(ctx)
		if err != nil {
			return err
		}
		i, err := stage(n)
		if err != nil {
			b.nets.give(n)
			return err
		}
		all, nets = append(all, i), append(nets, n)
	}
	var g errgroup.Group
	begin := time.Now()
	for i := range all {
		g.Go(func() error {
			if err := all[i].run(ctx); err != nil {
				return err
			}
			answer, err := w.answer(ctx, nets[i])
			if err == nil && was != nil && answer != was.answer {
				err = fmt.Errorf("one answers %q, and answered %q when it was saved", answer, was.answer)
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	answered := time.Since(begin)
	var sum usage
	for i := range all {
		if err := all[i].filled(ctx); err != nil {
			return err
		}
	}
	for _, i := range all {
		u, err := i.use(ctx)
		if err != nil {
			return err
		}
		sum.pss += u.pss
		sum.cgroup += u.cgroup
		sum.shim += u.shim
	}
	// Digests last: to read is to have.
	for i := range all {
		if was == nil {
			break
		}
		digest, err := w.readAll(ctx, nets[i])
		if err != nil {
			return err
		}
		if digest != was.digest {
			return fmt.Errorf("the digest of one's memory is %s, and was %s when it was saved", digest, was.digest)
		}
	}
	if count {
		b.add(w, c, metric+".answer", "ms", milliseconds(answered))
		if sum.pss > 0 { // not everybody tells
			b.add(w, c, metric+".pss", "MiB", mebibytes(sum.pss))
		}
		if sum.cgroup > 0 {
			b.add(w, c, metric+".cgroup", "MiB", mebibytes(sum.cgroup))
		}
		if sum.shim > 0 {
			b.add(w, c, metric+".shims", "MiB", mebibytes(sum.shim))
		}
	}
	return nil
}

// checkpoints saves a workload that runs on: for how long it stood still, how long all took, and
// how large the result is.
func checkpoints(ctx context.Context, b *bench, w *workload, entries []*entry) (err error) {
	type original struct {
		i instance
		n *network
	}
	originals := map[*entry]original{}
	defer func() {
		for _, o := range originals {
			_, rerr := o.i.remove(ctx)
			err = errors.Join(err, rerr)
			b.nets.give(o.n)
		}
	}()
	var some []*entry
	for _, e := range entries {
		r, ok := e.contender.(runtime)
		if !ok || e.saved == nil || !takesPart(e.contender, "checkpoint") {
			continue
		}
		n, err := b.nets.take(ctx)
		if err != nil {
			return err
		}
		i, err := r.stageCold(ctx, w, n)
		if err != nil {
			b.nets.give(n)
			return err
		}
		originals[e] = original{i, n}
		if err = i.run(ctx); err == nil {
			_, err = w.warm(ctx, n)
		}
		if err != nil {
			b.wrong(ctx, w, e, "checkpoint", err)
			continue
		}
		some = append(some, e)
	}
	b.rounds(ctx, w, "checkpoint", some, b.config.saves, func(e *entry, count bool) error {
		o := originals[e]
		return b.saveOne(ctx, w, e, o.i, o.n, count)
	})
	return context.Cause(ctx)
}

func (b *bench) saveOne(ctx context.Context, w *workload, e *entry, i instance, n *network, count bool) (err error) {
	before, err := w.answer(ctx, n)
	if err != nil {
		return err
	}
	time.Sleep(w.settle)
	if w.watched {
		if _, err := tell(ctx, n, w.port, "watch"); err != nil {
			return err
		}
	}
	begin := time.Now()
	s, err := e.contender.(runtime).save(ctx, w, i, false)
	took := time.Since(begin)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.remove(context.WithoutCancel(ctx))) }()
	frozen := -1.0
	if w.watched {
		gap, err := tell(ctx, n, w.port, "gap")
		if err != nil {
			return err
		}
		var us float64
		if _, err := fmt.Sscan(gap, &us); err != nil {
			return err
		}
		frozen = us / 1000
	}
	after, err := w.answer(ctx, n)
	if err != nil {
		return fmt.Errorf("after the checkpoint: %w", err)
	}
	if after != before {
		return fmt.Errorf("after the checkpoint it answers %q, and before %q", after, before)
	}
	if !count {
		return nil
	}
	b.add(w, e, "checkpoint.total", "ms", milliseconds(took))
	if frozen >= 0 {
		b.add(w, e, "checkpoint.frozen", "ms", frozen)
	}
	if z, ok := s.(interface {
		size(context.Context) (int64, error)
	}); ok {
		size, err := z.size(ctx)
		if err != nil {
			return err
		}
		b.add(w, e, "checkpoint.size", "MiB", mebibytes(size))
	}
	return nil
}

// colds starts the workload anew.
func colds(ctx context.Context, b *bench, w *workload, entries []*entry) error {
	var some []*entry
	for _, e := range entries {
		if _, ok := e.contender.(starter); ok && takesPart(e.contender, "cold") {
			some = append(some, e)
		}
	}
	if w.crowd > 0 {
		metric := fmt.Sprintf("colds.%d", w.crowd)
		b.rounds(ctx, w, metric, some, b.config.cloneRuns, func(e *entry, count bool) error {
			return b.several(ctx, w, e, w.crowd, metric, count, nil, func(n *network) (instance, error) {
				return e.contender.(starter).stageCold(ctx, w, n)
			})
		})
	}
	b.rounds(ctx, w, "cold", some, b.config.runs, func(e *entry, count bool) (err error) {
		n, err := b.nets.take(ctx)
		if err != nil {
			return err
		}
		defer b.nets.give(n)
		i, err := e.contender.(starter).stageCold(ctx, w, n)
		if err != nil {
			return err
		}
		begin := time.Now()
		err = i.run(ctx)
		running := time.Since(begin)
		if err == nil {
			_, err = w.answer(ctx, n)
		}
		answered := time.Since(begin)
		deleted, rerr := i.remove(ctx)
		if err = errors.Join(err, rerr); err != nil || !count {
			return err
		}
		b.add(w, e, "cold.running", "ms", milliseconds(running))
		b.add(w, e, "cold.answer", "ms", milliseconds(answered))
		if deleted > 0 {
			b.add(w, e, "cold.delete", "ms", milliseconds(deleted))
		}
		return nil
	})
	return context.Cause(ctx)
}
