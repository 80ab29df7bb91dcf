// Package images moves a checkpoint directory into a content store and back,
// verified.
//
// This package is the light half that the shim links: it finds a checkpoint in
// a container's root file system, tells whether this host and this request fit
// it, verifies it, and writes the layer that holds one. images/build, which
// talks to containerd, is the other half. Like oci, it does no work at program
// start.
package images

import (
	"errors"
	"path/filepath"
	"slices"

	"github.com/crac-shim/crac/oci"
)

var (
	// ErrDamaged is wrapped by errors about a checkpoint that is not whole or
	// not what its manifest says.
	ErrDamaged = errors.New("damaged checkpoint")
	// ErrCovered is wrapped when layers were put above a checkpoint layer:
	// files and memory no longer agree.
	ErrCovered = errors.New("checkpoint below other layers")
	// ErrNoCRIU is wrapped when no CRIU was found.
	ErrNoCRIU = errors.New("no CRIU found")
	// ErrNotDump is wrapped when a directory does not hold a CRIU dump that can
	// be packed.
	ErrNotDump = errors.New("not a complete dump")
)

// Mount mirrors containerd's types.Mount.
type Mount struct {
	Type    string
	Source  string
	Target  string
	Options []string
}

// Checkpoint is a checkpoint that a root file system brings along.
type Checkpoint struct {
	// Dir is .crac/v1 on disk.
	Dir string
	// Layer is the layer's or the root file system's directory that holds Dir.
	Layer string
	// Manifest is decoded and valid; nothing it lists was looked at yet.
	Manifest *oci.Manifest
	// digest is that of manifest.json.
	digest string
	// Parents are the dumps that this one continues, the nearest first.
	Parents []*Checkpoint
	// Visible tells that the container would see /.crac in the mounts that Find
	// returned, so that it must be masked.
	Visible bool
}

// CRIUDir is where the dump is.
func (c *Checkpoint) CRIUDir() string { return filepath.Join(c.Dir, oci.CRIUDirName) }

// Digest is that of manifest.json, which names everything in the dump by its digest.
func (c *Checkpoint) Digest() string { return c.digest }

// WorkingSet is the file that says which of the memory was asked for first, or none.
// What is in it is as hostile as the rest, and it may be ignored.
func (c *Checkpoint) WorkingSet() (path string, ok bool) {
	ok = slices.ContainsFunc(c.Manifest.Files, func(f oci.File) bool { return f.Name == oci.WorkingSetName })
	return filepath.Join(c.CRIUDir(), oci.WorkingSetName), ok
}

// ParentDirs are where the dumps are that this one continues, the nearest first.
func (c *Checkpoint) ParentDirs() []string {
	var dirs []string
	for _, p := range c.Parents {
		dirs = append(dirs, p.CRIUDir())
	}
	return dirs
}

// SpecPath is where the runtime spec of the dumped container is.
func (c *Checkpoint) SpecPath() string { return filepath.Join(c.Dir, oci.SpecName) }
