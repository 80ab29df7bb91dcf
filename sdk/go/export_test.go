package crac

import "math/rand/v2"

// SetSeed makes Rand predictable until the next restore.
func SetSeed(seed [32]byte) {
	seeded.mu.Lock()
	defer seeded.mu.Unlock()
	seeded.chacha = rand.NewChaCha8(seed)
}
