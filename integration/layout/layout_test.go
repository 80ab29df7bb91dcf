// Package layout enforces the import rule of docs/architecture.md: which of our
// packages may import which, and what the light ones must not link.
package layout

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/crac-shim/crac/"

// may lists, for each of our packages, those of ours that it may import. A
// trailing /... stands for everything below. A package that is not listed is an
// error: whoever adds one decides here what it is.
var may = map[string][]string{
	"cmd/containerd-shim-crac-v2": {"runtime", "runtime/pager", "shim"},
	"cmd/cracctl":                 {"cmd/cracctl/...", "images", "images/build", "images/convert", "images/crypt", "images/inspect", "images/registry", "images/trust", "oci", "runtime", "runtime/pager", "runtime/trace"},
	"cmd/cracctl/check":           {"cmd/cracctl/doctor", "cmd/cracctl/plain", "oci", "runtime/fdpolicy", "runtime/hook", "runtime/inspect"},
	"cmd/cracctl/doctor":          {"images", "oci", "runtime"},
	"cmd/cracctl/plain":           {},
	"oci/criuimage":               {},
	"shim":                        {"runtime", "runtime/fdpolicy", "runtime/hook", "runtime/inspect", "runtime/load", "runtime/trace", "images", "oci"},
	"runtime":                     {"oci/criuimage", "oci", "runtime/hook", "runtime/inspect", "runtime/pager", "runtime/thread", "runtime/tmpfs", "runtime/trace"},
	"runtime/fdpolicy":            {"oci", "runtime/inspect", "runtime/thread"},
	"runtime/hook":                {"oci"},
	"runtime/inspect":             {"oci", "runtime/thread"},
	"runtime/load":                {},
	"runtime/pager":               {"oci/criuimage", "runtime/load"},
	"runtime/thread":              {},
	"runtime/tmpfs":               {},
	"runtime/trace":               {},
	"images":                      {"oci/criuimage", "oci"},
	"images/blob":                 {},
	"images/build":                {"images", "images/blob", "images/compress", "images/crypt", "images/inspect", "images/registry", "images/workdir", "oci"},
	"images/compress":             {"oci"},
	"images/convert":              {"oci/criuimage", "images", "images/blob", "images/build", "images/compress", "images/crypt", "images/inspect", "images/workdir", "oci"},
	"images/crypt":                {"oci"},
	"images/inspect":              {"oci/criuimage", "images", "images/blob", "images/compress", "images/crypt", "oci"},
	"images/registry":             {"oci"},
	"images/trust":                {"images", "images/blob", "images/build", "images/inspect", "oci"},
	"images/workdir":              {},
	"oci":                         {},
	"sdk/...":                     {},
	"integration/...":             {"..."},
	"sdk/java":                    {},
}

// never lists packages that ours must not link, however indirectly.
var never = []struct {
	from []string // ours
	to   []string // prefixes of import paths
	why  string
}{
	{
		[]string{"oci/criuimage", "oci", "images"},
		[]string{
			"github.com/containerd/", "github.com/opencontainers/runc", "github.com/opencontainers/image-spec", "net/http",
			// Reading a message by hand (encoding/protowire) registers nothing; all else of protobuf does.
			"google.golang.org/grpc", "google.golang.org/genproto", "google.golang.org/protobuf/proto",
			"google.golang.org/protobuf/reflect", "google.golang.org/protobuf/runtime", "google.golang.org/protobuf/types",
		},
		"the shim runs their code as every container's init, so they stay free of containerd, gRPC and start-up work",
	},
	{
		[]string{"cmd/containerd-shim-crac-v2", "shim", "runtime"},
		[]string{"github.com/containerd/containerd/v2/client", "github.com/containerd/containerd/v2/core/content", module + "images/blob", module + "images/build", module + "images/compress", module + "images/convert", module + "images/crypt", module + "images/inspect", module + "images/registry", module + "images/trust", module + "images/workdir", "github.com/klauspost/", "github.com/containers/ocicrypt", "github.com/notaryproject/"},
		"a shim lives as long as its container; what packs images is a program of its own",
	},
	{
		[]string{"runtime/hook"},
		[]string{"github.com/containerd/", "github.com/opencontainers/runc", "google.golang.org/"},
		"it is usable and testable alone",
	},
	{
		[]string{"images/build", "images/convert", "cmd/cracctl", "cmd/cracctl/check", "runtime/fdpolicy", "runtime/inspect"},
		[]string{"github.com/opencontainers/runc"},
		"libcontainer has one door, which is runtime",
	},
}

