package convert

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	metadata "github.com/checkpoint-restore/checkpointctl/lib"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/oci"
)

// ErrSource is wrapped by errors about what a source holds.
var ErrSource = errors.New("not a checkpoint that can be converted")

// maxJSON bounds how long a file is that is read into memory.
const maxJSON = 16 << 20

// wanted are the files of an archive besides the dump.
var wanted = []string{
	metadata.ConfigDumpFile, metadata.SpecDumpFile, metadata.StatusFile, metadata.NetworkStatusFile,
	metadata.RootFsDiffTar, metadata.DeletedFilesFile, metadata.DevShmCheckpointTar,
}

// archive unpacks what is known of a checkpoint archive into a directory: the files
// of wanted, and the dump as checkpoint/NAME. Of anything else volumes alone are named.
//
// The archive is hostile. Nothing but regular files is made, each once, below one
// open directory, under names that are known or plain base names; there is never a
// link to follow. The sizes count as they are unpacked, not as the archive claims.
type archive struct {
	root    *os.Root
	allowed *allowance
	seen    map[string]bool
	dumped  time.Time // when CRIU was done
	volumes []string  // what else it has, that the report tells of
}

// maxVolumes bounds how many volumes the report tells of.
const maxVolumes = 100

func newArchive(dir string, maxSize int64) (*archive, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	return &archive{root: root, allowed: newAllowance(maxSize), seen: make(map[string]bool)}, nil
}

func (a *archive) close() { a.root.Close() }

// read unpacks a tar, compressed or not. place says where an entry goes, if anywhere: see
// archivePlace and dumpPlace.
func (a *archive) read(ctx context.Context, r io.Reader, place func(name string) (to string)) error {
	return readTar(ctx, r, a.allowed, func(h *tar.Header, content io.Reader) error {
		name, err := cleanName(h.Name)
		if err != nil {
			return err
		}
		to := place(name)
		if volume, ok := strings.CutPrefix(name, metadata.CheckpointVolumesDirectory+"/"); ok && oci.ValidFileName(volume) && len(a.volumes) < maxVolumes {
			a.volumes = append(a.volumes, volume)
		}
		if to == "checkpoint/parent" || strings.HasPrefix(name, "pre-checkpoint/") {
			return fmt.Errorf("%w: it is a part of a checkpoint in several (--pre-checkpoint, --with-previous); make a whole one", ErrSource)
		}
		if to == "" || h.Typeflag == tar.TypeDir {
			return nil
		}
		if h.Typeflag != tar.TypeReg && h.Typeflag != tar.TypeGNUSparse {
			return fmt.Errorf("%w: %q is not a regular file", ErrSource, h.Name)
		}
		if err := a.write(to, content); err != nil {
			return fmt.Errorf("unpack %q: %w", h.Name, err)
		}
		if to == metadata.CheckpointDirectory+"/"+inventoryName {
			a.dumped = h.ModTime
		}
		return nil
	})
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
func archivePlace(name string) (to string) {
	if base, ok := strings.CutPrefix(name, metadata.CheckpointDirectory+"/"); ok {
		return dumpPlace(base)
	}
	if slices.Contains(wanted, name) {
		return name
	}
	return ""
}

// dumpPlace is where an entry of a tar of a dump goes: logs and statistics nowhere.
func dumpPlace(name string) (to string) {
	if name == "parent" || oci.ValidFileName(name) && (strings.HasSuffix(name, ".img") || name == oci.DescriptorsName) {
		return metadata.CheckpointDirectory + "/" + name
	}
	return ""
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
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
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
	data, err := readAll(f, name, maxJSON)
	return data, true, err
}

// openRegular opens a file that somebody else may have made, and nothing else of its name: to
// open a pipe would wait for who writes into it.
func openRegular(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%w: %s is not a regular file", ErrSource, path)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// readAll reads what is called name, if it is no larger than allowed.
func readAll(r io.Reader, name string, most int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, most+1))
	if err == nil && int64(len(data)) > most {
		err = fmt.Errorf("%w: %s has more than %d bytes", ErrSource, name, most)
	}
	return data, err
}
