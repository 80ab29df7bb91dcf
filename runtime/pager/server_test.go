package pager

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// held restores a dump with a drain that waits until release is called, so that
// memory is missing for as long as a test needs it.
func (w *workload) held(images string) (s *Server, release func()) {
	w.t.Helper()
	hold := make(chan struct{})
	s = w.restore(images, func(c *Config) { c.hold = hold })
	return s, func() {
		w.t.Helper()
		close(hold)
		drained(w.t, s)
	}
}

// Everything that a restored process reads is what was dumped, however it comes.
func TestServe(t *testing.T) {
	w := newWorkload(t, "map 1 8192", "fill 1 0 8192", "map 2 100", "fill 2 50 10")
	s := w.restore(w.dump("dump"), nil)
	check := func() {
		t.Helper()
		w.run("check 1 0 8192")
		w.run("check 2 50 10")
		w.run("zero 2 0 50")
		w.run("zero 2 60 40")
	}
	check()
	drained(t, s)
	check()
	stats := s.Stats()
	if stats.Tasks != 1 || stats.Total < 8202*int64(pageSize) || stats.Restored <= 0 || stats.Drained < stats.Restored {
		t.Errorf("%+v", stats)
	}
}

// Faults alone bring everything, and the drain alone.
func TestFaultsAndDrainAlone(t *testing.T) {
	w := newWorkload(t, "map 1 2048", "fill 1 0 2048")
	s, release := w.held(w.dump("dump"))
	w.run("check 1 0 2048")
	// The last neighbours may be under way when the workload has its page.
	for start := time.Now(); s.Stats().FaultBytes < 2048*int64(pageSize); time.Sleep(time.Millisecond) {
		if time.Since(start) > 10*time.Second {
			t.Fatalf("with faults alone: %+v", s.Stats())
		}
	}
	if stats := s.Stats(); stats.DrainBytes != 0 {
		t.Errorf("with faults alone: %+v", stats)
	}
	release()

	w = newWorkload(t, "map 1 2048", "fill 1 0 2048")
	s = w.restore(w.dump("dump"), nil)
	if err := s.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	if stats := s.Stats(); stats.DrainBytes < 1024*int64(pageSize) {
		t.Errorf("with the drain: %+v", stats)
	}
	w.run("check 1 0 2048")
}

// What the workload does to memory that is missing is what it does to memory.
func TestEvents(t *testing.T) {
	for name, commands := range map[string][]string{
		"given up": {
			fmt.Sprintf("advise 1 100 50 %d", unix.MADV_DONTNEED),
			"|", "zero 1 100 50", "check 1 0 100", "check 1 150 362",
		},
		"given up, and asked for at once": {
			"check 1 120 1", fmt.Sprintf("advise 1 100 50 %d", unix.MADV_DONTNEED), "zero 1 100 50", "fill 1 110 5",
			"|", "check 1 110 5", "zero 1 100 10", "zero 1 115 35", "check 1 0 100", "check 1 150 362",
		},
		"unmapped": {"unmap 1 100 50", "|", "check 1 0 100", "check 1 150 362"},
		"moved":    {"move 1 100 50 2", "|", "check 2 100 50 1", "check 1 0 100", "check 1 150 362"},
		"moved, and asked for at once": {
			"move 1 100 50 2", "check 2 120 10 1", "|", "check 2 100 50 1", "check 1 0 100", "check 1 150 362",
		},
		"moved, given up in part and moved again": {
			"move 1 100 50 2", fmt.Sprintf("advise 2 110 10 %d", unix.MADV_DONTNEED), "move 2 100 50 3",
			"|", "check 3 100 10 1", "zero 3 110 10", "check 3 120 30 1",
		},
		"split by protections": {
			"protect 1 100 1 1", "protect 1 102 1 0", "protect 1 104 30 1", "check 1 103 3",
			"|", "protect 1 102 1 3", "check 1 0 512",
		},
		"locked":          {"lock 1 100 50", "check 1 100 50", "|", "check 1 0 512"},
		"threads at once": {"threads 1 16", "|", "check 1 0 512"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorkload(t, "map 1 512", "fill 1 0 512")
			_, release := w.held(w.dump("dump"))
			for _, c := range commands {
				if c == "|" {
					release()
				} else {
					w.run(c)
				}
			}
		})
	}
}

