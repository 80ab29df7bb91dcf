// Command demo shows the main job on a real application: it starts Apache Tomcat cold, warms it,
// checkpoints it into an image, sends the image through a registry and starts clones of it, with
// stock ctr on a private containerd. `make demo` runs it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/crac-shim/crac/integration/harness"
)

func main() {
	keep := flag.Bool("keep", false, "leave the logs in place at the end")
	flag.Parse()
	ctx, stop := interruptible(context.Background())
	err := run(ctx, *keep)
	stop()
	if err != nil {
		_, _ = fmt.Fprintf(os.Stderr, "\ndemo: %v\n", err)
		os.Exit(1)
	}
}

// interruptible ends its context at the first Ctrl-C, with a cause that says so. Cleaning up goes
// on through a second one: it takes seconds, and what it does not remove would stay.
func interruptible(parent context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(parent)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	go func() {
		for s := range signals {
			if ctx.Err() != nil {
				_, _ = fmt.Fprintln(os.Stderr, "demo: still cleaning up")
				continue
			}
			_, _ = fmt.Fprintf(os.Stderr, "\ndemo: %v: cleaning up\n", s)
			cancel(fmt.Errorf("stopped by signal %v", s))
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		close(signals)
		cancel(nil)
	}
}

// run plays the scenario and reports it. The report is written also when the scenario broke off,
// with what is known by then.
func run(ctx context.Context, keep bool) (err error) {
	s := &scenario{progress: newProgress(os.Stdout), report: &Report{ClonesMS: []float64{}}}
	err = s.setUp(ctx, keep)
	if err == nil {
		err = s.play(ctx)
	}
	if s.d == nil {
		return err
	}
	build := s.d.Tools.Build
	if err != nil || !s.report.ok() {
		err = errors.Join(err, s.saveLog(filepath.Join(build, "demo.log")))
	}
	stopped := s.progress.do(context.WithoutCancel(ctx), "stop everything, check that nothing is left", s.d.Stop)
	if stopped != nil {
		s.report.problem("%v", stopped)
	}
	if err != nil {
		s.report.problem("%v", err)
	}
	s.report.Steps = s.progress.steps
	file := filepath.Join(build, "demo.json")
	if err := s.report.save(file); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := s.report.print(os.Stdout); err != nil {
		return err
	}
	fmt.Printf("\nThe same numbers are in %s\n", file)
	if !s.report.ok() {
		return fmt.Errorf("not everything was as it should be; the logs are in %s", filepath.Join(build, "demo.log"))
	}
	return nil
}

func (s *scenario) setUp(ctx context.Context, keep bool) error {
	return s.progress.do(ctx, "start a private containerd and registry", func(ctx context.Context) error {
		d, err := harness.StartContainerd(ctx, harness.Options{
			Keep: keep,
			Need: []harness.Tool{harness.Shim, harness.RuncShim, harness.Runc, harness.Registry, harness.CNI, harness.CRIU, harness.Cracctl},
		})
		if err != nil {
			return err
		}
		s.d = d
		if s.network, err = d.Network(); err != nil {
			return err
		}
		s.registry, err = d.StartRegistry(ctx)
		return err
	})
}
