package integration

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/crac-shim/crac/integration/harness"
)

// drawing is a program that draws random numbers of several kinds, 64 of each, when it is asked to.
//
// It draws once at its start, writes "ready", and then does what it finds in the file /ask, which
// it removes, and writes "done". "draw" draws again: lines "drew KIND NUMBER". "env" writes "env"
// and the variable CRAC_TEST_CLONE. "checkpoint" asks by the SDK for a checkpoint and writes
// "outcome" and what it is told in original and clone.
type drawing struct {
	name  string
	image string
	// files puts what the program needs into a directory, which the container has as /opt/draw.
	files func(t *harness.T, dir string)
	// tool is a directory of build/tools, which the container has in the same place, with the program;
	// empty: the image has it.
	tool  string
	env   []string
	flags []string // of ctr, if it is to use the SDK
	args  []string // the argument "sdk" is added if it is to use the SDK
	kinds []string
	// without lists the kinds that two clones draw alike without the SDK, and with those that they
	// draw alike with it.
	without, with []string
}

var drawings = []drawing{
	{
		name:  "python",
		image: "python",
		files: func(t *harness.T, dir string) {
			copyFiles(t, dir, "testdata/draw/draw.py")
			copyDir(t, filepath.Join(dir, "crac"), "../sdk/python/crac")
		},
		env:     []string{"PYTHONPATH=/opt/draw"},
		args:    []string{"python3", "/opt/draw/draw.py"},
		kinds:   []string{"ssl.RAND_bytes", "random", "os.urandom", "secrets", "uuid4"},
		without: []string{"ssl.RAND_bytes", "random"},
	},
	{
		name:    "node",
		image:   "node",
		files:   func(t *harness.T, dir string) { nodeFiles(t, dir, true) },
		env:     []string{"NODE_PATH=/opt/draw/node_modules"},
		args:    []string{"node", "/opt/draw/draw.js"},
		kinds:   nodeKinds,
		without: nodeKinds,
	},
	{
		// What the documentation says about the package without its native part.
		name:    "node-functions",
		image:   "node",
		files:   func(t *harness.T, dir string) { nodeFiles(t, dir, false) },
		env:     []string{"NODE_PATH=/opt/draw/node_modules"},
		args:    []string{"node", "/opt/draw/draw.js"},
		kinds:   nodeKinds,
		without: nodeKinds,
		with:    []string{"key"},
	},
	{
		name:  "go",
		image: "busybox",
		files: func(t *harness.T, dir string) {
			cmd := exec.Command("go", "build", "-o", filepath.Join(dir, "draw"), "./internal/draw")
			cmd.Dir = "../sdk/go"
			cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
			}
		},
		args:    []string{"/opt/draw/draw"},
		kinds:   []string{"crypto/rand", "key", "math/rand", "math/rand/v2", "crac.Rand"},
		without: []string{"math/rand", "math/rand/v2"},
		// Nothing can give the Go runtime's generator a new seed; crac.Rand is in its place.
		with: []string{"math/rand", "math/rand/v2"},
	},
	javaDrawing("java", ""),
	javaDrawing("java25", "jdk25"), // the image's own is JDK 17
}

func javaDrawing(name, tool string) drawing {
	return drawing{
		name:    name,
		image:   "tomcat",
		files:   javaFiles,
		tool:    tool,
		flags:   []string{option("java", "auto")},
		args:    []string{"java", "-cp", "/opt/draw", "Draw"},
		kinds:   []string{"SecureRandom", "SHA1PRNG", "DRBG", "strong", "randomUUID", "Random", "ThreadLocalRandom", "SplittableRandom", "Math.random"},
		without: []string{"SHA1PRNG", "DRBG", "Random", "ThreadLocalRandom", "SplittableRandom", "Math.random"},
		// No secure ones, and out of reach.
		with: []string{"ThreadLocalRandom", "SplittableRandom", "Math.random"},
	}
}

