// Package inspect reads checkpoint images where they lie, in a content store,
// without unpacking them: what is inside, and whether it is what it says.
//
// It is cracctl's. It understands CRIU's image files with go-criu's messages,
// which register themselves at program start and so are nothing for the shim.
package inspect

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/crypt"
	"github.com/crac-shim/crac/oci"
)

const (
	// maxImages bounds how many bytes are kept in memory of the files that are looked into.
	// The largest are page maps, a few bytes for each run of pages.
	maxImages = 256 << 20
	// maxWhole bounds those of them that are unmarshalled as a whole, which takes many times
	// their size: a message of two bytes may become one of a hundred.
	maxWhole = 64 << 20
)

// Budget is how much memory reading may take, of one layer or of many together. It is used
// by one goroutine.
type Budget struct {
	kept, whole int64 // bytes of files, see maxImages and maxWhole
	hashed      int64 // bytes of hashes of pages
}

// NewBudget is for all that is kept at the same time.
func NewBudget() *Budget { return &Budget{kept: maxImages, whole: maxWhole, hashed: maxHashed()} }

// maxHashed is a 16th of this host's memory, for dumps of 16 times as much. How much is in a
// layer, only its end says.
func maxHashed() int64 {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 1 << 30
	}
	return int64(info.Totalram) * int64(info.Unit) / 16
}

// take takes n of what is left, if there is so much.
func take(left *int64, n int64) bool {
	if n > *left {
		return false
	}
	*left -= n
	return true
}

// Layer is what a checkpoint layer holds.
type Layer struct {
	Manifest *oci.Manifest
	// Spec is the runtime spec of the dumped container, as stored.
	Spec []byte
	// Images are the files of the dump that are looked into, by name.
	Images map[string][]byte
	// Found are the files of the dump as they are, in the layer's order. They have
	// digests if they were asked for.
	Found []oci.File
	// Pages are the hashes of the pages in pages-*.img, by name and in order, if
	// they were asked for: see images.SumPage.
	Pages map[string][]images.PageSum
	// ManifestDigest is that of manifest.json: dumps that continue this one name
	// it by that.
	ManifestDigest string
}

// Options say what a layer is read for. The zero value reads what is inside.
type Options struct {
	// Digests of all files are computed.
	Digests bool
	// Pages are hashed.
	Pages bool
	// Extract, if it is not empty, is a directory that the files of the dump, memory
	// included, are written into. It has to be empty.
	Extract string
	// Keys decrypt an encrypted layer.
	Keys *crypt.Keys
	// Budget is shared by all that is kept at the same time; nil: this alone.
	Budget *Budget
	// Progress, if there is one, is told how many bytes of the layer as stored were
	// read since it was told last.
	Progress func(n int64)

	// most is how many bytes the image says that the dump has; 0 if it does not say.
	most int64
	// parent: another dump continues this one, and of it nothing but memory counts.
	parent bool
}

// readLayer reads an uncompressed checkpoint layer in one pass. What it finds is
// hostile: only the format's own entries are taken, each once, and what is kept
// is bounded. Errors wrap images.ErrDamaged.
func readLayer(r io.Reader, o Options) (*Layer, error) {
	if o.Budget == nil {
		o.Budget = NewBudget()
	}
	l := &reader{o: o, Layer: &Layer{Images: make(map[string][]byte), Pages: make(map[string][]images.PageSum)}}
	var (
		manifest []byte
		seen     = make(map[string]bool)
		tr       = tar.NewReader(r)
	)
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, damaged(err)
		}
		name, dump, err := entry(h)
		switch {
		case err != nil:
			return nil, damaged(err)
		case name == "": // a directory
			continue
		case seen[name]:
			return nil, damaged(fmt.Errorf("%s is there twice", name))
		case len(seen) >= oci.MaxFiles+2:
			return nil, damaged(fmt.Errorf("it holds more than %d files", oci.MaxFiles))
		}
		seen[name] = true
		switch {
		case dump:
			err = l.file(tr, name, h.Size)
		case name == oci.ManifestName:
			manifest, err = l.keep(tr, h.Size)
		case name == oci.SpecName:
			l.Spec, err = l.keep(tr, h.Size)
		}
		if err != nil {
			return nil, damaged(fmt.Errorf("%s: %w", name, err))
		}
	}
	if manifest == nil {
		return nil, images.DamagedManifest(os.ErrNotExist)
	}
	var err error
	if l.Manifest, err = oci.DecodeManifest(bytes.NewReader(manifest)); err != nil {
		return nil, images.DamagedManifest(err)
	}
	sum := sha256.Sum256(manifest)
	l.ManifestDigest = "sha256:" + hex.EncodeToString(sum[:])
	return l.Layer, nil
}

// reader is a layer that is being read.
type reader struct {
	*Layer
	o     Options
	found int64 // bytes in the dump so far
}

// keep reads what is kept in memory.
func (l *reader) keep(r io.Reader, size int64) ([]byte, error) {
	if !take(&l.o.Budget.kept, size) {
		return nil, fmt.Errorf("with it there are more than %d bytes that would have to be looked into", int64(maxImages))
	}
	// The size is a claim: memory is taken for what is really there.
	var data bytes.Buffer
	_, err := io.CopyN(&data, r, size)
	return data.Bytes(), err
}

