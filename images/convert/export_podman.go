package convert

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"time"

	metadata "github.com/checkpoint-restore/checkpointctl/lib"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/blob"
	"github.com/crac-shim/crac/images/build"
	"github.com/crac-shim/crac/images/compress"
	"github.com/crac-shim/crac/images/workdir"
)

// podmanConfig is what podman has to know of a container that it did not make
// (libpod.ContainerConfig). The zero value of what is not here is right.
type podmanConfig struct {
	metadata.ContainerConfig
	RootfsImageID string    `json:"rootfsImageID"`
	RawImageName  string    `json:"RawImageName"`
	IDMappings    podmanIDs `json:"idMappingsOptions"`
	Command       []string  `json:"command"`
	StopSignal    uint      `json:"stopSignal"`
	StopTimeout   uint      `json:"stopTimeout"`
	CgroupManager string    `json:"cgroupManager"`
	CgroupParent  string    `json:"cgroupParent"`
	NoShm         bool      `json:"NoShm"`
	NoShmShare    bool      `json:"NOShmShare"`

	LabelOpts []string  `json:"labelopts"`
	Created   time.Time `json:"createdTime"`
}

type podmanIDs struct {
	HostUIDMapping bool
	HostGIDMapping bool
}

// podmanParent is the cgroup of podman's containers, where it does not use systemd's.
const podmanParent = "/libpod_parent"

var podmanID = regexp.MustCompile(`^[0-9a-f]{64}$`)

// podman writes an archive that podman container restore --import takes.
func (e *export) podman(ctx context.Context) error {
	e.report.From = "an archive for podman container restore --import"
	name, _, base, err := e.base(ctx)
	if err != nil {
		return err
	}
	id := e.m.Container.ID
	if !podmanID.MatchString(id) {
		sum := sha256.Sum256([]byte(id + e.m.Created.String()))
		id = hex.EncodeToString(sum[:])
	}
	e.spec.Linux.CgroupsPath = podmanParent + "/libpod-" + id
	config := podmanConfig{
		ContainerConfig: metadata.ContainerConfig{
			ID: id, Name: e.m.Container.ID, RootfsImageName: name, OCIRuntime: "runc", CheckpointedAt: e.m.Created,
		},
		// Podman calls images by their configurations.
		RootfsImageID: base.Manifest.Config.Digest.Encoded(), RawImageName: name,
		IDMappings: podmanIDs{true, true}, Command: e.m.Container.Args, StopSignal: 15, StopTimeout: 10,
		CgroupManager: "cgroupfs", CgroupParent: podmanParent,
		// The dump brings its own /dev/shm.
		NoShm: true, NoShmShare: true, LabelOpts: []string{"disable"}, Created: e.m.Created,
	}
	content := filepath.Join(e.work, "archive")
	if err := os.Mkdir(content, 0o700); err != nil {
		return err
	}
	put := func(file string, v any) error {
		data, err := json.Marshal(v)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(content, file), data, 0o600)
	}
	diff, err := os.OpenFile(filepath.Join(content, metadata.RootFsDiffTar), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	deleted, err := e.flatten(ctx, diff, e.changed(base), base.Manifest.Layers)
	if err := errors.Join(err, diff.Close()); err != nil {
		return err
	}
	for i := range deleted {
		deleted[i] = "/" + deleted[i]
	}
	if err := errors.Join(put(metadata.ConfigDumpFile, config), put(metadata.SpecDumpFile, e.spec), put(metadata.NetworkStatusFile, nil),
		put(metadata.DeletedFilesFile, deleted)); err != nil {
		return err
	}
	e.report.take("memory, and changes of the root file system with %d deleted files, for the image %s", len(deleted), name)
	return e.archive(ctx, content)
}

// archive packs the files of a directory, and the dump, into the file that was asked
// for.
func (e *export) archive(ctx context.Context, dir string) (err error) {
	work, err := workdir.New(filepath.Dir(e.r.Dest))
	if err != nil {
		return err
	}
	defer build.RemoveWork(work, &err, e.emit)
	out, err := os.OpenFile(filepath.Join(work.Path, "archive"), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer out.Close()
	format, err := compress.Of(e.r.Compression)
	if err != nil {
		return err
	}
	z, err := format.NewWriter(out)
	if err != nil {
		return err
	}
	tw, tell := tar.NewWriter(z), e.packing()
	for _, name := range []string{metadata.SpecDumpFile, metadata.ConfigDumpFile, metadata.RootFsDiffTar, metadata.DeletedFilesFile, metadata.NetworkStatusFile} {
		if err := e.packFile(ctx, tw, filepath.Join(dir, name), name, tell); err != nil {
			return err
		}
	}
	if err := e.packDump(ctx, tw, metadata.CheckpointDirectory+"/", tell); err != nil {
		return err
	}
	if err := errors.Join(tw.Close(), z.Close(), out.Close()); err != nil {
		return err
	}
	return replace(out.Name(), e.r.Dest)
}

// packing tells how much of the dump is written.
func (e *export) packing() (tell func(n int64)) {
	total := int64(0)
	for _, f := range e.m.Files {
		total += f.Size
	}
	return build.Telling(build.Event{Event: images.EventProgress, Total: total}, e.emit)
}

// packDump writes the files of the dump into a tar, below a prefix that is empty or a
// directory's.
func (e *export) packDump(ctx context.Context, tw *tar.Writer, prefix string, tell func(n int64)) error {
	files, err := images.DumpFiles(e.dump.dir)
	if err != nil {
		return err
	}
	if prefix != "" {
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: prefix, Mode: 0o700, ModTime: e.m.Created}); err != nil {
			return err
		}
	}
	for _, f := range files {
		if err := e.packFile(ctx, tw, filepath.Join(e.dump.dir, f.Name), prefix+f.Name, tell); err != nil {
			return err
		}
	}
	return nil
}

func (e *export) packFile(ctx context.Context, tw *tar.Writer, file, name string, tell func(n int64)) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600, Size: st.Size(), ModTime: e.m.Created}); err != nil {
		return err
	}
	_, err = io.Copy(tw, &blob.Reader{Ctx: ctx, R: f, Tell: tell})
	return err
}
