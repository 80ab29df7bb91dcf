package hook

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"fmt"
)

// Version is the contract's.
const Version = 1

// Event is what happens to the container.
type Event string

// The events. A participant answers one that it does not know as if it agreed.
const (
	BeforeCheckpoint Event = "before-checkpoint" // may be vetoed
	AfterRestore     Event = "after-restore"     // in a clone
	AfterResume      Event = "after-resume"      // in the original, which goes on
	Check            Event = "check"             // could you? A dry run that changes nothing
)

// before tells whether an event comes ahead of what it announces, and so runs
// against the order of registration.
func (e Event) before() bool { return e == BeforeCheckpoint || e == Check }

// Outcome is how a checkpoint ended, or that it has not yet.
type Outcome = string

// The outcomes.
const (
	OutcomePending      Outcome = "pending"
	OutcomeCheckpointed Outcome = "checkpointed"
	OutcomeFailed       Outcome = "failed"
	OutcomeRestored     Outcome = "restored" // what a clone hears about its original's checkpoint
)

// Message is one notification. Which fields are set depends on the event.
type Message struct {
	V          int    `json:"v"` // Version; filled in by Notify
	Event      Event  `json:"event"`
	ID         string `json:"id"`          // of the checkpoint or the restore; filled in by Notify if empty
	DeadlineMS int64  `json:"deadline_ms"` // for the answer, in milliseconds; filled in by Notify

	// After a restore: who the clone is, and what this start asked for.
	Generation  string            `json:"generation,omitempty"`
	Container   string            `json:"container,omitempty"`
	Hostname    string            `json:"hostname,omitempty"`
	Env         map[string]string `json:"env,omitempty"`
	Args        []string          `json:"args,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
	FrozenNS    int64             `json:"frozen_ns,omitempty"` // since the dump, in nanoseconds

	// After a resume.
	Outcome Outcome `json:"outcome,omitempty"`
	Error   string  `json:"error,omitempty"`
}

// maxMessage is the longest line a participant must be able to read.
const maxMessage = 1 << 20

// line is the message as it is sent, with its newline. Bytes that are not UTF-8
// become U+FFFD: JSON has no room for them.
func (m Message) line() ([]byte, error) {
	line, err := encode(m)
	if err == nil && len(line) > maxMessage {
		err = fmt.Errorf("the message has %d bytes and may have %d: start with fewer or shorter environment variables, arguments and annotations", len(line), maxMessage)
	}
	return line, err
}

// encode makes one line of JSON, in which < > & stay what they are: it is also read
// by people and shell scripts.
func encode(v any) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	err := enc.Encode(v)
	return b.Bytes(), err
}

// NewID makes an identifier of 32 hexadecimal digits: for a checkpoint, for a
// restore, for a clone's generation.
func NewID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}
