// Package oci defines what is written down: the checkpoint image's format and
// the annotations that steer the runtime.
//
// It holds pure functions over readers and maps; no disk, no network. The shim
// re-executes itself as a container's init, so this package does no work at
// program start: no compiled patterns, no filled maps.
package oci

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// The checkpoint layer, as paths relative to a root file system:
//
//	.crac/v1/criu/*.img       the dump, with libcontainer's descriptors.json
//	.crac/v1/manifest.json    what it is and what it needs: Manifest
//	.crac/v1/spec.json        the runtime spec it was dumped under
const (
	// Root is the layer's only entry at the top.
	Root = ".crac"
	// Dir is where version 1 of the format lives.
	Dir = ".crac/v1"
	// ManifestName, SpecName and CRIUDirName are entries of Dir.
	ManifestName = "manifest.json"
	SpecName     = "spec.json"
	CRIUDirName  = "criu"
	// WorkingSetName is the file of a dump that says which pages were asked for
	// first: see runtime/pager. No reader needs it, and CRIU knows nothing of it.
	WorkingSetName = "working-set"

	// NodeDir is a directory in containerd's root for what runtimes on a node have
	// found out, and WorkingSetDir one there, for files of that kind by the digest
	// of their dump's manifest.
	NodeDir       = "io.containerd.crac.v2"
	WorkingSetDir = "working-sets"

	// DescriptorsName is libcontainer's record of the container's stdio; a
	// restore needs it beside CRIU's own files.
	DescriptorsName = "descriptors.json"
)

// Version is the format's version, written by this code. A reader accepts any
// version with the same major number.
const Version = "1"

// MediaType is the type of manifest.json, for tools that hand it around alone.
const MediaType = "application/vnd.crac.checkpoint.manifest.v1+json"

// Annotation keys. Options (options.go) share AnnotationPrefix with two
// reserved groups, which are facts written by the builder and never options:
// everything below ImagePrefix, on manifests and indexes, and LayerAnnotation,
// on a layer's descriptor.
const (
	AnnotationPrefix = "io.containerd.crac."
	ImagePrefix      = AnnotationPrefix + "image."

	// LayerAnnotation marks a layer's descriptor with what the layer is.
	LayerAnnotation = AnnotationPrefix + "layer"
	// LayerCheckpoint is LayerAnnotation's value for a checkpoint layer.
	LayerCheckpoint = "checkpoint"
)

// CreatedByChanges and CreatedByCheckpoint mark the two layers of a checkpoint
// image that are not its base's in the image's history.
const (
	CreatedByChanges    = "crac: changes of the checkpointed container"
	CreatedByCheckpoint = "crac: checkpoint"
)

// HooksDir is where participants meet the shim in a container. The runtime mounts
// it, also in a clone: no request has to.
const HooksDir = "/run/crac"

// CheckpointOptionsType is the type URL of CheckpointOptions when it travels as
// a task request's options.
const CheckpointOptionsType = "io.containerd.crac.v1.CheckpointOptions"

// CheckpointOptions is what `cracctl checkpoint` asks of the shim, as JSON.
type CheckpointOptions struct {
	// Ref names the image to make.
	Ref string `json:"ref"`
	// Exit stops the container after the dump.
	Exit bool `json:"exit"`
	// Compression of the new layers; empty is the container's own option.
	Compression Compression `json:"compression,omitempty"`
	// Parent names a checkpoint image to continue; empty for a whole checkpoint.
	Parent string `json:"parent,omitempty"`
	// TCP says what happens to established connections; empty is the container's
	// own option.
	TCP TCPMode `json:"tcp,omitempty"`
	// PreDump says when memory is copied ahead of the freeze; empty is the container's
	// own option.
	PreDump PreDumpMode `json:"preDump,omitempty"`
	// EncryptTo are whom the new layers are encrypted for; empty is the container's
	// own option. Keys decrypt the parent. Files have absolute names.
	EncryptTo []string `json:"encryptTo,omitempty"`
	Keys      []string `json:"keys,omitempty"`
	// Index puts the image into an index, beside those of other platforms.
	Index bool `json:"index,omitempty"`
}

// ParseCheckpointOptions reads what a call asks for. What it does not know is an
// error: to leave it undone would be another checkpoint than was asked for.
func ParseCheckpointOptions(data []byte) (o CheckpointOptions, err error) {
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&o); err != nil {
		return o, fmt.Errorf("checkpoint options: %w; the shim and cracctl must come from one release", err)
	}
	if o.Compression != "" {
		if err := CheckCompression(o.Compression); err != nil {
			return o, err
		}
	}
	if o.TCP != "" {
		if err := CheckTCPMode(o.TCP); err != nil {
			return o, err
		}
	}
	if o.PreDump != "" {
		if err := CheckPreDumpMode(o.PreDump); err != nil {
			return o, err
		}
	}
	return o, CheckRecipients(o.EncryptTo)
}

// CheckCompression refuses what layers are not stored with.
func CheckCompression(c Compression) error {
	return known("compression", string(c), string(CompressionZstd), string(CompressionGzip))
}

// CheckTCPMode refuses what cannot be done about connections.
func CheckTCPMode(m TCPMode) error {
	return known("tcp", string(m), string(TCPClose), string(TCPEstablished), string(TCPError))
}

// CheckPreDumpMode refuses what is no answer to when memory is copied ahead.
func CheckPreDumpMode(m PreDumpMode) error {
	return known("pre-dump", string(m), string(PreDumpAuto), string(PreDumpRequire), string(PreDumpOff))
}

func known(what, value string, values ...string) error {
	if slices.Contains(values, value) {
		return nil
	}
	return fmt.Errorf("unknown %s %q; known are %s", what, value, strings.Join(values, ", "))
}

// CheckRef refuses what cannot be an image's name anywhere. containerd itself
// takes any string, so that a mistake would show only when the image is pushed.
func CheckRef(ref string) error {
	// The longest registry, repository and tag that a registry takes.
	const longest = 255 + 1 + 255 + 1 + 128
	if ref == "" {
		return fmt.Errorf("the image name is empty; give one such as registry.example/app:warm")
	}
	if len(ref) > longest {
		return fmt.Errorf("the image name is longer than %d characters: %.40q…", longest, ref)
	}
	for _, c := range []byte(ref) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
		case c == '.', c == '-', c == '_', c == '/', c == ':', c == '@', c == '[', c == ']', c == '+':
		default:
			return fmt.Errorf("image name %q holds %q, which no image name can", ref, c)
		}
	}
	return nil
}

// CheckPushRef refuses what CheckRef does, and names by which an image cannot be
// pushed: they need a registry's host and a tag. Docker's short names mean its
// hub, but containerd takes the first part for a host, so neither is guessed.
func CheckPushRef(ref string) error {
	if err := CheckRef(ref); err != nil {
		return err
	}
	host, rest, ok := strings.Cut(ref, "/")
	if !ok || !strings.ContainsAny(host, ".:") && host != "localhost" {
		return fmt.Errorf("image name %s gives no registry to push to; give one such as registry.example/%[1]s, or docker.io/library/%[1]s", ref)
	}
	if strings.Contains(rest, "@") {
		return fmt.Errorf("image name %s has a digest, which only an image that is there already can have; give a tag to push to", ref)
	}
	if _, tag, ok := strings.Cut(rest[strings.LastIndexByte(rest, '/')+1:], ":"); !ok || tag == "" {
		return fmt.Errorf("image name %s has no tag to push to; give one such as %s:warm", ref, strings.TrimSuffix(ref, ":"))
	}
	return nil
}
