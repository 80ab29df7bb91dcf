package integration

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/integration/harness"
	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/runtime/pager"
)

// workingSets are the files that the node of a test has learned.
func workingSets(t *harness.T) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(t.Dir, "root", oci.NodeDir, oci.WorkingSetDir, "*"))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

var broughtFirst = regexp.MustCompile(`brings \d+ MiB, (\d+) KiB of them as asked for before`)

// drained waits until all of a lazy clone's memory is there, and tells how much of it came in the
// order of a working set.
func (b *box) drained() (first string) {
	b.Helper()
	b.Eventually("all memory of "+b.id, func() bool {
		m := broughtFirst.FindStringSubmatch(b.CracctlOK("trace", b.id))
		if m != nil {
			first = m[1]
		}
		return m != nil
	})
	return first
}

// What a first clone asks for the next ones get first; from the node, and from an image that was
// tuned.
func TestWorkingSet(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image, tuned := ref(t), ref(t)
	original := held(t, "", 24, option("checkpoint.image", image))
	original.checkpoint("--exit")
	original.remove()
	if _, err := t.Cracctl(t.Ctx, "tune", image, tuned); err == nil || !strings.Contains(err.Error(), "not learned") {
		t.Errorf("tune before anything is known: %v", err)
	}

	before := workingSets(t)
	lazy := []string{option("restore", "require"), option("memory", "lazy")}
	clone := held(t, image, 24, lazy...)
	if first := clone.drained(); first != "0" {
		t.Errorf("the first clone knows of %s KiB", first)
	}
	clone.remove()
	// Other tests learn meanwhile.
	var file string
	for _, f := range workingSets(t) {
		if !strings.Contains(strings.Join(before, "\n"), f) && !strings.HasSuffix(f, ".learning") {
			file = f
		}
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if pages, err := pager.CheckWorkingSet(data); err != nil || pages == 0 {
		t.Errorf("%d pages were learned, %v", pages, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Dir(file), &st); err != nil || st.Uid != 0 || st.Mode&0o077 != 0 {
		t.Errorf("%s has the mode %o, %v", filepath.Dir(file), st.Mode, err)
	}

	clone = held(t, image, 24, lazy...)
	if first := clone.drained(); first == "0" {
		t.Error("the second clone begins with nothing of what the first one asked for")
	}
	if got := clone.askHolder("check"); got != "ok" {
		t.Error(got)
	}
	clone.remove()

	t.CracctlOK("tune", image, tuned)
	t.CracctlOK("verify", tuned)

	// What is damaged is said, ignored, and learned anew.
	if err := os.WriteFile(file, []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	clone = held(t, image, 24, lazy...)
	if first := clone.drained(); first != "0" {
		t.Errorf("of a damaged file %s KiB are known", first)
	}
	if got := clone.askHolder("check"); got != "ok" {
		t.Error(got)
	}
	t.Eventually("a warning in containerd's log", func() bool {
		for line := range strings.Lines(shared.Log()) {
			if strings.Contains(line, clone.id) && strings.Contains(line, "working set is ignored") {
				return true
			}
		}
		return false
	})
	clone.remove()
	t.Eventually("a new file", func() bool {
		data, err := os.ReadFile(file)
		if err != nil {
			return false
		}
		_, err = pager.CheckWorkingSet(data)
		return err == nil
	})

	// The tuned image brings its own.
	known := len(workingSets(t))
	clone = held(t, tuned, 24, lazy...)
	if first := clone.drained(); first == "0" {
		t.Error("the clone of the tuned image begins with nothing")
	}
	if got := clone.askHolder("check"); got != "ok" {
		t.Error(got)
	}
	if n := len(workingSets(t)); n != known {
		t.Errorf("%d files, before the tuned image %d", n, known)
	}
	clone.remove()
}

// What CRIU finds out about the kernel is found out once, also where CRIU does not keep it.
func TestKerndat(tb *testing.T) {
	onlyCrac(tb)
	t := setupDebug(tb)
	const path = "/run/criu.kdat"
	changesHost(t, path)
	var fs unix.Statfs_t
	if err := unix.Statfs("/run", &fs); err != nil {
		t.Fatal(err)
	}
	old := time.Unix(1, 0)
	if fs.Type != unix.TMPFS_MAGIC {
		// As if it had been made before this boot.
		if err := os.WriteFile(path, []byte("stale"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, old, old); err != nil {
			t.Fatal(err)
		}
	}
	image := ref(t)
	b := start(t, ticker(option("checkpoint.image", image)))
	b.waitTicks(3)
	b.checkpoint("--exit")
	last := b.lastTick()
	b.remove()
	clone := start(t, warm(image))
	clone.goesOnFrom(last)
	t.Eventually("what CRIU knows", func() bool {
		st, err := os.Stat(path)
		return err == nil && st.ModTime().After(old) && st.Size() > 100 && st.Mode() == 0o600
	})
	clone.remove()
	clone = start(t, warm(image))
	log, err := os.ReadFile(filepath.Join(t.Dir, "root/io.containerd.runtime.v2.task", t.Namespace, clone.id, "criu/restore.log"))
	if err != nil || !strings.Contains(string(log), "Loaded kdat cache from "+path) {
		t.Errorf("the second restore does not use it: %v\n%s", err, tailOf(string(log[:min(len(log), 2000)]), 2000))
	}
	clone.remove()
}
