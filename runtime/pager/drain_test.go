package pager

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestRunnable(t *testing.T) {
	for line, want := range map[string]int{
		"0.20 0.18 0.12 1/80 11206\n":   1,
		"10.2 0.18 0.12 117/8000 112\n": 117,
		"":                              0,
		"0.1 0.2":                       0,
	} {
		if got := runnable([]byte(line)); got != want {
			t.Errorf("%q: %d instead of %d", line, got, want)
		}
	}
}

// The drain rests while CPUs are short, unless somebody waits for its end.
func TestRest(t *testing.T) {
	for name, c := range map[string]struct {
		line    string
		late    bool
		hurried bool
		want    time.Duration // times the work
	}{
		"crowded":             {"0 0 0 9/80 1", false, false, earlyRest},
		"crowded for long":    {"0 0 0 9/80 1", true, false, lateRest},
		"not crowded":         {"0 0 0 2/80 1", false, false, 0},
		"crowded, in a hurry": {"0 0 0 9/80 1", false, true, 0},
	} {
		path := filepath.Join(t.TempDir(), "loadavg")
		if err := os.WriteFile(path, []byte(c.line), 0o600); err != nil {
			t.Fatal(err)
		}
		p := pace{cpus: 2}
		var err error
		if p.loadavg, err = os.Open(path); err != nil {
			t.Fatal(err)
		}
		defer p.close()
		if p.begin(); c.late {
			p.began.Add(-int64(earlyTime))
		}
		if c.hurried {
			p.hurry()
		}
		const worked = 20 * time.Millisecond
		start := time.Now()
		p.rest(worked)
		// The machine may add anything, but takes nothing away.
		if rested := time.Since(start); rested < c.want*worked || c.want == 0 && rested > worked {
			t.Errorf("%s: it has rested for %v", name, rested)
		}
	}
}

// Batches are small while there are faults: they wait for one under way.
func TestBatch(t *testing.T) {
	var p pace
	time.Sleep(2 * faultQuiet) // the program may have just begun
	if got := p.batch(); got != batchBytes {
		t.Errorf("%d bytes without faults", got)
	}
	p.fault()
	if got := p.batch(); got != faultBytes {
		t.Errorf("%d bytes after a fault", got)
	}
	time.Sleep(2 * faultQuiet)
	if got := p.batch(); got != batchBytes {
		t.Errorf("%d bytes some time after a fault", got)
	}
}
