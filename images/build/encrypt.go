package build

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	coreimages "github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/compress"
	"github.com/crac-shim/crac/images/crypt"
	"github.com/crac-shim/crac/images/inspect"
	"github.com/crac-shim/crac/oci"
)

// What a workload had in its memory it may have written to its files, and the other
// way round: layers of changes are encrypted with the checkpoint layer. Without the
// key an image with either cannot be unpacked anyway. The base's layers are as they
// were, and shared.

// encrypts tells whether a list of recipients has any.
func encrypts(to []string) bool { return len(to) > 0 && !slices.Equal(to, []string{oci.NoRecipients}) }

// storedType is the media type of a layer that is stored so.
func (c compression) storedType() string {
	if c.recipients == nil {
		return c.MediaType
	}
	return crypt.EncryptedType(c.MediaType)
}

// seal gives a writer that encrypts into w, if there are recipients. end has to be
// called, and gives the annotations that the layer is decrypted by.
func (c compression) seal(w io.Writer) (out io.Writer, end func() (annotations map[string]string, err error), err error) {
	if c.recipients == nil {
		return w, func() (map[string]string, error) { return nil, nil }, nil
	}
	e, err := c.recipients.Encrypt(w)
	if err != nil {
		return nil, nil, err
	}
	return e, func() (map[string]string, error) {
		if err := e.Close(); err != nil {
			return nil, err
		}
		return e.Annotations()
	}, nil
}

// mustEncrypt refuses to put what came from an encrypted image into one that anybody
// can read, unless that is asked for by name.
func mustEncrypt(name string, layers []ocispec.Descriptor, to []string) error {
	if len(to) > 0 || !slices.ContainsFunc(layers, func(l ocispec.Descriptor) bool { return crypt.IsEncrypted(l.MediaType) }) {
		return nil
	}
	return fmt.Errorf("image %s is encrypted and the new one would not be: say for whom it is to be (--encrypt-to, or the option checkpoint.encrypt-to), or that anybody may read it (%s)", name, oci.NoRecipients)
}

// EncryptRequest says what to encrypt.
type EncryptRequest struct {
	// From is a checkpoint image, Ref the name of the one to make of it.
	From, Ref string
	// To are the recipients: see oci.CheckRecipients.
	To []string
	// Keys decrypt what of From is encrypted already; without any, those of the node are
	// tried.
	Keys []string
}

// Encrypt makes an image of a checkpoint image whose own layers, but not those of its
// base, are encrypted for the recipients, and for nobody else. Their contents stay the
// same bytes. ctx must carry the namespace.
func Encrypt(ctx context.Context, client *containerd.Client, r EncryptRequest, emit func(Event)) (ocispec.Descriptor, error) {
	return encrypt(ctx, servicesOf(client), r, emit)
}

func encrypt(ctx context.Context, s services, r EncryptRequest, emit func(Event)) (_ ocispec.Descriptor, err error) {
	none := ocispec.Descriptor{}
	if err := oci.CheckRef(r.Ref); err != nil {
		return none, err
	}
	if !encrypts(r.To) {
		return none, errors.New("nobody is named who could read it: say whom with --encrypt-to")
	}
	comp, err := newCompression("", r.To) // layers stay compressed as they are
	if err != nil {
		return none, err
	}
	keys, err := ReadKeys(r.Keys)
	if err != nil {
		return none, err
	}
	ctx, release, err := s.hold(ctx, emit)
	if err != nil {
		return none, err
	}
	defer release(&err)
	img, err := s.open(ctx, r.From)
	if err != nil {
		return none, err
	}
	if img.Checkpoint < 0 {
		return none, fmt.Errorf("%s: %w", r.From, inspect.ErrNoCheckpoint)
	}
	b, err := baseOf(ctx, s, img)
	if err != nil {
		return none, err
	}
	if err := b.canReseal(comp, keys); err != nil {
		return none, err
	}
	total := int64(0)
	for i, l := range b.manifest.Layers {
		if comp.resealing(l, b.kinds[i]) == isEncrypted {
			total += l.Size
		}
	}
	if err := b.reseal(ctx, s.content, comp, keys, Telling(Event{Event: images.EventProgress, Total: total}, emit)); err != nil {
		return none, err
	}
	own, size, err := storeManifest(ctx, s.content, b.manifest)
	if err != nil {
		return none, fmt.Errorf("write image %s: %w", r.Ref, err)
	}
	target, err := s.replaced(ctx, img, own)
	if err != nil {
		return none, fmt.Errorf("write index %s: %w", r.Ref, err)
	}
	if err := s.publish(ctx, coreimages.Image{Name: r.Ref, Target: target}, own, b.absent); err != nil {
		return none, err
	}
	s.warnInTheOpen(ctx, target, own, emit)
	emit(Event{Event: images.EventDone, Name: r.Ref, Digest: target.Digest.String(), Size: size})
	return target, nil
}

// encryptLayer stores a layer once more, encrypted: compressed as it is.
func encryptLayer(ctx context.Context, cs content.Store, to *crypt.Recipients, l newLayer, tell func(n int64)) (newLayer, error) {
	return copyLayer(ctx, cs, l, compression{compress.Format{MediaType: l.desc.MediaType}, to}, tell, func(r io.Reader) (io.Reader, error) { return r, nil })
}

