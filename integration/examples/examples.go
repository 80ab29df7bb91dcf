// Package examples takes the programs out of the project's documents, so that tests
// can run what readers copy.
package examples

import (
	"fmt"
	"os"
	"regexp"
)

// A fenced block whose info string names a file.
var fence = regexp.MustCompile("(?ms)^```\\w+ file=(\\S+)\n(.*?)^```$")

// In gives the programs of a Markdown file by their names. A block that is to be run is
// fenced as ```LANGUAGE file=NAME.
func In(path string) (map[string]string, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	found := make(map[string]string)
	for _, m := range fence.FindAllSubmatch(text, -1) {
		name := string(m[1])
		if _, twice := found[name]; twice {
			return nil, fmt.Errorf("%s has two programs %s", path, name)
		}
		found[name] = string(m[2])
	}
	return found, nil
}
