package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/crac-shim/crac/integration/harness"
	"github.com/crac-shim/crac/oci"
)

// javaFiles compiles the drawing program, with classes that stand for the library org.crac, into a
// directory.
func javaFiles(t *harness.T, dir string) {
	t.Helper()
	if _, err := exec.LookPath("javac"); err != nil {
		t.Fatal("javac is not on PATH: integration/tools/install.sh jdk installs it")
	}
	jar := filepath.Join(t.Tools.Build, "bin", "crac.jar")
	sources, err := filepath.Glob("../sdk/java/test/orgcrac/org/crac/*.java")
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"--release", "17", "-cp", jar, "-d", dir, "testdata/draw/Draw.java"}
	if out, err := exec.Command("javac", append(args, sources...)...).CombinedOutput(); err != nil {
		t.Fatalf("javac: %v\n%s", err, out)
	}
}

// javaBox says how the drawing program is started. The image has only a JRE.
func javaBox(t *harness.T, args ...string) how {
	t.Helper()
	needImage(t, "tomcat")
	dir, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	javaFiles(t, dir)
	return how{
		image: harness.ImageRef("tomcat"), args: args,
		flags: []string{"--mount", "type=bind,src=" + dir + ",dst=/opt/draw,options=rbind:ro"},
	}
}

func (b *box) said(line string) bool { return slices.Contains(strings.Split(b.log(), "\n"), line) }

func (b *box) untilSaid(line string) {
	b.Helper()
	b.Eventually("the program to say "+line, func() bool { return b.said(line) })
}

// TestJava has the runtime put its library into containers that run java, or a script that does. A
// program written to org.crac is told of its checkpoint and of what is new in its clone, whose
// start needs nothing for it.
func TestJava(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	java := []string{"java", "-Dsame=1", "-cp", "/opt/draw", "Draw", "sdk"}
	for mode, args := range map[oci.JavaMode][]string{
		oci.JavaAuto: java,
		oci.JavaEnv:  {"sh", "-c", "JAVA_TOOL_OPTIONS= " + strings.Join(java, " ")},
	} {
		tb.Run(string(mode), func(tb *testing.T) {
			tb.Parallel()
			t := setup(tb)
			image := ref(t)
			h := javaBox(t, args...)
			h.flags = append(h.flags, option("java", string(mode)), option("checkpoint.image", image), option("hooks", "required"), "--env", "JDK_JAVA_OPTIONS=-Dsame=1 -Dafter=cold")
			original := start(t, h)
			original.untilSaid("ready")
			original.checkpoint()
			original.untilSaid("before")
			original.untilSaid("after cold")
			original.remove()

			// The clone's own options of java do not matter, nor does its mode.
			for _, clones := range []string{string(mode), "off"} {
				c := h
				c.image = image
				c.flags = slices.DeleteFunc(slices.Clone(h.flags), func(f string) bool { return f == option("java", string(mode)) || strings.HasPrefix(f, "JDK_") })
				c.flags = append(c.flags, "JDK_JAVA_OPTIONS=-Dsame=1 -Dafter=warm", option("java", clones), option("restore", "require"))
				clone := start(t, c)
				clone.untilSaid("after warm")
				clone.ask("property same")
				if !clone.said("property 1") {
					t.Errorf("the property that did not change: %s", tailOf(clone.log(), 200))
				}
				if clone.said("ready") {
					t.Error("the program has started anew")
				}
				clone.remove()
			}
		})
	}
}

// TestJavaUntold: a program that knows nothing of checkpoints gives back its heap before the dump.
func TestJavaUntold(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	sizes := map[string]int64{}
	t := setup(tb)
	// Its first use of time zones has the JDK look for providers.
	h := javaBox(t, "java", "-Xmx256m", "-cp", "/opt/draw", "Draw", "zones")
	for mode, hooks := range map[string]string{"off": "optional", "auto": "required"} {
		c := h
		image := ref(t)
		if mode == "off" {
			// A collector that collects nothing: another one might, by chance.
			c.args = slices.Insert(slices.Clone(h.args), 1, "-XX:+UnlockExperimentalVMOptions", "-XX:+UseEpsilonGC")
		}
		c.flags = append(slices.Clone(h.flags), option("java", mode), option("checkpoint.image", image), option("hooks", hooks))
		b := start(t, c)
		b.untilSaid("ready")
		b.ask("garbage")
		b.checkpoint()
		sizes[mode] = dumpBytes(t, image)
		b.remove()
	}
	t.Logf("dumps: %v bytes", sizes)
	if sizes["auto"] > sizes["off"]-(40<<20) {
		t.Errorf("dumps: %v bytes; the library should give back most of 64 MiB", sizes)
	}
}

