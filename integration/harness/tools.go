package harness

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Tools says where the programs are that the project builds or takes.
type Tools struct {
	Build  string // the build directory: $CRAC_BUILD or build/ of the repository
	Bin    string // our own binaries
	Tools  string // containerd, ctr, runc, nerdctl, registry
	CNI    string // CNI plugins
	Images string // image archives
	CRIU   string // the criu that containers on this host are dumped with; empty when there is none
}

// Tool is a program that a run may need, and the make target that makes it.
type Tool struct{ Name, Target string }

// The tools that FindTools knows.
var (
	Containerd = Tool{"containerd", "tools"}
	Ctr        = Tool{"ctr", "tools"}
	RuncShim   = Tool{"containerd-shim-runc-v2", "tools"}
	Runc       = Tool{"runc", "tools"}
	Nerdctl    = Tool{"nerdctl", "tools"}
	CtdDecoder = Tool{"ctd-decoder", "tools"}
	Registry   = Tool{"registry", "tools"}
	// DebianRegistry is Debian's own, of an older line.
	DebianRegistry = Tool{"docker-registry", "tools"}
	CNI            = Tool{"cni/bin/bridge", "tools"}
	CRIU           = Tool{"criu", "tools"}
	// Podman is a prefix of its own: programs below podman/bin, with their libraries.
	Podman  = Tool{"podman", "tools"}
	Shim    = Tool{"containerd-shim-crac-v2", "build"}
	Cracctl = Tool{"cracctl", "build"}
)

// FindTools locates the build directory and checks that every named tool is there.
func FindTools(need ...Tool) (*Tools, error) {
	build, err := buildDir()
	if err != nil {
		return nil, err
	}
	t := &Tools{
		Build:  build,
		Bin:    filepath.Join(build, "bin"),
		Tools:  filepath.Join(build, "tools", "bin"),
		CNI:    filepath.Join(build, "tools", "cni", "bin"),
		Images: filepath.Join(build, "images"),
	}
	// The host's own criu serves when the project brought none: that is how the guest of
	// `make test-vm` works.
	if own := filepath.Join(build, "tools", "criu", "bin", "criu"); executable(own) {
		t.CRIU = own
	} else if host, err := exec.LookPath("criu"); err == nil {
		t.CRIU = host
	}
	var missing []error
	for _, tool := range need {
		if _, err := t.path(tool); err != nil {
			missing = append(missing, err)
		}
	}
	return t, errors.Join(missing...)
}

// Path finds a program, or says how to get it.
func (t *Tools) Path(tool Tool) (string, error) { return t.path(tool) }

func (t *Tools) path(tool Tool) (string, error) {
	var p string
	switch {
	case tool == CRIU:
		p = t.CRIU
	case tool == CNI:
		p = filepath.Join(t.CNI, "bridge")
	case tool == Podman:
		p = filepath.Join(t.Build, "tools", "podman", "bin", "podman")
	case tool.Target == "build":
		p = filepath.Join(t.Bin, tool.Name)
	default:
		p = filepath.Join(t.Tools, tool.Name)
	}
	if !executable(p) {
		return "", fmt.Errorf("%s is not in %s: run `make %s`", tool.Name, t.Build, tool.Target)
	}
	return p, nil
}

// Image returns the archive of an image that integration/apps builds.
func (t *Tools) Image(name string) (string, error) {
	p := filepath.Join(t.Images, name+".tar")
	if _, err := os.Stat(p); err != nil {
		return "", fmt.Errorf("image %s is not in %s: run `make images`", name, t.Images)
	}
	return p, nil
}

// searchPath is PATH for everything that the harness starts: the project's own parts first, so
// that containerd finds our shim, its own shim, runc and criu before any that the host may have.
func (t *Tools) searchPath() string {
	dirs := []string{t.Bin, t.Tools}
	if t.CRIU != "" {
		dirs = append(dirs, filepath.Dir(t.CRIU))
	}
	host := os.Getenv("PATH")
	if host == "" {
		host = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	}
	return strings.Join(append(dirs, host), ":")
}

func buildDir() (string, error) {
	if b := os.Getenv("CRAC_BUILD"); b != "" {
		return filepath.Abs(b)
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for d := dir; ; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "go.mod")); err == nil {
			return filepath.Join(d, "build"), nil
		}
		if d == "/" {
			return "", fmt.Errorf("no go.mod above %s: run this inside the repository or set CRAC_BUILD to its build directory", dir)
		}
	}
}

func executable(p string) bool {
	fi, err := os.Stat(p)
	return p != "" && err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0
}
