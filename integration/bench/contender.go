package main

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// contender is one way to bring a workload back.
type contender interface {
	name() string
	// can says why a workload is beyond it; nil: it is not.
	can(w *workload) error
	// prepare runs the workload, warms it, saves it and ends it. It returns nil if there is nothing
	// to bring back.
	prepare(ctx context.Context, w *workload) (saved, error)
}

// saved is a workload that was put away and can be brought back, any number of times.
type saved interface {
	// stage prepares one more of it, to be restored: what a runtime does before it is asked to
	// create a task is not measured.
	stage(ctx context.Context, n *network) (instance, error)
	// was is what the workload said of itself before it was saved; nil if it never ran.
	was() *testimony
	// remove removes what was saved.
	remove(ctx context.Context) error
}

// instance is one container, or what stands for it.
type instance interface {
	// run starts or restores it. It returns when the runtime says that it runs.
	run(ctx context.Context) error
	// filled returns when it has all of its memory.
	filled(ctx context.Context) error
	// use tells the memory that it takes.
	use(ctx context.Context) (usage, error)
	// remove ends it, and leaves nothing of it. It tells how long the runtime took to delete what
	// had ended.
	remove(ctx context.Context) (time.Duration, error)
}

// starter is a contender that can start the workload anew.
type starter interface {
	// stageCold prepares a new container of the workload.
	stageCold(ctx context.Context, w *workload, n *network) (instance, error)
}

// runtime is a contender that starts containers too, and saves them while they run on.
type runtime interface {
	contender
	starter
	// save saves it. With exit it ends with that.
	save(ctx context.Context, w *workload, i instance, exit bool) (saved, error)
}

// errCannot marks what a contender is not able to do, which is no failure of the run.
var errCannot = errors.New("cannot")

func cannot(format string, args ...any) error {
	return fmt.Errorf("%w: "+format, append([]any{errCannot}, args...)...)
}

// takesPart tells whether a contender is measured in a part beside restores: some do what they do
// there as another does, or not at all.
func takesPart(c contender, part string) bool {
	l, limited := c.(interface{ takesPart(part string) bool })
	return !limited || l.takesPart(part)
}

// prepareRuntime is prepare for a runtime.
func (b *bench) prepareRuntime(ctx context.Context, r runtime, w *workload) (_ saved, err error) {
	n, err := b.nets.take(ctx)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.nets.drop(context.WithoutCancel(ctx), n)) }()
	i, err := r.stageCold(ctx, w, n)
	if err != nil {
		return nil, err
	}
	defer func() {
		_, rerr := i.remove(context.WithoutCancel(ctx))
		err = errors.Join(err, rerr)
	}()
	if err := i.run(ctx); err != nil {
		return nil, err
	}
	t, err := w.warm(ctx, n)
	if err != nil {
		return nil, err
	}
	s, err := r.save(ctx, w, i, true)
	if err != nil {
		return nil, fmt.Errorf("checkpoint: %w", err)
	}
	return &remembered{s, t}, nil
}

// remembered is saved with what the workload said.
type remembered struct {
	saved
	testimony *testimony
}

func (r *remembered) was() *testimony { return r.testimony }