// TestJavaNotPossible: what the option cannot do is an error of the start, or nothing at all.
func TestJavaNotPossible(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	t := setup(tb)
	b := start(t, how{flags: []string{option("java", "auto")}, args: []string{"sleep", "1000"}})
	if _, err := b.tryExec("test", "-e", "/usr/lib/crac"); err == nil {
		t.Error("a container that runs no java has the library")
	}
	b.remove()

	h := javaBox(t, "java", "-cp", "/opt/draw", "Draw")
	// A read-only root file system is still written by the runtime, before it becomes that.
	h.flags = append(h.flags, option("java", "auto"), "--read-only")
	b = start(t, h)
	b.untilSaid("ready")
	b.exec("test", "-r", "/usr/lib/crac/crac.jar")
	if out := b.exec("sh", "-c", "tr '\\0' ' ' </proc/1/cmdline"); !strings.HasPrefix(out, "java -Xbootclasspath/a:/usr/lib/crac/crac.jar -Dorg.crac.Core.Compat=io.github.cracshim -cp ") {
		t.Errorf("it runs %s", out)
	}
	st, err := os.Stat(filepath.Join(t.Tools.Build, "bin", "crac.jar"))
	if err != nil {
		t.Fatal(err)
	}
	if out := b.exec("stat", "-c", "%a %u %s", "/usr/lib/crac/crac.jar"); out != fmt.Sprintf("644 0 %d", st.Size()) {
		t.Errorf("the library is %s", out)
	}
	b.remove()
}

// TestJavaPolicy: the rules for descriptors that a JVM with CRaC of its own would follow.
func TestJavaPolicy(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	t := setup(tb)
	image := ref(t)
	h := javaBox(t, "java", "-Djdk.crac.resource-policies=/etc/policy", "-cp", "/opt/draw", "Draw")
	h.flags = append(h.flags, option("java", "auto"), option("checkpoint.image", image))
	b := start(t, h)
	b.untilSaid("ready")
	checkpoint := func() error {
		_, err := t.Ctr(t.Ctx, "tasks", "checkpoint", b.id)
		return err
	}
	if err := checkpoint(); err == nil || !strings.Contains(err.Error(), "/etc/policy") {
		t.Errorf("a checkpoint without the file of its policy: %v", err)
	}
	// The library itself is open in a JVM that has it.
	b.exec("sh", "-c", "printf 'type: file\\npath: /usr/lib/crac/*\\naction: error\\n' >/etc/policy")
	if err := checkpoint(); err == nil || !strings.Contains(err.Error(), "/usr/lib/crac/crac.jar") {
		t.Errorf("a checkpoint against the policy: %v", err)
	}
	// cracctl check foretells it.
	if r, status := b.check(); status != 1 || !slices.Equal(r.codes("error"), []string{"policy"}) {
		t.Errorf("cracctl check: %d, %+v", status, r.Findings)
	}
	// The library cannot close what is not its own.
	b.exec("sh", "-c", "printf 'type: file\\npath: /usr/lib/crac/*\\naction: close\\n' >/etc/policy")
	if err := checkpoint(); err == nil || !strings.Contains(err.Error(), "a file cannot be closed from outside") {
		t.Errorf("a checkpoint for which a file is to be closed: %v", err)
	}
	for _, action := range []string{"reopen", "ignore"} {
		b.exec("sh", "-c", "printf 'type: file\\naction: "+action+"\\n' >/etc/policy")
		if r, status := b.check(); status != 0 {
			t.Errorf("%s: cracctl check: %d, %+v", action, status, r.Findings)
		}
	}
	if err := checkpoint(); err != nil {
		t.Errorf("a checkpoint that the policy allows: %v", err)
	}
}

// TestJavaSessions: Tomcat draws the ids of its sessions from SHA1PRNG, which two clones have alike
// but for the library.
func TestJavaSessions(tb *testing.T) {
	onlyCrac(tb)
	tb.Parallel()
	for mode, want := range map[oci.JavaMode]bool{oci.JavaEnv: false, oci.JavaOff: true} {
		tb.Run(string(mode), func(tb *testing.T) {
			tb.Parallel()
			t := setup(tb)
			needImage(t, "tomcat")
			image := ref(t)
			original := start(t, how{image: harness.ImageRef("tomcat"), cni: true, flags: []string{option("java", string(mode)), option("checkpoint.image", image)}})
			sessions := func(b *box) (ids []string) {
				for range 20 {
					ids = append(ids, value(b.get("/examples/crac.jsp"), "session"))
				}
				slices.Sort(ids)
				if ids = slices.Compact(ids); len(ids) != 20 || ids[0] == "" {
					t.Fatalf("20 new sessions are %q", ids)
				}
				return ids
			}
			sessions(original)
			original.checkpoint("--exit")
			original.remove()
			var drawn [2][]string
			for i := range drawn {
				clone := start(t, how{image: image, cni: true, flags: []string{option("restore", "require")}})
				drawn[i] = sessions(clone)
				clone.remove()
			}
			if got := slices.ContainsFunc(drawn[0], func(id string) bool { return slices.Contains(drawn[1], id) }); got != want {
				t.Errorf("two clones give the same session to two clients: %v, want %v: %q", got, want, drawn)
			}
		})
	}
}

// dumpBytes is the size of an image's dump, as its annotation says.
func dumpBytes(t *harness.T, image string) int64 {
	t.Helper()
	n, err := strconv.ParseInt(manifestOf(t, image).Annotations[oci.AnnotationDumpBytes], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
