package registry

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	coreimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	remoteerrors "github.com/containerd/containerd/v2/core/remotes/errors"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/semaphore"

	"github.com/crac-shim/crac/oci"
)

// uploads is how many blobs of one image are sent at a time.
const uploads = 3

// Progress is how far a push has come, in bytes as stored.
type Progress struct {
	Done, Total int64
	// Uploaded of Done was sent. The rest was there already, or the registry took
	// it over from another repository.
	Uploaded int64
}

// Push sends an image with all that it refers to. report, if there is one, is
// called a few times a second, from another goroutine and never twice at a time.
// What was sent before an error stays there, unnamed, and need not be sent again.
func Push(ctx context.Context, c Config, store content.Store, ref string, target ocispec.Descriptor, report func(Progress)) (Progress, error) {
	if err := oci.CheckPushRef(ref); err != nil {
		return Progress{}, err
	}
	all, absent, err := contentOf(ctx, store, target)
	if err != nil {
		return Progress{}, fmt.Errorf("push %s: %w", ref, err)
	}
	tracker := docker.NewInMemoryTracker()
	resolver := c.resolver(ctx, tracker)
	if err := expect(ctx, resolver, ref, absent); err != nil {
		return Progress{}, fmt.Errorf("push %s: %w", ref, explain(ctx, store, all, hostOf(ref), err))
	}
	pusher, err := resolver.Pusher(ctx, ref+"@"+target.Digest.String())
	if err != nil {
		return Progress{}, fmt.Errorf("push %s: %w", ref, err)
	}
	stop := poll(ctx, tracker, all, report)
	err = first(ctx, pusher, store, all)
	if err == nil {
		err = remotes.PushContent(ctx, pusher, target, store, semaphore.NewWeighted(uploads), platforms.All, func(h coreimages.Handler) coreimages.Handler {
			return without(absent, h)
		})
	}
	stop()
	p := progress(ctx, tracker, all)
	if err != nil {
		return p, fmt.Errorf("push %s: %w", ref, explain(ctx, store, all, hostOf(ref), err))
	}
	if err := remember(ctx, store, ref, all); err != nil {
		return p, fmt.Errorf("pushed, but cannot note where %s is: %w", ref, err)
	}
	if report != nil {
		report(p)
	}
	return p, nil
}

