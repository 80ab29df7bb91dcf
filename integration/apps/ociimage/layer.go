package main

import (
	"archive/tar"
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// A layerInfo is what the image needs to know of a layer beside its bytes.
type layerInfo struct {
	DiffID     digest.Digest      `json:"diffID"`
	Descriptor ocispec.Descriptor `json:"descriptor"`
}

// Directories whose content belongs to the running system, not to the image.
var emptyDirs = map[string]bool{"dev": true, "proc": true, "sys": true, "run": true, "tmp": true}

func writeLayer(base, root, out string, epoch time.Time) (err error) {
	tmp, err := os.CreateTemp(filepath.Dir(out), ".layer-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			tmp.Close()
			os.Remove(tmp.Name())
		}
	}()
	packed, plain := digest.SHA256.Digester(), digest.SHA256.Digester()
	z, err := zstd.NewWriter(io.MultiWriter(tmp, packed.Hash()))
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(io.MultiWriter(z, plain.Hash()), 1<<20)
	d := differ{base: base, root: root, epoch: epoch, tar: tar.NewWriter(w), links: map[inode]string{}}
	if err := d.walk("."); err != nil {
		return err
	}
	if err := errors.Join(d.tar.Close(), w.Flush(), z.Close()); err != nil {
		return err
	}
	size, err := tmp.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	info := layerInfo{
		DiffID: plain.Digest(),
		Descriptor: ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageLayerZstd,
			Digest:    packed.Digest(),
			Size:      size,
		},
	}
	meta, err := json.Marshal(info)
	if err != nil {
		return err
	}
	if err := errors.Join(tmp.Chmod(0o644), tmp.Close()); err != nil {
		return err
	}
	if err := os.WriteFile(out+".json", meta, 0o644); err != nil {
		return err
	}
	return os.Rename(tmp.Name(), out)
}

type inode struct{ dev, ino uint64 }

// A differ writes what root has over base as an OCI layer.
type differ struct {
	base, root string
	epoch      time.Time
	tar        *tar.Writer
	links      map[inode]string
}

// walk writes the directory name, relative to root, and all below it.
func (d *differ) walk(name string) error {
	now, err := list1(d.root, name)
	if err != nil {
		return err
	}
	var before []string
	if d.base != "" {
		if before, err = list1(d.base, name); err != nil {
			return err
		}
	}
	if emptyDirs[name] {
		now, before = nil, nil
	}
	have := map[string]bool{}
	for _, n := range now {
		have[n] = true
	}
	for _, n := range before {
		if !have[n] {
			gone := filepath.Join(name, ".wh."+n)
			if err := d.tar.WriteHeader(&tar.Header{Name: gone, Typeflag: tar.TypeReg, Mode: 0o644, ModTime: d.epoch}); err != nil {
				return err
			}
		}
	}
	for _, n := range now {
		path := filepath.Join(name, n)
		info, err := os.Lstat(filepath.Join(d.root, path))
		if err != nil {
			return err
		}
		if err := d.entry(path, info); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
		if info.IsDir() {
			if err := d.walk(path); err != nil {
				return err
			}
		}
	}
	return nil
}

// list1 returns the sorted names in a directory; none when there is no such one.
func list1(root, name string) ([]string, error) {
	path := filepath.Join(root, name)
	if info, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) || err == nil && !info.IsDir() {
		return nil, nil
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, err
	}
	names := make([]string, 0, len(entries))
	for _, e := range entries {
		names = append(names, e.Name())
	}
	sort.Strings(names)
	return names, nil
}

func (d *differ) entry(path string, info fs.FileInfo) error {
	if info.Mode()&fs.ModeSocket != 0 {
		return nil // has no meaning without the process that listened
	}
	h, err := d.header(d.root, path, info)
	if err != nil {
		return err
	}
	if d.base != "" {
		same, err := d.inBase(path, h)
		if err != nil || same {
			return err
		}
	}
	if h.Typeflag == tar.TypeReg {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(d.root, path), &st); err != nil {
			return err
		}
		id := inode{st.Dev, st.Ino}
		if first, ok := d.links[id]; ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
		} else if st.Nlink > 1 {
			d.links[id] = path
		}
	}
	if err := d.tar.WriteHeader(h); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeReg || h.Size == 0 {
		return nil
	}
	f, err := os.Open(filepath.Join(d.root, path))
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(d.tar, f)
	return err
}

// inBase reports whether base has the same entry; times do not count.
func (d *differ) inBase(path string, h *tar.Header) (bool, error) {
	full := filepath.Join(d.base, path)
	info, err := os.Lstat(full)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
			return false, nil
		}
		return false, err
	}
	b, err := d.header(d.base, path, info)
	if err != nil {
		return false, err
	}
	if b.Typeflag != h.Typeflag || b.Mode != h.Mode || b.Uid != h.Uid || b.Gid != h.Gid ||
		b.Linkname != h.Linkname || b.Size != h.Size || b.Devmajor != h.Devmajor || b.Devminor != h.Devminor ||
		len(b.PAXRecords) != len(h.PAXRecords) {
		return false, nil
	}
	for k, v := range h.PAXRecords {
		if b.PAXRecords[k] != v {
			return false, nil
		}
	}
	if h.Typeflag != tar.TypeReg {
		return true, nil
	}
	return sameBytes(full, filepath.Join(d.root, path))
}

func sameBytes(a, b string) (bool, error) {
	fa, err := os.Open(a)
	if err != nil {
		return false, err
	}
	defer fa.Close()
	fb, err := os.Open(b)
	if err != nil {
		return false, err
	}
	defer fb.Close()
	ba, bb := make([]byte, 1<<18), make([]byte, 1<<18)
	for {
		na, erra := io.ReadFull(fa, ba)
		nb, errb := io.ReadFull(fb, bb)
		if !bytes.Equal(ba[:na], bb[:nb]) {
			return false, nil
		}
		if erra != nil || errb != nil {
			enda := erra == io.EOF || erra == io.ErrUnexpectedEOF
			endb := errb == io.EOF || errb == io.ErrUnexpectedEOF
			if enda && endb {
				return true, nil
			}
			return false, errors.Join(erra, errb)
		}
	}
}

func (d *differ) header(root, path string, info fs.FileInfo) (*tar.Header, error) {
	full := filepath.Join(root, path)
	target := ""
	if info.Mode()&fs.ModeSymlink != 0 {
		var err error
		if target, err = os.Readlink(full); err != nil {
			return nil, err
		}
	}
	h, err := tar.FileInfoHeader(info, target)
	if err != nil {
		return nil, err
	}
	h.Name = path
	if info.IsDir() {
		h.Name += "/"
	}
	h.Uname, h.Gname = "", ""
	h.AccessTime, h.ChangeTime = time.Time{}, time.Time{}
	h.ModTime = h.ModTime.Truncate(time.Second)
	if h.ModTime.After(d.epoch) {
		h.ModTime = d.epoch
	}
	if info.Mode().IsRegular() {
		// The only extended attribute that packages set.
		val := make([]byte, 256)
		if n, err := unix.Lgetxattr(full, "security.capability", val); err == nil {
			h.PAXRecords = map[string]string{"SCHILY.xattr.security.capability": string(val[:n])}
		} else if !errors.Is(err, unix.ENODATA) && !errors.Is(err, unix.ENOTSUP) {
			return nil, err
		}
	}
	if strings.HasPrefix(filepath.Base(path), ".wh.") {
		return nil, errors.New("the name would be read as a deletion")
	}
	return h, nil
}
