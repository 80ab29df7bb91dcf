// Package trust signs images and tells whether a node's policy accepts their
// signatures: those of the Notary Project, with its own library.
//
// It is cracctl's. The shim asks it through `cracctl judge`.
package trust

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/notaryproject/notation-core-go/signature/jws"
	"github.com/notaryproject/notation-go"
	"github.com/notaryproject/notation-go/dir"
	notationregistry "github.com/notaryproject/notation-go/registry"
	"github.com/notaryproject/notation-go/signer"
	"github.com/notaryproject/notation-go/verifier"
	"github.com/notaryproject/notation-go/verifier/trustpolicy"
	"github.com/notaryproject/notation-go/verifier/truststore"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	orascontent "oras.land/oras-go/v2/content"

	"github.com/crac-shim/crac/images"
)

// maxSignatures bounds how many signatures of one image are looked at.
const maxSignatures = 50

// recheck is how long a verdict is good at most: until then a certificate that was
// revoked may still count.
const recheck = 24 * time.Hour

// Sign signs an image in containerd's content store, with a key and the certificates
// from its own up to the one that others trust. ctx must hold a lease.
func Sign(ctx context.Context, cs content.Store, image ocispec.Descriptor, keyFile, certFile string) error {
	s, err := signer.NewGenericSignerFromFiles(keyFile, certFile)
	if err != nil {
		return fmt.Errorf("sign with the key %s and the certificates %s: %w", keyFile, certFile, err)
	}
	_, err = notation.Sign(ctx, s, notationregistry.NewRepository(store{cs, image.Digest}), notation.SignOptions{
		SignerSignOptions: notation.SignerSignOptions{SignatureMediaType: jws.MediaTypeEnvelope, SigningAgent: "cracctl"},
		ArtifactReference: image.Digest.String(),
	})
	return err
}

// Signatures lists the signatures of an image that are in a content store.
func Signatures(ctx context.Context, cs content.Store, image ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	return signatures(ctx, store{cs, image.Digest}, image)
}

func signatures(ctx context.Context, target oras.GraphTarget, image ocispec.Descriptor) ([]ocispec.Descriptor, error) {
	var all []ocispec.Descriptor
	err := notationregistry.NewRepository(target).ListSignatures(ctx, bare(image), func(some []ocispec.Descriptor) error {
		if all = append(all, some...); len(all) > maxSignatures {
			return fmt.Errorf("%s has more than %d signatures", image.Digest, maxSignatures)
		}
		return nil
	})
	return all, err
}

// bare is a descriptor as signatures have it.
func bare(d ocispec.Descriptor) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: d.Size}
}

// Push sends the signatures of an image to its registry, as referrers of the image,
// which is there. It returns how many there are.
func Push(ctx context.Context, cs content.Store, remote oras.GraphTarget, image ocispec.Descriptor) (int, error) {
	return copySignatures(ctx, store{cs, image.Digest}, remote, image)
}

// Fetch gets the signatures of an image that its registry has. ctx must hold a lease.
func Fetch(ctx context.Context, cs content.Store, remote oras.GraphTarget, image ocispec.Descriptor) (int, error) {
	return copySignatures(ctx, remote, store{cs, image.Digest}, image)
}

func copySignatures(ctx context.Context, from, to oras.GraphTarget, image ocispec.Descriptor) (int, error) {
	all, err := signatures(ctx, from, image)
	if err != nil {
		return 0, err
	}
	// What is signed is on both sides already.
	opts := oras.CopyGraphOptions{FindSuccessors: func(ctx context.Context, f orascontent.Fetcher, desc ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		next, err := orascontent.Successors(ctx, f, desc)
		return slices.DeleteFunc(next, func(d ocispec.Descriptor) bool { return d.Digest == image.Digest }), err
	}}
	for _, signature := range all {
		if signature.Size > maxSignature {
			return 0, fmt.Errorf("signature %s has %d bytes", signature.Digest, signature.Size)
		}
		if err := oras.CopyGraph(ctx, from, to, bare(signature), opts); err != nil {
			return 0, fmt.Errorf("copy signature %s: %w", signature.Digest, err)
		}
	}
	return len(all), nil
}

// Verify tells whether one of the images that a name means (an index and the manifest
// in it; either may be signed) has a signature that the policy's trust policy accepts
// for that name.
func Verify(ctx context.Context, cs content.Store, p *images.Policy, name string, all ...ocispec.Descriptor) images.Verdict {
	refuse := func(err error) images.Verdict {
		return images.Verdict{Reason: err.Error(), Image: name, Digest: all[0].Digest.String()}
	}
	spec, err := reference.Parse(name)
	if err != nil {
		return refuse(fmt.Errorf("image name %s cannot be matched with a trust policy: %w", name, err))
	}
	v, err := verifierOf(p.Notation)
	if err != nil {
		return refuse(err)
	}
	var errs []error
	for _, image := range all {
		_, outcomes, err := notation.Verify(ctx, v, notationregistry.NewRepository(store{cs, image.Digest}), notation.VerifyOptions{
			ArtifactReference: spec.Locator + "@" + image.Digest.String(), MaxSignatureAttempts: maxSignatures,
		})
		if err == nil {
			verdict := allow(outcomes)
			verdict.Image, verdict.Digest = name, image.Digest.String()
			return verdict
		}
		errs = append(errs, fmt.Errorf("%s: %s", image.Digest, oneLine(err)))
	}
	return refuse(fmt.Errorf("no signature of %s is accepted by %s: %w; have it signed (cracctl sign), fetch its signatures (cracctl verify does), or let the policy trust who did",
		name, filepath.Join(p.Notation, images.TrustPolicyName), errors.Join(errs...)))
}

func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }

// verifierOf reads the Notary Project's files: notation-go itself knows only those of
// the user.
func verifierOf(config string) (notation.Verifier, error) {
	path := filepath.Join(config, images.TrustPolicyName)
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read whose signatures count: %w", err)
	}
	var doc trustpolicy.Document
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	v, err := verifier.New(&doc, truststore.NewX509TrustStore(dir.NewSysFS(config)), nil)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return v, nil
}

// allow says who has signed, and for how long that can be relied on.
func allow(outcomes []*notation.VerificationOutcome) images.Verdict {
	v := images.Verdict{Allowed: true, Reason: "its trust policy asks for no signature of this image", Until: time.Now().Add(recheck)}
	for _, o := range outcomes {
		if o.EnvelopeContent == nil {
			continue // the level is skip
		}
		info := o.EnvelopeContent.SignerInfo
		if len(info.CertificateChain) > 0 {
			v.Reason = "signed by " + info.CertificateChain[0].Subject.String()
		}
		for _, cert := range info.CertificateChain {
			v.Until = earlier(v.Until, cert.NotAfter)
		}
		v.Until = earlier(v.Until, info.SignedAttributes.Expiry)
		for _, r := range o.VerificationResults {
			if r.Error != nil {
				v.Reason += fmt.Sprintf("; the trust policy only notes that %s failed: %s", r.Type, oneLine(r.Error))
			}
		}
	}
	return v
}

func earlier(a, b time.Time) time.Time {
	if !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}