var nodeKinds = []string{"randomBytes", "randomBytes-in-the-thread-pool", "randomUUID", "randomInt", "getRandomValues", "Math.random", "key"}

// nodeFiles is the Node SDK as npm installs it.
func nodeFiles(t *harness.T, dir string, native bool) {
	t.Helper()
	copyFiles(t, dir, "testdata/draw/draw.js")
	sdk := filepath.Join(dir, "node_modules/@crac-shim/crac")
	copyDir(t, sdk, "../sdk/node")
	if !native {
		if err := os.RemoveAll(filepath.Join(sdk, "native")); err != nil {
			t.Fatal(err)
		}
		return
	}
	if out, err := exec.Command("sh", filepath.Join(sdk, "native/build.sh")).CombinedOutput(); err != nil {
		t.Fatalf("native/build.sh: %v\n%s", err, out)
	}
}

func copyFiles(t *harness.T, dir string, names ...string) {
	t.Helper()
	for _, name := range names {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, filepath.Base(name)), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func copyDir(t *harness.T, to, from string) {
	t.Helper()
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		t.Fatal(err)
	}
}

// prepare says how the program is started, and its clones.
func (d drawing) prepare(t *harness.T, sdk bool) how {
	t.Helper()
	needImage(t, d.image)
	dir, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	d.files(t, dir)
	h := how{image: harness.ImageRef(d.image), args: slices.Clone(d.args)}
	h.flags = append(h.flags, "--mount", "type=bind,src="+dir+",dst=/opt/draw,options=rbind:ro")
	if d.tool != "" {
		tool := filepath.Join(t.Tools.Build, "tools", d.tool)
		h.args[0] = filepath.Join(tool, "bin", h.args[0])
		if _, err := os.Stat(h.args[0]); err != nil {
			t.Fatalf("%v: integration/tools/install.sh %s makes it", err, d.tool)
		}
		h.flags = append(h.flags, "--mount", "type=bind,src="+tool+",dst="+tool+",options=rbind:ro")
	}
	for _, e := range d.env {
		h.flags = append(h.flags, "--env", e)
	}
	if sdk {
		h.args = append(h.args, "sdk")
		h.flags = append(h.flags, d.flags...)
	}
	return h
}

// ask makes the program do something and waits until it is done.
func (b *box) ask(command string) {
	b.Helper()
	done := strings.Count(b.log(), "\ndone\n")
	b.exec("sh", "-c", "echo "+command+" >/new && mv /new /ask")
	b.Eventually(command, func() bool { return strings.Count("\n"+b.log(), "\ndone\n") > done })
}

var drewLine = regexp.MustCompile(`(?m)^drew (\S+) (\S+)$`)

// drawn is what the program has drawn, by kind.
func (b *box) drawn() map[string][]string {
	all := map[string][]string{}
	for _, m := range drewLine.FindAllStringSubmatch(b.log(), -1) {
		all[m[1]] = append(all[m[1]], m[2])
	}
	return all
}

// alike lists the kinds of which two programs have drawn a number in common.
func alike(a, b map[string][]string) (kinds []string) {
	for kind, numbers := range a {
		if slices.ContainsFunc(numbers, func(n string) bool { return slices.Contains(b[kind], n) }) {
			kinds = append(kinds, kind)
		}
	}
	slices.Sort(kinds)
	return kinds
}

// TestRandomness restores two clones of one image. With the SDK they draw no secure random number
// that the other one, or the original, draws too; without it, they do.
func TestRandomness(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	for _, d := range drawings {
		for _, sdk := range []bool{true, false} {
			if d.name == "node-functions" && !sdk {
				continue // as with node
			}
			name := d.name + map[bool]string{true: "/with the SDK", false: "/without"}[sdk]
			tb.Run(name, func(tb *testing.T) {
				tb.Parallel()
				t := setup(tb)
				want := d.without
				if sdk {
					want = d.with
				}
				testRandomness(t, d, sdk, slices.Sorted(slices.Values(want)))
			})
		}
	}
}

