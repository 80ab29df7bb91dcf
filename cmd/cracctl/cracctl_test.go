package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	taskv2 "github.com/containerd/containerd/api/runtime/task/v2"
	taskv3 "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/inspect"
	"github.com/crac-shim/crac/oci"
)

func run(t *testing.T, stdin string, args ...string) (stdout string, err error) {
	t.Helper()
	cmd := newCommand()
	var out bytes.Buffer
	cmd.SetArgs(args)
	cmd.SetIn(strings.NewReader(stdin))
	cmd.SetOut(&out)
	cmd.SetErr(&out)
	err = cmd.ExecuteContext(t.Context())
	return out.String(), err
}

func TestCommandLine(t *testing.T) {
	t.Setenv("NERDCTL_TOML", filepath.Join(t.TempDir(), "none.toml"))
	nowhere := filepath.Join(t.TempDir(), "containerd.sock")
	t.Setenv("CONTAINERD_ADDRESS", nowhere)
	for _, tt := range []struct {
		args []string
		out  string
		err  string
	}{
		{args: []string{"version"}, out: "cracctl "},
		{args: []string{"help"}, out: "doctor"},
		{args: []string{"completion", "bash"}, out: "__start_cracctl"},
		{args: []string{"nonsense"}, err: "nonsense"},
		{args: []string{"chekpoint", "c"}, err: "did you mean checkpoint?"},
		{args: []string{"checkpoint", "only-one"}, err: "usage: cracctl checkpoint CONTAINER REF"},
		{args: []string{"check"}, err: "1 arg"},
		{args: []string{"check", "--format", "xml", "c"}, err: "table, json"},
		{args: []string{"check", "c"}, err: nowhere},
		{args: []string{"doctor", "--format", "xml"}, err: "table, json"},
		{args: []string{"checkpoint", "c", "a b"}, err: "image name"},
		{args: []string{"import", "ref"}, err: "--bundle"},
		{args: []string{"import", "archive", "ref", "--images", "d", "--bundle", "b"}, err: "--bundle"},
		{args: []string{"import", "archive", "ref"}, err: nowhere},
		{args: []string{"export", "ref", "file"}, err: "--to podman, --to containerd, --to bundle"},
		{args: []string{"export", "--to", "tar", "ref", "file"}, err: "--to podman"},
		{args: []string{"export", "--to", "podman", "--format", "podman", "ref", "file"}, err: "none of the others can be"},
		{args: []string{"export", "--to", "podman", "--compression", "xz", "ref", "file"}, err: "zstd, gzip"},
		{args: []string{"import", "--compression", "xz", "archive", "ref"}, err: "zstd, gzip"},
		{args: []string{"import", "--max-size", "0", "archive", "ref"}, err: "at least 1"},
		{args: []string{"import", "--max-size", "-3", "archive", "ref"}, err: "at least 1"},
		{args: []string{"import", "--max-size", "9000000000", "archive", "ref"}, err: "--max-size"},
		{args: []string{"flatten", "--compression", "xz", "ref"}, err: "zstd, gzip"},
		{args: []string{"checkpoint", "--dry-run", "--format", "xml", "c", "ref"}, err: "table, json"},
		{args: []string{"checkpoint", "--format", "json", "c", "ref"}, err: "--dry-run"},
		{args: []string{"checkpoint", "--key", "key.pem:fd=3", "c", "ref"}, err: "fd="},
		{args: []string{"-a", "unix://" + nowhere, "ls"}, err: "dial unix " + nowhere},
		{args: []string{"-a", "tcp://localhost:1", "ls"}, err: "file here"},
		{args: []string{"-a", "tcp://localhost:1", "doctor"}, err: "file here"},
		{args: []string{"export", "--format", "podman", "ref", "file"}, err: nowhere},
		{args: []string{"checkpoint", "c", "ref"}, err: nowhere}, // the variable counts, and the way out is said
		{args: []string{"checkpoint", "c", "ref"}, err: "--address"},
		{args: []string{"-a", "/other.sock", "checkpoint", "c", "ref"}, err: "/other.sock"},
	} {
		out, err := run(t, "", tt.args...)
		if tt.err == "" && (err != nil || !strings.Contains(out, tt.out)) {
			t.Errorf("%v: %v\n%s", tt.args, err, out)
		}
		if tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
			t.Errorf("%v: got error %v, want one with %q", tt.args, err, tt.err)
		}
	}
	if out, _ := run(t, "", "help"); strings.Contains(out, "build-image") {
		t.Error("help shows what is for the shim only")
	}
}