// Children have what their parents had, and live on their own.
func TestFork(t *testing.T) {
	w := newWorkload(t, "map 1 512", "fill 1 0 512")
	w.makePipes("c1")
	w.makePipes("c2")
	s, release := w.held(w.dump("dump"))
	w.run("check 1 0 10")
	w.run("fork 1")
	w.runIn("c1", fmt.Sprintf("advise 1 100 50 %d", unix.MADV_DONTNEED))
	w.runIn("c1", "fork 2") // a grandchild
	w.run("fill 1 200 1")
	w.runIn("c1", "move 1 300 50 2")
	w.runIn("c2", "check 1 290 70")
	w.run("check 1 100 50")
	release()
	w.run("check 1 0 512")
	w.runIn("c1", "zero 1 100 50")
	w.runIn("c1", "check 1 150 150")
	w.runIn("c1", "check 2 300 50 1")
	w.runIn("c2", "zero 1 100 50")
	w.runIn("c2", "check 1 150 362")
	if stats := s.Stats(); stats.Forks != 2 {
		t.Errorf("%+v", stats)
	}
}

// Random use of memory while it comes.
func TestChurn(t *testing.T) {
	for seed := range 6 {
		w := newWorkload(t, "map 1 4096", "fill 1 0 4096")
		s := w.restore(w.dump("dump"), nil)
		w.run(fmt.Sprintf("churn 1 400 %d", seed))
		drained(t, s)
	}
}

// Processes of a dump are served each for itself, and the dead ones not at all.
func TestProcesses(t *testing.T) {
	w := newWorkload(t, "map 1 256", "fill 1 0 256")
	for i := range 6 {
		w.makePipes(fmt.Sprintf("c%d", i))
		w.run(fmt.Sprintf("fork %d", i))
	}
	w.runIn("c0", "fill 1 0 1") // a page of its own
	if answer, err := w.askOnce("c1", "exit 3"); err == nil {
		t.Fatal(answer)
	}
	s, release := w.held(w.dump("dump"))
	w.run("check 1 0 256")
	for _, c := range []string{"c0", "c2", "c3"} {
		w.runIn(c, "check 1 0 256")
	}
	// One leaves while its memory is missing, and one that is about to ask.
	_, _ = w.askOnce("c4", "exit 0")
	release()
	w.runIn("c5", "check 1 0 256")
	if stats := s.Stats(); stats.Tasks != 6 {
		t.Errorf("%d processes instead of 6 and a zombie: %+v", stats.Tasks, stats)
	}
}

// As many areas as a process may have.
func TestManyAreas(t *testing.T) {
	w := newWorkload(t, "map 1 60000", "fill 1 0 60000", "stripe 1 1")
	images := w.dump("dump")
	s := w.restore(images, nil)
	w.run("check 1 0 60000")
	drained(t, s)
	w.run("check 1 0 60000")
}

// What two processes must not share comes up empty.
func TestWipeOnFork(t *testing.T) {
	w := newWorkload(t, "map 1 64", "fill 1 0 64", fmt.Sprintf("advise 1 16 16 %d", unix.MADV_WIPEONFORK))
	s := w.restore(w.dump("dump"), nil)
	w.run("zero 1 16 16")
	w.run("check 1 0 16")
	w.run("check 1 32 32")
	drained(t, s)
	w.run("zero 1 16 16")
}

// Guards that were there stay, and hide nothing but zeroes.
func TestGuards(t *testing.T) {
	const guardInstall, guardRemove = 102, 103
	w := newWorkload(t, "map 1 64", "fill 1 0 64")
	if answer, err := w.ask("w", fmt.Sprintf("advise 1 16 16 %d", guardInstall)); err != nil || answer != "ok" {
		t.Skipf("this kernel has no guards: %s %v", answer, err)
	}
	w.makePipes("c1")
	s := w.restore(w.dump("dump"), nil)
	drained(t, s)
	w.run("check 1 0 16")
	w.run("check 1 32 32")
	// A child that looks at one dies of it, and does not answer.
	w.run("fork 1")
	if answer, err := w.askOnce("c1", "zero 1 20 1"); err == nil {
		t.Errorf("behind a guard: %s", answer)
	}
	w.run(fmt.Sprintf("advise 1 16 16 %d", guardRemove))
	w.run("zero 1 16 16")
}

