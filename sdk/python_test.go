package sdk

import (
	"context"
	"os"
	"os/exec"
	"testing"
	"time"
)

func pythonEnv(tb testing.TB) []string {
	return []string{"PYTHONPATH=" + here(tb, "python"), "PYTHONDONTWRITEBYTECODE=1"}
}

// TestPython runs the tests that are written in Python.
func TestPython(t *testing.T) {
	t.Parallel()
	unitTest(t, pythonEnv(t), need(t, "python3"), "-W", "error::ResourceWarning", "-m", "unittest", "discover", "-s", "python/tests")
}

// unitTest runs the tests of another language, which have to succeed.
func unitTest(t *testing.T, env []string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %v\n%s", args, err, out)
	}
}
