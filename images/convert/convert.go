// Package convert reads checkpoints that other tools made, and writes ours so that
// they can read them.
//
//	podman, CRI-O, containerd's CRI   an archive: config.dump, spec.dump, checkpoint/, rootfs-diff.tar, …
//	the same, as an image             the archive's files in its layers
//	containerd (ctr, its client)      an index: a tar of the dump, the spec, a layer of changes
//	runc checkpoint, criu dump        a directory of images and a bundle
//
// All of them hold a dump by CRIU, and differ in what is around it and in which
// mounts and namespaces the dump leaves to whoever restores it. So an import
// unpacks, changes what the dump says of those (see dump), and has images/build
// write the image; an export does the reverse.
//
// What is read is hostile, and is unpacked as such: see archive.
package convert

import (
	"fmt"
	"io"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Report says, for people, what of a checkpoint was carried over and what was not.
type Report struct {
	// From is what kind of checkpoint was read or written.
	From string
	// Taken was carried over, Left was not, with the reason or the way out.
	Taken, Left []string
}

func (r *Report) take(format string, a ...any) { r.Taken = append(r.Taken, fmt.Sprintf(format, a...)) }

func (r *Report) leave(format string, a ...any) { r.Left = append(r.Left, fmt.Sprintf(format, a...)) }

// source is a foreign checkpoint, unpacked.
type source struct {
	report  *Report
	dump    dump
	spec    *specs.Spec
	id      string
	base    string              // name of the image that the container came from
	target  *ocispec.Descriptor // what an index says that is
	created time.Time           // when it was dumped: what the source says, else what CRIU wrote last has
	criu    int                 // version that dumped, 0 if nobody says
	kernel  string              // of the machine of the dump, empty if nobody says
	// changes writes the layer of changes, nil for none.
	changes func(io.Writer) error
	shm     string // file with a tar of /dev/shm, empty for none
}

// Names that engines give their checkpoints' base image and so on: annotations of
// checkpoint images.
const (
	annotationsPodman = "io.podman.annotations.checkpoint."
	annotationsCRIO   = "io.kubernetes.cri-o.annotations.checkpoint."
	annotationsCommon = "org.criu.checkpoint."
)