// remember labels what was pushed as a pull does, so that a later push into
// another repository has the registry copy it.
func remember(ctx context.Context, store content.Store, ref string, all []ocispec.Descriptor) error {
	label, err := docker.AppendDistributionSourceLabel(store, ref)
	if err != nil {
		return err
	}
	for _, desc := range all {
		if _, err := label(ctx, desc); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return nil
}

// first sends one small blob alone. It gets the token that the others use:
// containerd's authorizer has a race when several ask at once. And whether one may
// push at all shows before anything large is read.
func first(ctx context.Context, pusher remotes.Pusher, store content.Provider, all []ocispec.Descriptor) error {
	for _, desc := range all {
		if coreimages.IsConfigType(desc.MediaType) {
			_, err := remotes.PushHandler(pusher, store)(ctx, desc)
			return err
		}
	}
	return nil
}

// contentOf lists what an image refers to, and the image itself. Images for other
// platforms that an index lists need not be here: whoever pulls an index fetches
// one of them.
func contentOf(ctx context.Context, store content.Store, target ocispec.Descriptor) (all, absent []ocispec.Descriptor, err error) {
	seen := make(map[digest.Digest]bool)
	err = coreimages.Walk(ctx, coreimages.HandlerFunc(func(ctx context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		if seen[desc.Digest] {
			return nil, nil
		}
		seen[desc.Digest] = true
		if desc.Digest != target.Digest && coreimages.IsManifestType(desc.MediaType) {
			if _, err := store.Info(ctx, desc.Digest); errdefs.IsNotFound(err) {
				absent = append(absent, desc)
				return nil, nil
			}
		}
		all = append(all, desc)
		return coreimages.Children(ctx, store, desc)
	}), target)
	return all, absent, err
}

// expect makes sure that a registry has what cannot be sent to it.
func expect(ctx context.Context, resolver remotes.Resolver, ref string, absent []ocispec.Descriptor) error {
	for _, desc := range absent {
		repository, err := withDigest(ref, desc.Digest)
		if err != nil {
			return err
		}
		_, _, err = resolver.Resolve(ctx, repository)
		if errdefs.IsNotFound(err) {
			platform := "another platform"
			if desc.Platform != nil {
				platform = platforms.Format(*desc.Platform)
			}
			return fmt.Errorf("the index lists %s for %s, which neither containerd nor the repository has; fetch the image that it is from for all platforms (ctr content fetch --all-platforms), or push without an index", desc.Digest, platform)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// without passes over some content.
func without(some []ocispec.Descriptor, h coreimages.Handler) coreimages.Handler {
	skip := make(map[digest.Digest]bool, len(some))
	for _, desc := range some {
		skip[desc.Digest] = true
	}
	return coreimages.HandlerFunc(func(ctx context.Context, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		if skip[desc.Digest] {
			return nil, nil
		}
		return h.Handle(ctx, desc)
	})
}

func progress(ctx context.Context, tracker docker.StatusTracker, all []ocispec.Descriptor) (p Progress) {
	for _, desc := range all {
		p.Total += desc.Size
		st, err := tracker.GetStatus(remotes.MakeRefKey(ctx, desc))
		switch {
		case err != nil: // not begun
		case st.Exists || st.MountedFrom != "":
			p.Done += desc.Size
		case st.Committed:
			p.Done += desc.Size
			p.Uploaded += desc.Size
		default:
			p.Done += st.Offset
			p.Uploaded += st.Offset
		}
	}
	return p
}

// poll reports until the function it returns is called.
func poll(ctx context.Context, tracker docker.StatusTracker, all []ocispec.Descriptor, report func(Progress)) (stop func()) {
	if report == nil {
		return func() {}
	}
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
				report(progress(ctx, tracker, all))
			}
		}
	})
	return func() {
		close(done)
		wg.Wait()
	}
}

// explain adds what to do about an error.
func explain(ctx context.Context, store content.Store, all []ocispec.Descriptor, host string, err error) error {
	var (
		status  remoteerrors.ErrUnexpectedStatus
		tlsName *tls.CertificateVerificationError
		plain   tls.RecordHeaderError
		dial    *net.OpError
	)
	denied := errors.As(err, &status) && (status.StatusCode == http.StatusUnauthorized || status.StatusCode == http.StatusForbidden)
	switch {
	case denied || errors.Is(err, docker.ErrInvalidAuthorization):
		return fmt.Errorf("%w; log in there (nerdctl login %s) as somebody who may push to this repository", err, host)
	case errors.As(err, &plain) || errors.Is(err, http.ErrSchemeMismatch):
		return fmt.Errorf("%w; the registry does not speak https: if it is meant so, say it in a hosts.toml (server = \"http://%s\" in /etc/containerd/certs.d/%s/)", err, host, host)
	case errors.As(err, &tlsName):
		return fmt.Errorf("%w; put the certificate of its authority where a hosts.toml names it (ca = … in /etc/containerd/certs.d/%s/)", err, host)
	case errors.As(err, &dial) && dial.Op == "dial":
		return fmt.Errorf("%w; is the registry running, and is its name right?", err)
	case errdefs.IsNotFound(err):
		for _, desc := range all {
			if _, serr := store.Info(ctx, desc.Digest); errdefs.IsNotFound(serr) {
				return fmt.Errorf("%w; layer %s is not in containerd's content store, which was told to discard what is unpacked, and the registry does not have it: fetch the base image again (ctr content fetch)", err, desc.Digest)
			}
		}
	}
	return err
}
