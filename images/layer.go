package images

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/oci"
)

// DumpFiles lists the files of a dump directory that a restore needs, sorted,
// with their sizes and without digests. Logs and statistics are left out.
//
// The directory may have been made by a workload's runtime moments ago, but it
// is read as carefully as a pulled one: only regular files are taken.
func DumpFiles(dir string) ([]oci.File, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read the dump: %w", err)
	}
	var files []oci.File
	for _, e := range entries {
		if e.Name() == parentLink {
			return nil, fmt.Errorf("%w: %s continues an earlier dump (it has a link named parent); its memory is not all there", ErrNotDump, dir)
		}
		if !isImage(e.Name()) && e.Name() != oci.WorkingSetName {
			continue
		}
		info, err := e.Info()
		if err != nil {
			return nil, fmt.Errorf("read the dump: %w", err)
		}
		if !info.Mode().IsRegular() || !oci.ValidFileName(e.Name()) {
			return nil, fmt.Errorf("%w: %s is not a regular file with a plain name", ErrNotDump, filepath.Join(dir, e.Name()))
		}
		files = append(files, oci.File{Name: e.Name(), Size: info.Size()})
	}
	// CRIU writes its inventory last.
	if !slices.ContainsFunc(files, func(f oci.File) bool { return f.Name == "inventory.img" }) {
		return nil, fmt.Errorf("%w: %s has no inventory.img; the dump failed or is still being written", ErrNotDump, dir)
	}
	return files, nil
}

// WriteLayer writes the checkpoint layer, an uncompressed tar, in one pass and
// constant memory, but for some 100 bytes for each run of pages that is left out. m.Files are replaced by what DumpFiles finds, with the
// digests of what was written, m.Requires and m.Container.LSM by Needs. The same
// input gives the same bytes: fixed times and owners, entries sorted by name,
// which also puts the manifest after the files it describes.
//
// Of the memory it leaves out pages that hold nothing but zeroes and that a
// restore makes anew, and with parent, which goes with m.Parent, those that the
// parent has; the page maps say so in CRIU's own way. To know how many they are it
// reads the memory twice.
//
// spec is the runtime spec of the dumped container. reused is how many bytes of the memory
// the parent has.
func WriteLayer(w io.Writer, dumpDir string, spec []byte, m *oci.Manifest, parent ParentMemory) (reused int64, err error) {
	files, err := DumpFiles(dumpDir)
	if err != nil {
		return 0, err
	}
	memory, err := planMemory(dumpDir, files, uint64(m.Host.PageSize), parent)
	if err != nil {
		return 0, err
	}
	return memory.reused, writeLayer(w, dumpDir, files, memory, spec, m)
}

func writeLayer(w io.Writer, dumpDir string, files []oci.File, memory *memory, spec []byte, m *oci.Manifest) (err error) {
	l := &layerWriter{tw: tar.NewWriter(w), buf: make([]byte, 1<<20)}
	for _, dir := range []string{oci.Root, oci.Dir, oci.Dir + "/" + oci.CRIUDirName} {
		if err := l.header(tar.TypeDir, dir+"/", 0o700, 0); err != nil {
			return err
		}
	}
	for i := range files {
		if err := l.dumpFile(dumpDir, &files[i], memory); err != nil {
			return fmt.Errorf("pack %s of the dump: %w", files[i].Name, err)
		}
	}
	m.Files = files
	if m.Requires, m.Container.LSM, err = Needs(dumpDir); err != nil {
		return err
	}
	if m.Parent != nil {
		m.Requires = append(m.Requires, oci.RequireParent)
	}
	data, err := m.Encode()
	if err != nil {
		return err
	}
	if err := l.write(oci.Dir+"/"+oci.ManifestName, int64(len(data)), bytes.NewReader(data)); err != nil {
		return err
	}
	if err := l.write(oci.Dir+"/"+oci.SpecName, int64(len(spec)), bytes.NewReader(spec)); err != nil {
		return err
	}
	return l.tw.Close()
}

type layerWriter struct {
	tw  *tar.Writer
	buf []byte
}

func (l *layerWriter) header(typ byte, name string, mode, size int64) error {
	return l.tw.WriteHeader(&tar.Header{Typeflag: typ, Name: name, Mode: mode, Size: size, ModTime: time.Unix(0, 0)})
}

func (l *layerWriter) write(name string, size int64, r io.Reader) error {
	if err := l.header(tar.TypeReg, name, 0o600, size); err != nil {
		return err
	}
	n, err := io.CopyBuffer(onlyWriter{l.tw}, r, l.buf)
	if err != nil {
		return err
	}
	if n != size {
		return fmt.Errorf("has %d bytes instead of %d: it changed while it was packed", n, size)
	}
	return nil
}

// dumpFile writes one file of the dump, as it is to be stored, and notes what was
// written.
func (l *layerWriter) dumpFile(dir string, file *oci.File, memory *memory) error {
	h := sha256.New()
	name := oci.Dir + "/" + oci.CRIUDirName + "/" + file.Name
	if changed, ok := memory.maps[file.Name]; ok {
		file.Size = int64(len(changed))
		if err := l.write(name, file.Size, io.TeeReader(bytes.NewReader(changed), h)); err != nil {
			return err
		}
		file.Digest = "sha256:" + hex.EncodeToString(h.Sum(nil))
		return nil
	}
	f, err := os.OpenFile(filepath.Join(dir, file.Name), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return errors.New("is not a regular file")
	}
	var content io.Reader = f
	if part, ok := memory.pages[file.Name]; ok {
		file.Size, content = part.size, part.reader(f)
	}
	// A reader with nothing but Read: io.Copy must not find a way around buf.
	if err := l.write(name, file.Size, io.TeeReader(content, h)); err != nil {
		return err
	}
	file.Digest = "sha256:" + hex.EncodeToString(h.Sum(nil))
	return nil
}

// onlyWriter hides tar.Writer's ReadFrom, which would not use the buffer given.
type onlyWriter struct{ io.Writer }