// file reads one file of the dump.
func (l *reader) file(r io.Reader, name string, size int64) error {
	if l.o.most > 0 && size > l.o.most-l.found {
		return fmt.Errorf("with it the dump has more than the %d bytes that the image's annotation %s says", l.o.most, oci.AnnotationDumpBytes)
	}
	l.found += size
	found := oci.File{Name: name, Size: size}
	var digest hash.Hash
	if l.o.Digests {
		digest = sha256.New()
		r = io.TeeReader(r, digest)
	}
	var extracted *extractedFile
	if l.o.Extract != "" {
		var err error
		if extracted, err = extract(l.o.Extract, name, size); err != nil {
			return err
		}
		defer extracted.Close()
		r = io.TeeReader(r, extracted)
	}
	switch {
	case l.o.looksInto(name):
		if !isPiecemeal(name) && !take(&l.o.Budget.whole, size) {
			return fmt.Errorf("with it there are more than %d bytes of messages that would have to be looked into", int64(maxWhole))
		}
		data, err := l.keep(r, size)
		if err != nil {
			return err
		}
		l.Images[name] = data
	case images.IsPages(name) && l.o.Pages:
		sums, err := l.hashPages(r)
		if err != nil {
			return err
		}
		l.Pages[name] = sums
	default:
		if _, err := io.Copy(io.Discard, r); err != nil {
			return err
		}
	}
	if l.o.Digests {
		found.Digest = "sha256:" + hex.EncodeToString(digest.Sum(nil))
	}
	l.Found = append(l.Found, found)
	if extracted != nil {
		if err := extracted.Close(); err != nil {
			return extractError{err}
		}
	}
	return nil
}

// looksInto tells the files that Processes and NewMemory read. The others are as large as
// they like: archives of tmpfs mounts, files without a name, shared memory.
func (o Options) looksInto(name string) bool {
	switch _, pagemap := pagemapPID(name); {
	case o.parent:
		return pagemap && o.Pages
	case isPiecemeal(name):
		return true
	}
	switch kind, _, _ := strings.Cut(name, "-"); kind {
	case "core", "fdinfo", "files.img", "fs", "ids", "pstree.img":
		return true
	}
	return false
}

// isPiecemeal tells those of which never more than a part is unmarshalled.
func isPiecemeal(name string) bool {
	_, pagemap := pagemapPID(name)
	return pagemap || strings.HasPrefix(name, "mm-")
}

// extractedFile is a file that is written on this host.
type extractedFile struct{ *os.File }

// extractError is about this host, and not about the image.
type extractError struct{ error }

func (e extractError) Unwrap() error { return e.error }

// extract makes a file below dir. Its name is a plain one: see entry. Whoever made the
// dump says how large it is, and a full disk is everybody's trouble.
func extract(dir, name string, size int64) (*extractedFile, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return nil, extractError{err}
	}
	if free := int64(st.Bavail) * st.Bsize; size > free {
		return nil, extractError{fmt.Errorf("it has %d bytes, and in %s there is room for %d; make room, or say where else there is (--work-dir, or TMPDIR)", size, dir, free)}
	}
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, extractError{err}
	}
	return &extractedFile{f}, nil
}

func (f *extractedFile) Write(p []byte) (int, error) {
	n, err := f.File.Write(p)
	if err != nil {
		err = extractError{err}
	}
	return n, err
}

func (l *reader) hashPages(r io.Reader) (sums []images.PageSum, err error) {
	page := make([]byte, images.SumSize)
	for {
		switch n, err := io.ReadFull(r, page); {
		case errors.Is(err, io.EOF):
			return sums, nil
		case errors.Is(err, io.ErrUnexpectedEOF):
			return nil, fmt.Errorf("does not hold whole pages: %d bytes are left over", n)
		case err != nil:
			return nil, err
		}
		sum := images.SumPage(page)
		if !take(&l.o.Budget.hashed, int64(unsafe.Sizeof(sum))) {
			return nil, fmt.Errorf("with it there is more memory than can be compared on this host: hashes of it take more than %d bytes", maxHashed())
		}
		sums = append(sums, sum)
	}
}

// entry knows the format's entries. name is empty for a directory; dump says that
// it is a file of CRIU's.
func entry(h *tar.Header) (name string, dump bool, err error) {
	clean := path.Clean(strings.TrimPrefix(h.Name, "./"))
	switch {
	case h.Typeflag == tar.TypeDir && (clean == oci.Root || clean == oci.Dir || clean == oci.Dir+"/"+oci.CRIUDirName):
		return "", false, nil
	case h.Typeflag != tar.TypeReg || isSparse(h):
	case clean == oci.Dir+"/"+oci.ManifestName, clean == oci.Dir+"/"+oci.SpecName:
		return path.Base(clean), false, nil
	case path.Dir(clean) == oci.Dir+"/"+oci.CRIUDirName && oci.ValidFileName(path.Base(clean)):
		return path.Base(clean), true, nil
	}
	return "", false, fmt.Errorf("%q is no entry of a checkpoint layer", h.Name)
}

// isSparse tells that a file has holes, which take nothing in a layer, however large: to
// read them would not end.
func isSparse(h *tar.Header) bool {
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return true
		}
	}
	return false
}

func damaged(err error) error {
	if here := (extractError{}); errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) || errors.As(err, &here) {
		return err
	}
	return fmt.Errorf("%w: %w", images.ErrDamaged, err)
}

// VerifyChain is Verify for all layers of a chain.
func VerifyChain(chain []*Layer) error {
	for n, l := range chain {
		err := l.Verify()
		if err != nil && n > 0 {
			err = images.InParent(n, err)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Verify compares the files of a layer that was read with Digests with its
// manifest, in the words of images.Checkpoint.Verify.
func (l *Layer) Verify() error {
	return images.CompareFiles(l.Manifest, l.Found)
}
