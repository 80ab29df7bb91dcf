package convert

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/mnt"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/images/blob"
	"github.com/crac-shim/crac/images/build"
	"github.com/crac-shim/crac/images/compress"
	"github.com/crac-shim/crac/images/crypt"
	"github.com/crac-shim/crac/images/inspect"
	"github.com/crac-shim/crac/images/workdir"
	"github.com/crac-shim/crac/oci"
)

// Format is what an export writes.
type Format string

const (
	// FormatPodman is an archive for podman container restore --import.
	FormatPodman Format = "podman"
	// FormatContainerd is an index in containerd, for ctr containers restore.
	FormatContainerd Format = "containerd"
	// FormatBundle is a directory with a dump and a bundle, for runc restore.
	FormatBundle Format = "bundle"
)

// Formats lists them all.
func Formats() []string {
	return []string{string(FormatPodman), string(FormatContainerd), string(FormatBundle)}
}

// Check refuses what is none.
func (f Format) Check() error {
	if slices.Contains(Formats(), string(f)) {
		return nil
	}
	return fmt.Errorf("unknown form %q to export to; say --to %s", string(f), strings.Join(Formats(), ", --to "))
}

// ExportRequest says what to export.
type ExportRequest struct {
	// Ref names the checkpoint image. Dest is a file for FormatPodman, an image's name
	// for FormatContainerd, a directory for FormatBundle; none may be there yet.
	Ref, Dest string
	Format    Format
	// Compression of what is written: zstd (the default) or gzip. Only archives ask.
	Compression oci.Compression
	// WorkDir is where the dump is unpacked; empty is the system's temporary directory.
	WorkDir string
	// Keys decrypt an encrypted image; without any, those of the node are tried.
	Keys []string
	// Snapshotter is for the containers that FormatContainerd is restored as; empty is
	// containerd's default.
	Snapshotter string
}

// export is a checkpoint image that is being written in another form.
type export struct {
	client *containerd.Client
	r      ExportRequest
	report *Report
	work   string
	img    *inspect.Image
	m      *oci.Manifest
	spec   *specs.Spec
	dump   dump
	keys   *crypt.Keys
	emit   func(build.Event)
}

// Export writes a checkpoint image so that another tool can restore it. A failure
// leaves nothing at Dest. ctx must carry the namespace.
func Export(ctx context.Context, client *containerd.Client, r ExportRequest, emit func(build.Event)) (_ *Report, err error) {
	// What is wrong with the request shows before anything is unpacked for it.
	if err := r.Format.Check(); err != nil {
		return nil, err
	}
	if _, err := compress.Of(r.Compression); err != nil {
		return nil, err
	}
	if err := r.checkDest(ctx, client); err != nil {
		return nil, err
	}
	keys, err := build.ReadKeys(r.Keys)
	if err != nil {
		return nil, err
	}
	work, err := workdir.New(r.WorkDir)
	if err != nil {
		return nil, err
	}
	defer build.RemoveWork(work, &err, emit)
	e := &export{client: client, r: r, report: &Report{}, work: work.Path, keys: keys, emit: emit}
	if err := e.open(ctx); err != nil {
		return nil, err
	}
	if err := e.adapt(); err != nil {
		return nil, err
	}
	write := map[Format]func(context.Context) error{FormatPodman: e.podman, FormatContainerd: e.native, FormatBundle: e.bundle}[r.Format]
	return e.report, write(ctx)
}

// checkDest refuses a destination that is taken, or that cannot be.
func (r *ExportRequest) checkDest(ctx context.Context, client *containerd.Client) error {
	if r.Format == FormatContainerd {
		if err := oci.CheckRef(r.Dest); err != nil {
			return err
		}
		_, err := client.ImageService().Get(ctx, r.Dest)
		switch {
		case err == nil:
			return errTaken(r.Dest)
		case !errdefs.IsNotFound(err):
			return err
		}
		return nil
	}
	if dir := filepath.Dir(r.Dest); !isDir(dir) {
		return fmt.Errorf("there is no directory %s for %s; make it, or say another name", dir, r.Dest)
	}
	return checkFree(r.Dest)
}

