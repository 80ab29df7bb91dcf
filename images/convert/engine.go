package convert

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	metadata "github.com/checkpoint-restore/checkpointctl/lib"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/blob"
	"github.com/crac-shim/crac/images/build"
)

// engineArchive makes a source of an archive that was unpacked: podman's, CRI-O's or
// that of containerd's CRI. annotations are those of the image that held it, if it
// was one.
func engineArchive(ctx context.Context, a *archive, dir string, maxSize int64, annotations map[string]string) (*source, error) {
	s := &source{report: &Report{}, dump: dump{filepath.Join(dir, metadata.CheckpointDirectory)}}
	var config metadata.ContainerConfig
	if err := a.decode(metadata.ConfigDumpFile, &config); err != nil {
		return nil, err
	}
	s.spec = new(specs.Spec)
	if err := a.decode(metadata.SpecDumpFile, s.spec); err != nil {
		return nil, err
	}
	s.id, s.created = config.ID, config.CheckpointedAt
	if s.created.IsZero() {
		s.created = a.dumped
	}
	s.base = cmp.Or(config.RootfsImageName, annotationOf(annotations, "rootfs.image.name"), config.RootfsImageRef)
	s.criu, _ = strconv.Atoi(annotationOf(annotations, "criu.version"))
	s.kernel = annotationOf(annotations, "host.kernel")
	status := a.seen[metadata.StatusFile]
	s.report.From = engineOf(s.spec, annotations, status)

	if a.seen[metadata.RootFsDiffTar] || a.seen[metadata.DeletedFilesFile] {
		var deleted []string
		if a.seen[metadata.DeletedFilesFile] {
			if err := a.decode(metadata.DeletedFilesFile, &deleted); err != nil {
				return nil, err
			}
		}
		// containerd's is a layer, with deletions inside.
		s.changes = engineChanges(ctx, filepath.Join(dir, metadata.RootFsDiffTar), a.seen[metadata.RootFsDiffTar], deleted, status, maxSize)
		s.report.take("changes of the root file system, with %d deleted files", len(deleted))
	}
	if a.seen[metadata.DevShmCheckpointTar] {
		s.shm = filepath.Join(dir, metadata.DevShmCheckpointTar)
	}
	network, ok, err := a.json(metadata.NetworkStatusFile)
	if err != nil {
		return nil, err
	}
	if ok && !slices.Contains([]string{"null", "{}", ""}, strings.TrimSpace(string(network))) {
		s.report.leave("addresses and interfaces of its network: a clone has those of its own request")
	}
	for _, volume := range a.volumes {
		s.report.leave("content of the volume %s: unpack %s/%s of the archive where the request's mount of it comes from",
			strings.TrimSuffix(volume, ".tar"), metadata.CheckpointVolumesDirectory, volume)
	}
	return s, nil
}

// decode reads a JSON file that has to be there.
func (a *archive) decode(name string, v any) error {
	data, ok, err := a.json(name)
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("%w: it has no %s: is it an archive of podman container checkpoint --export, of CRI-O, or of containerd?", ErrSource, name)
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrSource, name, err)
	}
	return nil
}

// annotationOf finds what any engine says about its checkpoint image. Engines write
// the same keys with other separators.
func annotationOf(annotations map[string]string, key string) string {
	want := strings.NewReplacer(".", "", "-", "", "_", "").Replace(key)
	for _, prefix := range []string{annotationsPodman, annotationsCRIO, annotationsCommon} {
		for k, v := range annotations {
			k, ok := strings.CutPrefix(k, prefix)
			if ok && strings.EqualFold(strings.NewReplacer(".", "", "-", "", "_", "").Replace(k), want) {
				return v
			}
		}
	}
	return ""
}

func engineOf(spec *specs.Spec, annotations map[string]string, status bool) string {
	has := func(prefix string) bool {
		for k := range annotations {
			if strings.HasPrefix(k, prefix) {
				return true
			}
		}
		return false
	}
	for k := range spec.Annotations {
		if strings.HasPrefix(k, "io.kubernetes.cri-o.") {
			return "a checkpoint of CRI-O"
		}
	}
	switch {
	case spec.Annotations["io.container.manager"] == "libpod", has(annotationsPodman):
		return "a checkpoint of podman"
	case has(annotationsCRIO):
		return "a checkpoint of CRI-O"
	case status:
		return "a checkpoint of containerd's CRI"
	}
	return "a checkpoint archive"
}

// unpackArchive reads an archive file.
func unpackArchive(ctx context.Context, file, dir string, maxSize int64, emit func(build.Event)) (*source, error) {
	a, err := prepare(dir, maxSize)
	if err != nil {
		return nil, err
	}
	defer a.close()
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	tell := build.Telling(build.Event{Event: images.EventReading, Name: file, Total: st.Size()}, emit)
	if err := a.read(ctx, &blob.Reader{Ctx: ctx, R: f, Tell: tell}, archivePlace); err != nil {
		return nil, err
	}
	return engineArchive(ctx, a, dir, maxSize, nil)
}

// prepare makes the directories that an archive is unpacked into.
func prepare(dir string, maxSize int64) (*archive, error) {
	if err := os.Mkdir(filepath.Join(dir, metadata.CheckpointDirectory), 0o700); err != nil {
		return nil, err
	}
	return newArchive(dir, maxSize)
}

// engineChanges writes the layer of changes that an engine keeps as a tar of what is
// new and a list of what is gone.
func engineChanges(ctx context.Context, file string, there bool, deleted []string, layer bool, maxSize int64) func(io.Writer) error {
	return func(w io.Writer) error {
		c := newChanges(w, maxSize)
		if there {
			f, err := os.Open(file)
			if err != nil {
				return err
			}
			defer f.Close()
			if err := c.copy(ctx, f, layer); err != nil {
				return fmt.Errorf("%s: %w", metadata.RootFsDiffTar, err)
			}
		}
		for _, p := range deleted {
			if err := c.delete(p); err != nil {
				return fmt.Errorf("%s: %w", metadata.DeletedFilesFile, err)
			}
		}
		return c.close()
	}
}