// Which containerd is asked say, in this order, a flag, a variable, and nerdctl's settings.
func TestSettings(t *testing.T) {
	file := filepath.Join(t.TempDir(), "nerdctl.toml")
	t.Setenv("NERDCTL_TOML", file)
	for _, tt := range []struct {
		settings, address, namespace string // those of variables
		args                         []string
		err                          string
	}{
		{settings: "address = 'unix:///toml.sock'", err: "dial unix /toml.sock"},
		{settings: "address = '/toml.sock'", address: "/env.sock", err: "dial unix /env.sock"},
		{settings: "address = '/toml.sock'", address: "/env.sock", args: []string{"-a", "/flag.sock"}, err: "dial unix /flag.sock"},
		{settings: "address =", err: file},
		{settings: "address =", address: "/env.sock", err: file}, // the namespace may be said there
		{settings: "address =", address: "/env.sock", namespace: "n", err: "dial unix /env.sock"},
		{settings: "address =", namespace: "n", args: []string{"-a", "/flag.sock"}, err: "dial unix /flag.sock"},
	} {
		t.Setenv(addressEnv, tt.address)
		t.Setenv(namespaceEnv, tt.namespace)
		if err := os.WriteFile(file, []byte(tt.settings), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := run(t, "", append([]string{"ls"}, tt.args...)...); err == nil || !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%+v: %v", tt, err)
		}
		if _, err := run(t, "", "version"); err != nil {
			t.Errorf("%+v: version: %v", tt, err)
		}
	}
	if err := os.WriteFile(file, []byte("namespace = 'shop'\nsnapshotter = 'native'\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv(namespaceEnv, "")
	if got := newCommand().PersistentFlags().Lookup("namespace").DefValue; got != "shop" {
		t.Errorf("the namespace is %q", got)
	}
}

// Every command that is shown has a page, and the pages are the same every time.
func TestMan(t *testing.T) {
	t.Setenv("SOURCE_DATE_EPOCH", "1700000000")
	var dirs [2]string
	for i := range dirs {
		dirs[i] = filepath.Join(t.TempDir(), "man")
		if _, err := run(t, "", "man", dirs[i]); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range newCommand().Commands() {
		name := filepath.Join(dirs[0], "cracctl-"+c.Name()+".1")
		page, err := os.ReadFile(name)
		if c.Hidden != errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s (hidden: %v): %v", c.Name(), c.Hidden, err)
		}
		if c.Hidden {
			continue
		}
		again, err := os.ReadFile(filepath.Join(dirs[1], filepath.Base(name)))
		if err != nil || !bytes.Equal(page, again) {
			t.Errorf("%s differs the second time: %v", name, err)
		}
	}
}

func TestFormats(t *testing.T) {
	type thing struct {
		Name string `json:"name"`
	}
	list := []thing{{"a<b"}, {"c"}}
	row := func(v thing) []string { return []string{v.Name, "x"} }
	table := func(w io.Writer, v thing) error { _, err := io.WriteString(w, v.Name+"!"); return err }
	for format, want := range map[string][2]string{
		"table":         {"a<b!", "NAME   X\na<b    x\nc      x\n"},
		"json":          {"{\n  \"name\": \"a<b\"\n}\n", "{\"name\":\"a<b\"}\n{\"name\":\"c\"}\n"},
		"<{{.Name}}>":   {"<a<b>\n", "<a<b>\n<c>\n"},
		"{{json .}}":    {"{\"name\":\"a\\u003cb\"}\n", "{\"name\":\"a\\u003cb\"}\n{\"name\":\"c\"}\n"},
		"{{size 2048}}": {"2.0 KiB\n", "2.0 KiB\n2.0 KiB\n"},
	} {
		if err := checkFormat(format); err != nil {
			t.Errorf("%s: %v", format, err)
		}
		var one, many bytes.Buffer
		if err := errors.Join(show(&one, format, list[0], table), showList(&many, format, list, []string{"NAME", "X"}, row)); err != nil {
			t.Errorf("%s: %v", format, err)
		}
		if one.String() != want[0] || many.String() != want[1] {
			t.Errorf("%s: %q, %q; want %q", format, one.String(), many.String(), want)
		}
	}
	for _, bad := range []string{"xml", "{{.Name", "", "{{nonsense .}}"} {
		if checkFormat(bad) == nil {
			t.Errorf("the format %q is taken", bad)
		}
	}
}

func TestAgo(t *testing.T) {
	for d, want := range map[time.Duration]string{0: "now", time.Second: "1 second ago", 90 * time.Second: "1 minute ago", 49 * time.Hour: "2 days ago", 400 * 24 * time.Hour: "1 year ago"} {
		if got := ago(time.Now().Add(-d)); got != want {
			t.Errorf("%v: got %s, want %s", d, got, want)
		}
	}
}

// A tree of processes that goes in circles is shown, too.
func TestWriteProcesses(t *testing.T) {
	var out bytes.Buffer
	all := []inspect.Process{
		{PID: 1, Command: "init", State: "running", Executable: "/sbin/init"},
		{PID: 2, Parent: 1, Command: "a", State: "running", Executable: "/bin/busybox"},
		{PID: 3, Parent: 2, Command: "b", State: "zombie"},
		{PID: 4, Parent: 1, Command: "c", State: "running"},
		{PID: 8, Parent: 9, Command: "x", State: "running"},
		{PID: 9, Parent: 8, Command: "y", State: "running"},
	}
	if err := writeProcesses(&out, all); err != nil {
		t.Fatal(err)
	}
	var shown []string
	for line := range strings.Lines(out.String()) {
		i := strings.LastIndex(line, "   ")
		shown = append(shown, strings.TrimSpace(line[i:]))
	}
	if got := strings.Join(shown, "|"); got != "COMMAND|init|├─ a (/bin/busybox)|│  └─ b <zombie>|└─ c|x|└─ y" {
		t.Errorf("got %s\n%s", got, out.String())
	}
}

// The shim reads one line for every outcome.
func TestBuildImageErrors(t *testing.T) {
	for stdin, want := range map[string]string{
		"":                        "cracctl checkpoint",
		"{":                       "read the request",
		`{"unknown": 1}`:          "unknown",
		`{"address": "/no.sock"}`: "/no.sock",
	} {
		out, err := run(t, stdin, "build-image")
		if !errors.Is(err, errReported) {
			t.Errorf("%q: got %v", stdin, err)
		}
		var e images.BuildEvent // before what is said to people
		if jerr := json.NewDecoder(strings.NewReader(out)).Decode(&e); jerr != nil || e.Event != images.EventError || !strings.Contains(e.Error, want) {
			t.Errorf("%q: said %q (%v), want an error with %q", stdin, out, jerr, want)
		}
	}
}

// Arguments may hold anything, and a terminal obeys.
func TestQuoted(t *testing.T) {
	got := strings.Join(quoted([]string{"/bin/sh", "-c", "a b", "", "\x1b[2J", "\u009b2J", "ä"}), " ")
	if want := `/bin/sh -c "a b" "" "\x1b[2J" "\u009b2J" ä`; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestIsOurs(t *testing.T) {
	for name, want := range map[string]bool{
		"io.containerd.crac.v2":                  true,
		"/usr/local/bin/containerd-shim-crac-v2": true,
		"io.containerd.runc.v2":                  false,
		"io.containerd.crac.v3":                  false,
		"":                                       false,
	} {
		if isOurs(name) != want {
			t.Errorf("%q: got %v", name, !want)
		}
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1 << 20: "1.0 MiB", 3 << 29: "1.5 GiB", 1 << 50: "1024.0 TiB"} {
		if got := size(n); got != want {
			t.Errorf("%d: got %s, want %s", n, got, want)
		}
	}
}

// A process that works in a bundle stands for the shim; its child for the
// container, or its child's child.
func TestStateOf(t *testing.T) {
	const child = "sleep 600 & echo $!; read x; kill $!"
	for _, tt := range []struct{ dir, script, want string }{
		{"io.containerd.runtime.v2.task/ns/c", child, "."},
		{"a/io.containerd.runtime.v2.task/ns/c", child, "a"},
		{"io.containerd.runtime.v2.task/ns/c", "(cd / && " + child + "); :", "."},
		{"io.containerd.runtime.v2.task/other/c", child, ""},
		{"somewhere", child, ""},
	} {
		state, err := filepath.EvalSymlinks(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		bundle := filepath.Join(state, tt.dir)
		if err := os.MkdirAll(bundle, 0o700); err != nil {
			t.Fatal(err)
		}
		// The shell tells its child's process and waits until its input ends.
		cmd := exec.Command("sh", "-c", tt.script)
		cmd.Dir = bundle
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var pid int
		if err := json.NewDecoder(out).Decode(&pid); err != nil {
			t.Fatal(err)
		}
		want := defaults.DefaultStateDir
		if tt.want != "" {
			want = filepath.Join(state, tt.want)
		}
		if got, err := stateOf(pid, "ns"); got != want || err != nil {
			t.Errorf("%s: got %s, %v, want %s", tt.dir, got, err, want)
		}
		in.Close()
		_ = cmd.Wait() // the shell's status is that of read
	}
	if got, err := stateOf(-1, "ns"); err == nil {
		t.Errorf("no process: got %s", got)
	}
}

func TestReadBootstrap(t *testing.T) {
	for _, tt := range []struct {
		text string
		want bootstrap
		err  string
	}{
		{`{"version":3,"address":"unix:///s","protocol":"ttrpc","capabilities":["x"]}`, bootstrap{3, "unix:///s", "ttrpc"}, ""},
		{`{"version":3}`, bootstrap{}, "no address"},
		{`unix:///s`, bootstrap{}, "invalid"},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "bootstrap.json"), []byte(tt.text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := readBootstrap(dir)
		if tt.err == "" && (err != nil || got != tt.want) {
			t.Errorf("%s: got %+v, %v", tt.text, got, err)
		}
		if tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
			t.Errorf("%s: got %v", tt.text, err)
		}
	}
	if _, err := readBootstrap(t.TempDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("none: %v", err)
	}
}

// shims answers Checkpoint in both versions of the task API and remembers what
// it was asked.
type shims struct {
	taskv2.TTRPCTaskService
	id      string
	options *anypb.Any
	err     error
}

func (s *shims) Checkpoint(_ context.Context, r *taskv2.CheckpointTaskRequest) (*emptypb.Empty, error) {
	s.id, s.options = "v2:"+r.ID, r.Options
	return &emptypb.Empty{}, errgrpc.ToGRPC(s.err)
}

type shimV3 struct {
	taskv3.TTRPCTaskService
	*shims
}

func (s shimV3) Checkpoint(_ context.Context, r *taskv3.CheckpointTaskRequest) (*emptypb.Empty, error) {
	s.id, s.options = "v3:"+r.ID, r.Options
	return &emptypb.Empty{}, errgrpc.ToGRPC(s.err)
}

func TestShimClient(t *testing.T) {
	fake := &shims{}
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Close() })
	taskv2.RegisterTTRPCTaskService(server, fake)
	taskv3.RegisterTTRPCTaskService(server, shimV3{shims: fake})
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = server.Serve(t.Context(), l) }() // ends with Close

	for version, want := range map[int]string{2: "v2:web", 3: "v3:web"} {
		conn, err := net.Dial("unix", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		client := &shimClient{Client: ttrpc.NewClient(conn), version: version}
		fake.err = nil
		if err := client.checkpoint(t.Context(), "web", oci.CheckpointOptions{Ref: "a/b:c", Exit: true}); err != nil {
			t.Errorf("version %d: %v", version, err)
		}
		var got oci.CheckpointOptions
		if err := json.Unmarshal(fake.options.GetValue(), &got); err != nil {
			t.Fatal(err)
		}
		if fake.id != want || fake.options.TypeUrl != oci.CheckpointOptionsType || !reflect.DeepEqual(got, oci.CheckpointOptions{Ref: "a/b:c", Exit: true}) {
			t.Errorf("version %d asked %s with %s %s", version, fake.id, fake.options.TypeUrl, fake.options.GetValue())
		}
		fake.err = errdefs.ErrNotFound.WithMessage("no such task")
		err = explain(client.checkpoint(t.Context(), "web", oci.CheckpointOptions{}))
		if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "ctr task") {
			t.Errorf("version %d: %v", version, err)
		}
		client.Close()
	}
}
