package crac

import (
	crand "crypto/rand"
	"math/rand/v2"
	"sync"
)

// seeded is a source for all of the process that gets a new seed after each restore.
var seeded source

type source struct {
	mu     sync.Mutex
	chacha *rand.ChaCha8
}

func (s *source) Uint64() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.chacha == nil {
		s.chacha = rand.NewChaCha8(newSeed())
	}
	return s.chacha.Uint64()
}

func (s *source) reseed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.chacha = nil
}

func newSeed() (seed [32]byte) {
	if _, err := crand.Read(seed[:]); err != nil {
		panic("crac: the kernel gives no random numbers: " + err.Error())
	}
	return seed
}

// Rand is a generator with the methods of math/rand/v2's functions, whose seed is new
// after each restore. It may be used concurrently. Like those it is not for secrets.
func Rand() *rand.Rand {
	process.startAndLog()
	return rand.New(&seeded)
}
