package examples

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
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

func TestBlocks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x.md")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("# One\n```sh\n# not a heading\na\n```\n## Two\ntext\n```go file=b.go\nb\n```\n```\n```\n")
	want := []Block{{"One", "sh", 3, "# not a heading\na\n"}, {"Two", "go", 9, "b\n"}, {"Two", "", 12, ""}}
	if got, err := Blocks(path); err != nil || !slices.Equal(got, want) {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
	write("```sh\nno end\n")
	if got, err := Blocks(path); err == nil {
		t.Errorf("a block without an end: %+v", got)
	}
}
