package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/plugins"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/crac-shim/crac/images/build"
	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/runtime/pager"
)

func newTune(t *target) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "tune REF [NEW]",
		Short: "Write into a checkpoint image which memory its clones ask for first",
		Long: `Write into a checkpoint image which memory its clones ask for first, as this node
has learned it from those that were started here with their memory on demand
(option memory=lazy, or auto with a large dump). Clones on other nodes then have
these pages at once, instead of asking for each. Without NEW the name REF is moved
to the new image.

The image is otherwise the same; readers that know nothing of it ignore it. One that
continues other checkpoints becomes a whole one, and one in an index takes the old
one's place there, as by cracctl flatten. The dumps are unpacked for as long as it
takes, so it needs as much room as their memory.`,
		Example: `  cracctl tune registry.example/shop/web:warm
  cracctl push registry.example/shop/web:warm`,
	}
	var root string
	t.flattens(cmd, func(s *session, _ ocispec.Descriptor, r build.FlattenRequest, emit func(build.Event)) (_ ocispec.Descriptor, more string, err error) {
		if root == "" {
			if root, err = s.root(); err != nil {
				return ocispec.Descriptor{}, "", err
			}
		}
		var pages uint64
		desc, err := build.Tune(s.ctx, s.Client, build.TuneRequest{
			FlattenRequest: r,
			WorkingSet: func(manifest string) (data []byte, err error) {
				data, pages, err = learned(root, manifest)
				return data, err
			},
		}, emit)
		return desc, fmt.Sprintf("First       %d pages\n", pages), err
	})
	cmd.Flags().StringVar(&root, "root", "", "containerd's root directory (default: asked of containerd)")
	return cmd
}

// root is containerd's root directory, which holds those of its plugins.
func (s *session) root() (string, error) {
	r, err := s.IntrospectionService().Plugins(s.ctx, "type=="+string(plugins.ContentPlugin))
	if err != nil {
		return "", fmt.Errorf("ask containerd for its root directory: %w", err)
	}
	for _, p := range r.GetPlugins() {
		if dir := p.GetExports()["root"]; dir != "" {
			return filepath.Dir(dir), nil
		}
	}
	return "", errors.New("containerd does not tell its root directory; give it with --root")
}

// learned is what this node knows of a dump.
func learned(root, manifest string) (data []byte, pages uint64, err error) {
	path := filepath.Join(root, oci.NodeDir, oci.WorkingSetDir, strings.TrimPrefix(manifest, "sha256:"))
	data, err = os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, fmt.Errorf("this node has not learned yet what its clones ask for: start one with the annotation %smemory=lazy, use it as it will be used, and try again when cracctl trace says that all memory is there (no %s)",
			oci.AnnotationPrefix, path)
	}
	if err == nil {
		pages, err = pager.CheckWorkingSet(data)
	}
	if err != nil {
		return nil, 0, fmt.Errorf("%s: %w", path, err)
	}
	return data, pages, nil
}
