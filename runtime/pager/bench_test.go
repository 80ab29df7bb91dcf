package pager

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkRestore restores one process of some size in turn by CRIU alone and
// with the pager, and copies the same bytes with as many threads as there are
// CPUs, which is the machine's limit. In ms, medians:
//
//	eager          criu restore, to its end: everything is there
//	lazy-run       criu restore --lazy-pages, to its end: the workload runs
//	lazy-answer    to the answer of a command to the workload
//	lazy-all       until all memory is there, with the drain at its usual pace
//	finish-all     the same, with Finish right after the restore
//	copy           the plain copy, into fresh memory
//	small          criu restore --lazy-pages of a process without that memory
//	*-cpu          what the pager has used
//	pager-start    to start a pager, which is done before the restore
//
// go test ./runtime/pager -run - -bench Restore -benchtime 10x
func BenchmarkRestore(b *testing.B) {
	small := newWorkload(b, "map 1 1", "fill 1 0 1")
	smallImages := small.dump("dump")
	for _, mb := range []int{10, 100, 500, 1000} {
		b.Run(fmt.Sprintf("%dMB", mb), func(b *testing.B) {
			n := mb << 20 / int(pageSize)
			w := newWorkload(b, fmt.Sprintf("map 1 %d", n), fmt.Sprintf("fill 1 0 %d", n), "map 2 1")
			images := w.dump("dump")
			times := make(map[string][]time.Duration)
			note := func(name string, d time.Duration) { times[name] = append(times[name], d) }
			b.ResetTimer()
			for range b.N {
				note("eager", timed(func() { w.criuRestore(images) }))
				w.kill()
				w.lazily(images, note, "lazy", false)
				w.kill()
				w.lazily(images, note, "finish", true)
				w.kill()
				note("copy", plainCopy(b, filepath.Join(images, "pages-1.img")))
				small.lazily(smallImages, note, "small", true)
				small.kill()
			}
			b.StopTimer()
			reportMedians(b, times)
		})
	}
}

// BenchmarkFirstAnswer restores a process of 500 MB, which then reads some of its pages before it
// answers: few, or many, all over its memory; alone, or while it has threads that need all CPUs. In turn with the drain
// and without, in ms from the start of criu restore, medians: the drain must not make an answer later.
//
// CRAC_PAGER_TEST=1 go test ./runtime/pager -run - -bench FirstAnswer -benchtime 20x
func BenchmarkFirstAnswer(b *testing.B) {
	n := 500 << 20 / int(pageSize)
	for _, spin := range []int{0, 2 * goruntime.NumCPU()} {
		setup := []string{fmt.Sprintf("map 1 %d", n), fmt.Sprintf("fill 1 0 %d", n)}
		name := "alone"
		if spin > 0 {
			setup, name = append(setup, fmt.Sprintf("spin %d", spin)), "busy"
		}
		w := newWorkload(b, setup...)
		images := w.dump("dump")
		for _, every := range []int{1024, 16} {
			b.Run(fmt.Sprintf("%s/%dpages", name, n/every), func(b *testing.B) {
				times := make(map[string][]time.Duration)
				for i := range 2 * b.N {
					metric, hold := "with", make(chan struct{})
					if i%2 == 0 {
						metric = "without"
					} else {
						close(hold)
					}
					start := time.Now()
					s := w.restore(images, func(c *Config) { c.hold, c.realtime = hold, true })
					w.run(fmt.Sprintf("every 1 %d", every))
					times[metric] = append(times[metric], time.Since(start))
					w.kill()
					s.fail(errors.New("it has answered"))
					<-s.Done()
				}
				reportMedians(b, times)
			})
		}
	}
}

// reportMedians reports them as NAME-ms.
func reportMedians(b *testing.B, times map[string][]time.Duration) {
	for name, d := range times {
		slices.Sort(d)
		b.ReportMetric(float64(d[len(d)/2].Microseconds())/1000, name+"-ms")
	}
	b.ReportMetric(0, "ns/op")
}

func timed(f func()) time.Duration {
	start := time.Now()
	f()
	return time.Since(start)
}

// lazily restores with a pager process.
func (w *workload) lazily(images string, note func(string, time.Duration), name string, finish bool) {
	w.t.Helper()
	start := time.Now()
	p, err := Start(context.Background(), ProcessConfig{Config: w.config(images)})
	if err != nil {
		w.t.Fatal(err)
	}
	defer func() { _ = p.Stop(context.Background()) }()
	note("pager-start", time.Since(start))
	start = time.Now()
	w.criuRestore(images, "--lazy-pages")
	note(name+"-run", time.Since(start))
	if finish {
		err = p.Finish(context.Background())
	} else {
		w.run("zero 2 0 1")
		note(name+"-answer", time.Since(start))
		err = p.Wait()
	}
	if err != nil {
		w.t.Fatal(err)
	}
	note(name+"-all", time.Since(start))
	note(name+"-cpu", p.cmd.ProcessState.SystemTime()+p.cmd.ProcessState.UserTime())
}

// plainCopy copies a file from the page cache into fresh memory.
func plainCopy(b *testing.B, path string) time.Duration {
	b.Helper()
	f, err := os.Open(path)
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		b.Fatal(err)
	}
	size := int(st.Size())
	from, err := unix.Mmap(int(f.Fd()), 0, size, unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = unix.Munmap(from) }()
	to, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = unix.Munmap(to) }()
	return timed(func() {
		threads := goruntime.NumCPU()
		var all sync.WaitGroup
		for i := range threads {
			all.Go(func() { copy(to[i*size/threads:(i+1)*size/threads], from[i*size/threads:]) })
		}
		all.Wait()
	})
}

// BenchmarkFault is the time that a process waits for a page, without a drain: it
// reads every 16th, since a fault brings the neighbours. Zeroes come in runs; the
// time is for each page that is written.
func BenchmarkFault(b *testing.B) {
	defer goruntime.GOMAXPROCS(goruntime.GOMAXPROCS(8))
	const n = 1 << 15
	for name, command := range map[string]string{"contents": "every 1 16", "zeroes": "fill 2 0 32768", "native": "fill 3 0 32768"} {
		b.Run(name, func(b *testing.B) {
			w := newWorkload(b, fmt.Sprintf("map 1 %d", n), fmt.Sprintf("fill 1 0 %d", n), fmt.Sprintf("map 2 %d", n))
			images := w.dump("dump")
			var took time.Duration
			var faults int64
			for range b.N {
				s, release := w.held(images)
				w.run(fmt.Sprintf("map 3 %d", n))
				w.run("check 1 0 1")
				before := s.Stats().Faults
				took += timed(func() { w.run(command) })
				faults += s.Stats().Faults - before
				release()
				w.kill()
			}
			pages := n
			if name == "contents" {
				pages /= 16
			}
			b.ReportMetric(float64(took.Nanoseconds())/float64(pages)/float64(b.N), "ns/page")
			b.ReportMetric(float64(faults)/float64(b.N), "faults")
			b.ReportMetric(0, "ns/op")
		})
	}
}
