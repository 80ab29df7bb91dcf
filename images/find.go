package images

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/oci"
)

// Find looks for a checkpoint in the mounts of a container's root file system.
//
// In an overlay it looks at the layers, topmost first. rest are the mounts with
// every checkpoint layer left out, so that the container never sees a dump, not
// even when it starts cold. In any other mount of a directory it looks there,
// and rest is as given: Checkpoint.Visible says so.
//
// Without a checkpoint it returns (nil, mounts, nil). A checkpoint that cannot
// be read, or that lies below other layers, gives an error that wraps ErrDamaged
// or ErrCovered, and rest is usable for a cold start all the same.
func Find(mounts []Mount) (c *Checkpoint, rest []Mount, err error) {
	rest = slices.Clone(mounts)
	for i, m := range mounts {
		var (
			found *Checkpoint
			ferr  error
		)
		switch m.Type {
		case "overlay":
			found, rest[i], ferr = findInOverlay(m)
		default:
			found, ferr = findInSource(m)
		}
		if ferr != nil && err == nil {
			err = ferr
		}
		if found != nil && c == nil {
			c = found
		}
	}
	if err != nil {
		return nil, rest, err
	}
	if c != nil {
		c.Visible = Visible(rest)
	}
	return c, rest, nil
}

// Visible tells whether a container with these mounts as its root file system
// would see a dump, or what is left of one, at /.crac, so that it must be
// masked. Of what Find returns that can be so with an error, too.
func Visible(mounts []Mount) bool {
	for _, m := range mounts {
		dirs := []string{m.Source}
		if m.Type == "overlay" {
			// Options that cannot be read do not mount either.
			o, _ := parseOverlay(m.Options)
			dirs = dirs[:0]
			for _, l := range o.lower {
				dirs = append(dirs, l.path)
			}
		}
		for _, dir := range dirs {
			if !filepath.IsAbs(dir) {
				continue
			}
			st, err := os.Lstat(filepath.Join(dir, oci.Root))
			if err != nil {
				continue
			}
			if st.IsDir() {
				return true
			}
			break // a whiteout or a file hides what is below
		}
	}
	return false
}

func findInSource(m Mount) (*Checkpoint, error) {
	if !filepath.IsAbs(m.Source) {
		return nil, nil // tmpfs, proc, or a block device by label
	}
	if st, err := os.Stat(m.Source); err != nil || !st.IsDir() {
		return nil, nil // a device, or gone: the mount itself will say so
	}
	l, err := readLayer(m.Source)
	if err == nil && l.checkpoint != nil {
		// Here the dump and its parents are one directory: the files of one have
		// taken the place of the other's.
		err = l.checkpoint.continues(nil)
	}
	return l.checkpoint, err
}

func findInOverlay(m Mount) (*Checkpoint, Mount, error) {
	opts, err := parseOverlay(m.Options)
	if err != nil {
		return nil, m, fmt.Errorf("root file system mount: %w", err)
	}

	var (
		found   *Checkpoint
		problem error
		closed  bool // a layer hides what is below it
		below   []*Checkpoint
	)
	drop := make([]bool, len(opts.lower))
	for i, dir := range opts.lower {
		l, err := readLayer(dir.path)
		drop[i] = l.only
		if !closed && found == nil && problem == nil {
			switch {
			case err != nil:
				problem = err
			case l.checkpoint != nil && i > 0:
				problem = fmt.Errorf("%w: %s in %s was made before %d layers that lie above it, so its memory does not match the files; make a new checkpoint of the newer image",
					ErrCovered, oci.Root, dir.path, i)
			case l.checkpoint != nil:
				found = l.checkpoint
			}
		} else if found != nil && l.checkpoint != nil && l.only {
			below = append(below, l.checkpoint)
		}
		closed = closed || l.hides
	}
	rest, err := opts.without(m, drop)
	if err != nil {
		return nil, m, err
	}
	if found != nil {
		problem = found.continues(below)
	}
	if problem != nil {
		return nil, rest, problem
	}
	return found, rest, nil
}

// continues finds the dumps that c continues among the checkpoints of the layers
// below it, and that it needs no others.
func (c *Checkpoint) continues(below []*Checkpoint) error {
	for last := c; last.Manifest.Parent != nil; {
		want := last.Manifest.Parent
		i := slices.IndexFunc(below, func(b *Checkpoint) bool { return b.digest == want.Manifest })
		if i < 0 {
			return NoParent(want)
		}
		next := below[i]
		if err := Continues(last.Manifest, next.Manifest); err != nil {
			return err
		}
		below = below[i+1:]
		c.Parents = append(c.Parents, next)
		last = next
	}
	return nil
}

// NoParent is an error about a dump that is missing below the one that continues it.
func NoParent(p *oci.Parent) error {
	return fmt.Errorf("%w: it continues the dump with the manifest %s, which is in no layer below it; on a snapshotter that is no overlay flatten the image (cracctl flatten), else pull it again",
		ErrDamaged, p.Manifest)
}