func testRandomness(t *harness.T, d drawing, sdk bool, want []string) {
	t.Helper()
	image := ref(t)
	h := d.prepare(t, sdk)
	first := h
	first.flags = append(slices.Clone(h.flags), option("checkpoint.image", image))
	original := start(t, first)
	original.Eventually("the program", func() bool { return strings.Contains(original.log(), "ready\n") })
	original.checkpoint()
	original.ask("draw")
	draws := []map[string][]string{original.drawn()}
	for _, kind := range d.kinds {
		// Twice: before the checkpoint and after it.
		if n := len(draws[0][kind]); n != 128 && (sdk || kind != "crac.Rand") {
			t.Errorf("the original has drawn %d of %s", n, kind)
		}
	}
	original.remove()

	// Both at once, so that they also share the kernel's own generation.
	var clones []*box
	for i := range 2 {
		c := h
		c.image = image
		c.flags = append(slices.Clone(h.flags), option("restore", "require"), "--env", fmt.Sprintf("CRAC_TEST_CLONE=clone%d", i))
		clones = append(clones, start(t, c))
	}
	for _, c := range clones {
		c.ask("draw")
		draws = append(draws, c.drawn())
	}
	for i, pair := range [][2]int{{1, 2}, {0, 1}, {0, 2}} {
		if got := alike(draws[pair[0]], draws[pair[1]]); !slices.Equal(got, want) {
			t.Errorf("%s draw the same %v; expected %v", []string{"two clones", "original and first clone", "original and second clone"}[i], got, want)
		}
	}
	for i, c := range clones {
		got, kinds := c.drawn(), slices.Clone(d.kinds)
		for kind := range maps.Keys(got) {
			if !slices.Contains(kinds, kind) {
				t.Errorf("a clone draws %s, which this test does not know", kind)
			}
		}
		c.ask("env")
		var value string
		for line := range strings.Lines(c.log()) {
			if v, ok := strings.CutPrefix(line, "env "); ok {
				value = strings.TrimSpace(v)
			}
		}
		if reached := value == fmt.Sprintf("clone%d", i); reached != sdk {
			t.Errorf("the environment of the clone's start reaches the program: %v (%q)", reached, value)
		}
		c.remove()
	}
}

// TestOwnCheckpointBySDK has programs ask for their own checkpoint, and waits in original and clone
// for what they are told.
func TestOwnCheckpointBySDK(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	for _, d := range drawings {
		if d.name == "node-functions" {
			continue
		}
		tb.Run(d.name, func(tb *testing.T) {
			tb.Parallel()
			t := setup(tb)
			image := ref(t)
			h := d.prepare(t, true)
			h.flags = append(h.flags, option("checkpoint.image", image), option("hooks", "required"))

			refused := start(t, h)
			refused.Eventually("the program", func() bool { return strings.Contains(refused.log(), "ready\n") })
			refused.ask("checkpoint")
			if !strings.Contains(refused.log(), "checkpoint.allow") {
				t.Errorf("a checkpoint that is not allowed: %s", tailOf(refused.log(), 200))
			}
			refused.remove()

			h.flags = append(h.flags, option("checkpoint.allow", "workload"))
			original := start(t, h)
			original.Eventually("the program", func() bool { return strings.Contains(original.log(), "ready\n") })
			original.ask("checkpoint")
			if !strings.Contains(original.log(), "outcome checkpointed") {
				t.Errorf("the original is told %s", tailOf(original.log(), 200))
			}
			original.remove()

			for range 2 {
				h.image = image
				clone := start(t, h)
				clone.Eventually("the outcome", func() bool { return strings.Contains(clone.log(), "outcome restored\ndone\n") })
				clone.remove()
			}
		})
	}
}
