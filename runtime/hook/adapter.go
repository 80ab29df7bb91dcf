package hook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/mattn/go-shellwords"
)

// Adapter tells a workload that has no participant. ParseAdapter makes them.
type Adapter interface {
	// String gives a value from which ParseAdapter makes the same adapter.
	String() string

	// tell gives the message, which is also there as the line that a participant
	// would get, and returns nil if the workload agrees.
	tell(ctx context.Context, n *Notifier, m Message, line []byte) error
}

var errNoContainer = errors.New("there is no container to run it in")

// ParseAdapter reads the value of a hook.* option: a URL of HTTP on the
// container's loopback, signal:NAME, or else a command, which is a JSON array of
// strings or words quoted as for a shell.
func ParseAdapter(value string) (Adapter, error) {
	value = strings.TrimSpace(value)
	lower := strings.ToLower(value)
	switch {
	case value == "":
		return nil, errors.New("the hook is empty: give a command, an http:// URL or signal:NAME")
	case strings.ContainsRune(value, 0):
		return nil, errors.New("the hook holds a NUL byte")
	case strings.HasPrefix(lower, "signal:"):
		return parseSignal(value[len("signal:"):])
	case strings.HasPrefix(lower, "http://"), strings.HasPrefix(lower, "https://"):
		return parseHTTP(value)
	case strings.HasPrefix(value, "["):
		return parseArgs(value)
	}
	return parseWords(value)
}

func parseArgs(value string) (Adapter, error) {
	var args []string
	if err := json.Unmarshal([]byte(value), &args); err != nil {
		return nil, fmt.Errorf("the hook begins with [ and is no JSON array of strings: %w", err)
	}
	return command(args)
}

func parseWords(value string) (Adapter, error) {
	words := shellwords.NewParser()
	words.ParseEnv, words.ParseBacktick, words.ParseComment = false, false, false
	args, err := words.Parse(value)
	if err != nil {
		return nil, fmt.Errorf("the hook's words are not quoted as for a shell: %w; a JSON array needs no shell's quotes", err)
	}
	if words.Position != -1 {
		return nil, errors.New(`the hook holds a shell's operator outside of quotes, and runs without a shell: for one, write ["sh","-c","…"]`)
	}
	return command(args)
}

func command(args []string) (Adapter, error) {
	if len(args) == 0 || args[0] == "" {
		return nil, errors.New("the hook names no program")
	}
	if slices.ContainsFunc(args, func(a string) bool { return strings.ContainsRune(a, 0) }) {
		return nil, errors.New("the hook holds a NUL byte")
	}
	return execAdapter(args), nil
}
