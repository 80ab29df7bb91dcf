package images

import (
	"errors"

	"google.golang.org/protobuf/encoding/protowire"
)

// task is what a core image says about a thread.
type task struct {
	leader          bool
	dead            bool
	comm            string
	capabilities    uint64 // of all sets together
	filtered        bool
	seccompMode     uint32
	seccompFilter   *uint32 // the number of the first in its chain
	noNewPrivileges bool
	rseq            bool
	lsm             string // the security module's profile or context
}

// TASK_DEAD and TASK_ZOMBIE of CRIU's pid.h.
const (
	taskDead   = 2
	taskZombie = 6
)

// parseCore reads a core_entry.
func parseCore(data []byte) (t task, err error) {
	core, err := parse(data)
	if err != nil {
		return t, err
	}
	tc, err := core.message(3)
	if err != nil {
		return t, err
	}
	if core.has(4) {
		return t, errors.New("names its namespaces in a way that CRIU has not used for long")
	}
	if tc != nil {
		t.leader = true
		state, err := tc.number(1)
		if err != nil {
			return t, err
		}
		t.dead = state == taskDead || state == taskZombie
		if t.comm, err = tc.text(6); err != nil {
			return t, err
		}
		// An older place for the filter. It would win over the thread's.
		if tc.has(11) || tc.has(12) {
			return t, errors.New("keeps seccomp filters in a way that CRIU has not used for long")
		}
	}
	if t.dead {
		return t, nil
	}
	thread, err := core.message(5)
	if err != nil {
		return t, err
	}
	if thread == nil {
		return t, errors.New("says nothing about its thread")
	}
	if t.seccompMode, err = thread.number(threadSeccomp); err != nil {
		return t, err
	}
	if thread.has(threadChain) {
		chain, err := thread.number(threadChain)
		if err != nil {
			return t, err
		}
		t.seccompFilter = &chain
	}
	t.filtered = t.seccompMode == seccompFilter && t.seccompFilter != nil
	creds, err := thread.message(10)
	if err != nil {
		return t, err
	}
	if creds == nil {
		return t, errors.New("has no credentials")
	}
	for _, field := range []protowire.Number{9, 10, 11, 12, 19} { // inheritable, permitted, effective, bounding, ambient
		words, err := creds.numbers(field)
		if err != nil {
			return t, err
		}
		if len(words) > 2 {
			return t, errors.New("has more capabilities than there are")
		}
		for i, w := range words {
			t.capabilities |= uint64(w) << (32 * i)
		}
	}
	if t.rseq, err = registeredRseq(thread); err != nil {
		return t, err
	}
	if t.lsm, err = creds.text(15); err != nil {
		return t, err
	}
	n, err := creds.number(18)
	t.noNewPrivileges = n != 0
	return t, err
}

// registeredRseq tells whether a thread has told the kernel of its restartable
// sequences: CRIU also notes of one that has not where they are, at 0.
func registeredRseq(thread fields) (bool, error) {
	entry, err := thread.message(15)
	if err != nil || entry == nil {
		return false, err
	}
	address, _, err := entry.single(1, protowire.VarintType)
	return address.number != 0, err
}
