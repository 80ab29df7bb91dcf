package sdk

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
)

// goProgram is testdata's counterpart for Go, which has to be compiled within the SDK's own module.
var goProgram = sync.OnceValues(func() (string, error) {
	program := filepath.Join(scratch, "conformance")
	cmd := exec.Command("go", "build", "-o", program, "./internal/conformance")
	cmd.Dir = "go"
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return program, nil
})

func goCommand(tb testing.TB) []string {
	tb.Helper()
	need(tb, "go")
	program, err := goProgram()
	if err != nil {
		tb.Fatal(err)
	}
	return []string{program}
}

// TestGo vets and tests the Go SDK: it is a module of its own, which go test ./... leaves out.
func TestGo(t *testing.T) {
	t.Parallel()
	need(t, "go")
	for _, args := range [][]string{
		{"go", "vet", "./..."},
		{"go", "test", "-race", "-count=1", "./..."},
	} {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Dir = "go"
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%v: %v\n%s", args, err, out)
		}
	}
}
