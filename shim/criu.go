package shim

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/crac-shim/crac/images"
)

// criu finds the CRIU to use and returns its version. From then on it is the
// one that this process runs: libcontainer looks for it in PATH. A CRIU that is
// too old is returned as well, for the gate to say so.
func (s *service) criu() (version int, err error) {
	s.criuMu.Lock()
	defer s.criuMu.Unlock()
	if s.criuVersion != 0 {
		return s.criuVersion, nil
	}
	path, err := images.CRIUPath()
	if err != nil {
		return 0, err
	}
	if version, err = s.askCRIU(path); err != nil {
		return 0, err
	}
	if filepath.Base(path) != "criu" {
		return 0, fmt.Errorf("%s: a CRIU must be called \"criu\": rename it, or link to it", path)
	}
	if err := os.Setenv("PATH", filepath.Dir(path)+string(os.PathListSeparator)+os.Getenv("PATH")); err != nil {
		return 0, err
	}
	s.criuVersion = version
	return version, nil
}
