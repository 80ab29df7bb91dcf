package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/crac-shim/crac/integration/examples"
	"github.com/crac-shim/crac/integration/harness"
)

const readme = "../README.md"

// TestReadmeCommands runs what readers copy out of the README, in order, in one shell, against a
// containerd of its own. Other than theirs are the registry's name, the ports on the host, and two
// directories.
func TestReadmeCommands(tb *testing.T) {
	onlyCrac(tb)
	if _, err := os.Stat(readme); err != nil {
		tb.Skip("the guest has no repository")
	}
	repository, err := filepath.Abs(filepath.Dir(readme))
	if err != nil {
		tb.Fatal(err)
	}
	blocks, err := examples.Blocks(readme)
	if err != nil {
		tb.Fatal(err)
	}
	d := ownDaemon(tb, harness.Options{Need: []harness.Tool{harness.Shim, harness.RuncShim, harness.Runc, harness.Cracctl, harness.Nerdctl, harness.Registry}})
	t := d.For(tb, harness.TestLimit)
	if _, err := t.Network(); err != nil {
		t.Fatal(err)
	}
	registry, err := t.StartRegistry(t.Ctx)
	if err != nil {
		t.Fatal(err)
	}
	checkpoints, err := t.Path("checkpoints")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ids, err := t.Nerdctl(t.Daemon.Context(t.Ctx), "ps", "--all", "--quiet")
		if err == nil && ids != "" {
			_, err = t.Nerdctl(t.Daemon.Context(t.Ctx), append([]string{"rm", "--force"}, strings.Fields(ids)...)...)
		}
		if err != nil {
			t.Error(err)
		}
		removeFIFOs(t, "again")
	})

	replace := strings.NewReplacer("localhost:5000", registry.Host, "build/images/", t.Tools.Images+"/", "/var/tmp/checkpoints", checkpoints)
	ports := map[string]string{}
	published := regexp.MustCompile(`-p (\d+):|localhost:(\d+)/`)
	script := &strings.Builder{}
	fmt.Fprintf(script, "exec 2>&1\nset -eEuo pipefail\ntrap 'echo \"failed: $BASH_COMMAND\" >&2' ERR\ncd %q\n", repository)
	sections := []string{"Use it with ctr", "Use it with nerdctl", "Telling the workload", "Why was this start cold?"}
	ran := map[string]int{}
	for _, b := range blocks {
		if b.Language != "sh" {
			continue
		}
		if !slices.Contains(sections, b.Section) {
			t.Errorf("%s:%d: nobody runs the commands of %q", readme, b.Line, b.Section)
			continue
		}
		ran[b.Section]++
		text := replace.Replace(b.Text)
		if b.Section == "Use it with nerdctl" {
			text = published.ReplaceAllStringFunc(text, func(m string) string {
				port := strings.Trim(m[strings.IndexAny(m, "0123456789"):], ":/")
				if ports[port] == "" {
					ports[port] = freePort(t)
				}
				return strings.Replace(m, port, ports[port], 1)
			})
		}
		fmt.Fprintf(script, "echo '=== %s'\n%s\n", b.Section, text)
	}
	for _, s := range sections {
		if ran[s] == 0 {
			t.Errorf("%s has no commands under %q", readme, s)
		}
	}

	// A ctr that does not stay leaves its FIFOs: not on this host.
	ctr, err := t.Tools.Path(harness.Ctr)
	if err != nil {
		t.Fatal(err)
	}
	bin, err := t.Path("bin")
	if err != nil {
		t.Fatal(err)
	}
	wrapper := fmt.Sprintf(`#!/bin/sh
case $1-$2 in
run-*) shift; set -- run --fifo-dir %[1]q "$@" ;;
tasks-exec) shift 2; set -- tasks exec --fifo-dir %[1]q "$@" ;;
esac
exec %[2]q "$@"
`, t.FIFODir(), ctr)
	if err := os.WriteFile(filepath.Join(bin, "ctr"), []byte(wrapper), 0o755); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	cmd := t.Command(t.Ctx, "bash", "-c", script.String())
	for _, kv := range cmd.Env {
		if path, ok := strings.CutPrefix(kv, "PATH="); ok {
			cmd.Env = append(cmd.Env, "PATH="+bin+":"+path)
		}
	}
	out, err := harness.Run(t.Ctx, cmd)
	t.Cleanup(func() {
		if tb.Failed() {
			tb.Logf("the commands say:\n%s", out)
		}
	})
	if err != nil {
		t.Fatal(err)
	}

	// What the text around the commands says of their outcome.
	counts := map[string][]string{}
	var section string
	for line := range strings.Lines(out) {
		if s, ok := strings.CutPrefix(line, "=== "); ok {
			section = strings.TrimSpace(s)
		} else if n := value(line, "count"); n != "" {
			counts[section] = append(counts[section], n)
		}
	}
	for section, want := range map[string][]string{
		"Use it with ctr":     {"1", "2", "3", "3", "3", "4", "1", "4"},
		"Use it with nerdctl": {"1", "2", "2", "1", "2", "3"},
	} {
		if !slices.Equal(counts[section], want) {
			t.Errorf("under %q the servers count %q, want %q", section, counts[section], want)
		}
	}
	for section, want := range map[string]string{
		"the workload is told of its checkpoint":    "before-checkpoint\nafter-restore clone-1\n",
		"a start that is refused says what differs": `asks for ["/usr/bin/goserver"`,
	} {
		if !strings.Contains(out, want) {
			t.Errorf("%s: there is no %q", section, want)
		}
	}
	t.Eventually("the image that is made when the container is ready", func() bool {
		_, err := t.Client.ImageService().Get(t.Ctx, registry.Host+"/ready:warm")
		return err == nil
	})
}

// TestReadmeConfiguration has containerd read the configuration that the README gives.
func TestReadmeConfiguration(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	if _, err := os.Stat(readme); err != nil {
		tb.Skip("the guest has no repository")
	}
	blocks, err := examples.Blocks(readme)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	read := 0
	for _, b := range blocks {
		if b.Language != "toml" {
			continue
		}
		read++
		file := filepath.Join(dir, "config.toml")
		if err := os.WriteFile(file, []byte(b.Text), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := harness.Run(t.Ctx, t.Command(t.Ctx, "containerd", "--config", file, "config", "dump"))
		if err != nil {
			t.Fatal(err)
		}
		_, runtime, ok := strings.Cut(out, "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.crac]")
		runtime, _, _ = strings.Cut(runtime, "containerd.runtimes.runc]")
		for _, want := range []string{"runtime_type = 'io.containerd.crac.v2'", "pod_annotations = ['io.containerd.crac.*']", "SystemdCgroup = true"} {
			if !ok || !strings.Contains(runtime, want) {
				t.Errorf("%s:%d: containerd does not read %s out of it:\n%s", readme, b.Line, want, runtime)
			}
		}
	}
	if read == 0 {
		t.Errorf("%s has no configuration", readme)
	}
}
