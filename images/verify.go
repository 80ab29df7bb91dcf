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
	for _, p := range c.Parents {
		parent, err := p.openVerified(pages)
		if err != nil {
			d.Close()
			return nil, err
		}
		parent.Close() // has memory that CRIU reads, and nothing to look at
	}
	return d, nil
}

// openVerified is open for the dump alone.
func (c *Checkpoint) openVerified(pages bool) (*Dump, error) {
	d, err := c.openDir()
	if err != nil {
		return nil, (&Dump{path: c.CRIUDir()}).damaged("", err)
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
	listed := make(map[string]bool, len(m.Files))
	v := verifier{Dump: d, hash: sha256.New()}
	for _, f := range m.Files {
		listed[f.Name] = true
		if err := v.file(f, pages || !IsPages(f.Name)); err != nil {
			return d.damaged(f.Name, err)
		}
	}
	for _, name := range d.names {
		if !listed[name] && mustBeListed(name) {
			return d.damaged(name, errNotListed)
		}
	}
	return nil
}

// verifier has what is needed for each file.
type verifier struct {
	*Dump
	hash hash.Hash
	buf  []byte
}

func (v *verifier) file(want oci.File, content bool) error {
	f, err := openDumpFile(int(v.dir.Fd()), want.Name)
	if err != nil {
		return err
	}
	defer f.close()
	got := oci.File{Name: want.Name, Size: f.size, Digest: want.Digest}
	if content && got.Size == want.Size {
		v.hash.Reset()
		if err := v.read(f, want.Name); err != nil {
			return err
		}
		got.Digest = "sha256:" + hex.EncodeToString(v.hash.Sum(nil))
	}
	return compareFile(want, got)
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

func compareFile(want, got oci.File) error {
	switch {
	case got.Size != want.Size:
		return fmt.Errorf("has %d bytes, the manifest says %d", got.Size, want.Size)
	case got.Digest != want.Digest:
		return fmt.Errorf("has digest %s, the manifest says %s", got.Digest, want.Digest)
	}
	return nil
}

// CompareFiles is Verify for a dump that lies somewhere else: found are all its
// files, with their digests.
func CompareFiles(m *oci.Manifest, found []oci.File) error {
	damaged := func(name string, err error) error {
		return fmt.Errorf("%w: %s: %w; pull the image again, or make a new checkpoint", ErrDamaged, name, err)
	}
	have := make(map[string]oci.File, len(found))
	for _, f := range found {
		have[f.Name] = f
	}
	for _, want := range m.Files {
		got, ok := have[want.Name]
		if !ok {
			return damaged(want.Name, os.ErrNotExist)
		}
		if err := compareFile(want, got); err != nil {
			return damaged(want.Name, err)
		}
		delete(have, want.Name)
	}
	for _, f := range found {
		if _, unlisted := have[f.Name]; unlisted && mustBeListed(f.Name) {
			return damaged(f.Name, errNotListed)
		}
	}
	return nil
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