// doors lists what may be imported directly in the named places only.
var doors = map[string][]string{
	"github.com/opencontainers/runc/libcontainer": {"runtime", "runtime/...", "cmd/containerd-shim-crac-v2"},
	"github.com/checkpoint-restore/go-criu":       {"runtime", "runtime/...", "images/convert", "images/inspect"}, // its messages, to read a dump that nobody restores
}

type pkg struct {
	ImportPath string
	Imports    []string
	Deps       []string
	Error      *struct{ Err string }
}

// packages lists our packages and, of all they link, who imports whom. Tests
// are not looked at: they may use what they need.
func packages(t *testing.T) (ours []pkg, graph map[string][]string) {
	t.Helper()
	dependOnSource(t)
	// The tags that the project is built with; -e, so that a package that does
	// not compile at the moment is reported as what it is.
	cmd := exec.Command("go", "list", "-e", "-deps", "-json=ImportPath,Imports,Deps,Error", "-tags", "seccomp", module+"...")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	graph = make(map[string][]string)
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		graph[p.ImportPath] = p.Imports
		if strings.HasPrefix(p.ImportPath, module) {
			if p.Error != nil {
				t.Fatalf("%s: %s", p.ImportPath, p.Error.Err)
			}
			ours = append(ours, p)
		}
	}
	if len(ours) == 0 {
		t.Fatalf("go list found no package of %s", module)
	}
	return ours, graph
}

