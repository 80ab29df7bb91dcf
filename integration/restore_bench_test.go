package integration

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"

	"github.com/crac-shim/crac/integration/harness"
	"github.com/crac-shim/crac/runtime/thread"
)

// BenchmarkRestore measures restores of holders of several sizes, in turns, so that what else the
// machine does hits all alike: from the call of Create until Start returns, until the first right
// answer, and until all memory was looked at and is right. It prints medians.
//
//	CRAC_BENCH_SIZES   megabytes: 10,1024
//	CRAC_BENCH_MEMORY  values of the option memory: eager,lazy
//	CRAC_BENCH_SHIMS   paths of shims to compare; without it, the one of this build
//	CRAC_BENCH_RUNS    of each: 20
func BenchmarkRestore(b *testing.B) {
	t := shared.For(b, time.Hour)
	list := func(name, otherwise string) []string {
		if v := os.Getenv(name); v != "" {
			return strings.Split(v, ",")
		}
		return strings.Split(otherwise, ",")
	}
	runs, err := strconv.Atoi(list("CRAC_BENCH_RUNS", "20")[0])
	if err != nil {
		t.Fatal(err)
	}
	var all []*contender
	for _, size := range list("CRAC_BENCH_SIZES", "10,1024") {
		mb, err := strconv.Atoi(size)
		if err != nil {
			t.Fatal(err)
		}
		image := ref(b)
		original := held(t, "", mb, option("checkpoint.image", image))
		original.checkpoint("--exit")
		original.remove()
		for _, shim := range list("CRAC_BENCH_SHIMS", testRuntime) {
			for _, memory := range list("CRAC_BENCH_MEMORY", "eager,lazy") {
				all = append(all, &contender{mb: mb, shim: shim, memory: memory, image: image})
			}
		}
	}
	for i := -2; i < runs; i++ {
		order := slices.Clone(all)
		if i%2 != 0 {
			slices.Reverse(order)
		}
		for _, c := range order {
			running, answer, complete := c.run(t)
			if i >= 0 {
				c.running, c.answer, c.complete = append(c.running, running), append(c.answer, answer), append(c.complete, complete)
			}
		}
	}
	for _, c := range all {
		// Not by Log, of which a benchmark shows ten lines.
		fmt.Printf("%4d MB  %-5s  running %v  first answer %v  all of it %v  %s\n", c.mb, c.memory, spread(c.running), spread(c.answer), spread(c.complete), c.shim)
	}
}

// contender is one way to restore.
type contender struct {
	mb                        int
	shim, memory, image       string
	running, answer, complete []time.Duration
}

func spread(all []time.Duration) string {
	all = slices.Sorted(slices.Values(all))
	ms := func(i int) float64 { return float64(all[i]) / float64(time.Millisecond) }
	return fmt.Sprintf("%6.1f ms (%.1f to %.1f)", ms(len(all)/2), ms(0), ms(len(all)-1))
}

func (c *contender) run(t *harness.T) (running, answer, complete time.Duration) {
	t.Helper()
	b := newBox(t, newID(t))
	img, err := t.Client.GetImage(t.Ctx, c.image)
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"containers", "create", "--runtime", c.shim, option("restore", "require"), option("memory", c.memory)}
	args = append(args, "--mount", "type=bind,src="+filepath.Join(t.Dir, "x/holder")+",dst=/opt/holder,options=rbind:ro")
	t.CtrOK(append(args, img.Name(), b.id, "/opt/holder/holder", "-mb", strconv.Itoa(c.mb))...)
	made, err := t.Client.LoadContainer(t.Ctx, b.id)
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	task, err := made.NewTask(t.Ctx, cio.NullIO)
	if err != nil {
		t.Fatal(err)
	}
	if err := task.Start(t.Ctx); err != nil {
		t.Fatal(err)
	}
	running = time.Since(began)
	answer, complete = b.answers(task, began)
	b.remove()
	return running, answer, complete
}

// answers asks a holder over its own network, without an exec.
func (b *box) answers(task containerd.Task, began time.Time) (first, all time.Duration) {
	b.Helper()
	err := thread.InNetwork(int(task.Pid()), func() error {
		conn, err := net.Dial("tcp", "127.0.0.1:9000")
		if err != nil {
			return err
		}
		defer conn.Close()
		in := bufio.NewReader(conn)
		for _, q := range []struct {
			ask, want string
			took      *time.Duration
		}{{"hello", "hello", &first}, {"check", "ok", &all}} {
			if _, err := fmt.Fprintln(conn, q.ask); err != nil {
				return err
			}
			line, err := in.ReadString('\n')
			*q.took = time.Since(began)
			if err != nil || strings.TrimSpace(line) != q.want {
				return fmt.Errorf("%s: %q, %w", q.ask, line, err)
			}
		}
		return nil
	})
	if err != nil {
		b.Fatal(err)
	}
	return first, all
}
