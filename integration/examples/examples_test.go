package examples

import (
	"maps"
	"os"
	"path/filepath"
	"testing"
)

func TestIn(t *testing.T) {
	const text = "Text\n```sh file=a.sh\necho a\n\n# ```\n```\n```sh\nnot this\n```\n```go file=b.go\nb\n```\n"
	for name, c := range map[string]struct {
		text string
		want map[string]string
		err  bool
	}{
		"some":  {text: text, want: map[string]string{"a.sh": "echo a\n\n# ```\n", "b.go": "b\n"}},
		"none":  {text: "Text\n```sh\nx\n```\n", want: map[string]string{}},
		"twice": {text: text + text, err: true},
	} {
		path := filepath.Join(t.TempDir(), "x.md")
		if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := In(path)
		if (err != nil) != c.err || !maps.Equal(got, c.want) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if _, err := In("no such file"); err == nil {
		t.Error("a file that is not there is no error")
	}
}
