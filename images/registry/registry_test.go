package registry

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
)

// newStore is containerd's content store as its clients see it.
func newStore(t *testing.T) content.Store {
	t.Helper()
	dir := t.TempDir()
	blobs, err := local.NewStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	db, err := bolt.Open(filepath.Join(dir, "meta.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return metadata.NewDB(db, blobs, nil).ContentStore()
}

func contextOf(t *testing.T) context.Context {
	return namespaces.WithNamespace(t.Context(), "test")
}

// image stores one whose layers are these bytes, which need not be layers.
func image(t *testing.T, layers ...[]byte) (content.Store, ocispec.Descriptor) {
	t.Helper()
	store := newStore(t)
	put := func(mediaType string, data []byte) ocispec.Descriptor {
		desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
		if err := content.WriteBlob(contextOf(t), store, desc.Digest.String(), bytes.NewReader(data), desc); err != nil {
			t.Fatal(err)
		}
		return desc
	}
	object := func(mediaType string, v any) ocispec.Descriptor {
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return put(mediaType, data)
	}
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest}
	m.SchemaVersion = 2
	config := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"}, RootFS: ocispec.RootFS{Type: "layers"}}
	for _, l := range layers {
		m.Layers = append(m.Layers, put(ocispec.MediaTypeImageLayer, l))
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromBytes(l))
	}
	m.Config = object(ocispec.MediaTypeImageConfig, config)
	return store, object(ocispec.MediaTypeImageManifest, m)
}

// hostsTOML makes a host directory that says this of a registry.
func hostsTOML(t *testing.T, host, text string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, host), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, host, "hosts.toml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestPush(t *testing.T) {
	srv := httptest.NewServer(ggcr.New(ggcr.Logger(quiet)))
	defer srv.Close()
	ref := strings.TrimPrefix(srv.URL, "http://") + "/a/app:warm"

	big := bytes.Repeat([]byte("memory"), 1<<18)
	store, target := image(t, []byte("base"), big)
	var (
		mu   sync.Mutex
		last Progress
	)
	p, err := Push(contextOf(t), Config{}, store, ref, target, func(p Progress) {
		mu.Lock()
		defer mu.Unlock()
		if p.Done < last.Done || p.Done > p.Total || p.Uploaded > p.Done {
			t.Errorf("%+v after %+v", p, last)
		}
		last = p
	})
	if err != nil {
		t.Fatal(err)
	}
	if p != last || p.Done != p.Total || p.Uploaded != p.Total || p.Total < int64(len(big)) {
		t.Errorf("%+v, last reported %+v", p, last)
	}
	// A client that is not containerd's finds it whole.
	tag, err := name.NewTag(ref)
	if err != nil {
		t.Fatal(err)
	}
	desc, err := remote.Get(tag)
	if err != nil || desc.Digest.String() != target.Digest.String() {
		t.Fatalf("%v, %v, want %s", desc, err, target.Digest)
	}
	img, err := desc.Image()
	if err != nil {
		t.Fatal(err)
	}
	// The layers are no tars, so only what is digested can be checked.
	if err := validate.Image(img, validate.Fast); err != nil {
		t.Error(err)
	}

	// What is there is not sent again, also under another name.
	elsewhere := strings.Replace(ref, "/a/app:", "/b/app:", 1)
	for again, want := range map[string]int64{ref: 0, ref + "-2": target.Size, elsewhere: target.Size} {
		p, err := Push(contextOf(t), Config{}, store, again, target, nil)
		if err != nil || p.Uploaded != want || p.Done != p.Total {
			t.Errorf("%s: %+v, %v, want %d uploaded", again, p, err, want)
		}
	}
}

func TestPushCredentials(t *testing.T) {
	// As registries do: a challenge, and a token for whoever has the password.
	inner := ggcr.New(ggcr.Logger(quiet))
	var srv *httptest.Server
	srv = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.URL.Path == "/token":
			user, password, _ := r.BasicAuth()
			if user != "ann" || password != "secret" {
				w.WriteHeader(http.StatusUnauthorized)
				return
			}
			fmt.Fprint(w, `{"token":"t0"}`)
		case r.Header.Get("Authorization") != "Bearer t0":
			w.Header().Set("WWW-Authenticate", fmt.Sprintf(`Bearer realm="%s/token",service="test"`, srv.URL))
			w.WriteHeader(http.StatusUnauthorized)
		default:
			inner.ServeHTTP(w, r)
		}
	}))
	defer srv.Close()
	host := strings.TrimPrefix(srv.URL, "http://")
	store, target := image(t, []byte("layer"))

	login := func(config string) Config {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
		return Config{DockerConfig: dir}
	}
	auth := func(s string) string {
		return fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, host, base64.StdEncoding.EncodeToString([]byte(s)))
	}
	for what, tt := range map[string]struct {
		config Config
		want   string
	}{
		"right":          {login(auth("ann:secret")), ""},
		"wrong password": {login(auth("ann:guess")), "nerdctl login " + host},
		"nobody":         {login(`{}`), "nerdctl login " + host},
		"no directory":   {Config{DockerConfig: "/does/not/exist"}, "nerdctl login " + host},
		"not JSON":       {login(`{`), "config.json"},
		"no such helper": {login(fmt.Sprintf(`{"credHelpers":{%q:"no-such-helper"}}`, host)), "no-such-helper"},
	} {
		_, err := Push(contextOf(t), tt.config, store, host+"/a:"+strings.ReplaceAll(what, " ", "-"), target, nil)
		if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
			t.Errorf("%s: %v, want an error with %q", what, err, tt.want)
		}
		if err != nil && strings.Contains(err.Error(), "guess") {
			t.Errorf("%s: the error gives the password: %v", what, err)
		}
	}
}

