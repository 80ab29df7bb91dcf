// Package runtime moves one container through Created, Running, Paused,
// Quiesced and Stopped.
//
// It is the only place that knows libcontainer (the shim's binary, which must
// re-execute itself as libcontainer's init, is the one exception). It knows
// directories, never images: a checkpoint is a directory of CRIU's image files,
// wherever it came from.
//
//	            Create                    Start
//	cold   New ───────▶ Created ─────────────────────────▶ Running ⇄ Paused
//	warm   New ───────▶ Created ──▶ Quiesced (CRIU) ─────▶ Running
//	                                    ▲
//	Checkpoint   Running or Paused ─────┘ dump, layer of changes, back again
//
// A Container is safe for concurrent use. Every process that this package
// starts is a child of the calling process, which is expected to be a child
// subreaper (see Subreaper).
package runtime
