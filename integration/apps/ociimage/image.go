package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// The annotation by which containerd's import names an image.
const containerdName = "io.containerd.image.name"

// writeImage writes an OCI layout as a tar archive, the form that `ctr images
// import` reads.
func writeImage(name, configFile string, layerFiles []string, out string, epoch time.Time) (err error) {
	config, err := readConfig(configFile)
	if err != nil {
		return err
	}
	layers := make([]layerInfo, len(layerFiles))
	for i, f := range layerFiles {
		data, err := os.ReadFile(f + ".json")
		if err != nil {
			return err
		}
		if err := json.Unmarshal(data, &layers[i]); err != nil {
			return fmt.Errorf("%s.json: %w", f, err)
		}
	}

	image := ocispec.Image{
		Created:  &epoch,
		Platform: ocispec.Platform{Architecture: runtime.GOARCH, OS: "linux"},
		Config:   config,
		RootFS:   ocispec.RootFS{Type: "layers"},
	}
	manifest := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, l := range layers {
		image.RootFS.DiffIDs = append(image.RootFS.DiffIDs, l.DiffID)
		manifest.Layers = append(manifest.Layers, l.Descriptor)
	}
	var imageJSON, manifestJSON, indexJSON []byte
	if imageJSON, err = json.Marshal(image); err != nil {
		return err
	}
	manifest.Config = describe(ocispec.MediaTypeImageConfig, imageJSON)
	if manifestJSON, err = json.Marshal(manifest); err != nil {
		return err
	}
	entry := describe(ocispec.MediaTypeImageManifest, manifestJSON)
	entry.Platform = &image.Platform
	entry.Annotations = map[string]string{containerdName: name, ocispec.AnnotationRefName: tagOf(name)}
	index := ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{entry},
	}
	if indexJSON, err = json.Marshal(index); err != nil {
		return err
	}
	layoutJSON, err := json.Marshal(ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
	if err != nil {
		return err
	}

	tmp, err := os.CreateTemp(filepath.Dir(out), ".image-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			tmp.Close()
			os.Remove(tmp.Name())
		}
	}()
	w := tar.NewWriter(tmp)
	add := func(path string, size int64, r io.Reader) error {
		h := &tar.Header{Name: path, Typeflag: tar.TypeReg, Mode: 0o644, Size: size, ModTime: epoch}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		_, err := io.Copy(w, r)
		return err
	}
	small := []struct {
		path string
		data []byte
	}{
		{ocispec.ImageLayoutFile, layoutJSON},
		{ocispec.ImageIndexFile, indexJSON},
		{blobPath(entry.Digest), manifestJSON},
		{blobPath(manifest.Config.Digest), imageJSON},
	}
	for _, s := range small {
		if err := add(s.path, int64(len(s.data)), bytes.NewReader(s.data)); err != nil {
			return err
		}
	}
	for i, file := range layerFiles {
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		d := layers[i].Descriptor
		sum := d.Digest.Verifier()
		err = add(blobPath(d.Digest), d.Size, io.TeeReader(f, sum))
		f.Close()
		if err != nil {
			return fmt.Errorf("layer %s: %w", file, err)
		}
		if !sum.Verified() {
			return fmt.Errorf("layer %s is not the %s that %s.json says: build the layer again", file, d.Digest, file)
		}
	}
	if err := errors.Join(w.Close(), tmp.Chmod(0o644), tmp.Close()); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), out)
}

func readConfig(file string) (ocispec.ImageConfig, error) {
	var config ocispec.ImageConfig
	f, err := os.Open(file)
	if err != nil {
		return config, err
	}
	defer f.Close()
	dec := json.NewDecoder(f)
	dec.DisallowUnknownFields()
	if err := dec.Decode(&config); err != nil {
		return config, fmt.Errorf("%s: %w", file, err)
	}
	if len(config.Entrypoint) == 0 && len(config.Cmd) == 0 {
		return config, fmt.Errorf("%s: neither Entrypoint nor Cmd: the image could not start", file)
	}
	return config, nil
}

func describe(mediaType string, data []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
}

func blobPath(d digest.Digest) string {
	return filepath.Join(ocispec.ImageBlobsDir, d.Algorithm().String(), d.Encoded())
}

func tagOf(ref string) string {
	if i := strings.LastIndexByte(ref, ':'); i > strings.LastIndexByte(ref, '/') {
		return ref[i+1:]
	}
	return "latest"
}