// dependOnSource looks at every source file, so that go test, which cannot see
// what go list reads, does not answer from its cache after one of them changed.
func dependOnSource(t *testing.T) {
	t.Helper()
	top := filepath.Join("..", "..")
	err := filepath.WalkDir(top, func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (name == filepath.Join(top, "build") || name == filepath.Join(top, ".git")):
			return filepath.SkipDir
		case filepath.Ext(name) == ".go" || d.Name() == "go.mod":
			_, err = os.Stat(name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// matches tells whether a package is meant by a pattern.
func matches(pattern, name string) bool {
	prefix, all := strings.CutSuffix(pattern, "...")
	if !all {
		return pattern == name
	}
	return strings.HasPrefix(name, prefix) || name == strings.TrimSuffix(prefix, "/")
}

func anyMatches(patterns []string, name string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matches(p, name) })
}

// allowed gives the rule for one of our packages.
func allowed(name string) (list []string, known bool) {
	if list, ok := may[name]; ok {
		return list, true
	}
	for pattern, list := range may {
		if matches(pattern, name) {
			return list, true
		}
	}
	return nil, false
}

func TestImports(t *testing.T) {
	ours, _ := packages(t)
	for _, err := range checkImports(ours) {
		t.Error(err)
	}
}

func checkImports(ours []pkg) (errs []error) {
	for _, p := range ours {
		name := strings.TrimPrefix(p.ImportPath, module)
		list, known := allowed(name)
		if !known {
			errs = append(errs, fmt.Errorf("package %s is not in the table of this test: add it there and to docs/architecture.md", name))
			continue
		}
		for _, i := range p.Imports {
			if imported, ok := strings.CutPrefix(i, module); ok && !anyMatches(list, imported) {
				errs = append(errs, fmt.Errorf("%s imports %s; it may import %v of ours", name, imported, list))
			}
			for door, places := range doors {
				if (i == door || strings.HasPrefix(i, door+"/")) && !anyMatches(places, name) {
					errs = append(errs, fmt.Errorf("%s imports %s; only %v may", name, i, places))
				}
			}
		}
	}
	return errs
}

func TestLinks(t *testing.T) {
	ours, graph := packages(t)
	for _, err := range checkLinks(ours, graph) {
		t.Error(err)
	}
}

// shimTags are the Makefile's for the shim.
const shimTags = "seccomp,netgo,osusergo,no_grpc"

// What the shim links is initialized three times on the way to a container's first
// instruction.
func TestShimIsLight(t *testing.T) {
	makefile, err := os.ReadFile(filepath.Join("..", "..", "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	tags, _, _ := strings.Cut(shimTags, ",no_grpc")
	if !strings.Contains(string(makefile), "GOTAGS := "+tags+"\n") || !strings.Contains(string(makefile), "SHIM_TAGS    := $(GOTAGS),no_grpc\n") {
		t.Errorf("the Makefile does not build the shim with the tags %s", shimTags)
	}
	out, err := exec.Command("go", "list", "-deps", "-tags", shimTags, module+"cmd/containerd-shim-crac-v2").Output()
	if err != nil {
		t.Fatal(err)
	}
	deps := strings.Fields(string(out))
	for _, heavy := range []string{"google.golang.org/grpc", "google.golang.org/grpc/internal/transport", "html/template", "text/template", "golang.org/x/net/trace"} {
		if slices.Contains(deps, heavy) {
			t.Errorf("the shim links %s", heavy)
		}
	}
	if !slices.Contains(deps, "github.com/containerd/ttrpc") {
		t.Error("go list does not list what the shim links")
	}
}

func checkLinks(ours []pkg, graph map[string][]string) (errs []error) {
	for _, rule := range never {
		for _, p := range ours {
			if !slices.Contains(rule.from, strings.TrimPrefix(p.ImportPath, module)) {
				continue
			}
			for _, dep := range p.Deps {
				for _, prefix := range rule.to {
					if dep == prefix || strings.HasPrefix(dep, strings.TrimSuffix(prefix, "/")+"/") {
						errs = append(errs, fmt.Errorf("%s links %s: %s\n\t%s", p.ImportPath, dep, rule.why,
							strings.Join(path(graph, p.ImportPath, dep), "\n\t→ ")))
					}
				}
			}
		}
	}
	return errs
}

// path is a shortest chain of imports from one package to another.
func path(graph map[string][]string, from, to string) []string {
	before := map[string]string{from: ""}
	for queue := []string{from}; len(queue) > 0; queue = queue[1:] {
		if queue[0] == to {
			var chain []string
			for p := to; p != ""; p = before[p] {
				chain = append(chain, p)
			}
			slices.Reverse(chain)
			return chain
		}
		for _, next := range graph[queue[0]] {
			if _, seen := before[next]; !seen {
				before[next] = queue[0]
				queue = append(queue, next)
			}
		}
	}
	return nil
}

// A rule that cannot fail is none.
func TestRulesBite(t *testing.T) {
	for name, p := range map[string]pkg{
		"upward":    {ImportPath: module + "oci", Imports: []string{module + "images"}},
		"sideways":  {ImportPath: module + "images", Imports: []string{module + "runtime"}},
		"unknown":   {ImportPath: module + "utils"},
		"back door": {ImportPath: module + "shim", Imports: []string{"github.com/opencontainers/runc/libcontainer/configs"}},
		"test code": {ImportPath: module + "shim", Imports: []string{module + "integration/harness"}},
	} {
		if errs := checkImports([]pkg{p}); len(errs) != 1 {
			t.Errorf("%s: %v", name, errs)
		}
	}
	if errs := checkImports([]pkg{
		{ImportPath: module + "integration/x/y", Imports: []string{module + "shim"}},
		{ImportPath: module + "cmd/cracctl", Imports: []string{module + "cmd/cracctl/doctor", "fmt"}},
	}); len(errs) != 0 {
		t.Errorf("good imports: %v", errs)
	}

	graph := map[string][]string{module + "oci": {"a", "b"}, "b": {"google.golang.org/grpc/codes"}}
	errs := checkLinks([]pkg{{ImportPath: module + "oci", Deps: []string{"a", "b", "google.golang.org/grpc/codes"}}}, graph)
	if len(errs) != 1 || !strings.Contains(errs[0].Error(), module+"oci\n\t→ b\n\t→ google.golang.org/grpc/codes") {
		t.Errorf("links: %v", errs)
	}
}