// Continues tells whether a dump is what one that continues it says.
func Continues(m, parent *oci.Manifest) error {
	depth := 1
	if parent.Parent != nil {
		depth += parent.Parent.Depth
	}
	if m.Parent.Depth != depth || m.Host.PageSize != parent.Host.PageSize {
		return fmt.Errorf("%w: it continues %d dumps with pages of %d bytes, and the one below it makes them %d with pages of %d; pull the image again, or make a new checkpoint",
			ErrDamaged, m.Parent.Depth, m.Host.PageSize, depth, parent.Host.PageSize)
	}
	return nil
}

// layer is what one directory of a stack says about checkpoints.
type layer struct {
	checkpoint *Checkpoint
	only       bool // it has nothing but a directory .crac: a checkpoint layer
	hides      bool // it hides a .crac of the layers below
}

// readLayer looks for a checkpoint in one directory. The content is hostile: no
// symbolic link is followed below dir, no other file system entered, and only
// regular files are read.
func readLayer(dir string) (l layer, err error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
			return l, nil // the mount itself will say so, better than we can
		}
		return l, fmt.Errorf("look for a checkpoint in layer %s: %w", dir, err)
	}
	defer unix.Close(fd)

	var st unix.Stat_t
	if err := unix.Fstatat(fd, oci.Root, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		if errors.Is(err, unix.ENOENT) {
			return l, nil
		}
		return l, fmt.Errorf("look for a checkpoint in layer %s: %w", dir, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		// A whiteout (a character device), or a file in the way: either hides
		// what is below.
		l.hides = true
		return l, nil
	}
	l.hides = IsOpaque(filepath.Join(dir, oci.Root))
	if l.only, err = holdsOnly(dir, oci.Root); err != nil {
		return l, err
	}

	f, err := openBeneath(fd, filepath.Join(oci.Dir, oci.ManifestName))
	if errors.Is(err, os.ErrNotExist) {
		err = os.ErrNotExist
	}
	if err != nil {
		return l, DamagedManifest(err)
	}
	defer f.Close()
	h := sha256.New()
	manifest, err := oci.DecodeManifest(io.TeeReader(f, h))
	if err != nil {
		return l, DamagedManifest(err)
	}
	l.checkpoint = &Checkpoint{
		Dir: filepath.Join(dir, oci.Dir), Layer: dir, Manifest: manifest, digest: "sha256:" + hex.EncodeToString(h.Sum(nil)),
	}
	return l, nil
}

// DamagedManifest is an error about the manifest of a checkpoint, which makes one what it is.
func DamagedManifest(err error) error {
	return fmt.Errorf("%w: %s/%s: %w", ErrDamaged, oci.Dir, oci.ManifestName, err)
}

// IsOpaque tells whether overlayfs hides a lower directory of the same name.
func IsOpaque(dir string) bool {
	var b [1]byte
	for _, attr := range []string{"trusted.overlay.opaque", "user.overlay.opaque"} {
		if n, err := unix.Lgetxattr(dir, attr, b[:]); err == nil && n == 1 && b[0] == 'y' {
			return true
		}
	}
	return false
}

func holdsOnly(dir, name string) (bool, error) {
	d, err := os.Open(dir)
	if err != nil {
		return false, fmt.Errorf("look for a checkpoint in layer %s: %w", dir, err)
	}
	defer d.Close()
	// Two are enough to know.
	names, err := d.Readdirnames(2)
	if err != nil {
		return false, fmt.Errorf("look for a checkpoint in layer %s: %w", dir, err)
	}
	return len(names) == 1 && names[0] == name, nil
}

// openat2 opens what is there for reading, without leaving dirfd by any trick of a
// path. flags are added to those of open(2).
func openat2(dirfd int, name string, flags uint64) (fd int, err error) {
	how := unix.OpenHow{
		// O_NONBLOCK: opening a FIFO must not wait for its writer.
		Flags:   unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NOFOLLOW | unix.O_NONBLOCK | flags,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
	}
	for range 128 {
		fd, err = unix.Openat2(dirfd, name, &how)
		// EAGAIN: a rename went on meanwhile and the kernel could not be sure.
		if !errors.Is(err, unix.EINTR) && !errors.Is(err, unix.EAGAIN) {
			break
		}
	}
	return fd, err
}

