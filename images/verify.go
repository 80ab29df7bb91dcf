package images

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/oci"
)

// Verify checks that the dump is whole and what its manifest says: every file is
// there, regular and of the right size, and nothing else that CRIU would read
// is there.
//
// Content is checked by digest for all files but pages-*.img. Those are the
// memory: reading all of it would take as long as the restore it is for.
// containerd has verified the layer's digest when it was pulled.
//
// The dumps that it continues are checked as well.
func (c *Checkpoint) Verify() error { return c.verify(false) }

// VerifyAll is Verify that also reads the memory.
func (c *Checkpoint) VerifyAll() error { return c.verify(true) }

func (c *Checkpoint) verify(pages bool) error {
	d, err := c.open(pages)
	if err == nil {
		d.Close()
	}
	return err
}

// Open opens the dump if Verify finds nothing wrong with it, for those who look at it
// next: they need not read again what has been verified.
func (c *Checkpoint) Open() (*Dump, error) { return c.open(false) }

func (c *Checkpoint) open(pages bool) (*Dump, error) {
	d, err := c.openVerified(pages)
	if err != nil {
		return nil, err
	}
	for n, p := range c.Parents {
		parent, err := p.openVerified(pages)
		if err != nil {
			d.Close()
			return nil, InParent(n+1, err)
		}
		parent.Close() // has memory that CRIU reads, and nothing to look at
	}
	return d, nil
}

// openVerified is open for the dump alone.
func (c *Checkpoint) openVerified(pages bool) (*Dump, error) {
	d, err := c.openDir()
	if err != nil {
		return nil, damaged(c.CRIUDir(), err)
	}
	if err := d.verify(c.Manifest, pages); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
}

// openDir opens the dump's directory without following links below the layer.
func (c *Checkpoint) openDir() (*Dump, error) {
	dir := c.CRIUDir()
	rel, err := filepath.Rel(c.Layer, dir)
	if err != nil {
		return nil, err
	}
	layer, err := unix.Open(c.Layer, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(layer)
	fd, err := openat2(layer, rel, unix.O_DIRECTORY)
	if err != nil {
		return nil, err
	}
	return newDump(dir, os.NewFile(uintptr(fd), dir))
}

// verify compares the dump with its manifest, and keeps what others read of it.
func (d *Dump) verify(m *oci.Manifest, pages bool) error {
	v := verifier{Dump: d, hash: sha256.New()}
	return compareFiles(m, d.names, func(want oci.File) (oci.File, error) {
		return v.file(want, pages || !IsPages(want.Name))
	})
}

// verifier has what is needed for each file.
type verifier struct {
	*Dump
	hash hash.Hash
	buf  []byte
}

// file tells what a file is that should be as the manifest says. Without content its
// digest is taken for right.
func (v *verifier) file(want oci.File, content bool) (oci.File, error) {
	f, err := openDumpFile(int(v.dir.Fd()), want.Name)
	if errors.Is(err, os.ErrNotExist) {
		err = os.ErrNotExist
	}
	if err != nil {
		return want, err
	}
	defer f.close()
	got := oci.File{Name: want.Name, Size: f.size, Digest: want.Digest}
	if content && got.Size == want.Size {
		v.hash.Reset()
		if err := v.read(f, want.Name); err != nil {
			return got, err
		}
		got.Digest = "sha256:" + hex.EncodeToString(v.hash.Sum(nil))
	}
	return got, nil
}

// read hashes a file, and keeps it if somebody will look at it.
func (v *verifier) read(f dumpFile, name string) error {
	if f.size <= mostLookedAt(name) {
		data := make([]byte, f.size)
		if err := f.readFull(data); err != nil {
			return err
		}
		v.hash.Write(data)
		v.keep(name, data)
		return nil
	}
	if v.buf == nil {
		v.buf = make([]byte, 64<<10)
	}
	for left := f.size; left > 0; {
		part := v.buf[:min(left, int64(len(v.buf)))]
		if err := f.readFull(part); err != nil {
			return err
		}
		v.hash.Write(part)
		left -= int64(len(part))
	}
	return nil
}

// mostLookedAt is up to which size somebody reads a file before CRIU does; -1 for
// those that CRIU alone reads.
func mostLookedAt(name string) int64 {
	switch kind, _, _ := strings.Cut(name, "-"); kind {
	case "core", "ids", "mountpoints", "inventory.img", "pstree.img", "seccomp.img":
		return maxImage
	case "tmpfs":
		return maxTmpfsArchive
	}
	return -1
}

// CompareFiles is Verify for a dump that lies somewhere else: found are all its
// files, with their digests.
func CompareFiles(m *oci.Manifest, found []oci.File) error {
	have := make(map[string]oci.File, len(found))
	var names []string
	for _, f := range found {
		have[f.Name] = f
		names = append(names, f.Name)
	}
	return compareFiles(m, names, func(want oci.File) (oci.File, error) {
		got, ok := have[want.Name]
		if !ok {
			return want, os.ErrNotExist
		}
		return got, nil
	})
}

// compareFiles tells what of a dump is not as its manifest says, wherever it lies: look
// tells what a file is, names are those of all files that are there.
func compareFiles(m *oci.Manifest, names []string, look func(want oci.File) (oci.File, error)) error {
	listed := make(map[string]bool, len(m.Files))
	for _, want := range m.Files {
		listed[want.Name] = true
		got, err := look(want)
		switch {
		case err != nil:
		case got.Size != want.Size:
			err = fmt.Errorf("has %d bytes, the manifest says %d", got.Size, want.Size)
		case got.Digest != want.Digest:
			err = fmt.Errorf("has digest %s, the manifest says %s", got.Digest, want.Digest)
		}
		if err != nil {
			return damaged(want.Name, err)
		}
	}
	for _, name := range names {
		if !listed[name] && mustBeListed(name) {
			return damaged(name, errNotListed)
		}
	}
	return nil
}

// InParent says of an error that it is about one of the dumps that a checkpoint continues,
// the nearest being 1.
func InParent(n int, err error) error { return fmt.Errorf("in parent %d: %w", n, err) }

// damaged is about something in a dump.
func damaged(what string, err error) error {
	return fmt.Errorf("%w: %s: %w; pull the image again, or make a new checkpoint", ErrDamaged, what, err)
}

var errNotListed = errors.New("is not listed in the manifest")

// mustBeListed: a file that is not listed would be read unchecked; "parent" is the
// link that CRIU follows to an earlier dump, anywhere on the host.
func mustBeListed(name string) bool { return isImage(name) || name == "parent" }

// IsPages tells the files with the workload's memory.
func IsPages(name string) bool {
	return strings.HasPrefix(name, "pages-") && strings.HasSuffix(name, ".img")
}

// isImage tells the files that a restore reads.
func isImage(name string) bool {
	return strings.HasSuffix(name, ".img") || name == oci.DescriptorsName
}
