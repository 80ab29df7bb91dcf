package pager

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

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
		p := pace{cpus: 2, loadavg: loadavg(t, c.line)}
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
		if rested := time.Since(start); rested < c.want*worked || c.want == 0 && rested > earlyRest*worked/2 {
			t.Errorf("%s: it has rested for %v", name, rested)
		}
	}
}

// What nobody has asked for waits while there is a crowd; not for long, and not
// when somebody waits for it, or nobody does any more.
func TestRestOfCrowd(t *testing.T) {
	stopped := make(chan struct{})
	close(stopped)
	for name, c := range map[string]struct {
		line    string
		since   time.Duration // the restore
		hurried bool
		stopped chan struct{}
		want    time.Duration
	}{
		"crowd":                      {"0 0 0 9/80 1", crowdTime - crowdLook, false, nil, crowdLook},
		"crowd for long":             {"0 0 0 9/80 1", crowdTime, false, nil, 0},
		"crowd, in a hurry":          {"0 0 0 9/80 1", 0, true, nil, 0},
		"crowd, after the end":       {"0 0 0 9/80 1", 0, false, stopped, 0},
		"no crowd, but short of CPU": {"0 0 0 6/80 1", 0, false, nil, 0},
	} {
		p := pace{cpus: 2, loadavg: loadavg(t, c.line), stopped: c.stopped}
		defer p.close()
		p.begin()
		p.began.Add(-int64(c.since))
		if c.hurried {
			p.hurry()
		}
		start := time.Now()
		p.restOfCrowd()
		if rested := time.Since(start); rested < c.want || c.want == 0 && rested > crowdTime/2 {
			t.Errorf("%s: it has rested for %v", name, rested)
		}
	}
}

func loadavg(t *testing.T, line string) *os.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "loadavg")
	if err := os.WriteFile(path, []byte(line), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	return f
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
