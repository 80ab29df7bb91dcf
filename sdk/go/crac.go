package crac

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"
)

// Hooks are functions to be called when something happens to the container; nil ones
// are not. Their context ends a little before the time in which the runtime expects an
// answer; a hook that goes on is reported and no longer waited for. What they return
// is logged (log/slog) and sent to the runtime.
type Hooks struct {
	// Name is what reports call these hooks; "" for the names of the functions.
	Name string
	// BeforeCheckpoint is called before a checkpoint, last registered first. If it
	// returns an error, there is none, and AfterResume is called.
	BeforeCheckpoint func(context.Context) error
	// AfterRestore is called in each clone, before its start is reported. The
	// process's environment is up to date then.
	AfterRestore func(context.Context, Restore) error
	// AfterResume is called in the original when it goes on: after a checkpoint, and
	// after one that failed.
	AfterResume func(context.Context, Outcome) error
	// Check is called when somebody asks whether a checkpoint would be possible now.
	// It must change nothing.
	Check func(context.Context) error
}

// Restore is what a clone was told about itself. Env, Args and Annotations are those of
// the request that started it.
type Restore struct {
	Generation  string // new for each clone
	Container   string
	Hostname    string
	Env         map[string]string
	Args        []string
	Annotations map[string]string
	Frozen      time.Duration // from the dump to the restore
}

// Outcome is how a checkpoint ended.
type Outcome struct {
	Result Result
	Error  string // why it failed
}

// Result is how a checkpoint ended, in a word.
type Result string

// The results.
const (
	Checkpointed Result = "checkpointed" // the original goes on
	Failed       Result = "failed"       // it goes on, and there is no checkpoint
	Restored     Result = "restored"     // this is a clone
)

// Info is what this container is.
type Info struct {
	Container  string `json:"container"`
	Hostname   string `json:"hostname"`
	Start      string `json:"start"`  // cold or warm
	Image      string `json:"image"`  // the image it came from
	Reason     string `json:"reason"` // why cold
	Code       string `json:"code"`   // the reason's code
	Generation string `json:"generation"`
	Checkpoint struct {
		Allowed bool `json:"allowed"` // whether Checkpoint may be called
		Last    *struct {
			ID      string `json:"id"`
			Outcome string `json:"outcome"` // pending, checkpointed or failed
			Error   string `json:"error"`
		} `json:"last"`
	} `json:"checkpoint"`
}

// ErrUnavailable says that nobody is there to ask: this container's runtime is another
// one, or was told hooks=off, or does not answer.
var ErrUnavailable = errors.New("no runtime to ask")

// CheckpointError says that there was no checkpoint.
type CheckpointError struct {
	Reason string
	Hooks  []error // what this process's own hooks returned
}

func (e *CheckpointError) Error() string { return e.Reason }

// Unwrap gives the hooks' errors.
func (e *CheckpointError) Unwrap() []error { return e.Hooks }

// RestoreError says that the program was restored, and what its hooks returned.
type RestoreError struct{ Hooks []error }

func (e *RestoreError) Error() string {
	var s []string
	for _, err := range e.Hooks {
		s = append(s, err.Error())
	}
	return strings.Join(s, "; ")
}

// Unwrap gives the hooks' errors.
func (e *RestoreError) Unwrap() []error { return e.Hooks }

// process is this process's part.
var process participant

// directory is where the sockets are. It is read once: a restore may change the
// environment, and the directory stays.
var directory = sync.OnceValue(func() string {
	if dir := os.Getenv("CRAC_DIR"); dir != "" {
		return dir
	}
	return "/run/crac" // su and the like drop variables
})

// Start begins to take part, if the process does not yet; other functions do it, too. In
// a container of another runtime it does nothing and returns nil.
func Start() error { return process.start() }

// Stop removes the process's socket, for a program that ends: Go has no way to do it by
// itself. What is left over disturbs nobody.
func Stop() { process.stop() }

// Register has hooks called from now on, until the function that it returns is called.
// It may be used concurrently, but not from within a hook.
func Register(h Hooks) (unregister func()) {
	process.startAndLog()
	return process.register(h)
}

// LastRestore is the restore that made this clone; ok is false in a process that was
// never restored.
func LastRestore() (r Restore, ok bool) {
	process.mu.Lock()
	defer process.mu.Unlock()
	if process.restored == nil {
		return Restore{}, false
	}
	return *process.restored, true
}

// Status tells what this container is. The error is ErrUnavailable in one of another
// runtime.
func Status(ctx context.Context) (Info, error) {
	var info Info
	line, err := ask(ctx, map[string]any{"op": "status"})
	if err != nil {
		return info, err
	}
	if err := json.Unmarshal(line, &info); err != nil {
		return info, fmt.Errorf("status: %w", err)
	}
	return info, nil
}

// Checkpoint asks for a checkpoint of the container and waits until it has happened and
// this process's hooks were called. It returns Checkpointed in the original, if that
// goes on, and Restored in each clone.
//
// The error is a *CheckpointError if there was none (the option checkpoint.allow must be
// "workload", checkpoint.image must name an image, and no participant may object), a
// *RestoreError if hooks failed in a clone, ErrUnavailable in a container of another
// runtime, or the context's: the checkpoint may then still happen.
func Checkpoint(ctx context.Context) (Result, error) {
	process.startAndLog()
	return process.checkpoint(ctx)
}
