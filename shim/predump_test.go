package shim

import (
	"errors"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/runtime"
)

// Where there can be no pre-dump nothing is said of it, unless it is required.
func TestNoPreDump(t *testing.T) {
	tracks := runtime.TracksMemory
	defer func() { runtime.TracksMemory = tracks }()
	for _, tt := range []struct {
		name   string
		tracks bool
		r      checkpointRequest
		says   string
	}{
		{"the kernel cannot", false, checkpointRequest{}, "CONFIG_MEM_SOFT_DIRTY"},
		{"a directory", true, checkpointRequest{dir: "/d"}, "directory"},
		{"the end", true, checkpointRequest{exit: true}, "ends the container"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			runtime.TracksMemory = func() bool { return tt.tracks }
			c := newTestContainer(t, "c")
			for mode, says := range map[oci.PreDumpMode]string{oci.PreDumpOff: "", oci.PreDumpAuto: "", oci.PreDumpRequire: tt.says} {
				r := tt.r
				r.preDump = mode
				dir, err := c.preDump(t.Context(), &r)
				switch {
				case dir != "":
					t.Errorf("%s: a pre-dump in %s", mode, dir)
				case says == "" && err != nil:
					t.Errorf("%s: %v", mode, err)
				case says != "" && (!errors.Is(err, errdefs.ErrFailedPrecondition) || !strings.Contains(err.Error(), says)):
					t.Errorf("%s: %v, want one that says %q", mode, err, says)
				}
			}
		})
	}
}