func TestPushTransport(t *testing.T) {
	store, target := image(t, []byte("layer"))
	encrypted := httptest.NewTLSServer(ggcr.New(ggcr.Logger(quiet)))
	defer encrypted.Close()
	encrypted.Config.ErrorLog = quiet
	plain := httptest.NewServer(ggcr.New(ggcr.Logger(quiet)))
	defer plain.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: encrypted.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	// A name that is no loopback address for a client, though it leads to one.
	const far = "registry.example"
	for what, tt := range map[string]struct {
		host  string
		hosts string // hosts.toml
		want  string
	}{
		"plain http said":         {far, fmt.Sprintf("server = %q\n[host.%[1]q]\n", plain.URL), ""},
		"authority said":          {far, fmt.Sprintf("server = %q\n[host.%[1]q]\nca = %q\n", encrypted.URL, ca), ""},
		"plain http, loopback":    {strings.TrimPrefix(plain.URL, "http://"), "", ""},
		"nothing there":           {"127.0.0.1:1", "", "is the registry running"},
		"hosts.toml is not TOML":  {far, "[", "hosts.toml is not"},
		"plain http, said as TLS": {far, fmt.Sprintf("server = %q\n", strings.Replace(plain.URL, "http:", "https:", 1)), "does not speak https"},
		"unknown authority":       {far, fmt.Sprintf("server = %q\n", encrypted.URL), "ca = "},
	} {
		t.Run(what, func(t *testing.T) {
			var c Config
			if tt.hosts != "" {
				c.HostDirs = []string{t.TempDir(), hostsTOML(t, tt.host, tt.hosts)}
			}
			_, err := Push(contextOf(t), c, store, tt.host+"/a/b:c", target, nil)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("%v, want an error with %q", err, tt.want)
			}
		})
	}
}

// nerdctl's insecure_registry is for registries without a certificate, or with one that
// nobody knows.
func TestInsecure(t *testing.T) {
	store, target := image(t, []byte("layer"))
	encrypted := httptest.NewTLSServer(ggcr.New(ggcr.Logger(quiet)))
	defer encrypted.Close()
	encrypted.Config.ErrorLog = quiet
	plain := httptest.NewServer(ggcr.New(ggcr.Logger(quiet)))
	defer plain.Close()
	for _, srv := range []*httptest.Server{encrypted, plain} {
		// An address that leads here, and is no loopback address for a client.
		ref := "0.0.0.0:" + srv.URL[strings.LastIndex(srv.URL, ":")+1:] + "/a/b:c"
		if _, err := Push(contextOf(t), Config{}, store, ref, target, nil); err == nil {
			t.Errorf("%s takes a push that is not secure", srv.URL)
		}
		insecure := Config{Insecure: true}
		if _, err := Push(contextOf(t), insecure, store, ref, target, nil); err != nil {
			t.Errorf("%s: %v", srv.URL, err)
		}
		r, err := insecure.Repository(contextOf(t), ref)
		if err != nil {
			t.Fatal(err)
		}
		if found, err := r.Resolve(contextOf(t), "c"); err != nil || found.Digest != target.Digest || r.PlainHTTP != (srv == plain) {
			t.Errorf("%s: %v, %v, plain http: %v", srv.URL, found, err, r.PlainHTTP)
		}
	}
}

func TestPushMissing(t *testing.T) {
	srv := httptest.NewServer(ggcr.New(ggcr.Logger(quiet)))
	defer srv.Close()
	host := strings.TrimPrefix(srv.URL, "http://")
	store, target := image(t, []byte("base"), []byte("memory"))
	base := digest.FromString("base")
	if _, err := Push(contextOf(t), Config{}, store, host+"/with:1", target, nil); err != nil {
		t.Fatal(err)
	}
	if err := store.Delete(contextOf(t), base); err != nil {
		t.Fatal(err)
	}
	// Where the registry has it, nobody needs it.
	if _, err := Push(contextOf(t), Config{}, store, host+"/with:2", target, nil); err != nil {
		t.Error(err)
	}
	other := httptest.NewServer(ggcr.New(ggcr.Logger(quiet)))
	defer other.Close()
	_, err := Push(contextOf(t), Config{}, store, strings.TrimPrefix(other.URL, "http://")+"/without:1", target, nil)
	if err == nil || !strings.Contains(err.Error(), base.String()) || !strings.Contains(err.Error(), "ctr content fetch") {
		t.Errorf("got %v, want the missing layer and what to do", err)
	}
	if _, err := Push(contextOf(t), Config{}, store, "app:warm", target, nil); err == nil || !strings.Contains(err.Error(), "registry") {
		t.Errorf("a name without a registry: %v", err)
	}
}

