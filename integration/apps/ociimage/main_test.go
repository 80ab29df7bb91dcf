package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

var epoch = time.Unix(1700000000, 0).UTC()

// tree makes a directory from paths to contents; a path that ends in / is a
// directory, a content that starts with -> is a symbolic link.
func tree(t *testing.T, entries map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for path, content := range entries {
		full := filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		var err error
		switch {
		case strings.HasSuffix(path, "/"):
			err = os.MkdirAll(full, 0o755)
		case strings.HasPrefix(content, "->"):
			err = os.Symlink(content[2:], full)
		default:
			err = os.WriteFile(full, []byte(content), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// names reads a layer's entries back, in order, with the link target if any.
func names(t *testing.T, layer string) []string {
	t.Helper()
	f, err := os.Open(layer)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := zstd.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	var got []string
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return got
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.ModTime.After(epoch) {
			t.Errorf("%s has a time after the epoch: %v", h.Name, h.ModTime)
		}
		if h.Linkname != "" {
			h.Name += " -> " + h.Linkname
		}
		got = append(got, h.Name)
	}
}

func TestLayerIsTheDifference(t *testing.T) {
	base := tree(t, map[string]string{
		"etc/same": "1", "etc/changed": "old", "etc/gone": "x", "opt/gonedir/file": "x",
		"usr/becomes-dir": "file", "link": "->etc/same",
	})
	root := tree(t, map[string]string{
		"etc/same": "1", "etc/changed": "new", "etc/fresh": "y", "opt/": "",
		"usr/becomes-dir/inner": "z", "link": "->etc/fresh", "tmp/leftover": "no", "proc/1/stat": "no",
	})
	if err := os.Link(filepath.Join(root, "etc/fresh"), filepath.Join(root, "etc/hard")); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "layer")
	if err := writeLayer(base, root, out, epoch); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"etc/.wh.gone", "etc/changed", "etc/fresh", "etc/hard -> etc/fresh", "link -> etc/fresh",
		"opt/.wh.gonedir", "proc/", "tmp/", "usr/becomes-dir/", "usr/becomes-dir/inner",
	}
	if got := names(t, out); !reflect.DeepEqual(got, want) {
		t.Errorf("layer has %q, want %q", got, want)
	}
}

func TestLayerIsReproducible(t *testing.T) {
	var blobs [2][]byte
	for i := range blobs {
		root := tree(t, map[string]string{"b/2": "two", "a/1": "one", "c": "->a/1"})
		// Only the times differ from one build to the next.
		if err := os.Chtimes(filepath.Join(root, "a/1"), epoch, epoch.Add(time.Duration(i+1)*time.Hour)); err != nil {
			t.Fatal(err)
		}
		out := filepath.Join(t.TempDir(), "layer")
		if err := writeLayer("", root, out, epoch); err != nil {
			t.Fatal(err)
		}
		var err error
		if blobs[i], err = os.ReadFile(out); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(blobs[0], blobs[1]) {
		t.Error("two builds of the same tree differ")
	}
}

func TestImage(t *testing.T) {
	dir := t.TempDir()
	layer, config, out := filepath.Join(dir, "layer"), filepath.Join(dir, "config.json"), filepath.Join(dir, "image.tar")
	if err := writeLayer("", tree(t, map[string]string{"a": "1"}), layer, epoch); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(config, []byte(`{"Entrypoint":["/a"],"User":"nobody"}`), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := writeImage("crac.test/x:latest", config, []string{layer}, out, epoch); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string][]byte{}
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
	var index ocispec.Index
	var manifest ocispec.Manifest
	var image ocispec.Image
	parse := func(name string, into any) {
		t.Helper()
		if err := json.Unmarshal(files[name], into); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	parse("index.json", &index)
	parse(blobPath(index.Manifests[0].Digest), &manifest)
	parse(blobPath(manifest.Config.Digest), &image)
	if got := index.Manifests[0].Annotations[containerdName]; got != "crac.test/x:latest" {
		t.Errorf("image is named %q", got)
	}
	if image.Config.User != "nobody" || len(image.RootFS.DiffIDs) != 1 {
		t.Errorf("image config is %+v", image)
	}
	blob, ok := files[blobPath(manifest.Layers[0].Digest)]
	if !ok || digest.FromBytes(blob) != manifest.Layers[0].Digest || int64(len(blob)) != manifest.Layers[0].Size {
		t.Errorf("layer %v is not in the archive as described", manifest.Layers[0])
	}

	// A layer that changed behind its description must not become an image.
	if err := os.WriteFile(layer, append(blob[:len(blob)-1], blob[len(blob)-1]^1), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := writeImage("crac.test/x:latest", config, []string{layer}, out, epoch); err == nil {
		t.Error("a damaged layer was packed")
	}
	if now, err := os.ReadFile(out); err != nil || !bytes.Equal(now, data) {
		t.Errorf("the earlier image was touched: %v", err)
	}
}

func TestConfigNamesItsMistake(t *testing.T) {
	for config, want := range map[string]string{
		`{"Entrypont":["/a"]}`: "Entrypont",
		`{"User":"a"}`:         "neither Entrypoint nor Cmd",
	} {
		file := filepath.Join(t.TempDir(), "config.json")
		if err := os.WriteFile(file, []byte(config), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := readConfig(file); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("config %s: error %v, want one that says %q", config, err, want)
		}
	}
}
