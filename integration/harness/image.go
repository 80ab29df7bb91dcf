package harness

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	containerd "github.com/containerd/containerd/v2/client"
)

// ImageRef is the name under which ImportImage makes an image known.
func ImageRef(name string) string { return "crac.test/" + name + ":latest" }

// ImportImage imports an image that integration/apps builds and unpacks it, once.
func (d *Daemon) ImportImage(ctx context.Context, name string) (containerd.Image, error) {
	return d.ImportImageFor(ctx, name, "")
}

// ImportImageFor is ImportImage for another snapshotter than the default one.
func (d *Daemon) ImportImageFor(ctx context.Context, name, snapshotter string) (containerd.Image, error) {
	ctx = d.Context(ctx)
	img, err := d.Client.GetImage(ctx, ImageRef(name))
	if err != nil {
		archive, err := d.Tools.Image(name)
		if err != nil {
			return nil, err
		}
		f, err := os.Open(archive)
		if err != nil {
			return nil, err
		}
		defer func() { _ = f.Close() }()
		if _, err := d.Client.Import(ctx, f); err != nil {
			return nil, fmt.Errorf("import %s: %w", archive, err)
		}
		if img, err = d.Client.GetImage(ctx, ImageRef(name)); err != nil {
			return nil, fmt.Errorf("%s does not hold an image of the name %s: %w", archive, ImageRef(name), err)
		}
	}
	unpacked, err := img.IsUnpacked(ctx, snapshotter)
	if err == nil && !unpacked {
		err = img.Unpack(ctx, snapshotter)
	}
	if err != nil {
		return nil, fmt.Errorf("unpack %s: %w", ImageRef(name), err)
	}
	return img, nil
}

// BuildImages builds the named images when their archives are not there. It needs the
// repository, so it has no use in the guest, which gets the archives.
func (t *Tools) BuildImages(ctx context.Context, names ...string) error {
	var missing []string
	for _, n := range names {
		if _, err := t.Image(n); err != nil {
			missing = append(missing, n)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	script := filepath.Join(filepath.Dir(t.Build), "integration", "apps", "build.sh")
	cmd := exec.CommandContext(ctx, script, missing...)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s %v: %w", script, missing, err)
	}
	return nil
}
