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
func (c *Checkpoint) Verify() error {
	return verifyDir(c.CRIUDir(), c.Layer, c.Manifest, false)
}

// VerifyAll is Verify that also reads the memory.
func (c *Checkpoint) VerifyAll() error {
	return verifyDir(c.CRIUDir(), c.Layer, c.Manifest, true)
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
		if err := verifyFile(fd, filepath.Join(rel, f.Name), f, pages || !isPages(f.Name)); err != nil {
			return damaged(f.Name, err)
		}
	}

	// A file that is not listed would be read unchecked; "parent" is the link
	// that CRIU follows to an earlier dump, anywhere on the host.
	entries, err := os.ReadDir(dir)
	if err != nil {
		return damaged("", err)
	}
	for _, e := range entries {
		if !listed[e.Name()] && (isImage(e.Name()) || e.Name() == "parent") {
			return damaged(e.Name(), errors.New("is not listed in the manifest"))
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
	if st.Size() != want.Size {
		return fmt.Errorf("has %d bytes, the manifest says %d", st.Size(), want.Size)
	}
	if !content {
		return nil
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	if got := "sha256:" + hex.EncodeToString(h.Sum(nil)); got != want.Digest {
		return fmt.Errorf("has digest %s, the manifest says %s", got, want.Digest)
	}
	return nil
}

// isPages tells the files with the workload's memory.
func isPages(name string) bool {
	return strings.HasPrefix(name, "pages-") && strings.HasSuffix(name, ".img")
}

// isImage tells the files that a restore reads.
func isImage(name string) bool {
	return strings.HasSuffix(name, ".img") || name == oci.DescriptorsName
}
