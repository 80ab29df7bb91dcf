package shim

import (
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/log"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/runtime"
)

// nodeDir makes the directory for what all shims of a node share, and gives its path,
// or none: what one has found out, the next need not. All of it may be lost. work is a container's
// work directory, ROOT/io.containerd.runtime.v2.task/NAMESPACE/ID in containerd's
// root, which nobody but root may enter.
func nodeDir(work, bundle string) string {
	if work == bundle {
		return "" // containerd gave none
	}
	dir := filepath.Join(work, "../../..", oci.NodeDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		log.L.WithError(err).Warn("nothing is kept for the next start on this node")
		return ""
	}
	return dir
}

// criuRecord is the version of a CRIU that one shim has asked it for.
type criuRecord struct {
	Path     string    `json:"path"`
	Size     int64     `json:"size"`
	Modified time.Time `json:"modified"`
	Version  int       `json:"version"`
}

const criuFile = "criu.json"

// askCRIU asks a CRIU for its version, or who has asked it before: to execute
// it takes about ten milliseconds.
func (s *service) askCRIU(path string) (int, error) {
	st, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	want := criuRecord{Path: path, Size: st.Size(), Modified: st.ModTime()}
	file := filepath.Join(s.node, criuFile)
	if s.node != "" {
		var known criuRecord
		if err := readJSON(file, &known); err == nil && known.Version > 0 && known.Path == want.Path && known.Size == want.Size && known.Modified.Equal(want.Modified) {
			return known.Version, nil
		}
	}
	defer s.reaper.Hold()() // it runs a child
	if want.Version, err = images.CRIUVersion(path); err != nil {
		return 0, err
	}
	if s.node != "" {
		if err := writeJSON(file, want); err != nil {
			log.G(s.ctx).WithError(err).Warn("failed to note CRIU's version for the next start")
		}
	}
	return want.Version, nil
}

// keepKerndat spares the node's restores what CRIU does at each of them, in the
// background and once.
func (s *service) keepKerndat() {
	s.kerndat.Do(func() {
		path, err := images.CRIUPath()
		if err != nil {
			return // the restore says so
		}
		go func() {
			if err := runtime.KeepKerndat(path, s.reaper); err != nil {
				log.G(s.ctx).WithError(err).Warn("each restore takes some 30 ms longer than it need")
			}
		}()
	})
}
