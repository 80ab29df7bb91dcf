package build

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/diff"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/labels"
	cfs "github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/oci"
)

// emptyTar is the diff ID of a layer without entries.
const emptyTar = digest.Digest("sha256:5f70bf18a086007016e948b04aed3b82103a36bea41755b6cddfaf10ace3c6ef")

// errUnusual means that an upper directory alone does not tell what changed.
var errUnusual = errors.New("upper directory refers to layers below")

// takeChanges stores the layer of what the container changed in its root file
// system. No change gives no layer.
//
// The container is frozen meanwhile, so this is the part of a build that must be
// quick. containerd's own differ compares the whole tree below with the whole
// tree above, and reads every file whose time has no fraction, which is every
// file that came from an image. On overlay the upper directory holds exactly the
// changes, so only it is read.
func takeChanges(ctx context.Context, s services, sn snapshots.Snapshotter, c containers.Container, info snapshots.Info, own *owners, comp compression) (newLayer, error) {
	if info.Kind != snapshots.KindActive {
		return newLayer{}, nil // a read-only root file system
	}
	mounts, err := sn.Mounts(ctx, c.SnapshotKey)
	if err != nil {
		return newLayer{}, err
	}
	if upper, ok := upperDir(mounts); ok {
		l, err := writeUpper(ctx, s, c.ID, upper, own, comp)
		if !errors.Is(err, errUnusual) {
			return l, err
		}
	}
	l, err := compare(ctx, s, sn, c, info, mounts, comp)
	if err != nil {
		return newLayer{}, err
	}
	return own.rewrite(ctx, s.content, c.ID, l, comp)
}

func upperDir(mounts []mount.Mount) (string, bool) {
	if len(mounts) != 1 || mounts[0].Type != "overlay" {
		return "", false
	}
	for _, o := range mounts[0].Options {
		if dir, ok := strings.CutPrefix(o, "upperdir="); ok && filepath.IsAbs(dir) {
			return dir, true
		}
	}
	return "", false
}

func writeUpper(ctx context.Context, s services, id, upper string, own *owners, comp compression) (newLayer, error) {
	changed, err := plainUpper(upper)
	if err != nil || !changed {
		return newLayer{}, err
	}
	return writeLayer(ctx, s.content, "crac-changes-"+id, comp, func(w io.Writer) error {
		return own.layer(w, func(w io.Writer) error { return tarUpper(ctx, w, upper) })
	})
}

// plainUpper tells whether there is any change, and gives errUnusual when the
// kernel left pointers to lower layers there (renamed directories, files of
// which only the attributes were copied up).
func plainUpper(upper string) (changed bool, err error) {
	err = walkUpper(upper, func(path string, d fs.DirEntry) error {
		changed = true
		if !d.IsDir() && !d.Type().IsRegular() {
			return nil
		}
		for _, attr := range []string{"redirect", "metacopy"} {
			for _, class := range []string{"trusted.overlay.", "user.overlay."} {
				_, err := unix.Lgetxattr(filepath.Join(upper, path), class+attr, nil)
				if err == nil {
					return errUnusual
				}
				if !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.ENOTSUP) {
					return fmt.Errorf("%s of %s: %w", class+attr, path, err)
				}
			}
		}
		return nil
	})
	return changed, err
}

// tarUpper writes an overlay's upper directory as an OCI layer.
func tarUpper(ctx context.Context, w io.Writer, upper string) error {
	cw := archive.NewChangeWriter(w, upper)
	err := walkUpper(upper, func(path string, d fs.DirEntry) error {
		if err := ctx.Err(); err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if isWhiteout(info) {
			return cw.HandleChange(cfs.ChangeKindDelete, path, nil, nil)
		}
		if err := cw.HandleChange(cfs.ChangeKindModify, path, info, nil); err != nil {
			return err
		}
		if d.IsDir() && images.IsOpaque(filepath.Join(upper, path)) {
			// The name of an opaque directory's marker is .wh..wh..opq; the
			// writer puts the first .wh. there.
			return cw.HandleChange(cfs.ChangeKindDelete, filepath.Join(path, ".wh..opq"), nil, nil)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return cw.Close()
}

// walkUpper visits everything below upper in order, as absolute paths, but a
// dump: whatever put one there, it is not the container's.
func walkUpper(upper string, visit func(path string, d fs.DirEntry) error) error {
	return filepath.WalkDir(upper, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(upper, path)
		if err != nil {
			return err
		}
		switch rel {
		case ".":
			return nil
		case oci.Root:
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		return visit("/"+rel, d)
	})
}

func isWhiteout(info os.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && info.Mode()&os.ModeCharDevice != 0 && st.Rdev == 0
}

// compare has containerd's differ compare the snapshot with its parent. An
// earlier checkpoint layer is left out of both sides: it is large, and reading
// it twice to find no difference would keep the container frozen.
func compare(ctx context.Context, s services, sn snapshots.Snapshotter, c containers.Container, info snapshots.Info, upper []mount.Mount, comp compression) (_ newLayer, err error) {
	key := fmt.Sprintf("crac-parent-%s-%d", c.ID, time.Now().UnixNano())
	// Where the snapshotter maps owners when it mounts, the two sides would
	// differ in every file without the same map.
	maps := make(map[string]string)
	for _, k := range []string{snapshots.LabelSnapshotUIDMapping, snapshots.LabelSnapshotGIDMapping} {
		if v, ok := info.Labels[k]; ok {
			maps[k] = v
		}
	}
	lower, err := sn.View(ctx, key, info.Parent, snapshots.WithLabels(maps))
	if err != nil {
		return newLayer{}, err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		if rerr := sn.Remove(ctx, key); rerr != nil && !errdefs.IsNotFound(rerr) {
			err = errors.Join(err, fmt.Errorf("remove the view of the parent: %w", rerr))
		}
	}()
	// The differ names its ingest itself, and removes what it could not finish only then.
	desc, err := s.diff.Compare(ctx, withoutCheckpoint(lower), withoutCheckpoint(upper), diff.WithMediaType(comp.MediaType))
	if err != nil {
		return newLayer{}, err
	}
	blob, err := s.content.Info(ctx, desc.Digest)
	if err != nil {
		return newLayer{}, err
	}
	diffID, err := digest.Parse(blob.Labels[labels.LabelUncompressed])
	if err != nil {
		return newLayer{}, fmt.Errorf("containerd's differ did not label %s with its diff ID: %w", desc.Digest, err)
	}
	if diffID == emptyTar {
		return newLayer{}, nil
	}
	desc.Annotations = nil
	return newLayer{desc: desc, diffID: diffID}, nil
}

func withoutCheckpoint(mounts []mount.Mount) []mount.Mount {
	in := make([]images.Mount, len(mounts))
	for i, m := range mounts {
		in[i] = images.Mount(m)
	}
	// An error is about the earlier checkpoint, which is not needed; the mounts
	// are good either way.
	_, rest, _ := images.Find(in)
	out := make([]mount.Mount, len(rest))
	for i, m := range rest {
		out[i] = mount.Mount(m)
		out[i].Options = slices.Clone(m.Options)
	}
	return out
}