// openBeneath opens a regular file for reading, as openat2 does.
func openBeneath(dirfd int, name string) (*os.File, error) {
	fd, err := openat2(dirfd, name, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", name)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// overlay is an overlay mount's options, taken apart as far as needed to leave
// layers out.
type overlay struct {
	options []string
	lower   []lower // topmost first
	upper   string
}

// lower is one layer: where its text stands and what directory that means.
type lower struct {
	option int    // index in options
	raw    string // as written, with escapes
	path   string
	// data marks a data-only layer (each one stands after "::"): files there are
	// reached only through metadata of the layers above.
	data bool
}

const (
	lowerdir    = "lowerdir="
	lowerdirAdd = "lowerdir+="
	datadirAdd  = "datadir+="
	upperdir    = "upperdir="
	workdir     = "workdir="
)

func parseOverlay(options []string) (overlay, error) {
	o := overlay{options: options}
	for i, opt := range options {
		switch {
		case strings.HasPrefix(opt, lowerdirAdd):
			p := opt[len(lowerdirAdd):]
			o.lower = append(o.lower, lower{option: i, raw: p, path: p})
		case strings.HasPrefix(opt, lowerdir):
			if len(o.lower) > 0 {
				return o, fmt.Errorf("overlay options %q name the lower layers twice", options)
			}
			data := false // the part before was empty: "::"
			for _, raw := range splitLower(opt[len(lowerdir):]) {
				if raw == "" {
					if data || len(o.lower) == 0 {
						return o, fmt.Errorf("overlay option %q has an empty layer", opt)
					}
					data = true
					continue
				}
				if n := len(o.lower); !data && n > 0 && o.lower[n-1].data {
					// The kernel refuses it, too.
					return o, fmt.Errorf("overlay option %q has a layer below data layers", opt)
				}
				o.lower = append(o.lower, lower{option: i, raw: raw, path: unescape(raw), data: data})
				data = false
			}
			if data {
				return o, fmt.Errorf("overlay option %q has an empty layer", opt)
			}
		case strings.HasPrefix(opt, upperdir):
			o.upper = opt[len(upperdir):]
		}
	}
	for _, l := range o.lower {
		if !filepath.IsAbs(l.path) {
			return o, fmt.Errorf("overlay layer %q is not an absolute path", l.path)
		}
	}
	if len(o.lower) == 0 {
		return o, fmt.Errorf("overlay options %q name no lower layer", options)
	}
	return o, nil
}

// splitLower splits at colons that no backslash escapes. "a::b" gives an empty
// part between, as does each colon after the first in a row.
func splitLower(s string) []string {
	var (
		parts []string
		start int
	)
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case ':':
			parts = append(parts, s[start:i])
			start = i + 1
		}
	}
	return append(parts, s[start:])
}

func unescape(s string) string {
	if !strings.ContainsRune(s, '\\') {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+1 < len(s) {
			i++
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// without writes the mount anew with the marked layers left out. Everything
// else stays as it was written. Where an overlay would be invalid it becomes
// the bind mount that containerd's snapshotter makes of so few layers.
func (o overlay) without(m Mount, drop []bool) (Mount, error) {
	if !slices.Contains(drop, true) {
		return m, nil
	}
	var left []lower
	for i, l := range o.lower {
		if !drop[i] {
			left = append(left, l)
		}
	}

	merged := 0
	for _, l := range left {
		if !l.data {
			merged++
		}
	}
	if merged == 0 && len(left) > 0 {
		return m, fmt.Errorf("overlay options %q: only data layers would be left without the checkpoint", o.options)
	}
	hasData := len(left) > merged || slices.ContainsFunc(o.options, func(s string) bool { return strings.HasPrefix(s, datadirAdd) })
	switch {
	case merged == 0 && o.upper == "":
		return m, fmt.Errorf("root file system has no layer but the checkpoint")
	case merged == 0:
		return bindMount(m, o.upper, "rw"), nil
	case merged == 1 && o.upper == "" && !hasData:
		return bindMount(m, left[0].path, "ro"), nil
	}

	rest := m
	rest.Options = nil
	for i, opt := range o.options {
		switch {
		case strings.HasPrefix(opt, lowerdirAdd):
			if slices.ContainsFunc(left, func(l lower) bool { return l.option == i }) {
				rest.Options = append(rest.Options, opt)
			}
		case strings.HasPrefix(opt, lowerdir):
			var b strings.Builder
			b.WriteString(lowerdir)
			first := true
			for _, l := range left {
				if l.option != i {
					continue
				}
				if !first {
					b.WriteByte(':')
				}
				if l.data {
					b.WriteByte(':')
				}
				first = false
				b.WriteString(l.raw)
			}
			if !first {
				rest.Options = append(rest.Options, b.String())
			}
		default:
			rest.Options = append(rest.Options, opt)
		}
	}
	return rest, nil
}

// bindMount keeps what is no overlay's own option: flags, and the ID maps that
// containerd's mount understands for both.
func bindMount(m Mount, source, mode string) Mount {
	bind := Mount{Type: "bind", Source: source, Target: m.Target}
	for _, opt := range m.Options {
		key, _, hasValue := strings.Cut(opt, "=")
		switch {
		case hasValue && key != "uidmap" && key != "gidmap":
		case opt == "ro", opt == "rw", opt == "volatile", opt == "userxattr":
		default:
			bind.Options = append(bind.Options, opt)
		}
	}
	if slices.Contains(m.Options, "ro") {
		mode = "ro"
	}
	bind.Options = append(bind.Options, mode, "rbind")
	return bind
}
