package build

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	coreimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/blob"
	"github.com/crac-shim/crac/images/crypt"
	"github.com/crac-shim/crac/images/inspect"
	"github.com/crac-shim/crac/images/registry"
	"github.com/crac-shim/crac/oci"
)

// An index lists images, one for each platform. Putting a checkpoint into one
// changes the entry of its own platform; the others are what somebody else made,
// and need not be here.

// attestationOf is an annotation of BuildKit's, on an entry that is no image but
// says something about one: the digest of that.
const attestationOf = "vnd.docker.reference.digest"

// unknown is the platform of what is no image.
const unknown = "unknown"

// place puts entries where those of their platforms are, or at the end. What was said about
// an entry that went, goes too.
func place(list []ocispec.Descriptor, own ...ocispec.Descriptor) []ocispec.Descriptor {
	gone := make(map[string]bool)
	placed := make([]bool, len(own))
	var out []ocispec.Descriptor
	for _, m := range list {
		replaced := false
		for i, o := range own {
			if m.Digest != o.Digest && !samePlatform(m.Platform, o.Platform) {
				continue
			}
			replaced = true
			if !placed[i] {
				placed[i] = true
				out = append(out, o)
			}
		}
		if replaced {
			gone[m.Digest.String()] = true
		} else {
			out = append(out, m)
		}
	}
	for i, o := range own {
		delete(gone, o.Digest.String())
		if !placed[i] {
			out = append(out, o)
		}
	}
	kept := out[:0]
	for _, m := range out {
		if of := m.Annotations[attestationOf]; of == "" || !gone[of] { // a broken entry may have no digest
			kept = append(kept, m)
		}
	}
	return kept
}

func samePlatform(a, b *ocispec.Platform) bool {
	if a == nil || b == nil || a.OS == unknown || b.OS == unknown {
		return false
	}
	x, y := platforms.Normalize(*a), platforms.Normalize(*b)
	return x.OS == y.OS && x.Architecture == y.Architecture && x.Variant == y.Variant && x.OSVersion == y.OSVersion &&
		slices.Equal(slices.Sorted(slices.Values(x.OSFeatures)), slices.Sorted(slices.Values(y.OSFeatures)))
}

// merge puts all of a later list into an earlier one. What one list has several of stays as
// it is there: they may differ in what this code does not know.
func merge(into, list ocispec.Index) ocispec.Index {
	into.Manifests = place(into.Manifests, list.Manifests...)
	annotations := maps.Clone(into.Annotations)
	if annotations == nil {
		annotations = make(map[string]string)
	}
	maps.Copy(annotations, list.Annotations)
	into.Annotations = annotations
	return into
}

// readList reads what an image's name means as a list: the index, or one of the
// only image.
func readList(ctx context.Context, cs content.Provider, target ocispec.Descriptor) (list ocispec.Index, err error) {
	if !coreimages.IsIndexType(target.MediaType) {
		entry, err := entryOf(ctx, cs, target)
		return ocispec.Index{Manifests: []ocispec.Descriptor{entry}}, err
	}
	return list, blob.ReadJSON(ctx, cs, target, &list)
}

// entryOf is an image as an index lists it.
func entryOf(ctx context.Context, cs content.Provider, desc ocispec.Descriptor) (ocispec.Descriptor, error) {
	return registry.Entry(desc, func(desc ocispec.Descriptor, v any) error { return blob.ReadJSON(ctx, cs, desc, v) })
}

// writeIndex stores an index that has an image in the place of its platform, and
// the entries of the lists, the later ones before the earlier, in all others.
func writeIndex(ctx context.Context, cs content.Store, own ocispec.Descriptor, lists ...ocispec.Index) (ocispec.Descriptor, error) {
	none := ocispec.Descriptor{}
	entry, err := entryOf(ctx, cs, own)
	if err != nil {
		return none, err
	}
	last := ocispec.Index{Manifests: []ocispec.Descriptor{entry}}
	if v := entry.Annotations[oci.AnnotationVersion]; v != "" {
		// The rest is different for each entry.
		last.Annotations = map[string]string{oci.AnnotationVersion: v}
	}
	var index ocispec.Index
	for _, l := range append(lists, last) {
		index = merge(index, l)
	}
	index.Versioned, index.MediaType = specs.Versioned{SchemaVersion: 2}, ocispec.MediaTypeImageIndex
	data, err := json.MarshalIndent(index, "", "  ")
	if err != nil {
		return none, err
	}
	return writeBlob(ctx, cs, ocispec.MediaTypeImageIndex, data, gcLabels(index.Manifests))
}

// replaced gives what a name is to mean that meant an image, or an index with that image,
// now that another is made of it: the others of the index are kept as they are. from may be
// nil.
func (s services) replaced(ctx context.Context, from *inspect.Image, own ocispec.Descriptor) (ocispec.Descriptor, error) {
	if from == nil || !coreimages.IsIndexType(from.Target.MediaType) {
		return own, nil
	}
	if own.Digest == from.Desc.Digest {
		return from.Target, nil
	}
	list, err := s.list(ctx, from.Target)
	if err != nil {
		return own, err
	}
	entry, err := entryOf(ctx, s.content, own)
	if err != nil {
		return own, err
	}
	for i, m := range list.Manifests {
		if m.Digest == from.Desc.Digest {
			// However its platform was said, if at all.
			list.Manifests[i].Platform = entry.Platform
		}
	}
	return writeIndex(ctx, s.content, own, list)
}

