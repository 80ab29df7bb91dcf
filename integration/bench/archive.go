package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// archive is what a JVM can do for its start by itself: a cold start, under containerd's own shim,
// with what an earlier run has left in a file.
type archive struct {
	b             *bench
	title         string
	training, use string // the options that write the file and that use it, which its name ends
	jdk25         bool   // with that JDK in place of the image's
	file          map[string]string
}

func (a *archive) name() string { return a.title }

func (a *archive) can(w *workload) error {
	if !w.java {
		return cannot("there is no JVM in %s", w.name)
	}
	return nil
}

// archiveTime is how long a JVM may take to write its archive when it ends.
const archiveTime = 3 * time.Minute

// prepare lets the workload do what it does when it is warmed for a checkpoint, and end in order.
func (a *archive) prepare(ctx context.Context, w *workload) (_ saved, err error) {
	dir, err := a.b.d.Path("archive-" + a.title + "-" + w.name)
	if err != nil {
		return nil, err
	}
	a.file = map[string]string{w.name: filepath.Join(dir, "app")}
	n, err := a.b.nets.take(ctx)
	if err != nil {
		return nil, err
	}
	defer a.b.nets.give(n)
	i, err := a.stage(ctx, w, n, a.training)
	if err != nil {
		return nil, err
	}
	defer func() {
		if _, rerr := i.remove(ctx); err == nil {
			err = rerr
		}
	}()
	if err := i.run(ctx); err != nil {
		return nil, err
	}
	if _, err := w.warm(ctx, n); err != nil {
		return nil, err
	}
	if err := i.task.Kill(ctx, unix.SIGTERM); err != nil && !errdefs.IsNotFound(err) {
		return nil, err
	}
	select {
	case <-i.exits:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-time.After(archiveTime):
		return nil, fmt.Errorf("the JVM did not end within %v", archiveTime)
	}
	if _, err := os.Stat(a.file[w.name]); err != nil {
		return nil, fmt.Errorf("the JVM has written no archive: %w", err)
	}
	return nil, nil
}

func (a *archive) stageCold(ctx context.Context, w *workload, n *network) (instance, error) {
	return a.stage(ctx, w, n, a.use)
}

func (a *archive) stage(ctx context.Context, w *workload, n *network, option string) (*task, error) {
	file := a.file[w.name]
	with := *w
	with.mounts = append([]bind{{filepath.Dir(file), filepath.Dir(file)}}, w.mounts...)
	with.env = append(append([]string{}, w.env...), "JAVA_TOOL_OPTIONS="+option+file)
	if a.jdk25 {
		// Its programs name their loader by its path on this machine.
		jdk, err := filepath.EvalSymlinks(filepath.Join(a.b.d.Tools.Build, "tools", "jdk25"))
		if err != nil {
			return nil, fmt.Errorf("JDK 25: %w: run integration/tools/install.sh jdk25", err)
		}
		with.mounts = append(with.mounts, bind{jdk, jdk})
		with.env = append(with.env, "JRE_HOME="+jdk, "PATH="+filepath.Join(jdk, "bin")+":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	}
	img, err := a.b.image(ctx, w)
	if err != nil {
		return nil, err
	}
	return a.b.create(ctx, runcRuntime, nil, img, &with, n, nil)
}
