package integration

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/crac-shim/crac/runtime/trace"
)

// traced is the trace of a box, checked for what is true of all.
func (b *box) traced(wall time.Duration) trace.Start {
	b.Helper()
	out := b.CracctlOK("trace", "--format", "json", b.id)
	var s trace.Start
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		b.Fatalf("%v in %s", err, out)
	}
	if s.Container != b.id {
		b.Errorf("the trace is of %q", s.Container)
	}
	var calls time.Duration
	for _, step := range s.Steps {
		if step.Took < 0 || step.Name == "" || step.Track == "" {
			b.Errorf("step %+v", step)
		}
		if step.Track == trace.Shim && (step.Name == "create" || step.Name == "start") {
			calls += step.Took
		}
	}
	if calls <= 0 || calls > wall {
		b.Errorf("the calls took %v of the %v that the client waited", calls, wall)
	}
	return s
}

func has(s trace.Start, track, name string) bool {
	return slices.ContainsFunc(s.Steps, func(step trace.Step) bool { return step.Track == track && strings.HasPrefix(step.Name, name) })
}

// A start can be taken apart: cold, warm, and warm with the memory behind it.
func TestTrace(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image := ref(t)
	began := time.Now()
	b := held(t, "", 8, option("checkpoint.image", image))
	var s trace.Start
	t.Eventually("a trace", func() bool {
		_, err := os.Stat(filepath.Join(t.Dir, "state/io.containerd.runtime.v2.task", t.Namespace, b.id, trace.FileName))
		return err == nil
	})
	if s = b.traced(time.Since(began)); s.Warm || has(s, trace.CRIU, "") || !has(s, trace.Shim, "start the container's init") {
		t.Errorf("a cold start: %+v", s)
	}
	b.checkpoint("--exit")
	b.remove()

	for _, memory := range []string{"eager", "lazy"} {
		began := time.Now()
		clone := held(t, image, 8, option("restore", "require"), option("memory", memory))
		t.Eventually("the whole trace", func() bool {
			s = clone.traced(time.Since(began))
			return has(s, trace.Pager, "brings") == (memory == "lazy")
		})
		if !s.Warm || s.Lazy != (memory == "lazy") || s.Memory < 8<<20 {
			t.Errorf("memory=%s: warm %v, lazy %v, %d bytes", memory, s.Warm, s.Lazy, s.Memory)
		}
		for _, name := range []string{"find a checkpoint", "verify", "restore", "CRIU restores", "the client's turn"} {
			if !has(s, trace.Shim, name) {
				t.Errorf("memory=%s: no step %q in %+v", memory, name, s.Steps)
			}
		}
		if !has(s, trace.CRIU, "until post-restore") {
			t.Errorf("memory=%s: no stages of CRIU in %+v", memory, s.Steps)
		}

		out := t.CracctlOK("trace", clone.id)
		if !strings.Contains(out, "SHIM") || !strings.Contains(out, "until post-restore") {
			t.Errorf("memory=%s: %s", memory, out)
		}
		dir, err := t.Path("traces")
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(dir, memory+".json")
		t.CracctlOK("trace", "--output", file, clone.id)
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var chrome struct {
			TraceEvents []struct {
				Name string  `json:"name"`
				Ph   string  `json:"ph"`
				Dur  float64 `json:"dur"`
			} `json:"traceEvents"`
		}
		if err := json.Unmarshal(data, &chrome); err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, e := range chrome.TraceEvents {
			if e.Ph == "X" && e.Dur > 0 {
				n++
			}
		}
		if n < 15 {
			t.Errorf("memory=%s: %d steps for viewers", memory, n)
		}
		clone.remove()
	}
}
