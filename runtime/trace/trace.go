// Package trace keeps where the time of a container's start went.
package trace

import (
	"encoding/json"
	"slices"
	"sync"
	"time"
)

// FileName is the trace's in a container's bundle.
const FileName = "trace.json"

// maxSteps bounds a trace: a start has some forty steps, and what goes on after it
// may not let it grow.
const maxSteps = 256

// Tracks are what goes on at the same time.
const (
	Shim       = "shim"       // the calls of the task API, one after the other
	Background = "background" // what the shim does beside them
	CRIU       = "criu"
	Pager      = "pager"
)

// Step is something that took time. Steps of a track lie one behind the other or
// one within the other.
type Step struct {
	Track string `json:"track"`
	Name  string `json:"name"`
	// At is when it began, after Start.Began. It may lie before it.
	At time.Duration `json:"at_ns"`
	// Took is 0 for what is a moment.
	Took time.Duration `json:"took_ns"`
}

// End is when it was over.
func (s Step) End() time.Duration { return s.At + s.Took }

// Start is a trace as it is written down.
type Start struct {
	Container string    `json:"container"`
	Began     time.Time `json:"began"` // Create was called
	Warm      bool      `json:"warm"`
	Lazy      bool      `json:"lazy"`   // it ran before it had its memory
	Memory    int64     `json:"memory"` // of the dump, in bytes
	Steps     []Step    `json:"steps"`
}

// Recorder records a start. It is safe for concurrent use, and its methods do
// nothing on nil.
type Recorder struct {
	mu    sync.Mutex
	start Start
}

// New begins a trace.
func New(container string) *Recorder {
	return &Recorder{start: Start{Container: container, Began: time.Now(), Steps: make([]Step, 0, 48)}}
}

// Step begins a step of the shim's own track. What it returns ends it.
func (r *Recorder) Step(name string) (end func()) { return r.On(Shim, name) }

// On begins a step of a track.
func (r *Recorder) On(track, name string) (end func()) {
	if r == nil {
		return func() {}
	}
	began := time.Now()
	return func() { r.Add(track, name, began, time.Now()) }
}

// Add adds a step that is over.
func (r *Recorder) Add(track, name string, began, ended time.Time) {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.start.Steps) < maxSteps {
		r.start.Steps = append(r.start.Steps, Step{Track: track, Name: name, At: began.Sub(r.start.Began), Took: ended.Sub(began)})
	}
}

// Facts says what kind of a start it is.
func (r *Recorder) Facts(warm, lazy bool, memory int64) {
	if r == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.start.Warm, r.start.Lazy, r.start.Memory = warm, lazy, memory
}

// Start is what was recorded until now: of each track in order, what contains
// others before them.
func (r *Recorder) Start() Start {
	if r == nil {
		return Start{}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.start
	s.Steps = slices.Clone(s.Steps)
	s.sort()
	return s
}

func (s *Start) sort() {
	slices.SortStableFunc(s.Steps, func(a, b Step) int {
		switch {
		case a.At != b.At:
			return int(min(max(a.At-b.At, -1), 1))
		case a.Took != b.Took:
			return int(min(max(b.Took-a.Took, -1), 1))
		}
		return 0
	})
}

// Chrome is the trace in the format of chrome://tracing, which Perfetto and
// speedscope read as well ("Trace Event Format").
func (s Start) Chrome() ([]byte, error) {
	type event struct {
		Name  string         `json:"name"`
		Phase string         `json:"ph"`
		Pid   int            `json:"pid"`
		Tid   int            `json:"tid"`
		At    float64        `json:"ts"` // microseconds
		Took  float64        `json:"dur,omitempty"`
		Scope string         `json:"s,omitempty"`
		Args  map[string]any `json:"args,omitempty"`
	}
	const pid = 1
	micro := func(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
	events := []event{{Name: "process_name", Phase: "M", Pid: pid, Args: map[string]any{"name": s.Container}}}
	tids := make(map[string]int)
	for _, step := range s.Steps {
		tid, ok := tids[step.Track]
		if !ok {
			tid = len(tids) + 1
			tids[step.Track] = tid
			events = append(events, event{Name: "thread_name", Phase: "M", Pid: pid, Tid: tid, Args: map[string]any{"name": step.Track}})
		}
		e := event{Name: step.Name, Phase: "X", Pid: pid, Tid: tid, At: micro(step.At), Took: micro(step.Took)}
		if step.Took == 0 {
			e.Phase, e.Scope = "i", "t"
		}
		events = append(events, e)
	}
	return json.MarshalIndent(map[string]any{
		"traceEvents":     events,
		"displayTimeUnit": "ms",
		"otherData": map[string]any{
			"container": s.Container, "began": s.Began.UTC().Format(time.RFC3339Nano),
			"warm": s.Warm, "lazy": s.Lazy, "memory": s.Memory,
		},
	}, "", "  ")
}
