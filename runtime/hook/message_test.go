package hook

import (
	"context"
	"encoding/json"
	"maps"
	"slices"
	"strings"
	"testing"
)

// TestLines pins what is sent: SDKs in several languages read it.
func TestLines(t *testing.T) {
	for _, c := range []struct {
		m    Message
		want string
	}{
		{
			Message{V: 1, Event: BeforeCheckpoint, ID: "ab12", DeadlineMS: 10000},
			`{"v":1,"event":"before-checkpoint","id":"ab12","deadline_ms":10000}`,
		},
		{
			Message{V: 1, Event: AfterResume, ID: "ab12", DeadlineMS: 10000, Outcome: OutcomeFailed, Error: "a <b> & c\nd"},
			`{"v":1,"event":"after-resume","id":"ab12","deadline_ms":10000,"outcome":"failed","error":"a <b> & c\nd"}`,
		},
		{
			Message{
				V: 1, Event: AfterRestore, ID: "ab12", DeadlineMS: 10000, Generation: "cd34", Container: "c", Hostname: "h",
				Env: map[string]string{"B": "", "A": "x=y"}, Args: []string{"java", ""}, Annotations: map[string]string{"k": "v\xff"}, FrozenNS: 123,
			},
			`{"v":1,"event":"after-restore","id":"ab12","deadline_ms":10000,"generation":"cd34","container":"c","hostname":"h",` +
				`"env":{"A":"x=y","B":""},"args":["java",""],"annotations":{"k":"v` + `\ufffd` + `"},"frozen_ns":123}`,
		},
		{
			Message{V: 1, Event: Check, ID: "ab12", DeadlineMS: 1},
			`{"v":1,"event":"check","id":"ab12","deadline_ms":1}`,
		},
	} {
		line, err := c.m.line()
		if err != nil || string(line) != c.want+"\n" {
			t.Errorf("%v\n got %s\nwant %s", err, line, c.want)
		}
	}
}

func TestMessageIsBounded(t *testing.T) {
	m := Message{Event: AfterRestore, Env: map[string]string{"BIG": strings.Repeat("x", maxMessage)}}
	n := Notifier{Dir: t.TempDir()}
	participant(t, n.Dir, "a.sock", answer(ack))
	r := n.Notify(t.Context(), m)
	wantErr(t, r.Err(), "the message has 1048", "fewer or shorter environment variables")
	if r.Told() != 0 {
		t.Errorf("%d were told half a message", r.Told())
	}
}

func TestNewID(t *testing.T) {
	seen := make(map[string]bool)
	for range 100 {
		id := NewID()
		if len(id) != 32 || strings.Trim(id, "0123456789abcdef") != "" || seen[id] {
			t.Fatalf("%q is no new identifier", id)
		}
		seen[id] = true
	}
}

// TestEnvironment: what a hook that is a command finds in its environment.
func TestEnvironment(t *testing.T) {
	m := Message{
		Event: AfterResume, ID: "i", Generation: "g", Container: "c", Hostname: "h", FrozenNS: 5, Outcome: OutcomeFailed,
		Error: "first\nsecond\x00third", Env: map[string]string{"PATH": "/evil"},
	}
	want := []string{
		"CRAC_EVENT=after-resume", "CRAC_ID=i", "CRAC_GENERATION=g", "CRAC_CONTAINER=c", "CRAC_HOSTNAME=h",
		"CRAC_FROZEN_NS=5", "CRAC_OUTCOME=failed", "CRAC_ERROR=first second third",
	}
	if got := m.environment(); !slices.Equal(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
	if got := (Message{Event: Check, ID: "i"}).environment(); !slices.Equal(got, []string{"CRAC_EVENT=check", "CRAC_ID=i"}) {
		t.Errorf("a check has %q", got)
	}
}

// TestNotifyFillsIn: what every message needs, callers need not give.
func TestNotifyFillsIn(t *testing.T) {
	noLeaks(t)
	lines := make(chan string, 1)
	n := Notifier{
		Adapters: map[Event]Adapter{Check: execAdapter{"x"}},
		Container: &fakeContainer{exec: func(_ context.Context, _, _ []string, stdin []byte) ([]byte, int, error) {
			lines <- string(stdin)
			return nil, 0, nil
		}},
	}
	wantErr(t, n.Notify(t.Context(), Message{Event: Check}).Err())
	line := <-lines
	var got map[string]any
	if err := json.Unmarshal([]byte(line), &got); err != nil {
		t.Fatal(err)
	}
	if got["v"] != 1.0 || got["deadline_ms"] != 10000.0 || len(got["id"].(string)) != 32 {
		t.Errorf("sent %s", line)
	}
	if keys := slices.Sorted(maps.Keys(got)); !slices.Equal(keys, []string{"deadline_ms", "event", "id", "v"}) {
		t.Errorf("sent the fields %v", keys)
	}
}
