package main

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	coreimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/introspection"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/build"
	"github.com/crac-shim/crac/images/convert"
	"github.com/crac-shim/crac/oci"
)

// world is a containerd of nothing but images.
type world struct {
	*testing.T
	ctx context.Context
	db  *metadata.DB
}

func newWorld(t *testing.T) *world {
	t.Helper()
	_ = log.SetLevel("error")
	dir := t.TempDir()
	cs, err := local.NewStore(filepath.Join(dir, "content"))
	if err != nil {
		t.Fatal(err)
	}
	bdb, err := bolt.Open(filepath.Join(dir, "meta.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := bdb.Close(); err != nil {
			t.Error(err)
		}
	})
	w := &world{t, namespaces.WithNamespace(t.Context(), "test"), metadata.NewDB(bdb, cs, nil)}
	w.must(w.db.Init(w.ctx))
	t.Setenv(addressEnv, "/no.sock")
	t.Setenv(namespaceEnv, "test")
	t.Setenv("NERDCTL_TOML", filepath.Join(dir, "none.toml"))
	t.Setenv("CRAC_POLICY", filepath.Join(dir, "none.json"))
	t.Setenv("TMPDIR", t.TempDir())
	return w
}

func (w *world) must(err error) {
	w.Helper()
	if err != nil {
		w.Fatal(err)
	}
}

func (w *world) dial(context.Context, string) (*containerd.Client, error) {
	return containerd.New("", containerd.WithServices(containerd.WithContentStore(w.db.ContentStore()),
		containerd.WithImageStore(metadata.NewImageStore(w.db)), containerd.WithLeasesService(metadata.NewLeaseManager(w.db)),
		containerd.WithIntrospectionService(daemon{})))
}

// daemon is this process in containerd's place.
type daemon struct{ introspection.Service }

func (daemon) Server(context.Context) (*introspectionapi.ServerResponse, error) {
	return &introspectionapi.ServerResponse{Pid: uint64(os.Getpid())}, nil
}

func (w *world) client() *containerd.Client {
	w.Helper()
	c, err := w.dial(w.ctx, "")
	w.must(err)
	return c
}

// cracctl runs a command as somebody would who reads what it writes at errOut.
func (w *world) cracctl(errOut io.Writer, args ...string) (stdout string, err error) {
	w.Helper()
	cmd := commandFor(w.dial)
	var out bytes.Buffer
	cmd.SetArgs(args)
	cmd.SetOut(&out)
	cmd.SetErr(errOut)
	err = cmd.ExecuteContext(w.ctx)
	return out.String(), err
}

func (w *world) put(mediaType string, v any) ocispec.Descriptor {
	w.Helper()
	data, ok := v.([]byte)
	if !ok {
		var err error
		data, err = json.Marshal(v)
		w.must(err)
	}
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	w.must(content.WriteBlob(w.ctx, w.db.ContentStore(), desc.Digest.String(), bytes.NewReader(data), desc))
	return desc
}

func (w *world) name(ref string, target ocispec.Descriptor) {
	w.Helper()
	store, img := metadata.NewImageStore(w.db), coreimages.Image{Name: ref, Target: target}
	_, err := store.Create(w.ctx, img)
	if errdefs.IsAlreadyExists(err) {
		_, err = store.Update(w.ctx, img)
	}
	w.must(err)
}

// image makes an image of one layer, which its history says this of.
func (w *world) image(ref, createdBy string) ocispec.Descriptor {
	w.Helper()
	layer := tarOf(w.T, map[string]string{"file": ref})
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Layers: []ocispec.Descriptor{w.put(ocispec.MediaTypeImageLayer, layer)}}
	m.SchemaVersion = 2
	m.Config = w.put(ocispec.MediaTypeImageConfig, ocispec.Image{
		Platform: platforms.DefaultSpec(), RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromBytes(layer)}},
		History: []ocispec.History{{CreatedBy: createdBy}},
	})
	desc := w.put(ocispec.MediaTypeImageManifest, m)
	w.name(ref, desc)
	return desc
}

const spec = `{"ociVersion":"1.2.0","process":{"args":["/bin/sh"],"cwd":"/","user":{}},"root":{"path":"rootfs"},"linux":{}}`

// checkpoint makes a checkpoint image of the dump that images/inspect keeps, and so
// many bytes more, on top of the image base:1.
func (w *world) checkpoint(ref string, more int, change func(*oci.Manifest)) {
	w.Helper()
	dump := w.TempDir()
	w.must(os.CopyFS(dump, os.DirFS(filepath.Join("..", "..", "images", "inspect", "testdata", "dump"))))
	for name, size := range pagesOf {
		w.must(os.WriteFile(filepath.Join(dump, name), make([]byte, size), 0o600))
	}
	if more > 0 {
		data := make([]byte, more)
		_, _ = rand.Read(data)
		w.must(os.WriteFile(filepath.Join(dump, "ghost-file-1.img"), data, 0o600))
	}
	r := build.AdoptRequest{Ref: ref, Base: "base:1", DumpDir: dump, Spec: []byte(spec), Changes: func(out io.Writer) error {
		_, err := out.Write(tarOf(w.T, map[string]string{"changed": "1"}))
		return err
	}}
	images.ThisHost(40201).Describe(&r.Manifest)
	r.Manifest.Created = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	r.Manifest.Container = oci.Container{ID: "c", Args: []string{"/bin/sh"}}
	if change != nil {
		change(&r.Manifest)
	}
	_, err := build.Adopt(w.ctx, w.client(), r, func(build.Event) {})
	w.must(err)
}

