// Command delta measures what a second checkpoint of a warm JVM costs in a registry: as a delta of
// the first one, and whole.
//
// Tomcat is warmed up and checkpointed. Then, for each number of requests, a clone serves them and
// is checkpointed twice, as a delta and whole. What is compared: the memory that changed, page by
// page, as cracctl diff finds it in the finished images; what the layers hold; and the bytes that the
// registry was really sent.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/images/build"
	"github.com/crac-shim/crac/images/registry"
	"github.com/crac-shim/crac/integration/harness"
	"github.com/crac-shim/crac/oci"
)

const (
	app  = "tomcat"
	port = 8080
)

// pages are what requests ask for, in turn: all of Tomcat's own examples.
var pages = []string{
	"/examples/jsp/dates/date.jsp",
	"/examples/jsp/snp/snoop.jsp",
	"/examples/jsp/jsp2/el/basic-arithmetic.jsp",
	"/examples/servlets/servlet/HelloWorldExample",
	"/examples/crac.jsp",
}

func main() {
	warmUp := flag.Int("warm-up", 300, "requests before the first checkpoint")
	requests := flag.String("requests", "0,20,200,2000", "requests between the first checkpoint and the second")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	var counts []int
	for s := range strings.SplitSeq(*requests, ",") {
		n, err := strconv.Atoi(s)
		if err != nil || n < 0 {
			fmt.Fprintf(os.Stderr, "bench-delta: -requests: %q is no number of requests\n", s)
			os.Exit(2)
		}
		counts = append(counts, n)
	}
	if err := run(ctx, *warmUp, counts); err != nil {
		fmt.Fprintln(os.Stderr, "bench-delta:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, warmUp int, counts []int) (err error) {
	d, err := harness.StartContainerd(ctx, harness.Options{Need: []harness.Tool{harness.Shim, harness.Registry, harness.CNI}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Stop(ctx)) }()
	b := &bench{d: d, ctx: d.Context(ctx)}
	if b.network, err = d.Network(); err != nil {
		return err
	}
	reg, err := d.StartRegistry(ctx)
	if err != nil {
		return err
	}
	if _, err := d.ImportImage(ctx, app); err != nil {
		return err
	}
	first := reg.Host + "/bench/" + app + ":first"
	url, err := b.start("original", harness.ImageRef(app), "auto")
	if err != nil {
		return err
	}
	if err := b.ask(url, warmUp); err != nil {
		return err
	}
	whole, err := b.checkpoint("original", first, "")
	if err != nil {
		return err
	}
	if err := b.remove("original"); err != nil {
		return err
	}
	var rows []row
	for i, n := range counts {
		id := fmt.Sprintf("clone-%d", i)
		url, err := b.start(id, first, "require")
		if err != nil {
			return err
		}
		if err := b.ask(url, n); err != nil {
			return err
		}
		r := row{requests: n}
		name := fmt.Sprintf("%s/bench/%s:after-%d", reg.Host, app, n)
		if r.delta, err = b.checkpoint(id, name+"-delta", first); err != nil {
			return err
		}
		if r.whole, err = b.checkpoint(id, name+"-whole", ""); err != nil {
			return err
		}
		if r.changed, err = b.changed(first, name+"-delta"); err != nil {
			return err
		}
		if err := b.remove(id); err != nil {
			return err
		}
		rows = append(rows, r)
		fmt.Fprintf(os.Stderr, "after %d requests: done\n", n)
	}
	return report(warmUp, whole, rows)
}

type bench struct {
	d       *harness.Daemon
	network *harness.Network
	ctx     context.Context
}

// sizes are of one checkpoint, in bytes.
type sizes struct {
	dump     int64 // what CRIU's files in the layer take, unpacked
	layer    int64 // the checkpoint layer as stored
	uploaded int64 // what the registry was sent: also changes of files, configuration, manifest
	frozen   string
}

type row struct {
	requests     int
	changed      int64 // bytes of pages that the first checkpoint has not, or has otherwise
	delta, whole sizes
}

// start runs a container and returns where it answers, as soon as it does.
func (b *bench) start(id, image, restore string) (string, error) {
	if _, err := b.d.Ctr(b.ctx, "run", "--detach", "--cni", "--runtime", oci.RuntimeName,
		"--annotation", oci.AnnotationPrefix+"restore="+restore, image, id); err != nil {
		return "", err
	}
	c, err := b.d.Client.LoadContainer(b.ctx, id)
	if err != nil {
		return "", err
	}
	task, err := c.Task(b.ctx, nil)
	if err != nil {
		return "", err
	}
	ip, err := b.network.IP(b.ctx, int(task.Pid()))
	if err != nil {
		return "", err
	}
	url := fmt.Sprintf("http://%s:%d", ip, port)
	ctx, cancel := context.WithTimeout(b.ctx, 5*time.Minute)
	defer cancel()
	_, _, err = harness.WaitHTTP(ctx, url+pages[0])
	return url, err
}

func (b *bench) ask(url string, n int) error {
	for i := range n {
		if _, err := harness.Get(b.ctx, url+pages[i%len(pages)]); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) remove(id string) error {
	_, err := b.d.Ctr(b.ctx, "tasks", "delete", "--force", id)
	_, err2 := b.d.Ctr(b.ctx, "containers", "delete", id)
	return errors.Join(err, err2, b.network.Release(b.ctx, id))
}

// checkpoint makes an image and pushes it. The container runs on.
func (b *bench) checkpoint(id, image, parent string) (s sizes, err error) {
	args := []string{"checkpoint", "--quiet"}
	if parent != "" {
		args = append(args, "--parent", parent)
	}
	if _, err := b.d.Cracctl(b.ctx, append(args, id, image)...); err != nil {
		return s, err
	}
	var about struct{ DumpSize, CheckpointSize int64 }
	if err := b.cracctl(&about, "inspect", image); err != nil {
		return s, err
	}
	record, err := b.d.Client.ImageService().Get(b.ctx, image)
	if err != nil {
		return s, err
	}
	p, err := registry.Push(b.ctx, registry.Config{}, b.d.Client.ContentStore(), image, record.Target, nil)
	return sizes{about.DumpSize, about.CheckpointSize, p.Uploaded, record.Labels[build.LabelFrozen]}, err
}

// changed is how much memory of an image is not in another one.
func (b *bench) changed(from, to string) (int64, error) {
	var d struct {
		Memory struct{ Changed, Added int64 }
	}
	err := b.cracctl(&d, "diff", from, to)
	return d.Memory.Changed + d.Memory.Added, err
}

func (b *bench) cracctl(into any, args ...string) error {
	out, err := b.d.Cracctl(b.ctx, append(args, "--format", "json")...)
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(out), into)
}

func report(warmUp int, first sizes, rows []row) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	fmt.Printf("%s, kernel %s; %s after %d requests: dump %s MiB, layer %s MiB, sent %s MiB, stood still %s\n\n", time.Now().UTC().Format(time.DateOnly),
		unix.ByteSliceToString(u.Release[:]), app, warmUp, mib(first.dump), mib(first.layer), mib(first.uploaded), first.frozen)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 1, ' ', 0)
	fmt.Fprintln(w, "| requests since\t| pages changed\t| MiB of them\t| delta: dump\t| layer\t| sent\t| whole: dump\t| layer\t| sent\t| sent, delta to whole\t| sent, to changed\t|")
	fmt.Fprintln(w, "|---\t|---\t|---\t|---\t|---\t|---\t|---\t|---\t|---\t|---\t|---\t|")
	for _, r := range rows {
		fmt.Fprintf(w, "| %d\t| %d\t| %s\t| %s\t| %s\t| %s\t| %s\t| %s\t| %s\t| %.0f %%\t| %.0f %%\t|\n", r.requests, r.changed/int64(os.Getpagesize()), mib(r.changed),
			mib(r.delta.dump), mib(r.delta.layer), mib(r.delta.uploaded), mib(r.whole.dump), mib(r.whole.layer), mib(r.whole.uploaded),
			100*float64(r.delta.uploaded)/float64(r.whole.uploaded), 100*float64(r.delta.uploaded)/float64(max(r.changed, 1)))
	}
	return w.Flush()
}

func mib(n int64) string { return fmt.Sprintf("%.1f", float64(n)/(1<<20)) }