// InTheOpen warns of checkpoints for other platforms that an index lists beside an encrypted
// one: that are not encrypted, or not here to be looked at. It is empty if there are none.
func InTheOpen(ctx context.Context, cs content.Provider, target, own ocispec.Descriptor) (warning string) {
	open, err := inTheOpen(ctx, cs, target, own)
	switch {
	case err != nil:
		return fmt.Sprintf("whether the checkpoints for other platforms in the index are encrypted could not be found out: %v", err)
	case len(open) > 0:
		return fmt.Sprintf("the index has checkpoints beside the encrypted one that anybody can read who has it: for %s; encrypt them, too, on machines of their platforms (cracctl encrypt)",
			strings.Join(open, ", "))
	}
	return ""
}

// inTheOpen lists their platforms.
func inTheOpen(ctx context.Context, cs content.Provider, target, own ocispec.Descriptor) (open []string, err error) {
	if !coreimages.IsIndexType(target.MediaType) {
		return nil, nil
	}
	if sealed, err := isSealed(ctx, cs, own); err != nil || !sealed {
		return nil, err
	}
	var list ocispec.Index
	if err := blob.ReadJSON(ctx, cs, target, &list); err != nil {
		return nil, err
	}
	for _, m := range list.Manifests {
		if m.Digest == own.Digest || m.Annotations[oci.AnnotationVersion] == "" {
			continue
		}
		platform := "a platform that is not named"
		if m.Platform != nil {
			platform = platforms.Format(*m.Platform)
		}
		switch sealed, err := isSealed(ctx, cs, m); {
		case errdefs.IsNotFound(err):
			open = append(open, platform+" (perhaps: it is not here)")
		case err != nil:
			return nil, fmt.Errorf("%s: %w", platform, err)
		case !sealed:
			open = append(open, platform)
		}
	}
	return open, nil
}

// isSealed tells whether all that an image does not have from its base is encrypted.
func isSealed(ctx context.Context, cs content.Provider, manifest ocispec.Descriptor) (bool, error) {
	img, err := inspect.Open(ctx, cs, manifest.Digest.String(), manifest, platforms.All)
	if err != nil {
		return false, err
	}
	for n, l := range img.Manifest.Layers {
		if img.Kind(n) != "base" && !crypt.IsEncrypted(l.MediaType) {
			return false, nil
		}
	}
	return img.Checkpoint >= 0, nil
}

// warnInTheOpen passes on what InTheOpen says.
func (s services) warnInTheOpen(ctx context.Context, target, own ocispec.Descriptor, emit func(Event)) {
	if warning := InTheOpen(ctx, s.content, target, own); warning != "" {
		emit(Event{Event: images.EventWarning, Error: warning})
	}
}

// list reads what an image's name means as a list, and holds what is in it.
func (s services) list(ctx context.Context, target ocispec.Descriptor) (ocispec.Index, error) {
	if err := s.keep(ctx, target); err != nil {
		return ocispec.Index{}, err
	}
	list, err := readList(ctx, s.content, target)
	if err != nil {
		return list, err
	}
	return list, s.keepParts(ctx, target, list.Manifests...)
}

// lists are those that a new index starts from: of the image that the container
// came from, and of what the new name means so far.
func (s services) lists(ctx context.Context, names ...string) ([]ocispec.Index, error) {
	var lists []ocispec.Index
	for _, name := range names {
		record, err := s.images.Get(ctx, name)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		list, err := s.list(ctx, record.Target)
		if err != nil {
			return nil, fmt.Errorf("read image %s: %w", name, err)
		}
		lists = append(lists, list)
	}
	return lists, nil
}

// MakeIndex makes the name of an image mean an index with that image, and what the
// name means in its registry for other platforms. Nobody must push to this name
// meanwhile: registries know no way to change a part of an index.
func MakeIndex(ctx context.Context, client *containerd.Client, config registry.Config, ref string) (ocispec.Descriptor, error) {
	return makeIndex(ctx, servicesOf(client), config, ref)
}

func makeIndex(ctx context.Context, s services, config registry.Config, ref string) (_ ocispec.Descriptor, err error) {
	none := ocispec.Descriptor{}
	l, err := newLease(ctx, s.leases)
	if err != nil {
		return none, err
	}
	// What is stored has its name by then, or is of no use.
	defer func() { _ = endLease(ctx, s.leases, l) }()
	ctx = leases.WithLease(ctx, l.ID)
	record, err := s.images.Get(ctx, ref)
	if err != nil {
		return none, fmt.Errorf("find image %s: %w", ref, err)
	}
	img, err := s.openTarget(ctx, ref, record.Target)
	if err != nil {
		return none, err
	}
	lists, err := s.lists(ctx, ref)
	if err != nil {
		return none, err
	}
	there, err := registry.List(ctx, config, ref)
	if err != nil {
		return none, err
	}
	target, err := writeIndex(ctx, s.content, img.Desc, append(lists, there)...)
	if err != nil {
		return none, fmt.Errorf("write index %s: %w", ref, err)
	}
	record.Target = target
	_, err = s.images.Update(ctx, record, "target")
	return target, err
}
