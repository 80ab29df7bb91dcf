package build

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// sizeEnv makes this test program a builder of a dump with so many MiB of memory, which tells how
// much it needed for that itself.
const sizeEnv = "CRAC_TEST_DUMP_MIB"

// TestConstantMemory: what a build takes does not grow with the dump. With a parent it does, by 16
// bytes for each page of that.
func TestConstantMemory(t *testing.T) {
	if mib, err := strconv.Atoi(os.Getenv(sizeEnv)); err == nil {
		buildLarge(t, mib)
		return
	}
	const small, large = 16, 80
	peak := func(mib int) int {
		cmd := exec.Command(os.Args[0], "-test.run=^TestConstantMemory$", "-test.v")
		cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%d", sizeEnv, mib), "TMPDIR="+t.TempDir())
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		for line := range strings.Lines(string(out)) {
			var kib int
			if n, _ := fmt.Sscanf(line, "VmHWM: %d kB", &kib); n == 1 {
				return kib >> 10
			}
		}
		t.Fatalf("it does not say how much it needed:\n%s", out)
		return 0
	}
	before, after := peak(small), peak(large)
	t.Logf("%d MiB of memory take %d MiB to pack, %d MiB take %d", small, before, large, after)
	if after-before > (large-small)/4 {
		t.Errorf("%d MiB more to pack take %d MiB more", large-small, after-before)
	}
}

func buildLarge(t *testing.T, mib int) {
	w := newWorld(t)
	w.image("base:1", "overlayfs", "one")
	w.container("c", "base:1", "overlayfs")
	r := w.request("c", "large:1")
	r.Manifest.Host.PageSize = 4096
	f, err := os.Create(filepath.Join(r.DumpDir, "pages-1.img"))
	w.must(err)
	out := bufio.NewWriterSize(f, 1<<20)
	pages := uint64(mib) << 20 / 4096
	page := make([]byte, 4096)
	for i := range pages {
		// No two are equal, and few bytes of one are those of the next.
		for k := 0; k < len(page); k += 8 {
			binary.LittleEndian.PutUint64(page[k:], (i+1)*(uint64(k)*0x9e3779b97f4a7c15+1))
		}
		_, err := out.Write(page)
		w.must(err)
	}
	w.must(out.Flush())
	w.must(f.Close())
	// One run of pages at 0x10000, as CRIU 4.2 writes it.
	entry := []byte("\x08\x80\x80\x04\x10\x00\x20\x04\x28")
	entry = binary.AppendUvarint(entry, pages)
	maps := append([]byte("\x19\x43\x56\x54\x25\x40\x08\x56\x02\x00\x00\x00\x08\x01"), byte(len(entry)), 0, 0, 0)
	w.must(os.WriteFile(filepath.Join(r.DumpDir, "pagemap-1.img"), append(maps, entry...), 0o600))
	_, events, err := w.build(r)
	w.must(err)
	if done := events[len(events)-1]; done.MemorySize != int64(mib)<<20 {
		t.Fatalf("%+v", done)
	}
	status, err := os.ReadFile("/proc/self/status")
	w.must(err)
	for line := range strings.Lines(string(status)) {
		if strings.HasPrefix(line, "VmHWM:") {
			fmt.Print(strings.Join(strings.Fields(line), " "), "\n")
		}
	}
}
