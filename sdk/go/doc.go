// Package crac lets a program take part in checkpoint and restore of its container by
// the runtime io.containerd.crac.v2.
//
//	crac.Register(crac.Hooks{
//		BeforeCheckpoint: func(ctx context.Context) error { return pool.Close() },
//		AfterResume:      func(ctx context.Context, _ crac.Outcome) error { return open(ctx) },
//		AfterRestore:     func(ctx context.Context, _ crac.Restore) error { return open(ctx) },
//	})
//
// The process listens on a unix socket in $CRAC_DIR from the first use of Register,
// Start, Checkpoint or Rand. In a container of another runtime all of this is there to
// call, and nothing calls the hooks.
//
// # Random numbers
//
// Two clones have the same memory. crypto/rand asks the kernel and is safe: where it
// does so through the vDSO, its state is memory that no dump holds. The functions of
// math/rand and math/rand/v2 are not: the runtime seeds them when the program starts,
// nothing can seed them again, and clones draw the same numbers from them. Use Rand
// where that matters, and crypto/rand for secrets, as ever. The seed of maps' hashes
// is the same in all clones, too.
//
// The package is a Go module of its own, so that a program that uses it takes over
// none of the runtime's requirements. Where no version of it is published, take it from
// a copy of the repository:
//
//	go mod edit -require=github.com/crac-shim/crac/sdk/go@v0.0.0 -replace=github.com/crac-shim/crac/sdk/go=DIRECTORY
package crac
