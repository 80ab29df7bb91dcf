package build

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	containerd "github.com/containerd/containerd/v2/client"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/crac-shim/crac/images/inspect"
	"github.com/crac-shim/crac/oci"
)

// TuneRequest says what to tune: a FlattenRequest, and how.
type TuneRequest struct {
	FlattenRequest
	// WorkingSet gives the file that names the pages to bring first, for the dump
	// whose manifest has this digest. It is not looked into.
	WorkingSet func(manifest string) ([]byte, error)
}

// Tune makes a checkpoint image that brings a working set along, and is otherwise
// what Flatten makes.
func Tune(ctx context.Context, client *containerd.Client, r TuneRequest, emit func(Event)) (ocispec.Descriptor, error) {
	return tune(ctx, servicesOf(client), r, emit)
}

func tune(ctx context.Context, s services, r TuneRequest, emit func(Event)) (ocispec.Descriptor, error) {
	return flattenAnd(ctx, s, r.FlattenRequest, func(chain []*inspect.Layer, dir string) error {
		data, err := r.WorkingSet(chain[0].ManifestDigest)
		if err != nil {
			return fmt.Errorf("tune %s: %w", r.From, err)
		}
		// In place of one that came with it, if there was one.
		return os.WriteFile(filepath.Join(dir, oci.WorkingSetName), data, 0o600)
	}, emit)
}
