package trace

import (
	"encoding/json"
	"strings"
	"sync"
	"testing"
	"time"
)

func TestStartIsInOrder(t *testing.T) {
	r := New("web")
	began := r.Start().Began
	at := func(ms int) time.Time { return began.Add(time.Duration(ms) * time.Millisecond) }
	// As they end: what contains others comes last.
	r.Add(CRIU, "c", at(3), at(4))
	r.Add(Shim, "inner", at(1), at(2))
	r.Add(Shim, "outer", at(1), at(6))
	r.Add(Shim, "before", at(-5), at(0))
	r.Add(Pager, "moment", at(5), at(5))
	r.Facts(true, true, 7)
	s := r.Start()
	var names []string
	for _, step := range s.Steps {
		names = append(names, step.Name)
	}
	if got := strings.Join(names, " "); got != "before outer inner c moment" {
		t.Errorf("in the order %s", got)
	}
	if !s.Warm || !s.Lazy || s.Memory != 7 || s.Steps[1].End() != 6*time.Millisecond {
		t.Errorf("%+v", s)
	}
	// What was written comes back the same.
	data, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	var again Start
	if err := json.Unmarshal(data, &again); err != nil || len(again.Steps) != len(s.Steps) || again.Steps[2] != s.Steps[2] {
		t.Errorf("%v: %+v", err, again)
	}
}

func TestChrome(t *testing.T) {
	s := Start{Container: "web", Steps: []Step{
		{Shim, "create", 0, 1500 * time.Microsecond},
		{CRIU, "restore", time.Millisecond, 2 * time.Millisecond},
		{CRIU, "moment", 3 * time.Millisecond, 0},
	}}
	data, err := s.Chrome()
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		TraceEvents []struct {
			Name, Ph string
			Tid      int
			Ts, Dur  float64
			Args     struct{ Name string }
		}
	}
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatal(err)
	}
	tracks := make(map[int]string)
	steps := make(map[string][2]float64)
	for _, e := range got.TraceEvents {
		switch {
		case e.Ph == "M" && e.Name == "thread_name":
			tracks[e.Tid] = e.Args.Name
		case e.Ph == "X", e.Ph == "i":
			steps[e.Ph+" "+tracks[e.Tid]+"/"+e.Name] = [2]float64{e.Ts, e.Dur}
		}
	}
	for name, want := range map[string][2]float64{
		"X shim/create": {0, 1500}, "X criu/restore": {1000, 2000}, "i criu/moment": {3000, 0},
	} {
		if got, ok := steps[name]; !ok || got != want {
			t.Errorf("%s: %v, want %v, in %v", name, got, want, steps)
		}
	}
}

// Nobody who traces need ask whether anybody wants to know, and a trace is bounded.
func TestRecorder(t *testing.T) {
	var none *Recorder
	none.Step("x")()
	none.Facts(true, true, 1)
	if s := none.Start(); len(s.Steps) != 0 || s.Warm {
		t.Errorf("nothing has %+v", s)
	}
	r := New("web")
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range maxSteps {
				r.On(Background, "x")()
			}
		})
	}
	all.Wait()
	if n := len(r.Start().Steps); n != maxSteps {
		t.Errorf("%d steps, want %d", n, maxSteps)
	}
}

func BenchmarkStep(b *testing.B) {
	for b.Loop() {
		r := New("web")
		for range 40 {
			r.Step("x")()
		}
	}
}
