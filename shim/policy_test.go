package shim

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/oci"
)

// Nobody can have signed a directory.
func TestDirectoryUnderAPolicy(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "policy.json")
	t.Setenv(oci.PolicyEnv, path)
	for policy, want := range map[string]string{
		"": "", `{"version":"1","signature":"optional"}`: "",
		`{"version":"1","signature":"require"}`: "wants a signature", `{"version":"1"}`: "known are require, optional",
	} {
		if policy != "" {
			if err := os.WriteFile(path, []byte(policy), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		err := allowedPath()
		var why *coldReason
		if (want == "") != (err == nil) || err != nil && (!errors.As(err, &why) || why.code != images.CodePolicy || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", policy, err, want)
		}
		_ = os.Remove(path)
	}
}

func TestWhereVerdictsAre(t *testing.T) {
	for bundle, want := range map[string]images.Verdicts{
		"/run/containerd/io.containerd.runtime.v2.task/default/web": "/run/containerd/crac-verdicts",
		"/somewhere/else/web": "",
	} {
		if got := verdictsOf(bundle); got != want {
			t.Errorf("for %s: %q, want %q", bundle, got, want)
		}
	}
}
