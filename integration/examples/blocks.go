package examples

import (
	"fmt"
	"os"
	"strings"
)

// Block is a fenced block of a Markdown file.
type Block struct {
	Section  string // the heading that it is under
	Language string // of its info string, the first word
	Line     int    // where it begins
	Text     string
}

// Blocks gives all fenced blocks of a Markdown file, in order.
func Blocks(path string) ([]Block, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var all []Block
	var section string
	inside := false
	n := 0
	for line := range strings.Lines(string(text)) {
		n++
		info, fence := strings.CutPrefix(line, "```")
		switch {
		case fence && inside:
			inside = false
		case fence:
			language, _, _ := strings.Cut(strings.TrimSpace(info), " ")
			all = append(all, Block{Section: section, Language: language, Line: n + 1})
			inside = true
		case inside:
			all[len(all)-1].Text += line
		case strings.HasPrefix(line, "#"):
			section = strings.TrimSpace(strings.TrimLeft(line, "#"))
		}
	}
	if inside {
		return nil, fmt.Errorf("%s: the block that begins at line %d has no end", path, all[len(all)-1].Line)
	}
	return all, nil
}
