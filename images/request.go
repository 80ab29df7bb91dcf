package images

import (
	"time"

	"github.com/crac-shim/crac/oci"
)

// BuildRequest is what to build an image of, as far as it is known before there is a dump:
// the first line of JSON on the standard input of `cracctl build-image`. It is answered
// with EventReady or EventError.
type BuildRequest struct {
	// Address and Namespace are containerd's.
	Address   string `json:"address"`
	Namespace string `json:"namespace"`
	// Container is the ID of the container that is to be dumped.
	Container string `json:"container"`
	// Ref names the image to make. An existing name is moved.
	Ref string `json:"ref"`
	// SpecPath is the runtime spec of the container.
	SpecPath string `json:"specPath"`
	// Compression of the new layers: zstd (the default) or gzip.
	Compression oci.Compression `json:"compression,omitempty"`
	// Parent names a checkpoint image that the new one continues: memory that it
	// has is not stored again, and its checkpoint layers stay below the new one.
	Parent string `json:"parent,omitempty"`
	// EncryptTo are whom the container's own layers are encrypted for, in the forms of
	// oci.CheckRecipients; empty: nobody.
	EncryptTo []string `json:"encryptTo,omitempty"`
	// Keys decrypt the parent, and what the container's image has of an earlier
	// checkpoint. Without any, those of the node are tried.
	Keys []string `json:"keys,omitempty"`
	// Index makes the name mean an index: this image for its platform, and what the
	// container's image and the name itself have for others.
	Index bool `json:"index,omitempty"`
	// Push sends the image to the registry in its name once it is there.
	Push bool `json:"push,omitempty"`
	// BuildDump has what is known of it.
	BuildDump
}

// BuildDump is a dump to build the image of: the second line.
type BuildDump struct {
	// DumpDir is CRIU's directory.
	DumpDir string `json:"dumpDir,omitempty"`
	// PreDumpDir, if there is one, has the memory that the dump left out, being the
	// same: then the dump has a link to it named parent. Both become one.
	PreDumpDir string `json:"preDumpDir,omitempty"`
	// Manifest is complete but for Files and Base.
	Manifest oci.Manifest `json:"manifest"`
	// Frozen is when the container was frozen for the dump. With it, the image's
	// record says how long it was until it could run again.
	Frozen time.Time `json:"frozen,omitzero"`
}

// Kinds of BuildEvent.
const (
	// EventReady: nothing is known that stands in the way of the image; the dump may be
	// made.
	EventReady = "ready"
	// EventDiffed: the container's changes are taken; it may run again.
	EventDiffed = "diffed"
	// EventReading: Done of Total bytes of Name, which the image is made of, are read; Total
	// is 0 where nobody knows it. The builder of the shim does not tell it.
	EventReading = "reading"
	// EventProgress: Done of Total bytes of the dump are packed.
	EventProgress = "progress"
	// EventWarning: the image will be made, but Error should be known.
	EventWarning = "warning"
	// EventDone: the image is there. Without a push it is the last event.
	EventDone = "done"
	// EventPushing: Done of Total bytes of the image are in the registry.
	EventPushing = "pushing"
	// EventPushed: all of them, and Uploaded of them were not there before.
	EventPushed = "pushed"
	// EventError: what was asked for is not done, and why. After EventDone it is
	// about the push alone: the image is there.
	EventError = "error"
)

// BuildEvent is what a build tells: one line of JSON on the standard output of
// `cracctl build-image`.
type BuildEvent struct {
	Event string `json:"event"`
	// Name, Digest and Size are the image's; Size counts all that a registry
	// stores for it. Of EventReading Name is what is read.
	Name   string `json:"name,omitempty"`
	Digest string `json:"digest,omitempty"`
	Size   int64  `json:"size,omitempty"`
	// LayerSize is the checkpoint layer's size as stored, DumpSize what it is
	// when unpacked, ChangesSize the stored size of the layer of changes.
	LayerSize   int64 `json:"layerSize,omitempty"`
	DumpSize    int64 `json:"dumpSize,omitempty"`
	ChangesSize int64 `json:"changesSize,omitempty"`
	// MemorySize is how much memory was dumped, PreDumpedSize how much of it ahead of
	// the freeze.
	MemorySize    int64 `json:"memorySize,omitempty"`
	PreDumpedSize int64 `json:"preDumpedSize,omitempty"`
	// ReusedSize is how much of the memory is not stored because the parent has it.
	ReusedSize int64 `json:"reusedSize,omitempty"`
	// Done and Total are bytes: of what is read, of the dump while it is packed, of the
	// image as stored while it is pushed. Uploaded of Done were sent to the registry.
	Done     int64  `json:"done,omitempty"`
	Total    int64  `json:"total,omitempty"`
	Uploaded int64  `json:"uploaded,omitempty"`
	Error    string `json:"error,omitempty"`
}
