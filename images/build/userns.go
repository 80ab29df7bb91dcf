package build

import (
	"archive/tar"
	"cmp"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/snapshots"
	archivecompression "github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// A container in a user namespace has files that belong to other IDs on the host
// than in the container. An image says what containers see, so that it can be
// run with any mapping or none, and its layers have the container's IDs.

// owners turns the host's user and group IDs into a container's. nil is for
// containers without a user namespace of their own, and changes nothing.
type owners struct {
	uids, gids []specs.LinuxIDMapping
	// mountPoints are the places of mounts, and the directories on the way.
	mountPoints map[string]bool
}

func ownersOf(spec *specs.Spec) *owners {
	if spec.Linux == nil || !slices.ContainsFunc(spec.Linux.Namespaces, func(ns specs.LinuxNamespace) bool {
		return ns.Type == specs.UserNamespace && ns.Path == ""
	}) {
		return nil
	}
	o := &owners{uids: spec.Linux.UIDMappings, gids: spec.Linux.GIDMappings, mountPoints: make(map[string]bool)}
	for _, m := range spec.Mounts {
		for p := path.Join("/", m.Destination); p != "/"; p = path.Dir(p) {
			o.mountPoints[p] = true
		}
	}
	return o
}

// toContainer finds the container's ID of a host's.
func toContainer(maps []specs.LinuxIDMapping, host int) (int, bool) {
	for _, m := range maps {
		// An int has room for any sum of two IDs.
		if first := int(m.HostID); host >= first && host < first+int(m.Size) {
			return int(m.ContainerID) + host - first, true
		}
	}
	return 0, false
}

func unmapped(what string, id int, name, kind string, maps []specs.LinuxIDMapping) error {
	return fmt.Errorf("%s of /%s is %s ID %d of the host, which the container's user namespace does not have (it has %s): change it to one that the container has, or remove the file",
		what, strings.Trim(name, "/"), kind, id, describeMaps(maps))
}

func describeMaps(maps []specs.LinuxIDMapping) string {
	if len(maps) == 0 {
		return "none"
	}
	parts := make([]string, len(maps))
	for i, m := range maps {
		parts[i] = fmt.Sprintf("%d-%d", m.HostID, int(m.HostID)+int(m.Size)-1)
	}
	return strings.Join(parts, ", ")
}

// layer passes on the layer that write makes, with the container's owners.
func (o *owners) layer(w io.Writer, write func(io.Writer) error) error {
	if o == nil {
		return write(w)
	}
	r, pw := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := write(pw)
		// nil is the end of the stream.
		_ = pw.CloseWithError(err)
		done <- err
	}()
	err := o.copyLayer(w, r)
	// The writer ends with the reader.
	_ = r.CloseWithError(cmp.Or(err, io.ErrClosedPipe))
	werr := <-done
	if err == nil {
		err = werr
	}
	return err
}

func (o *owners) copyLayer(w io.Writer, r io.Reader) error {
	tr, tw := tar.NewReader(r), tar.NewWriter(w)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		if err := o.header(h); err != nil {
			return err
		}
		if err := tw.WriteHeader(h); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
		if _, err := io.Copy(tw, tr); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
	}
	// What follows the last entry: a writer that is not read to its end fails.
	if _, err := io.Copy(io.Discard, r); err != nil {
		return err
	}
	return tw.Close()
}

// fileCapability is the one extended attribute with an ID in it.
const fileCapability = "SCHILY.xattr.security.capability"

func (o *owners) header(h *tar.Header) error {
	// An ID may need the room of a PAX record now, or no longer.
	h.Format = tar.FormatPAX
	if strings.HasPrefix(path.Base(h.Name), ".wh.") {
		return nil // a whiteout has no owner
	}
	if h.Uid == 0 && h.Gid == 0 && o.mountPoints[path.Join("/", h.Name)] {
		// Where a mount is added to a restored container, the runtime makes
		// the mount point, as the host's root.
		if _, ok := toContainer(o.uids, 0); !ok {
			return nil
		}
	}
	uid, ok := toContainer(o.uids, h.Uid)
	if !ok {
		return unmapped("the owner", h.Uid, h.Name, "user", o.uids)
	}
	gid, ok := toContainer(o.gids, h.Gid)
	if !ok {
		return unmapped("the group", h.Gid, h.Name, "group", o.gids)
	}
	h.Uid, h.Gid = uid, gid
	if c, ok := h.PAXRecords[fileCapability]; ok {
		c, err := o.capability([]byte(c), h.Name)
		if err != nil {
			return err
		}
		h.PAXRecords[fileCapability] = string(c)
		// The reader puts attributes there, too, and the writer prefers it.
		h.Xattrs = nil //nolint:staticcheck // deprecated, but both sides use it
	}
	return nil
}