// An index may list what only the registry has.
func TestPushIndex(t *testing.T) {
	srv := httptest.NewServer(ggcr.New(ggcr.Logger(quiet)))
	defer srv.Close()
	ref := strings.TrimPrefix(srv.URL, "http://") + "/a/app:warm"
	_, elsewhere := image(t, []byte("for another platform"))
	elsewhere.Platform = &ocispec.Platform{OS: "linux", Architecture: "s390x"}
	store, here := image(t, []byte("base"))
	here.Platform = &ocispec.Platform{OS: "linux", Architecture: "amd64"}
	data, err := json.Marshal(ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{elsewhere, here}})
	if err != nil {
		t.Fatal(err)
	}
	index := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: digest.FromBytes(data), Size: int64(len(data))}
	if err := content.WriteBlob(contextOf(t), store, "index", bytes.NewReader(data), index); err != nil {
		t.Fatal(err)
	}

	_, err = Push(contextOf(t), Config{}, store, ref, index, nil)
	if err == nil || !strings.Contains(err.Error(), elsewhere.Digest.String()) || !strings.Contains(err.Error(), "linux/s390x") || !strings.Contains(err.Error(), "--all-platforms") {
		t.Errorf("an index of which neither side has all: %v", err)
	}
	if list, err := List(contextOf(t), Config{}, ref); err != nil || len(list.Manifests) > 0 {
		t.Errorf("a refused push leaves %+v, %v", list, err)
	}

	other, target := image(t, []byte("for another platform"))
	if _, err := Push(contextOf(t), Config{}, other, ref+"-s390x", target, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := Push(contextOf(t), Config{}, store, ref, index, nil); err != nil {
		t.Fatal(err)
	}
	list, err := List(contextOf(t), Config{}, ref)
	if err != nil || len(list.Manifests) != 2 || list.Manifests[0].Digest != elsewhere.Digest || list.Manifests[1].Digest != here.Digest {
		t.Errorf("the registry lists %+v, %v", list, err)
	}
}

// What a registry says is not believed: an object must have the digest it was asked for by.
func TestListRefuses(t *testing.T) {
	index := []byte(`{"schemaVersion":2,"manifests":[]}`)
	for name, tt := range map[string]struct {
		body []byte
		want string
	}{
		"another object":  {[]byte(`{"schemaVersion":2,"manifests":[{}]}`), "not what"},
		"an endless one":  {bytes.Repeat([]byte(" "), maxObject+1), "longer than"},
		"what is no JSON": {[]byte(`{"manifests":`), "JSON"},
	} {
		t.Run(name, func(t *testing.T) {
			says := digest.FromBytes(index)
			if name == "what is no JSON" {
				says = digest.FromBytes(tt.body)
			}
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
				w.Header().Set("Docker-Content-Digest", says.String())
				if r.Method == http.MethodHead { // without a length, the client would take its digest from what it gets
					w.Header().Set("Content-Length", strconv.Itoa(len(tt.body)))
					return
				}
				_, _ = w.Write(tt.body)
			}))
			defer srv.Close()
			list, err := List(contextOf(t), Config{}, strings.TrimPrefix(srv.URL, "http://")+"/a:1")
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %+v, %v; want an error with %q", list, err, tt.want)
			}
		})
	}
}

func TestDefaultConfig(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "nerdctl.toml")
	t.Setenv("NERDCTL_TOML", file)
	c, err := DefaultConfig()
	if err != nil || len(c.HostDirs) != 2 || !strings.HasSuffix(c.HostDirs[0], "/containerd/certs.d") || c.DockerConfig == "" {
		t.Errorf("without a file: %+v, %v", c, err)
	}
	for text, want := range map[string]string{
		"hosts_dir = ['/a', '/b']\ninsecure_registry = true\n": "[/a /b] true",
		"namespace = 'x'\n": fmt.Sprint(c.HostDirs, " false"),
		"hosts_dir = []\n":  "[] false",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if c, err := DefaultConfig(); err != nil || fmt.Sprint(c.HostDirs, c.Insecure) != want {
			t.Errorf("%q: %+v, %v, want %s", text, c, err, want)
		}
	}
	if err := os.WriteFile(file, []byte("address = 'unix:///x'\nnamespace = 'y'\nsnapshotter = 'z'\ndebug = true\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if s, err := ReadSettings(); err != nil || s.Address != "unix:///x" || s.Namespace != "y" || s.Snapshotter != "z" {
		t.Errorf("%+v, %v", s, err)
	}
	if err := os.WriteFile(file, []byte("hosts_dir = 7"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := DefaultConfig(); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("a wrong file: %v", err)
	}
}
