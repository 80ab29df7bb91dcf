package convert

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	metadata "github.com/checkpoint-restore/checkpointctl/lib"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/crac-shim/crac/oci"
)

// ErrSource is wrapped by errors about what a source holds.
var ErrSource = errors.New("not a checkpoint that can be imported")

const (
	// DefaultMaxSize bounds what a source may be when it is unpacked.
	DefaultMaxSize = 256 << 30
	// maxEntries bounds how many files an archive names, maxJSON how long one is that
	// is read into memory.
	maxEntries = 1 << 20
	maxJSON    = 16 << 20
)

// wanted are the files of an archive besides the dump.
var wanted = []string{
	metadata.ConfigDumpFile, metadata.SpecDumpFile, metadata.StatusFile, metadata.NetworkStatusFile,
	metadata.RootFsDiffTar, metadata.DeletedFilesFile, metadata.DevShmCheckpointTar,
}

// archive unpacks what is known of a checkpoint archive into a directory: the files
// of wanted, and the dump as checkpoint/NAME. Anything else is only named.
//
// The archive is hostile. Nothing but regular files is made, each once, below one
// open directory, under names that are known or plain base names; there is never a
// link to follow. The sizes count as they are unpacked, not as the archive claims.
type archive struct {
	root    *os.Root
	max     int64 // bytes that it may hold
	left    int64 // of them
	seen    map[string]bool
	entries int
	others  []string // what was not unpacked
}

func newArchive(dir string, maxSize int64) (*archive, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	if maxSize <= 0 {
		maxSize = DefaultMaxSize
	}
	return &archive{root: root, max: maxSize, left: maxSize, seen: make(map[string]bool)}, nil
}

func (a *archive) close() { a.root.Close() }

// decompress reads gzip, zstd or plain, whatever it is.
func decompress(r io.Reader) (io.ReadCloser, error) {
	b := bufio.NewReaderSize(r, 64<<10)
	magic, err := b.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		return gzip.NewReader(b)
	case bytes.HasPrefix(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		// More than the format's usual window would let a small file take gigabytes.
		z, err := zstd.NewReader(b, zstd.WithDecoderMaxWindow(128<<20))
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	case bytes.HasPrefix(magic, []byte("BZh")), bytes.HasPrefix(magic, []byte("\xfd7zX")):
		return nil, fmt.Errorf("%w: compressed with bzip2 or xz; unpack it and compress it with zstd or gzip", ErrSource)
	}
	return io.NopCloser(b), nil
}

// read unpacks a tar, compressed or not. place says where an entry goes: see
// archivePlace and dumpPlace.
func (a *archive) read(ctx context.Context, r io.Reader, place func(name string) (to string, skip bool)) error {
	plain, err := decompress(r)
	if err != nil {
		return err
	}
	defer plain.Close()
	tr := tar.NewReader(plain)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%w: no whole tar: %w", ErrSource, err)
		}
		if a.entries++; a.entries > maxEntries {
			return fmt.Errorf("%w: it has more than %d entries", ErrSource, maxEntries)
		}
		name, err := cleanName(h.Name)
		if err != nil {
			return err
		}
		to, skip := place(name)
		if skip {
			a.others = append(a.others, name)
			continue
		}
		if to == "" || h.Typeflag == tar.TypeDir {
			continue
		}
		if to == "checkpoint/parent" || strings.HasPrefix(name, "pre-checkpoint/") {
			return fmt.Errorf("%w: it continues an earlier checkpoint (--with-previous), which is not in it; make a whole one", ErrSource)
		}
		if h.Typeflag != tar.TypeReg {
			return fmt.Errorf("%w: %s is not a regular file", ErrSource, h.Name)
		}
		if err := a.write(to, ctxReader{ctx, tr}); err != nil {
			return fmt.Errorf("unpack %s: %w", h.Name, err)
		}
	}
}

// cleanName makes a path below the archive's root of an entry's name.
func cleanName(name string) (string, error) {
	clean := path.Clean(name)
	if name == "" || path.IsAbs(clean) || clean == ".." || strings.HasPrefix(clean, "../") || strings.ContainsRune(clean, 0) {
		return "", fmt.Errorf("%w: the entry %q leads out of it", ErrSource, name)
	}
	return clean, nil
}

// archivePlace is where an entry of an engine's archive goes: nowhere, under its
// name, or to the dump.
func archivePlace(name string) (to string, skip bool) {
	if base, ok := strings.CutPrefix(name, metadata.CheckpointDirectory+"/"); ok {
		return dumpPlace(base)
	}
	for _, w := range wanted {
		if name == w {
			return name, false
		}
	}
	if name == "." || name == metadata.CheckpointDirectory {
		return "", false
	}
	return "", true
}

// dumpPlace is where an entry of a tar of a dump goes.
func dumpPlace(name string) (to string, skip bool) {
	switch {
	case name == ".":
		return "", false
	case name == "parent":
		return metadata.CheckpointDirectory + "/" + name, false
	case !oci.ValidFileName(name), !strings.HasSuffix(name, ".img") && name != oci.DescriptorsName:
		return "", true // logs, statistics
	}
	return metadata.CheckpointDirectory + "/" + name, false
}

func (a *archive) write(name string, r io.Reader) error {
	if a.seen[name] {
		return fmt.Errorf("%w: it is there twice", ErrSource)
	}
	if a.seen[name] = true; len(a.seen) > oci.MaxFiles {
		return fmt.Errorf("%w: the dump has more than %d files", ErrSource, oci.MaxFiles)
	}
	f, err := a.root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	n, err := io.Copy(f, io.LimitReader(r, a.left+1))
	if a.left -= n; err == nil && a.left < 0 {
		err = fmt.Errorf("%w: unpacked it is larger than allowed; say --max-size if that is right", ErrSource)
	}
	return errors.Join(err, f.Close())
}

// ctxReader makes a long copy stop when its context ends.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (r ctxReader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}

// json reads a file that was unpacked; false if there is none.
func (a *archive) json(name string) ([]byte, bool, error) {
	f, err := a.root.Open(name)
	if errors.Is(err, os.ErrNotExist) {
		return nil, false, nil
	}
	if err != nil {
		return nil, false, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxJSON+1))
	if err == nil && len(data) > maxJSON {
		err = fmt.Errorf("%w: %s has more than %d bytes", ErrSource, name, maxJSON)
	}
	return data, true, err
}
