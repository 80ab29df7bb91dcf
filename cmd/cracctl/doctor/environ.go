package doctor

import (
	"fmt"
	"os"
	"strings"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/oci"
)

// AsShim makes this process look for CRIU and for the node's policy where the shims do that
// containerd, which is process pid, starts: they have its environment. What is set here
// counts more. Without leave to look there nothing changes.
func AsShim(pid int) {
	for _, name := range []string{images.CRIUEnv, oci.PolicyEnv} {
		if v, ok := variable(pid, name); ok && os.Getenv(name) == "" {
			_ = os.Setenv(name, v)
		}
	}
	if path, ok := variable(pid, "PATH"); ok {
		_ = os.Setenv("PATH", os.Getenv("PATH")+string(os.PathListSeparator)+path)
	}
}

// variable gives one of the environment that a process was started with.
func variable(pid int, name string) (value string, ok bool) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if err != nil {
		return "", false
	}
	for v := range strings.SplitSeq(string(data), "\x00") {
		if value, ok := strings.CutPrefix(v, name+"="); ok {
			return value, true
		}
	}
	return "", false
}
