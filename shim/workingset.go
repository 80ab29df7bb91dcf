package shim

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/log"

	"github.com/crac-shim/crac/oci"
)

// Which pages of a dump are asked for first is learned by its first restore on a
// node that is lazy: its pager waits with all else until the workload asks for
// little more, and writes the order down. Pagers of later restores begin with these
// pages, and add what was asked for nevertheless. The files are in the node's
// directory, oci.WorkingSetDir/HEX, by the digest of the dump's manifest.
const (
	// maxWorkingSets bounds how many files are kept; a node restores few dumps.
	maxWorkingSets = 128
	// learningTime is how long a restore may be learning before another one may.
	learningTime = 10 * time.Minute
	// learningName is added to the name of a file while a first restore is learning.
	learningName = ".learning"
)

// workingSet is what a pager is to use and to write; the zero value is neither.
type workingSet struct {
	use, record string
	lock        string
}

// done ends the learning.
func (w workingSet) done() {
	if w.lock != "" {
		os.Remove(w.lock)
	}
}

// ownWorkingSet is what this node knows of a dump, or is to learn.
func (s *service) ownWorkingSet(digest string) workingSet {
	hex, ok := strings.CutPrefix(digest, "sha256:")
	if !ok || s.node == "" {
		return workingSet{}
	}
	dir := filepath.Join(s.node, oci.WorkingSetDir)
	path := filepath.Join(dir, hex)
	if _, err := os.Lstat(path); err == nil {
		return workingSet{use: path, record: path}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		log.G(s.ctx).WithError(err).Warn("the order in which memory is asked for is not kept")
		return workingSet{}
	}
	w := workingSet{record: path, lock: path + learningName}
	if st, err := os.Lstat(w.lock); err == nil && time.Since(st.ModTime()) > learningTime {
		os.Remove(w.lock) // its shim was killed
	}
	f, err := os.OpenFile(w.lock, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return workingSet{} // another one learns; this one need not be as slow
	}
	f.Close()
	forget(dir)
	return w
}

// forget removes the oldest files when there are too many.
func forget(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) <= maxWorkingSets {
		return
	}
	age := make(map[string]time.Time, len(entries))
	for _, e := range entries {
		if info, err := e.Info(); err == nil {
			age[e.Name()] = info.ModTime()
		}
	}
	slices.SortFunc(entries, func(a, b os.DirEntry) int { return age[a.Name()].Compare(age[b.Name()]) })
	for _, e := range entries[:len(entries)-maxWorkingSets] {
		os.Remove(filepath.Join(dir, e.Name()))
	}
}