// Of a dump that builds on another one, both are read: what CRIU reads itself,
// and what it leaves to us. The second dump is made from a real one, since not
// every kernel can tell what has changed.
func TestChain(t *testing.T) {
	for name, flags := range map[string]uint64{"as criu makes it": entryParent, "lazy": entryParent | entryLazy} {
		t.Run(name, func(t *testing.T) {
			w := newWorkload(t, "map 1 1024", "fill 1 0 1024")
			first := w.dump("first")
			second := w.buildOn(first, flags)
			s := w.restore(second, nil)
			w.run("check 1 0 1024")
			drained(t, s)
			w.run("check 1 0 1024")
			if total := s.Stats().Total; (total >= 1024*int64(pageSize)) != (flags&entryLazy != 0) {
				t.Errorf("%d bytes are ours", total)
			}
		})
	}
}

// buildOn makes a dump of which every other 16 lazy pages are in the one given.
func (w *workload) buildOn(first string, flags uint64) (second string) {
	w.t.Helper()
	second = filepath.Join(w.dir, "second")
	if err := os.CopyFS(second, os.DirFS(first)); err != nil {
		w.t.Fatal(err)
	}
	if err := os.Symlink("../first", filepath.Join(second, "parent")); err != nil {
		w.t.Fatal(err)
	}
	name := fmt.Sprintf("pagemap-%d.img", w.pid)
	image, err := os.ReadFile(filepath.Join(first, name))
	if err != nil {
		w.t.Fatal(err)
	}
	id, entries, err := parsePagemap(image, pageSize)
	if err != nil {
		w.t.Fatal(err)
	}
	pagesName := fmt.Sprintf("pages-%d.img", id)
	pages, err := os.ReadFile(filepath.Join(first, pagesName))
	if err != nil {
		w.t.Fatal(err)
	}
	var changed [][]byte
	var kept []byte
	for _, e := range entries {
		for e.len > 0 {
			n, flagsHere := min(e.len, 16*pageSize), uint64(e.flags)
			if e.flags&entryLazy != 0 && e.addr/pageSize/16%2 == 0 {
				flagsHere = flags
			} else {
				kept = append(kept, pages[:n]...)
			}
			changed = append(changed, pageEntry(e.addr/pageSize, n/pageSize, flagsHere))
			e.addr, e.len, pages = e.addr+n, e.len-n, pages[n:]
		}
	}
	for name, data := range map[string][]byte{name: pagemapOfPages(uint64(id), changed...), pagesName: kept} {
		if err := os.WriteFile(filepath.Join(second, name), data, 0o600); err != nil {
			w.t.Fatal(err)
		}
	}
	return second
}

// A file that gets lost under the pager's hands is the end of the workload.
func TestDamage(t *testing.T) {
	for name, ask := range map[string]string{"asked for": "check 1 0 8192", "drained": ""} {
		t.Run(name, func(t *testing.T) {
			w := newWorkload(t, "map 1 8192", "fill 1 0 8192")
			images := w.dump("dump")
			hold := make(chan struct{})
			s := w.restore(images, func(c *Config) { c.hold = hold })
			if err := os.Truncate(filepath.Join(images, "pages-1.img"), 1<<20); err != nil {
				t.Fatal(err)
			}
			if ask == "" {
				close(hold)
			} else if answer, err := w.ask("w", ask); !errors.Is(err, errWorkloadDead) {
				t.Errorf("the workload says %s %v", answer, err)
			}
			err := s.Wait()
			if err == nil || !strings.Contains(err.Error(), "pages-1.img is damaged or cannot be read") {
				t.Errorf("error %v", err)
			}
			if w.alive() {
				t.Error("the workload is alive")
			}
		})
	}
}

// A restore that fails ends the server, and hurts nobody.
func TestRestoreFails(t *testing.T) {
	w := newWorkload(t, "map 1 64", "fill 1 0 64")
	images := w.dump("dump")
	if err := os.Remove(filepath.Join(w.dir, "w.in")); err != nil {
		t.Fatal(err)
	}
	s, err := Serve(t.Context(), w.config(images))
	if err != nil {
		t.Fatal(err)
	}
	if err := w.criuCommand("restore", "--lazy-pages", "-d", "-D", images).Run(); err == nil {
		t.Fatal("the restore has not failed")
	}
	if err := s.Wait(); err == nil || !strings.Contains(err.Error(), "the restore has failed") {
		t.Errorf("error %v", err)
	}
}

