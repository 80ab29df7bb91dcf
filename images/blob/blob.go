// Package blob reads what images are made of out of containerd's content store, and
// writes it.
package blob

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Store stores what write writes, in one pass, and tells what it has become. The labels
// that write returns it has then, also if somebody else stored it before, without them.
// ref names the ingest, or what its name begins with up to an "@". A failure leaves
// nothing, also not for a resume.
func Store(ctx context.Context, cs content.Store, ref, mediaType string, write func(io.Writer) (labels map[string]string, err error)) (desc ocispec.Descriptor, err error) {
	desc = ocispec.Descriptor{MediaType: mediaType}
	err = ingest(ctx, cs, ref, desc, func(cw content.Writer) error {
		ahead := newAheadWriter(cw)
		defer ahead.close()
		labels, err := write(&ctxWriter{ctx, ahead})
		if err != nil {
			return err
		}
		if err := ahead.close(); err != nil {
			return err
		}
		desc.Digest = cw.Digest()
		if err := cw.Commit(ctx, 0, desc.Digest, content.WithLabels(labels)); err != nil && !errdefs.IsAlreadyExists(err) {
			return err
		}
		desc.Size, err = label(ctx, cs, desc, labels)
		return err
	})
	return desc, err
}

// Write stores data that has the size and the digest of desc, with the labels.
func Write(ctx context.Context, cs content.Store, desc ocispec.Descriptor, data []byte, labels map[string]string) error {
	err := ingest(ctx, cs, "crac-"+desc.Digest.String(), desc, func(cw content.Writer) error {
		if _, err := cw.Write(data); err != nil {
			return err
		}
		return cw.Commit(ctx, desc.Size, desc.Digest, content.WithLabels(labels))
	})
	if err != nil && !errdefs.IsAlreadyExists(err) {
		return err
	}
	_, err = label(ctx, cs, desc, labels)
	return err
}

// ingest opens a writer, and leaves nothing of it if fill fails.
func ingest(ctx context.Context, cs content.Store, ref string, desc ocispec.Descriptor, fill func(content.Writer) error) (err error) {
	cw, ref, err := open(ctx, cs, ref, desc)
	if err != nil {
		return err
	}
	defer func() {
		cerr := cw.Close()
		if err == nil {
			err = cerr
			return
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		if aerr := cs.Abort(ctx, ref); aerr != nil && !errdefs.IsNotFound(aerr) {
			err = errors.Join(err, fmt.Errorf("remove the unfinished content %s: %w", ref, aerr))
		}
	}()
	// One that was killed may have left a beginning.
	if err := cw.Truncate(0); err != nil {
		return err
	}
	return fill(cw)
}

// open opens the ingest named ref, or one whose name begins so when that is locked, and
// tells which. containerd 2.4.2 locks a name until it restarts when it could not record
// the ingest, as on a full disk (core/metadata/content.go, Writer), and content.OpenWriter
// would wait for that without a word.
func open(ctx context.Context, cs content.Store, ref string, desc ocispec.Descriptor) (content.Writer, string, error) {
	cw, err := cs.Writer(ctx, content.WithRef(ref), content.WithDescriptor(desc))
	if errdefs.IsUnavailable(err) {
		ref = fmt.Sprintf("%s@%d", ref, time.Now().UnixNano())
		cw, err = cs.Writer(ctx, content.WithRef(ref), content.WithDescriptor(desc))
	}
	return cw, ref, err
}

// label adds what content lacks of the labels, and tells how large it is: it may have
// been there before, from somebody who did not say.
func label(ctx context.Context, cs content.Store, desc ocispec.Descriptor, labels map[string]string) (size int64, err error) {
	info, err := cs.Info(ctx, desc.Digest)
	if err != nil {
		return 0, err
	}
	var lacks []string
	for k := range labels {
		if info.Labels[k] == "" {
			lacks = append(lacks, "labels."+k)
		}
	}
	if len(lacks) > 0 {
		_, err = cs.Update(ctx, content.Info{Digest: desc.Digest, Labels: labels}, lacks...)
	}
	return info.Size, err
}

// ctxWriter makes a long copy stop when its context ends.
type ctxWriter struct {
	ctx context.Context
	w   io.Writer
}

func (w *ctxWriter) Write(p []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	return w.w.Write(p)
}

// Reader makes a long read stop when its context ends, and tells how it gets on.
type Reader struct {
	Ctx context.Context
	R   io.Reader
	// Tell, if it is not nil, is told how many bytes more were read.
	Tell func(n int64)
}

func (r *Reader) Read(p []byte) (int, error) {
	if err := r.Ctx.Err(); err != nil {
		return 0, err
	}
	n, err := r.R.Read(p)
	if r.Tell != nil {
		r.Tell(int64(n))
	}
	return n, err
}

// maxSmall bounds what is read as a whole: manifests, indexes, configurations. The
// registries take half of that.
const maxSmall = 8 << 20

// Small is a store out of which nothing large is read: what is no layer is read as a
// whole, and whoever made an image chose how large it is.
type Small struct{ content.Provider }

// ReaderAt refuses what is large.
func (s Small) ReaderAt(ctx context.Context, desc ocispec.Descriptor) (content.ReaderAt, error) {
	ra, err := s.Provider.ReaderAt(ctx, desc)
	if err != nil {
		return nil, err
	}
	if n := ra.Size(); n > maxSmall {
		ra.Close()
		return nil, fmt.Errorf("%s %s has %d bytes, and no more than %d are read of what is no layer", desc.MediaType, desc.Digest, n, maxSmall)
	}
	return ra, nil
}

// ReadJSON reads one blob of JSON into each of these.
func ReadJSON(ctx context.Context, from content.Provider, desc ocispec.Descriptor, into ...any) error {
	data, err := content.ReadBlob(ctx, Small{from}, desc)
	if err != nil {
		return err
	}
	for _, v := range into {
		if err := json.Unmarshal(data, v); err != nil {
			return fmt.Errorf("%s %s: %w", desc.MediaType, desc.Digest, err)
		}
	}
	return nil
}
