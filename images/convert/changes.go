package convert

import (
	"archive/tar"
	"context"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/crac-shim/crac/oci"
)

// whiteout begins the names by which a layer deletes files.
const whiteout = ".wh."

// changes writes a layer of changes out of what another tool kept of them. Where it
// is unpacked later is containerd's care; here it is made sure that every entry is
// below the root, is of a kind that a layer has, and is no dump.
type changes struct {
	tw      *tar.Writer
	allowed *allowance
}

// newChanges bounds what the files hold; 0 is DefaultMaxSize.
func newChanges(w io.Writer, maxSize int64) *changes {
	return &changes{tar.NewWriter(w), newAllowance(maxSize)}
}

func (c *changes) close() error { return c.tw.Close() }

// copy takes the entries of a tar. Names of deletions mean that in a layer alone.
func (c *changes) copy(ctx context.Context, r io.Reader, layer bool) error {
	return readTar(ctx, r, c.allowed, func(h *tar.Header, content io.Reader) error {
		out, err := changed(h, layer)
		if err != nil || out == nil {
			return err
		}
		if err := c.tw.WriteHeader(out); err != nil {
			return err
		}
		_, err = io.Copy(c.tw, content)
		return err
	})
}

// changed makes an entry of a layer; nil for what does not belong there.
func changed(h *tar.Header, layer bool) (*tar.Header, error) {
	name, err := cleanName(strings.TrimPrefix(h.Name, "/"))
	if err != nil {
		return nil, err
	}
	if name == "." || inDump(name) {
		return nil, nil
	}
	target, deletes := strings.CutPrefix(path.Base(name), whiteout)
	if deletes && slices.Contains([]string{"", ".", ".."}, target) {
		return nil, fmt.Errorf("%w: %q deletes no file that could be there", ErrSource, name)
	}
	if deletes && !layer {
		return nil, fmt.Errorf("%w: the container has a file %q, whose name means a deletion in a layer; remove it and make the checkpoint again", ErrSource, name)
	}
	out := &tar.Header{
		Typeflag: h.Typeflag, Name: name, Mode: h.Mode & 0o7777, Uid: h.Uid, Gid: h.Gid,
		ModTime: h.ModTime.Truncate(time.Second), Format: tar.FormatPAX,
	}
	if deletes {
		out.ModTime = time.Unix(0, 0) // containerd's is when it was written
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		out.Typeflag, out.Size = tar.TypeReg, h.Size
	case tar.TypeDir:
		out.Name += "/"
	case tar.TypeSymlink:
		out.Linkname = h.Linkname
	case tar.TypeLink:
		if out.Linkname, err = cleanName(strings.TrimPrefix(h.Linkname, "/")); err != nil {
			return nil, err
		}
		if inDump(out.Linkname) {
			return nil, fmt.Errorf("%w: %q is a link into a dump", ErrSource, name)
		}
	case tar.TypeChar, tar.TypeBlock:
		out.Devmajor, out.Devminor = h.Devmajor, h.Devminor
	case tar.TypeFifo:
	default:
		return nil, nil // a socket: CRIU makes it anew
	}
	const xattr = "SCHILY.xattr."
	for k, v := range h.PAXRecords {
		if strings.HasPrefix(k, xattr) && !strings.HasPrefix(k, xattr+"trusted.overlay.") {
			if out.PAXRecords == nil {
				out.PAXRecords = make(map[string]string)
			}
			out.PAXRecords[k] = v
		}
	}
	return out, nil
}

func inDump(name string) bool { return name == oci.Root || strings.HasPrefix(name, oci.Root+"/") }

// delete marks a file of the layers below as deleted. A layer's own deletions do not
// touch what it brings.
func (c *changes) delete(name string) error {
	clean, err := cleanName(strings.TrimPrefix(name, "/"))
	if err != nil {
		return err
	}
	if clean == "." || inDump(clean) {
		return nil
	}
	return c.tw.WriteHeader(&tar.Header{
		Typeflag: tar.TypeReg, Name: path.Join(path.Dir(clean), whiteout+path.Base(clean)), Mode: 0o600, ModTime: time.Unix(0, 0),
	})
}
