package images

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// FindCRIU finds the CRIU to use and asks it for its version (40101 is 4.1.1).
// Places, in this order:
//
//	$CRAC_CRIU                          the operator's choice; nothing else is tried
//	<our binary>/../lib/crac/criu/bin   where `make install` puts one
//	<our binary>/../tools/criu/bin      a development tree
//	$PATH
//
// The version is not judged here: see MinimumCRIU and Gate.
func FindCRIU() (path string, version int, err error) {
	path, err = CRIUPath()
	if err != nil {
		return "", 0, err
	}
	version, err = CRIUVersion(path)
	if err != nil {
		return path, 0, err
	}
	return path, version, nil
}

// CRIUEnv names the CRIU to use.
const CRIUEnv = "CRAC_CRIU"

// CRIUPath is the first half of FindCRIU.
func CRIUPath() (string, error) {
	if p := os.Getenv(CRIUEnv); p != "" {
		if _, err := exec.LookPath(p); err != nil {
			return "", fmt.Errorf("%w: %s names %s: %w; correct or unset it", ErrNoCRIU, CRIUEnv, p, err)
		}
		return p, nil
	}
	var tried []string
	if self, err := os.Executable(); err == nil {
		dir := filepath.Dir(self)
		for _, p := range []string{
			filepath.Join(dir, "..", "lib", "crac", "criu", "bin", "criu"),
			filepath.Join(dir, "..", "tools", "criu", "bin", "criu"),
		} {
			if _, err := exec.LookPath(p); err == nil {
				return p, nil
			}
			tried = append(tried, p)
		}
	}
	p, err := exec.LookPath("criu")
	if err != nil {
		return "", fmt.Errorf("%w: neither %s nor criu in PATH; install CRIU, or name its binary in CRAC_CRIU", ErrNoCRIU, strings.Join(tried, " nor "))
	}
	return p, nil
}

// CRIUVersion is the second: it executes the program.
func CRIUVersion(path string) (int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, path, "--version")
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return 0, fmt.Errorf("%w: %s --version: %w: %s", ErrNoCRIU, path, err, strings.TrimSpace(stderr.String()))
	}
	v, err := parseCRIUVersion(string(out))
	if err != nil {
		return 0, fmt.Errorf("%w: %s --version: %w", ErrNoCRIU, path, err)
	}
	return v, nil
}

// parseCRIUVersion reads "Version: 4.1.1" or "Version: 4.2-rc1".
func parseCRIUVersion(out string) (int, error) {
	for line := range strings.Lines(out) {
		s, ok := strings.CutPrefix(strings.TrimSpace(line), "Version:")
		if !ok {
			continue
		}
		s, _, _ = strings.Cut(strings.TrimSpace(s), "-")
		parts := strings.Split(s, ".")
		if len(parts) < 2 || len(parts) > 3 {
			break
		}
		version := 0
		for i, weight := range []int{10000, 100, 1} {
			if i == len(parts) {
				break
			}
			n, err := strconv.Atoi(parts[i])
			if err != nil || n < 0 || n > 99 {
				return 0, fmt.Errorf("cannot read the version in %q", line)
			}
			version += n * weight
		}
		return version, nil
	}
	return 0, errors.New("its output gives no version")
}
