package sdk

import (
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// scratch is a directory for what several tests share. TestMain removes it.
var scratch string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		var err error
		if scratch, err = os.MkdirTemp("", "crac-sdk"); err != nil {
			panic(err)
		}
		defer os.RemoveAll(scratch)
		return m.Run()
	}())
}

// nodeModules is a node_modules with the SDK as npm would install it, and its native part built.
var nodeModules = sync.OnceValues(func() (string, error) {
	modules := filepath.Join(scratch, "node_modules")
	dir := filepath.Join(modules, "@crac-shim", "crac")
	if err := os.CopyFS(dir, os.DirFS("node")); err != nil {
		return "", err
	}
	// Another machine's, perhaps.
	old, err := filepath.Glob(filepath.Join(dir, "native", "*.node"))
	if err != nil {
		return "", err
	}
	for _, o := range old {
		if err := os.Remove(o); err != nil {
			return "", err
		}
	}
	if out, err := exec.Command("sh", filepath.Join(dir, "native", "build.sh")).CombinedOutput(); err != nil {
		return "", &exec.Error{Name: "native/build.sh: " + string(out), Err: err}
	}
	return modules, nil
})

func nodeEnv(tb testing.TB) []string {
	tb.Helper()
	need(tb, "cc")
	modules, err := nodeModules()
	if err != nil {
		tb.Fatal(err)
	}
	return []string{"NODE_PATH=" + modules}
}

// TestNode runs the tests that are written in JavaScript, with the native part and without.
func TestNode(t *testing.T) {
	node := need(t, "node")
	nodeEnv(t)
	built, err := nodeModules()
	if err != nil {
		t.Fatal(err)
	}
	for how, modules := range map[string]string{"openssl": built, "functions": bareNodeModules(t)} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			// The tests of the copy: by its name, a package finds itself first.
			unitTest(t, []string{"CRAC_TEST_RESEED=" + how}, node, "--test", filepath.Join(modules, "@crac-shim", "crac", "test")+"/")
		})
	}
}

// bareNodeModules has the SDK without its native part.
func bareNodeModules(tb testing.TB) string {
	tb.Helper()
	modules := tb.TempDir()
	if err := os.CopyFS(filepath.Join(modules, "@crac-shim", "crac"), os.DirFS("node")); err != nil {
		tb.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(modules, "@crac-shim", "crac", "native")); err != nil {
		tb.Fatal(err)
	}
	return modules
}