// pagesOf are the sizes of the memory that the dump's page maps name.
var pagesOf = map[string]int{"pages-1.img": 77824, "pages-2.img": 65536, "pages-3.img": 61440}

func tarOf(t *testing.T, files map[string]string) []byte {
	t.Helper()
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for name, data := range files {
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o600, Size: int64(len(data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(tw, data); err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

// What whoever made an image or an archive wrote into it does nothing to a terminal, and makes no
// line that would pass for one of ours.
func TestHostileText(t *testing.T) {
	const evil = "evil\x1b]0;title\a\u009b2J\u202eX\x7f\nFAKE line\tcolumn"
	// The manifest of a checkpoint cannot have all of it.
	shown := strings.NewReplacer("\x1b", "", "\a", "", "\n", "", "\t", "", "\x7f", "", "\u009b", "").Replace(evil)
	w := newWorld(t)
	w.image("base:1", "base "+evil)
	w.checkpoint("hostile:1", 0, func(m *oci.Manifest) {
		m.Container.ID, m.Container.Hostname, m.Container.Cwd = shown, shown, shown
		m.Container.Args = []string{evil, evil}
		m.Host.Kernel, m.Host.CPU.Model = shown, shown
		m.Mounts = []oci.Mount{{Destination: "/" + shown, Type: "bind"}}
	})
	w.checkpoint("other:1", 0, nil)
	// Annotations nobody has checked.
	img, err := w.client().GetImage(w.ctx, "hostile:1")
	w.must(err)
	var m ocispec.Manifest
	data, err := content.ReadBlob(w.ctx, w.db.ContentStore(), img.Target())
	w.must(err)
	w.must(json.Unmarshal(data, &m))
	for k := range m.Annotations {
		if strings.Contains(k, "base.name") || strings.Contains(k, "cpu.model") || strings.Contains(k, "requires") {
			m.Annotations[k] = evil
		}
	}
	w.name("annotated:1", w.put(ocispec.MediaTypeImageManifest, m))

	dir := t.TempDir()
	file := func(name string, files map[string]string) string {
		name = filepath.Join(dir, name)
		w.must(os.WriteFile(name, tarOf(t, files), 0o600))
		return name
	}
	asJSON, err := json.Marshal(evil)
	w.must(err)

	commands := map[string]bool{"ls": true, "history": true, "diff": true, "flatten": true, "export": true, "import": true} // that must do what they are asked
	for _, args := range [][]string{
		{"ls"},
		{"ls", "-q"},
		{"ls", "--format", "json"},
		{"ls", "--format", "{{.Base}}"},
		{"history", "hostile:1"},
		{"history", "base:1"},
		{"history", "hostile:1", "--format", "json"},
		{"history", "hostile:1", "--format", "{{.CreatedBy}}"},
		{"inspect", "hostile:1"},
		{"inspect", "--full", "hostile:1"},
		{"inspect", "hostile:1", "--format", "json"},
		{"inspect", "annotated:1"},
		{"verify", "hostile:1"},
		{"verify", "annotated:1"},
		{"diff", "hostile:1", "other:1"},
		{"diff", "hostile:1", "other:1", "--format", "json"},
		{"flatten", "hostile:1", "flat:1"},
		{"flatten", "annotated:1", "flat:1"},
		{"export", "--to", "containerd", "hostile:1", "native:1"},
		{"import", "native:1", "imported:1"},
		{"inspect", "imported:1"},
		{"export", "--to", "podman", "hostile:1", filepath.Join(dir, "exported")},
		{"import", filepath.Join(dir, "exported"), "imported:2"},
		{"import", file("escaping", map[string]string{"../" + evil: ""}), "imported:3"},
		{"import", file("no-file", map[string]string{"volumes/" + evil + ".tar": "", "checkpoint/pre\x1b\n.img": "", "config.dump": `{"id":` + string(asJSON) + `}`}), "imported:3"},
		{"import", file("no-json", map[string]string{"spec.dump": `{}`, "config.dump": "{" + evil}), "imported:3"},
		{"inspect", "no-such:1"},
		{"rm", evil},
	} {
		var errOut bytes.Buffer
		out, err := w.cracctl(&errOut, args...)
		if err != nil { // as main shows it
			printError(&errOut, err)
		}
		for _, text := range []string{out, errOut.String()} {
			if i := strings.IndexFunc(text, func(r rune) bool { return r < ' ' && r != '\n' && r != '\t' || r >= 0x7f && r <= 0x9f || r == '\u202e' }); i >= 0 {
				t.Errorf("%q writes %q", args, text[i:min(i+40, len(text))])
			}
		}
		if commands[args[0]] && err != nil && !strings.HasPrefix(args[len(args)-1], "imported:3") {
			t.Errorf("%q: %v", args, err)
		}
		templated := strings.Contains(strings.Join(args, " "), "{{")
		if !templated && err == nil && strings.Contains(out, "\nFAKE") {
			t.Errorf("%q writes a line of somebody else's:\n%s", args, out)
		}
	}
}

func TestCarried(t *testing.T) {
	got := carried(&convert.Report{Taken: []string{"a\x1b"}, Left: []string{"b\nTaken       c"}})
	if want := "Taken       a\\u001b\nNot taken   b\\nTaken       c\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

// Every command that is shown tells what it is for, with an example that it takes, and what is
// wrong with what it was asked: what, why, and the way out.
func TestEveryCommand(t *testing.T) {
	w := newWorld(t)
	w.image("localhost/plain:1", "plain")
	public := publicKey(t)
	for _, c := range commandFor(w.dial).Commands() {
		if c.Hidden || c.Name() == "help" || c.Name() == "completion" { // the last two are cobra's
			continue
		}
		t.Run(c.Name(), func(t *testing.T) {
			if c.Long == "" || c.Example == "" {
				t.Error("it has no text or no example")
			}
			for line := range strings.Lines(c.Example) {
				args := strings.Fields(line)
				if len(args) < 2 || args[0] != "cracctl" || args[1] != c.Name() {
					continue // of another tool, or command
				}
				for i, a := range args {
					if strings.HasPrefix(a, "'") || a == "|" || a == "#" {
						args = args[:i] // what follows is the shell's
						break
					}
				}
				found, rest, err := commandFor(w.dial).Find(args[1:])
				if err != nil {
					t.Error(err)
				} else if err := found.ParseFlags(rest); err != nil && !strings.Contains(err.Error(), "needs an argument: --format") {
					t.Errorf("%s: %v", line, err)
				}
			}
			tt, ok := failing[c.Name()]
			if !ok {
				t.Fatal("this test does not know what the command takes")
			}
			if tt == nil {
				return
			}
			check := func(what string, dial func(context.Context, string) (*containerd.Client, error), image string, want ...string) {
				t.Helper()
				cmd := commandFor(dial)
				var out bytes.Buffer
				cmd.SetOut(&out)
				cmd.SetErr(&out)
				cmd.SetArgs(append([]string{c.Name()}, strings.Fields(strings.NewReplacer("IMAGE", image, "KEY", public).Replace(strings.Join(tt, " ")))...))
				err := cmd.ExecuteContext(w.ctx)
				for _, s := range want {
					if err == nil || !strings.Contains(err.Error(), s) {
						t.Errorf("%s: it says %v, and not %q", what, err, s)
					}
				}
			}
			check("no containerd", connect, "localhost/plain:1", "/no.sock", "no such file or directory", "--address")
			if !strings.Contains(strings.Join(tt, " "), "IMAGE") {
				return
			}
			if c.Name() != "import" { // it may be a file
				check("no image", w.dial, "localhost/no-such:1", "localhost/no-such:1", "in namespace test", "cracctl ls")
			}
			switch c.Name() {
			case "history", "push", "sign": // any image will do
			case "rm":
				check("no checkpoint", w.dial, "localhost/plain:1", "localhost/plain:1", "no checkpoint image", "ctr images rm")
			case "import":
				check("no image", w.dial, "localhost/no-such:1", "localhost/no-such:1", "neither an image nor a file", "--help")
				check("no checkpoint", w.dial, "localhost/plain:1", "localhost/plain:1", "ordinary image", "--help")
			default:
				check("no checkpoint", w.dial, "localhost/plain:1", "localhost/plain:1", "no checkpoint in this image", "cracctl ls", "cracctl checkpoint")
			}
		})
	}
}

// failing are arguments of each command that asks containerd for something.
var failing = map[string][]string{
	"check": {"c"}, "checkpoint": {"c", "localhost/new:1"}, "trace": {"c"}, "ls": {}, "events": {},
	"inspect": {"IMAGE"}, "verify": {"IMAGE"}, "history": {"IMAGE"}, "rm": {"IMAGE"}, "diff": {"IMAGE", "IMAGE"}, "flatten": {"IMAGE", "new:1"},
	"tune": {"IMAGE", "new:1", "--root", "/none"}, "import": {"IMAGE", "new:1"}, "export": {"--to", "containerd", "IMAGE", "new:1"},
	"encrypt": {"IMAGE", "new:1", "--encrypt-to", "jwe:KEY"}, "push": {"IMAGE"}, "sign": {"--key", "k", "--cert", "c", "IMAGE"},
	"doctor": nil, "version": nil,
}
