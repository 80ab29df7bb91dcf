package main

import (
	"bufio"
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
	name   string
	image  string   // of integration/apps
	args   []string // after the image's entrypoint; nil: the image's own
	env    []string
	mounts []bind
	port   int
	mib    int // of memory that it holds on purpose
	// prepare gives a program that has just been started its state; nil if it makes its own.
	prepare func(ctx context.Context, n *network) error
	// ask is a request that every client could make. Its answer says whose it is: that of a program
	// that was started anew, or of one that went on from elsewhere, is another.
	ask func(ctx context.Context, n *network) (string, error)
	// digest reads all of the memory that the program holds on purpose.
	digest func(ctx context.Context, n *network) (string, error)
	// watched workloads tell how long they stood still.
	watched bool
}

// bind is a directory of the host that the workload sees.
type bind struct{ host, container string }

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
	t.digest, err = w.digest(ctx, n)
	return t, err
}

// memoryPort is where integration/apps/memory listens.
const memoryPort = 8080

// memoryWorkload is a static program that holds random memory.
func memoryWorkload(name string, mib int) *workload {
	word := func(word string) func(context.Context, *network) (string, error) {
		return func(ctx context.Context, n *network) (string, error) { return tell(ctx, n, memoryPort, word) }
	}
	return &workload{
		name: name, image: "memory", args: []string{strconv.Itoa(mib)}, port: memoryPort, mib: mib,
		ask: word("id"), digest: word("sum"), watched: true,
	}
}

// tell sends one line and returns all that comes back. It waits for the server to close first, so
// that no connection is left for a dump to find.
func tell(ctx context.Context, n *network, port int, line string) (string, error) {
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
	if _, err := io.WriteString(c, line+"\n"); err != nil {
		return "", err
	}
	answer, err := io.ReadAll(bufio.NewReader(c))
	text := strings.TrimSpace(string(answer))
	if err == nil && text == "" {
		err = errors.New("an empty answer")
	}
	return text, err
}

// workloads are all that there are, in the order in which they are measured.
func workloads() []*workload {
	return []*workload{
		memoryWorkload("mem-10m", 10),
		memoryWorkload("mem-100m", 100),
		memoryWorkload("mem-500m", 500),
		memoryWorkload("mem-1g", 1000),
		memoryWorkload("mem-2g", 2000),
	}
}