func isDir(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}

func errTaken(name string) error {
	return fmt.Errorf("the name %s is taken; remove that image or say another name: %w", name, errdefs.ErrAlreadyExists)
}

// open unpacks the image's dump, checked, and with the memory of those that it
// continues.
func (e *export) open(ctx context.Context) error {
	record, err := e.client.ImageService().Get(ctx, e.r.Ref)
	if err != nil {
		if errdefs.IsNotFound(err) {
			return fmt.Errorf("image %s is not there: %w", e.r.Ref, err)
		}
		return err
	}
	store := e.client.ContentStore()
	if e.img, err = inspect.Open(ctx, store, e.r.Ref, record.Target, platforms.Default()); err != nil {
		return err
	}
	unpacked := filepath.Join(e.work, "dump")
	if err := os.Mkdir(unpacked, 0o700); err != nil {
		return err
	}
	chain, whole, err := e.img.ReadWhole(ctx, store, unpacked, build.Reading(e.img, e.keys, e.emit))
	if err != nil {
		return err
	}
	e.m, e.dump = chain[0].Manifest, dump{whole}
	e.spec = new(specs.Spec)
	if err := json.Unmarshal(chain[0].Spec, e.spec); err != nil {
		return fmt.Errorf("%s: spec.json: %w", e.r.Ref, err)
	}
	if e.spec.Linux == nil || e.spec.Process == nil || e.spec.Root == nil {
		return fmt.Errorf("%s: spec.json is not that of a Linux container with a process", e.r.Ref)
	}
	if len(e.spec.Linux.UIDMappings)+len(e.spec.Linux.GIDMappings) > 0 {
		return fmt.Errorf("%s: its container has a user namespace, and each engine keeps the owners of files in its own way; make the checkpoint of a container without one", e.r.Ref)
	}
	return nil
}

// adapt changes our dump, and its spec, so that others can restore it: directories
// that only our shim offers, in memory, become the dump's own, and the network
// namespace one that CRIU makes.
func (e *export) adapt() error {
	all, err := e.dump.readMounts()
	if err != nil {
		return err
	}
	var sources []string
	for _, m := range all.entries {
		place := m.GetMountpoint()
		known := slices.ContainsFunc(e.spec.Mounts, func(s specs.Mount) bool { return path.Clean("/"+s.Destination) == place })
		switch {
		case !external(m):
		case known && place != hooksMount:
			if !within(place, cgroupMount) {
				sources = append(sources, place)
			}
			continue
		case within(place, cgroupMount):
			continue
		case m.GetRoot() != "/":
			return fmt.Errorf("%s: its dump has a mount at %s that nobody else can offer", e.r.Ref, place)
		default:
			if err := all.own(m, nil); err != nil {
				return err
			}
		}
		if !known && slices.ContainsFunc(e.m.Mounts, func(d oci.Mount) bool { return d.Destination == place }) {
			// Somebody has to make the directory for it.
			e.spec.Mounts = append(e.spec.Mounts, ownMount(m))
		}
	}
	e.spec.Mounts = slices.DeleteFunc(e.spec.Mounts, func(m specs.Mount) bool { return m.Type == "bind" && path.Clean(m.Destination) == hooksMount })
	if len(sources) > 0 {
		e.report.leave("the sources of mounts: the spec names those of the dumped container for %s", strings.Join(sources, ", "))
	}
	if _, err := e.dump.network(false); err != nil {
		return err
	}
	e.report.leave("its network: the namespace has no interface but lo, which is down")
	n, err := e.dump.selfContained()
	if err != nil {
		return err
	}
	if n > 0 {
		option := "tcp-close"
		if e.m.TCPEstablished {
			option = "tcp-established"
		}
		e.report.leave("%d TCP connections: CRIU restores only if it is told %s, by the tool or by a line in /etc/criu/runc.conf", n, option)
	}
	if err := e.dump.forgetRootMode(); err != nil {
		return err
	}
	e.spec.Annotations = nil // of no meaning elsewhere
	return all.save()
}

