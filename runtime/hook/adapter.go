package hook

import (
	"fmt"
)

// Adapter tells a workload that has no participant.
type Adapter interface {
	// String gives a value from which ParseAdapter makes the same adapter.
	String() string
}

// ParseAdapter reads the value of a hook.* option.
func ParseAdapter(value string) (Adapter, error) {
	return nil, fmt.Errorf("adapters: not yet")
}
