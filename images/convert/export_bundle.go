package convert

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	tararchive "github.com/containerd/containerd/v2/pkg/archive"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/build"
	"github.com/crac-shim/crac/images/compress"
	"github.com/crac-shim/crac/images/workdir"
)

// bundle writes a directory with the dump in images/, and in bundle/ the spec and the
// root file system.
func (e *export) bundle(ctx context.Context) (err error) {
	e.report.From = "a directory for runc restore --image-path DIR/images --bundle DIR/bundle"
	// Beside the place where it goes: it is moved there as a whole.
	work, err := workdir.New(filepath.Dir(e.r.Dest))
	if err != nil {
		return err
	}
	defer build.RemoveWork(work, &err, e.emit)
	dir := filepath.Join(work.Path, "export")
	rootfs := filepath.Join(dir, "bundle", "rootfs")
	if err := errors.Join(os.MkdirAll(filepath.Join(dir, "images"), 0o700), os.MkdirAll(rootfs, 0o755)); err != nil {
		return err
	}
	var layers []ocispec.Descriptor
	for i, desc := range e.img.Manifest.Layers {
		if e.img.Kind(i) != "checkpoint" {
			layers = append(layers, desc)
		}
	}
	tell := reading(e.emit, "the root file system", layers...)
	for _, desc := range layers {
		if err := e.unpack(ctx, desc, tell, rootfs); err != nil {
			return fmt.Errorf("unpack: %w", err)
		}
	}
	files, err := images.DumpFiles(e.dump.dir)
	if err != nil {
		return err
	}
	tell = e.packing()
	for _, f := range files {
		to := filepath.Join(dir, "images", f.Name)
		if err := errors.Join(copyFile(ctx, filepath.Join(e.dump.dir, f.Name), to, tell), os.Chtimes(to, e.m.Created, e.m.Created)); err != nil {
			return err
		}
	}
	e.spec.Root.Path = "rootfs"
	e.spec.Linux.CgroupsPath = "" // runc calls it by the container's id
	spec, err := json.MarshalIndent(e.spec, "", "\t")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "bundle", "config.json"), spec, 0o600); err != nil {
		return err
	}
	e.report.take("memory, and the whole root file system")
	return replace(dir, e.r.Dest)
}

// unpack applies a layer to a directory.
func (e *export) unpack(ctx context.Context, desc ocispec.Descriptor, tell func(n int64), dir string) error {
	return e.read(ctx, desc, tell, func(r io.Reader) error {
		plain, err := compress.Detect(r)
		if err != nil {
			return err
		}
		defer plain.Close()
		_, err = tararchive.Apply(ctx, dir, plain)
		return err
	})
}
