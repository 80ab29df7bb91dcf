package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
)

// looker is a workload that looks once for a file, with its first instructions as the clone that
// is called so, and says what it sees.
const looker = `echo ready
while read -r name </proc/sys/kernel/hostname; [ "$name" != clone ]; do :; done
if [ -e /extra/marker ]; then echo at first: there; else echo at first: missing; fi
while :; do sleep 1; done`

// What a request mounts and the dump does not have is there before the clone's first instruction.
func TestCloneFindsItsMounts(tb *testing.T) {
	onlyCrac(tb)
	for name, flags := range map[string][]string{"host's users": nil, "user namespace": ownMaps} {
		tb.Run(name, func(tb *testing.T) {
			t := setup(tb)
			image := ref(t)
			b := start(t, how{args: []string{"sh", "-c", looker}, flags: append([]string{option("checkpoint.image", image)}, flags...)})
			t.Eventually("the workload runs", func() bool { return strings.Contains(b.log(), "ready") })
			b.checkpoint("--exit")
			b.remove()

			dir, err := t.Path("extra")
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(dir, 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "marker"), nil, 0o644); err != nil {
				t.Fatal(err)
			}
			clone := start(t, how{image: image, args: []string{"sh", "-c", looker}, flags: append([]string{
				option("restore", "require"), "--hostname", "clone", "--mount", "type=bind,src=" + dir + ",dst=/extra,options=rbind:ro",
			}, flags...)})
			t.Eventually("the clone looks", func() bool { return strings.Contains(clone.log(), "at first:") })
			if !strings.Contains(clone.log(), "at first: there") {
				t.Errorf("the clone ran before its mount was there:\n%s", clone.log())
			}
			clone.wantStatus(containerd.Running)
		})
	}
}