// ownMount is a mount of a dump's own, as a spec would ask for it.
func ownMount(m *mnt.MntEntry) specs.Mount {
	return specs.Mount{Destination: m.GetMountpoint(), Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "nodev", "noexec"}}
}

// base is the image that the container came from, as this containerd knows it.
func (e *export) base(ctx context.Context) (name string, desc ocispec.Descriptor, manifest *inspect.Image, err error) {
	name = e.m.Base.Name
	if name == "" {
		return "", desc, nil, fmt.Errorf("%s does not name the image that its container came from: it cannot be written in this form", e.r.Ref)
	}
	record, err := e.client.ImageService().Get(ctx, name)
	if err != nil {
		if errdefs.IsNotFound(err) {
			err = fmt.Errorf("its base image %s is not there; pull it: %w", name, err)
		}
		return "", desc, nil, err
	}
	img, err := inspect.Open(ctx, e.client.ContentStore(), name, record.Target, platforms.Default())
	if err != nil {
		return "", desc, nil, err
	}
	n := len(img.Config.RootFS.DiffIDs)
	if n > len(e.img.Config.RootFS.DiffIDs) || !slices.Equal(img.Config.RootFS.DiffIDs, e.img.Config.RootFS.DiffIDs[:n]) {
		return "", desc, nil, fmt.Errorf("%s is another image now than the one that %s was made from; give that its name again (%s)", name, e.r.Ref, e.m.Base.Digest)
	}
	return name, record.Target, img, nil
}

// changed are the layers above the base's, but for checkpoints, lowest first.
func (e *export) changed(base *inspect.Image) []ocispec.Descriptor {
	var layers []ocispec.Descriptor
	for i := len(base.Config.RootFS.DiffIDs); i < len(e.img.Manifest.Layers); i++ {
		if e.img.Kind(i) != "checkpoint" {
			layers = append(layers, e.img.Manifest.Layers[i])
		}
	}
	return layers
}

// read gives take a layer as it is stored, decrypted. Only the end of an encrypted one
// tells whether it is the one that was encrypted, so all of it is read.
func (e *export) read(ctx context.Context, desc ocispec.Descriptor, tell func(n int64), take func(io.Reader) error) error {
	ra, err := e.client.ContentStore().ReaderAt(ctx, desc)
	if err != nil {
		return fmt.Errorf("layer %s: %w", desc.Digest, err)
	}
	defer ra.Close()
	var r io.Reader = &blob.Reader{Ctx: ctx, R: content.NewReader(ra), Tell: tell}
	if crypt.IsEncrypted(desc.MediaType) {
		if r, err = e.keys.Decrypt(r, desc); err != nil {
			return fmt.Errorf("layer %s: %w", desc.Digest, err)
		}
	}
	err = take(r)
	if err == nil {
		_, err = io.Copy(io.Discard, r)
	}
	if err != nil {
		return fmt.Errorf("layer %s: %w", desc.Digest, err)
	}
	return nil
}

// replace gives a finished file or directory its name, unless there is one of it.
func replace(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if err == nil {
		return nil
	}
	if err := checkFree(to); err != nil {
		return err
	}
	// Not every file system knows such a thing.
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		return os.Rename(from, to)
	}
	return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
}

func checkFree(path string) error {
	_, err := os.Lstat(path)
	switch {
	case err == nil:
		return fmt.Errorf("%s is there already; remove it or say another name", path)
	case errors.Is(err, os.ErrNotExist):
		return nil
	}
	return err
}
