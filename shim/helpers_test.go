package shim

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/events"

	"github.com/crac-shim/crac/runtime"
)

// theReaper is this process's: there can be only one.
var theReaper = sync.OnceValues(runtime.NewSubreaper)

func reaper(tb testing.TB) *runtime.Subreaper {
	tb.Helper()
	r, err := theReaper()
	if err != nil {
		tb.Fatal(err)
	}
	return r
}

// waitFor waits until cond holds. It bounds a test that fails, no more.
func waitFor(tb testing.TB, what string, cond func() bool) {
	tb.Helper()
	for deadline := time.Now().Add(30 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			tb.Fatalf("waited in vain for: %s", what)
		}
	}
}

// published collects events.
type published struct {
	mu     sync.Mutex
	topics []string
	events []any
	ctxs   []context.Context
	hold   chan struct{} // unless nil, publishing waits for it
}

func (p *published) Publish(ctx context.Context, topic string, event events.Event) error {
	if p.hold != nil {
		<-p.hold
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.topics, p.events, p.ctxs = append(p.topics, topic), append(p.events, event), append(p.ctxs, ctx)
	return nil
}

// newTestService is a service without a shim around it. The returned function
// ends it, when all events have been published.
func newTestService(tb testing.TB) (s *service, sent *published, finish func()) {
	tb.Helper()
	sent = &published{}
	stop := make(chan struct{})
	s = &service{
		ctx:        context.Background(),
		namespace:  "test",
		events:     newEventSender(sent, stop),
		reaper:     reaper(tb),
		trimmer:    newTrimmer(),
		containers: make(map[string]*container),
		creating:   make(map[string]struct{}),
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		s.events.run(s.ctx)
	}()
	finish = sync.OnceFunc(func() {
		close(stop)
		<-ended
		s.trimmer.timer.Stop()
	})
	tb.Cleanup(finish)
	return s, sent, finish
}

func newTestContainer(tb testing.TB, id string) *container {
	tb.Helper()
	return &container{id: id, bundle: tb.TempDir(), init: newProcess("", stdioConfig{}, nil), dumping: make(chan struct{}, 1), probing: newProbing(), execs: make(map[string]*process)}
}