// decryptLayer is the reverse.
func decryptLayer(ctx context.Context, cs content.Store, keys *crypt.Keys, l newLayer) (newLayer, error) {
	plain := compression{compress.Format{MediaType: crypt.PlainType(l.desc.MediaType)}, nil}
	return copyLayer(ctx, cs, l, plain, quietly, func(r io.Reader) (io.Reader, error) { return keys.Decrypt(r, l.desc) })
}

// quietly tells nobody how a copy gets on.
func quietly(int64) {}

// copyLayer stores what through makes of a layer's bytes.
func copyLayer(ctx context.Context, cs content.Store, l newLayer, comp compression, tell func(n int64), through func(io.Reader) (io.Reader, error)) (newLayer, error) {
	ra, err := cs.ReaderAt(ctx, l.desc)
	if err != nil {
		return newLayer{}, err
	}
	defer ra.Close()
	r, err := through(content.NewReader(ra))
	if err != nil {
		return newLayer{}, err
	}
	// Under a name that no other build has.
	ref := fmt.Sprintf("crac-copy-%d-%d", os.Getpid(), time.Now().UnixNano())
	return storeLayer(ctx, cs, ref, comp, func(w io.Writer) (digest.Digest, error) {
		_, err := io.Copy(&progress{w, tell}, r)
		return l.diffID, err
	})
}

// nodeKeyDir is where the keys of the node are.
var nodeKeyDir = crypt.NodeKeyDir

// ReadKeys reads the keys that a request names, or, if it names none, gives those of the node:
// containers of encrypted images run there.
func ReadKeys(list []string) (*crypt.Keys, error) {
	if len(list) == 0 {
		return crypt.KeysIn(nodeKeyDir), nil
	}
	return crypt.ParseKeys(list)
}

// resealing is what becomes of a layer that an image is made with.
type resealing int

const (
	stays resealing = iota
	isEncrypted
	isDecrypted
	isPassedOn // its key is encrypted for others
)

// resealing tells what becomes of a layer. Whoever can read a new image must be able to
// read all of it: of what the container's image had of its own, not only what is new.
func (c compression) resealing(l ocispec.Descriptor, kind string) resealing {
	switch encrypted := crypt.IsEncrypted(l.MediaType); {
	case encrypted && c.recipients == nil:
		return isDecrypted
	case encrypted:
		return isPassedOn
	case kind != "base" && c.recipients != nil:
		return isEncrypted
	}
	return stays
}

// reseal makes a layer of an earlier image one that the new image's recipients can read,
// or anybody if there are none. tell is told how much is encrypted.
func (c compression) reseal(ctx context.Context, cs content.Store, l newLayer, kind string, keys *crypt.Keys, tell func(n int64)) (newLayer, error) {
	had := l.desc
	var err error
	switch c.resealing(had, kind) {
	case isEncrypted:
		l, err = encryptLayer(ctx, cs, c.recipients, l, tell)
	case isDecrypted:
		l, err = decryptLayer(ctx, cs, keys, l)
	case isPassedOn:
		l.desc.Annotations, err = keys.Pass(had, c.recipients)
	default:
		return l, nil
	}
	if err != nil {
		return l, fmt.Errorf("layer %s: %w", had.Digest, err)
	}
	// What else was said of it still holds.
	others := maps.Clone(had.Annotations)
	maps.DeleteFunc(others, func(k, _ string) bool { return crypt.IsAnnotation(k) })
	if l.desc.Annotations == nil {
		l.desc.Annotations = others
	} else {
		maps.Copy(l.desc.Annotations, others)
	}
	return l, nil
}

// reseal does so with all layers of the base.
func (b *base) reseal(ctx context.Context, cs content.Store, comp compression, keys *crypt.Keys, tell func(n int64)) error {
	layers := slices.Clone(b.manifest.Layers)
	for i, l := range layers {
		sealed, err := comp.reseal(ctx, cs, newLayer{desc: l, diffID: b.diffIDs[i]}, b.kinds[i], keys, tell)
		if err != nil {
			return fmt.Errorf("image %s: %w", b.Name, err)
		}
		layers[i] = sealed.desc
	}
	b.manifest.Layers = layers
	return nil
}

// canReseal refuses what reseal would.
func (b *base) canReseal(comp compression, keys *crypt.Keys) error {
	for i, l := range b.manifest.Layers {
		becomes := comp.resealing(l, b.kinds[i])
		if (becomes == isDecrypted || becomes == isPassedOn) && keys.Fit(l) != nil {
			return fmt.Errorf("image %s: the new image would have its layer %s, too: %w", b.Name, l.Digest, keys.Fit(l))
		}
		if (becomes == isDecrypted || becomes == isEncrypted) && b.absent[l.Digest] {
			return fmt.Errorf("image %s: its layer %s has to be encrypted otherwise, and is not in the content store; fetch the image again (ctr content fetch)", b.Name, l.Digest)
		}
	}
	return nil
}