// Without a restore there is nothing to wait for.
func TestServeCancelled(t *testing.T) {
	w := newWorkload(t)
	images := w.dump("dump")
	ctx, cancel := context.WithCancelCause(context.Background())
	s, err := Serve(ctx, w.config(images))
	if err != nil {
		t.Fatal(err)
	}
	cancel(errors.New("never mind"))
	if err := s.Wait(); err == nil || err.Error() != "never mind" {
		t.Errorf("error %v", err)
	}
}

// A dump right after Finish is complete.
func TestDumpWhileDraining(t *testing.T) {
	w := newWorkload(t, "map 1 16384", "fill 1 0 16384")
	s := w.restore(w.dump("first"), nil)
	if err := s.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	second := w.dump("second")
	w.criuRestore(second)
	w.run("check 1 0 16384")
}

// The working set of one restore is where the next one begins.
func TestRecord(t *testing.T) {
	w := newWorkload(t, "map 1 4096", "fill 1 0 4096")
	images := w.dump("dump")
	record := filepath.Join(w.dir, "workingset")
	hold := make(chan struct{})
	s := w.restore(images, func(c *Config) { c.Record, c.hold = record, hold })
	for _, page := range []int{2000, 100, 3000} {
		w.run(fmt.Sprintf("check 1 %d 1", page))
	}
	close(hold)
	drained(t, s)
	got, err := loadWorkingSet(record)
	if err != nil {
		t.Fatal(err)
	}
	// Between them there may be pages of the workload's own.
	found := false
	for i, first := range got {
		found = found || containsInOrder(got[i:], first.page, first.page-1900, first.page+1000)
	}
	if !found {
		t.Errorf("%v has not pages 2000, 100 and 3000 in this order", got)
	}

	if stats := s.Stats(); stats.WorkingSet != 0 {
		t.Errorf("without a working set: %+v", stats)
	}

	// The second one finds them there without having asked for them, and adds what
	// it asks for before that comes.
	w.kill()
	s = w.restore(images, func(c *Config) { c.WorkingSet, c.Record = record, record })
	drained(t, s)
	if stats := s.Stats(); stats.WorkingSet < 3*int64(pageSize) {
		t.Errorf("with a working set: %+v", stats)
	}
	w.run("check 1 0 4096")
	if after, err := loadWorkingSet(record); err != nil || len(after) < len(got) || !slices.Equal(after[:len(got)], got) {
		t.Errorf("%v became %v (%v)", got, after, err)
	}

	// What is damaged is ignored, and replaced.
	if err := os.WriteFile(record, []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	w.kill()
	hold = make(chan struct{})
	s = w.restore(images, func(c *Config) { c.WorkingSet, c.Record, c.hold = record, record, hold })
	if s.warning == nil {
		t.Error("nothing is said of a damaged file")
	}
	w.run("check 1 2000 1")
	close(hold)
	drained(t, s)
	w.run("check 1 0 4096")
	if again, err := loadWorkingSet(record); err != nil || len(again) == 0 {
		t.Errorf("after a damaged one: %v, %v", again, err)
	}
}

func containsInOrder(runs workingSet, pages ...uint64) bool {
	for _, run := range runs {
		if len(pages) > 0 && run.page == pages[0] {
			pages = pages[1:]
		}
	}
	return len(pages) == 0
}

// A workload that reaches its limit of memory dies, as it would without us.
func TestMemoryLimit(t *testing.T) {
	needPrograms(t)
	const v1 = "/sys/fs/cgroup/memory"
	if _, err := os.Stat(filepath.Join(v1, "memory.limit_in_bytes")); err != nil {
		t.Skip("this needs the memory controller of cgroup v1")
	}
	w := newWorkload(t, "map 1 16384", "fill 1 0 16384")
	images := w.dump("dump")
	limited := newCgroupIn(t, v1)
	if err := os.WriteFile(filepath.Join(limited, "memory.limit_in_bytes"), []byte("20M"), 0); err != nil {
		t.Fatal(err)
	}
	w.group = limited
	start := time.Now()
	s := w.restore(images, nil)
	answer, err := w.ask("w", "check 1 0 16384")
	if !errors.Is(err, errWorkloadDead) {
		t.Errorf("the workload says %s %v after %v", answer, err, time.Since(start))
	}
	t.Log(s.Wait())
}
