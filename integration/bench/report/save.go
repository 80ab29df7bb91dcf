package report

import (
	"encoding/json"
	"os"
	"path/filepath"
)

// Save writes results so that a reader never sees half of them.
func Save(file string, results []Result) error {
	if results == nil {
		results = []Result{}
	}
	data, err := json.MarshalIndent(results, "", "  ")
	if err != nil {
		return err
	}
	return write(file, append(data, '\n'))
}

func write(file string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	tmp := file + ".tmp"
	if err := os.WriteFile(tmp, data, 0o644); err != nil { //nolint:gosec // a report to be read
		return err
	}
	return os.Rename(tmp, file)
}
