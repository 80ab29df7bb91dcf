package images

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
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
	for _, p := range append([]*Checkpoint{c}, c.Parents...) {
		if err := verifyDir(p.CRIUDir(), p.Layer, p.Manifest, pages); err != nil {
			return err
		}
	}
	return nil
}

func verifyDir(dir, base string, m *oci.Manifest, pages bool) error {
	damaged := func(name string, err error) error {
		var p *os.PathError
		if errors.As(err, &p) {
			err = p.Err // the name is said once
		}
		return fmt.Errorf("%w: %s: %w; pull the image again, or make a new checkpoint", ErrDamaged, filepath.Join(dir, name), err)
	}
	rel, err := filepath.Rel(base, dir)
	if err != nil {
		return fmt.Errorf("verify the checkpoint in %s: %w", dir, err)
	}
	fd, err := unix.Open(base, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return damaged("", &os.PathError{Op: "open", Path: base, Err: err})
	}
	defer unix.Close(fd)

	listed := make(map[string]bool, len(m.Files))
	for _, f := range m.Files {
		listed[f.Name] = true
		if err := verifyFile(fd, filepath.Join(rel, f.Name), f, pages || !IsPages(f.Name)); err != nil {
			return damaged(f.Name, err)
		}
	}

	entries, err := os.ReadDir(dir)
	if err != nil {
		return damaged("", err)
	}
	for _, e := range entries {
		if !listed[e.Name()] && mustBeListed(e.Name()) {
			return damaged(e.Name(), errNotListed)
		}
	}
	return nil
}

func verifyFile(dirfd int, path string, want oci.File, content bool) error {
	f, err := openBeneath(dirfd, path)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	got := oci.File{Name: want.Name, Size: st.Size(), Digest: want.Digest}
	if content && got.Size == want.Size {
		h := sha256.New()
		if _, err := io.Copy(h, f); err != nil {
			return err
		}
		got.Digest = "sha256:" + hex.EncodeToString(h.Sum(nil))
	}
	return compareFile(want, got)
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