// Layouts of security.capability (linux/capability.h): the third revision ends
// with the user that is root where the capabilities count.
const (
	capRevisionMask = 0xff000000
	capRevision2    = 0x02000000
	capRevision3    = 0x03000000
	capSize2        = 20
	capSize3        = 24
)

// capability gives file capabilities that a container set to its own root.
// Those of the second revision are an image's, and are so already.
func (o *owners) capability(c []byte, name string) ([]byte, error) {
	if len(c) != capSize3 || binary.LittleEndian.Uint32(c)&capRevisionMask != capRevision3 {
		return c, nil
	}
	host := int(binary.LittleEndian.Uint32(c[capSize2:]))
	root, ok := toContainer(o.uids, host)
	if !ok {
		return nil, unmapped("the root user of the file capabilities", host, name, "user", o.uids)
	}
	c = slices.Clone(c)
	if root != 0 {
		binary.LittleEndian.PutUint32(c[capSize2:], uint32(root))
		return c, nil
	}
	flags := binary.LittleEndian.Uint32(c) &^ capRevisionMask
	binary.LittleEndian.PutUint32(c, capRevision2|flags)
	return c[:capSize2], nil
}

// rewrite stores a layer once more, with the container's owners, and encrypted if it is
// to be. The one that containerd's differ has made goes with the build's lease.
func (o *owners) rewrite(ctx context.Context, cs content.Store, id string, l newLayer, comp compression) (newLayer, error) {
	if l.diffID == "" || o == nil && comp.recipients == nil {
		return l, nil
	}
	ra, err := cs.ReaderAt(ctx, l.desc)
	if err != nil {
		return newLayer{}, err
	}
	defer ra.Close()
	plain, err := archivecompression.DecompressStream(content.NewReader(ra))
	if err != nil {
		return newLayer{}, err
	}
	defer plain.Close()
	return writeLayer(ctx, cs, "crac-owners-"+id, comp, func(w io.Writer) error {
		if o == nil {
			_, err := io.Copy(w, plain)
			return err
		}
		return o.copyLayer(w, plain)
	})
}

// remapped tells whether key names a snapshot that containerd's client made of
// the image's snapshot chain, by giving every file to the owner that it has on
// the host. Such a snapshot holds nothing that the image does not.
//
// The name is the only mark it has (client.remappedSnapshot in containerd; up to
// containerd 2.0 it was the second form).
func (o *owners) remapped(key, chain string) bool {
	if o == nil {
		return false
	}
	byContainer := func(a, b specs.LinuxIDMapping) int { return cmp.Compare(a.ContainerID, b.ContainerID) }
	var mark struct {
		Parent string
		IDMap  struct{ UidMap, GidMap []specs.LinuxIDMapping } // spelt as containerd does: it is hashed
	}
	mark.Parent = chain
	mark.IDMap.UidMap = slices.SortedStableFunc(slices.Values(o.uids), byContainer)
	mark.IDMap.GidMap = slices.SortedStableFunc(slices.Values(o.gids), byContainer)
	data, err := json.Marshal(mark)
	if err != nil {
		return false // cannot be: it is strings and numbers
	}
	if key == digest.FromBytes(data).String() {
		return true
	}
	uid, okUID := toHost(o.uids, 0)
	gid, okGID := toHost(o.gids, 0)
	return okUID && okGID && key == fmt.Sprintf("%s-%d-%d", chain, uid, gid)
}

func toHost(maps []specs.LinuxIDMapping, container uint32) (uint32, bool) {
	for _, m := range maps {
		if container >= m.ContainerID && container-m.ContainerID < m.Size {
			return m.HostID + container - m.ContainerID, true
		}
	}
	return 0, false
}

// unpacked finds the snapshot of the image that the container's root file
// system was made from: parent itself, or what is below it if parent has other
// owners.
func (o *owners) unpacked(ctx context.Context, sn snapshots.Snapshotter, parent string) (string, error) {
	if o == nil || parent == "" {
		return parent, nil
	}
	info, err := sn.Stat(ctx, parent)
	if err != nil {
		if errdefs.IsNotFound(err) {
			return parent, nil // the base will say so
		}
		return "", fmt.Errorf("find snapshot %s: %w", parent, err)
	}
	if o.remapped(parent, info.Parent) {
		return info.Parent, nil
	}
	return parent, nil
}

// Unpacked finds the snapshot that an image was unpacked into and the container's root
// file system was made from: parent, or what is below it if containerd's client gave
// parent the owners of the container's user namespace.
func Unpacked(ctx context.Context, sn snapshots.Snapshotter, spec *specs.Spec, parent string) (string, error) {
	return ownersOf(spec).unpacked(ctx, sn, parent)
}
