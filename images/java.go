package images

import "path/filepath"

// JavaLibraryPaths are where a shim whose binary is exe looks for the Java library: where
// make install puts it, and make build.
func JavaLibraryPaths(exe string) []string {
	const name = "crac.jar"
	dir := filepath.Dir(exe)
	return []string{filepath.Join(dir, "..", "share", "crac", name), filepath.Join(dir, name)}
}
