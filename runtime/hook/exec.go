package hook

import (
	"bytes"
	"context"
	"fmt"
	"strconv"
)

// execAdapter runs a command in the container, with the message on its standard
// input and its main facts in its environment. Exit status 0 agrees; another does
// not, for the reason on the last line of stderr.
type execAdapter []string

func (a execAdapter) String() string {
	line, _ := encode([]string(a)) // strings always encode
	return string(bytes.TrimSpace(line))
}

func (a execAdapter) tell(ctx context.Context, n *Notifier, m Message, line []byte) error {
	if n.Container == nil {
		return errNoContainer
	}
	return a.run(ctx, n.Container, m.environment(), line)
}

func (a execAdapter) run(ctx context.Context, c Container, env []string, stdin []byte) error {
	stderr, status, err := c.Exec(ctx, a, env, stdin)
	switch {
	case err == nil && status == 0:
		return nil
	case ctx.Err() != nil:
		return ctx.Err() // whatever the process that was ended came to
	case err != nil:
		return err
	}
	if text := lastLine(stderr); text != "" {
		return fmt.Errorf("%s (exit status %d)", text, status)
	}
	return fmt.Errorf("exit status %d, and nothing on stderr", status)
}

// environment is the message for those who read variables rather than JSON.
func (m Message) environment() []string {
	var env []string
	add := func(name, value string) {
		if value != "" {
			env = append(env, name+"="+clean(value))
		}
	}
	add("CRAC_EVENT", string(m.Event))
	add("CRAC_ID", m.ID)
	add("CRAC_GENERATION", m.Generation)
	add("CRAC_CONTAINER", m.Container)
	add("CRAC_HOSTNAME", m.Hostname)
	if m.FrozenNS != 0 {
		add("CRAC_FROZEN_NS", strconv.FormatInt(m.FrozenNS, 10))
	}
	add("CRAC_OUTCOME", m.Outcome)
	add("CRAC_ERROR", m.Error)
	return env
}

// lastLine is the last line with something in it, of a text of any length.
func lastLine(text []byte) string {
	text = text[max(0, len(text)-maxAnswer):]
	text = bytes.TrimSpace(text)
	return clean(string(text[bytes.LastIndexByte(text, '\n')+1:]))
}
