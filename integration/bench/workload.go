package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"
)

// workload is a program that is saved and brought back.
type workload struct {
	name    string
	image   string   // of integration/apps
	command []string // nil: the image's own
	env     []string
	mounts  []bind
	java    bool // a JVM runs it
	writes  bool // files, which have to be there when it is restored
	port    int
	mib     int // of memory, for those that hold just that
	takes   int // MiB that one of it takes, roughly
	// make makes what it is made of beside its image; nil: there is nothing.
	make func(ctx context.Context) error
	// prepare gives a program that has just been started its state; nil if it makes its own.
	prepare func(ctx context.Context, n *network) error
	// ask is a request that every client could make. Its answer says whose it is: that of a program
	// that was started anew, or of one that went on from elsewhere, is another.
	ask func(ctx context.Context, n *network) (string, error)
	// digest reads all of the memory that the program holds on purpose; nil if it holds none.
	digest func(ctx context.Context, n *network) (string, error)
	// settle is how long it needs to let go of a connection that its client has seen closed; CRIU
	// refuses what is left of one.
	settle time.Duration
	// crowd is how many are started anew at once, beside one at a time; 0: none.
	crowd int
	// coldOnly workloads are only started, never saved.
	coldOnly bool
	// watched workloads tell how long they stood still.
	watched bool
}

// bind is a directory of the host that the workload sees.
type bind struct{ host, container string }

// crowdLimit is how many MiB clones may take together: on a machine of 16 GB the page cache
// has to keep what they are restored from, and more of the large ones would say no more.
const crowdLimit = 4 << 10

// fits tells whether so many at once are measured.
func (w *workload) fits(clones int) bool { return clones*w.takes <= crowdLimit }

// needsNoFiles says whether a workload can be restored from its memory alone.
func (w *workload) needsNoFiles() error {
	if w.writes {
		return cannot("it saves memory only, and %s writes files", w.name)
	}
	return nil
}

// testimony is what a workload says of itself, before it is saved and when it is back.
type testimony struct{ answer, digest string }

// patience is how long a workload may take to answer.
const patience = 2 * time.Minute

// answer asks until there is an answer.
func (w *workload) answer(ctx context.Context, n *network) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		answer, err := w.ask(ctx, n)
		if err == nil {
			return answer, nil
		}
		select {
		case <-ctx.Done():
			return "", fmt.Errorf("%s does not answer: %w", w.name, err)
		case <-time.After(500 * time.Microsecond):
		}
	}
}

// warm brings a program that was just started to where it is worth saving.
func (w *workload) warm(ctx context.Context, n *network) (*testimony, error) {
	if _, err := w.answer(ctx, n); err != nil {
		return nil, err
	}
	if w.prepare != nil {
		if err := w.prepare(ctx, n); err != nil {
			return nil, fmt.Errorf("prepare %s: %w", w.name, err)
		}
	}
	t := &testimony{}
	var err error
	if t.answer, err = w.ask(ctx, n); err != nil {
		return nil, err
	}
	t.digest, err = w.readAll(ctx, n)
	time.Sleep(w.settle)
	return t, err
}

// readAll is the digest, of a workload that has one.
func (w *workload) readAll(ctx context.Context, n *network) (string, error) {
	if w.digest == nil {
		return "", nil
	}
	return w.digest(ctx, n)
}

// memoryPort is where integration/apps/memory listens.
const memoryPort = 8080

// memoryWorkload is a static program that holds random memory.
func memoryWorkload(name string, mib int) *workload {
	word := func(word string) func(context.Context, *network) (string, error) {
		return func(ctx context.Context, n *network) (string, error) { return tell(ctx, n, memoryPort, word) }
	}
	return &workload{
		name: name, image: "memory", command: []string{"/usr/bin/memory", strconv.Itoa(mib)}, port: memoryPort, mib: mib, takes: mib,
		ask: word("id"), digest: word("sum"), watched: true,
	}
}

// hello is as small as it can be: what its start takes is the runtime's.
func hello() *workload {
	w := memoryWorkload("hello", 1)
	w.coldOnly, w.crowd = true, 20
	return w
}

// tell sends a line and returns what comes back.
func tell(ctx context.Context, n *network, port int, line string) (string, error) {
	answer, err := exchange(ctx, n, port, line+"\n")
	text := strings.TrimSpace(answer)
	if err == nil && text == "" {
		err = errors.New("an empty answer")
	}
	return text, err
}

// exchange sends a request and returns all that comes back. It waits for the server to close first,
// so that no connection is left for a dump to find.
func exchange(ctx context.Context, n *network, port int, request string) (string, error) {
	c, err := n.dial(ctx, port)
	if err != nil {
		return "", err
	}
	defer func() { _ = c.Close() }()
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(patience)
	}
	if err := c.SetDeadline(deadline); err != nil {
		return "", err
	}
	if _, err := io.WriteString(c, request); err != nil {
		return "", err
	}
	answer, err := io.ReadAll(c)
	return string(answer), err
}

// workloads are all that there are, in the order in which they are measured. dir is for what they
// are made of.
func workloads(dir string) []*workload {
	// Clones of this one are compared with cold starts.
	hundred := memoryWorkload("mem-100m", 100)
	hundred.crowd = 16
	return []*workload{
		hello(),
		memoryWorkload("mem-10m", 10),
		hundred,
		memoryWorkload("mem-500m", 500),
		memoryWorkload("mem-1g", 1000),
		memoryWorkload("mem-2g", 2000),
		tomcat(),
		javaHeap(dir),
		redis(),
		python(),
	}
}
