package oci

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

var update = flag.Bool("update", false, "write the golden files anew")

func digestOf(c string) string { return "sha256:" + strings.Repeat(c, 64) }

func sample() *Manifest {
	return &Manifest{
		Version:  Version,
		Name:     "registry.example/app:warm",
		Created:  time.Date(2026, 3, 4, 5, 6, 7, 891011, time.FixedZone("", 3600)),
		Platform: Platform{OS: "linux", Architecture: "amd64"},
		Host: Host{
			Kernel: "6.12.1", PageSize: 4096, CgroupVersion: 2,
			CPU: CPU{Vendor: "GenuineIntel", Model: "Xeon <E5>", Features: []string{"sse4_2", "avx", "avx2"}},
		},
		CRIU: CRIU{Version: 40101, Minimum: 40100},
		Container: Container{
			ID: "web", Hostname: "web-1", Args: []string{"/bin/app", "--config=a&b"}, Cwd: "/srv", UID: 1000, GID: 1000,
			AdditionalGids: []uint32{10, 4}, Namespaces: []string{"pid", "mount", "network"},
			UIDMappings: []IDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}},
			GIDMappings: []IDMapping{{ContainerID: 0, HostID: 100000, Size: 65536}},
			LSM:         &LSM{Name: "apparmor", Profiles: []string{"shop", "default"}},
		},
		Requires: []string{RequireUserNamespace, RequireSeccomp},
		Mounts:   []Mount{{Destination: "/proc", Type: "proc"}, {Destination: "/dev", Type: "tmpfs"}},
		Base:     Base{Name: "registry.example/app:1", Digest: digestOf("a"), Args: []string{"/bin/app"}},
		Files: []File{
			{Name: "pages-1.img", Size: 1 << 33, Digest: digestOf("b")},
			{Name: "core-1.img", Size: 7, Digest: digestOf("c")},
		},
	}
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs; got:\n%s", path, got)
	}
}

func TestManifestGolden(t *testing.T) {
	got, err := sample().Encode()
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "manifest.json", got)

	back, err := DecodeManifest(bytes.NewReader(got))
	if err != nil {
		t.Fatal(err)
	}
	again, err := back.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, again) {
		t.Errorf("decoded and encoded again it is:\n%s", again)
	}
}

func TestAnnotationsGolden(t *testing.T) {
	m := sample()
	m.TCPEstablished = true
	if _, err := m.Encode(); err != nil { // sorts
		t.Fatal(err)
	}
	got, err := json.MarshalIndent(Annotations(m), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "annotations.json", append(got, '\n'))
}

// The specification has the golden file as its example, and names every field.
func TestSpecification(t *testing.T) {
	doc, err := os.ReadFile(filepath.Join("..", "docs", "checkpoint-image.md"))
	if err != nil {
		t.Fatal(err)
	}
	example, err := os.ReadFile(filepath.Join("testdata", "manifest.json"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Contains(doc, []byte("```json\n"+string(example)+"```\n")) {
		t.Error("the example in the specification is not testdata/manifest.json")
	}
	var walk func(prefix string, typ reflect.Type)
	walk = func(prefix string, typ reflect.Type) {
		for i := range typ.NumField() {
			f := typ.Field(i)
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			inner := f.Type
			for inner.Kind() == reflect.Pointer {
				inner = inner.Elem()
			}
			switch {
			case inner.Kind() == reflect.Struct && inner != reflect.TypeFor[time.Time]():
				walk(prefix+name+".", inner)
			case inner.Kind() == reflect.Slice && inner.Elem().Kind() == reflect.Struct:
				for k := range inner.Elem().NumField() {
					part, _, _ := strings.Cut(inner.Elem().Field(k).Tag.Get("json"), ",")
					if !bytes.Contains(doc, []byte("`"+part+"`")) {
						t.Errorf("the specification does not name %s of %s%s", part, prefix, name)
					}
				}
				fallthrough
			default:
				if !bytes.Contains(doc, []byte("`"+prefix+name+"`")) {
					t.Errorf("the specification does not name %s%s", prefix, name)
				}
			}
		}
	}
	walk("", reflect.TypeFor[Manifest]())
	for _, r := range append(KernelFeatures(), RequireParent) {
		if !bytes.Contains(doc, []byte("`"+r+"`")) {
			t.Errorf("the specification does not name the requirement %s", r)
		}
	}
	for key := range Annotations(sample()) {
		short := strings.TrimPrefix(strings.TrimPrefix(key, ImagePrefix), "org.criu.checkpoint.")
		if !strings.HasPrefix(key, "org.opencontainers.") && !bytes.Contains(doc, []byte("`"+short+"`")) {
			t.Errorf("the specification does not name the annotation %s", key)
		}
	}
}

// Each line of the specification that has a MUST, by a part of it, with a test that holds
// us to it.
var musts = map[string]string{
	"MUST, MUST NOT, SHOULD and MAY":           "TestSpecification", // says what the words mean
	"A reader MAY ignore it, and MUST go on":   "TestWorkingSetInvalid",
	"MUST NOT take such an image for one":      "TestBuildEncrypted",
	"MUST be there and not be empty":           "TestDecodeManifestRefuses",
	"**`platform.os`**":                        "TestGate",
	"**`host.pageSize`**":                      "TestGate",
	"**`host.cgroupVersion`**":                 "TestGate",
	"`host.cpu.features`":                      "TestGate",
	"**`container.args`**":                     "TestGate",
	"`container.uid`":                          "TestGate",
	"`container.terminal`":                     "TestGate",
	"`container.namespaces`":                   "TestGate",
	"`container.uidMappings`":                  "TestGate",
	"`container.lsm.name`":                     "TestGateHost",
	"`container.lsm.profiles`":                 "TestGate",
	"| `mounts`":                               "TestGate",
	"MUST refuse another major version":        "TestDecodeManifestRefuses",
	"MUST ignore fields that it does not know": "TestDecodeManifestText",
	"MUST NOT use a field for anything else":   "TestManifestGolden",
	"A reader MUST also refuse":                "TestDecodeManifestRefuses",
	"MUST be quoted where they are shown":      "TestQuoted",
	"MUST refuse a dump with a file":           "TestSameWords",
	"and those below. A writer MUST NOT set":   "TestAnnotationsGolden",
	"A writer MUST set it":                     "TestBuild",
	"that requires signatures MUST compare it": "TestJudge",
}

func TestMusts(t *testing.T) {
	doc, err := os.ReadFile(filepath.Join("..", "docs", "checkpoint-image.md"))
	if err != nil {
		t.Fatal(err)
	}
	var tests strings.Builder
	for _, dir := range []string{".", "../images", "../cmd/cracctl", "../runtime/pager"} {
		err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, "_test.go") {
				return err
			}
			data, err := os.ReadFile(path)
			tests.Write(data)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	for line := range strings.Lines(string(doc)) {
		if !strings.Contains(line, "MUST") {
			continue
		}
		said := slices.DeleteFunc(slices.Collect(maps.Keys(musts)), func(part string) bool { return !strings.Contains(line, part) })
		if len(said) == 0 {
			t.Errorf("no test is named for: %s", line)
		}
		for _, part := range said {
			if name := musts[part]; !strings.Contains(tests.String(), "\nfunc "+name+"(") {
				t.Errorf("there is no %s: %s", name, line)
			}
		}
	}
}

// What a scheduler reads is what the builder wrote.
func TestFactsOf(t *testing.T) {
	m := sample()
	m.TCPEstablished = true
	if _, err := m.Encode(); err != nil { // sorts
		t.Fatal(err)
	}
	got, ok := FactsOf(Annotations(m))
	if !ok {
		t.Fatal("not known to be a checkpoint image")
	}
	want := &Manifest{
		Version: m.Version, Created: m.Created.Truncate(time.Second), Platform: m.Platform, Host: m.Host, CRIU: m.CRIU, TCPEstablished: true,
		Container: Container{ID: m.Container.ID, LSM: &LSM{Name: "apparmor"}}, Base: Base{Name: m.Base.Name, Digest: m.Base.Digest}, Requires: m.Requires,
		Files: []File{{Size: m.Files[0].Size + m.Files[1].Size}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	if _, ok := FactsOf(map[string]string{"org.criu.checkpoint.engine.name": "podman"}); ok {
		t.Error("another engine's image passes for ours")
	}
	all := Annotations(m)
	all[AnnotationBaseName] = "evil\x1b[2J"
	if got, _ := FactsOf(all); got.Base.Name != "" {
		t.Errorf("the name of the base is %q", got.Base.Name)
	}
	// Anybody may write annotations.
	odd := map[string]string{AnnotationVersion: "1", AnnotationPageSize: "-4", AnnotationCRIUMinimum: "4.x", AnnotationDumpBytes: "many", annotationCreated: "now"}
	if got, ok := FactsOf(odd); !ok || got.Host.PageSize != 0 || got.CRIU.Minimum != 0 || got.Files[0].Size != 0 || !got.Created.IsZero() {
		t.Errorf("%+v", got)
	}
}

func TestAnnotationsAreNoOptions(t *testing.T) {
	if _, err := ParseOptions(Annotations(sample()), nil); err != nil {
		t.Errorf("an image's annotations copied to a container: %v", err)
	}
	for k, v := range Annotations(&Manifest{}) {
		if v == "" {
			t.Errorf("%s is empty", k)
		}
	}
}

// What is long in sum, but in no part, is fine, and so is what an argument holds.
func TestDecodeManifestTakes(t *testing.T) {
	m := sample()
	m.Container.Args = append(m.Container.Args, "two\nlines", strings.Repeat("a", maxString))
	m.Host.CPU.Features = slices.Repeat([]string{strings.Repeat("b", 1<<10)}, 1<<8)
	m.Platform.Variant = "v3"
	data, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := DecodeManifest(bytes.NewReader(data)); err != nil {
		t.Error(err)
	}
}

func TestDecodeManifestRefuses(t *testing.T) {
	long := strings.Repeat("a", maxString+1)
	for _, tt := range []struct {
		name   string
		change func(*Manifest)
		want   string
	}{
		{"later version", func(m *Manifest) { m.Version = "2" }, `"2"`},
		{"no version", func(m *Manifest) { m.Version = "" }, `""`},
		{"version that begins alike", func(m *Manifest) { m.Version = "10" }, `"10"`},
		{"no platform", func(m *Manifest) { m.Platform.Architecture = "" }, "platform"},
		{"odd page size", func(m *Manifest) { m.Host.PageSize = 4097 }, "page size"},
		{"tiny pages", func(m *Manifest) { m.Host.PageSize = 2048 }, "page size"},
		{"huge pages", func(m *Manifest) { m.Host.PageSize = 1 << 40 }, "page size"},
		{"no page size", func(m *Manifest) { m.Host.PageSize = 0 }, "page size"},
		{"cgroup version", func(m *Manifest) { m.Host.CgroupVersion = 3 }, "cgroup"},
		{"CRIU version", func(m *Manifest) { m.CRIU.Minimum = 0 }, "CRIU"},
		{"no arguments", func(m *Manifest) { m.Container.Args = nil }, "arguments"},
		{"no files", func(m *Manifest) { m.Files = nil }, "no files"},
		{"negative size", func(m *Manifest) { m.Files[0].Size = -1 }, "size -1"},
		{"short digest", func(m *Manifest) { m.Files[0].Digest = "sha256:abc" }, "digest"},
		{"other algorithm", func(m *Manifest) { m.Files[0].Digest = "md5:" + strings.Repeat("a", 64) }, "digest"},
		{"upper case digest", func(m *Manifest) { m.Files[0].Digest = "sha256:" + strings.Repeat("A", 64) }, "digest"},
		{"no digest", func(m *Manifest) { m.Files[0].Digest = "" }, "digest"},
		{"base digest", func(m *Manifest) { m.Base.Digest = "latest" }, "base digest"},
		{"twice", func(m *Manifest) { m.Files[1].Name = m.Files[0].Name }, "twice"},
		{"name with a slash", func(m *Manifest) { m.Files[0].Name = "a/b.img" }, "file name"},
		{"name above", func(m *Manifest) { m.Files[0].Name = ".." }, "file name"},
		{"name with a NUL", func(m *Manifest) { m.Files[0].Name = "a\x00.img" }, "file name"},
		{"hidden name", func(m *Manifest) { m.Files[0].Name = ".img" }, "file name"},
		{"option as a name", func(m *Manifest) { m.Files[0].Name = "-rf" }, "file name"},
		{"empty name", func(m *Manifest) { m.Files[0].Name = "" }, "file name"},
		{"long name", func(m *Manifest) { m.Files[0].Name = strings.Repeat("a", 256) }, "file name"},
		{"relative mount", func(m *Manifest) { m.Mounts[0].Destination = "proc" }, "mount destination"},
		{"mount above", func(m *Manifest) { m.Mounts[0].Destination = "/a/../../b" }, "mount destination"},
		{"parent that is not required", func(m *Manifest) { m.Parent = &Parent{Manifest: digestOf("d"), Depth: 1} }, "parent"},
		{"required parent", func(m *Manifest) { m.Requires = append(m.Requires, RequireParent) }, "parent"},
		{"parent too deep", func(m *Manifest) {
			m.Requires, m.Parent = append(m.Requires, RequireParent), &Parent{Manifest: digestOf("d"), Depth: MaxDepth + 1}
		}, "parent"},
		{"parent at no depth", func(m *Manifest) {
			m.Requires, m.Parent = append(m.Requires, RequireParent), &Parent{Manifest: digestOf("d")}
		}, "parent"},
		{"parent without a digest", func(m *Manifest) {
			m.Requires, m.Parent = append(m.Requires, RequireParent), &Parent{Manifest: "x", Depth: 1}
		}, "parent"},
		{"requirement", func(m *Manifest) { m.Requires[0] = "A b" }, "requirement"},
		{"empty requirement", func(m *Manifest) { m.Requires[0] = "" }, "requirement"},
		{"security module", func(m *Manifest) { m.Container.LSM.Name = "" }, "container.lsm"},
		{"no profile", func(m *Manifest) { m.Container.LSM.Profiles = nil }, "container.lsm"},
		{"control characters in a profile", func(m *Manifest) { m.Container.LSM.Profiles[0] = "a\x1bb" }, "control"},
		{"control characters", func(m *Manifest) { m.Container.Hostname = "a\x1b[2Jb" }, "control"},
		{"control characters in a feature", func(m *Manifest) { m.Host.CPU.Features[0] = "a\nb" }, "control"},
		{"control characters in a mount's place", func(m *Manifest) { m.Mounts[0].Destination = "/a\nb" }, "control"},
		{"control characters in a mount's type", func(m *Manifest) { m.Mounts[0].Type = "a\x1b]0;b\a" }, "control"},
		{"control characters of 8 bits", func(m *Manifest) { m.Container.Cwd = "/\u009b2J" }, "control"},
		{"not created", func(m *Manifest) { m.Created = time.Time{} }, "created"},
		{"no operating system", func(m *Manifest) { m.Platform.OS = "" }, "platform"},
		{"no kernel", func(m *Manifest) { m.Host.Kernel = "" }, "host.kernel"},
		{"no cgroup version", func(m *Manifest) { m.Host.CgroupVersion = 0 }, "cgroup"},
		{"no CRIU version", func(m *Manifest) { m.CRIU.Version = 0 }, "CRIU"},
		{"no container", func(m *Manifest) { m.Container.ID = "" }, "container.id"},
		{"long string", func(m *Manifest) { m.Base.Name = long }, "too long"},
		{"long argument", func(m *Manifest) { m.Container.Args[1] = long }, "argument with"},
		{"long argument of the base", func(m *Manifest) { m.Base.Args[0] = long }, "argument with"},
		{"long type of a mount", func(m *Manifest) { m.Mounts[0].Type = long }, "too long"},
		{"long profile", func(m *Manifest) { m.Container.LSM.Profiles[0] = long }, "too long"},
		{"long requirement", func(m *Manifest) { m.Requires[0] = strings.Repeat("a", 65) }, "requirement"},
		{"long list", func(m *Manifest) { m.Container.Args = make([]string, maxList+1) }, "list"},
		{"long list of mounts", func(m *Manifest) { m.Mounts = make([]Mount, maxList+1) }, "list"},
		{"long list of profiles", func(m *Manifest) { m.Container.LSM.Profiles = slices.Repeat([]string{"a"}, maxList+1) }, "container.lsm"},
		{"many files", func(m *Manifest) { m.Files = make([]File, MaxFiles+1) }, "files"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			m := sample()
			tt.change(m)
			data, err := json.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			got, err := DecodeManifest(bytes.NewReader(data))
			if !errors.Is(err, ErrInvalid) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("decode: got error %v, want ErrInvalid with %q", err, tt.want)
			}
			if got != nil {
				t.Errorf("a manifest beside the error: %+v", got)
			}
			if _, err := m.Encode(); !errors.Is(err, ErrInvalid) {
				t.Errorf("encode: got error %v, want ErrInvalid", err)
			}
		})
	}
}

func TestDecodeManifestText(t *testing.T) {
	good, err := sample().Encode()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name string
		text string
		ok   bool
	}{
		{"unknown field", strings.Replace(string(good), `"version"`, `"later": {"x": 1}, "version"`, 1), true},
		{"minor version", strings.Replace(string(good), `"version": "1"`, `"version": "1.7"`, 1), true},
		{"empty", "", false},
		{"not JSON", "\x7fELF", false},
		{"null", "null", false},
		{"cut off", string(good[:len(good)/2]), false},
		{"something after it", string(good) + "{}", false},
		{"wrong type", strings.Replace(string(good), `"version": "1"`, `"version": 1`, 1), false},
		{"too large", string(good) + strings.Repeat(" ", MaxManifestSize), false},
		{"a later version of another shape", `{"version":"2","files":"in a bundle"}`, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := DecodeManifest(strings.NewReader(tt.text))
			if tt.ok && err != nil {
				t.Error(err)
			}
			if !tt.ok && !errors.Is(err, ErrInvalid) {
				t.Errorf("got error %v, want ErrInvalid", err)
			}
		})
	}
}

func FuzzDecodeManifest(f *testing.F) {
	good, err := sample().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"version":"1","files":[{"name":"../x"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := DecodeManifest(bytes.NewReader(data))
		if err != nil {
			return
		}
		for _, file := range m.Files {
			if filepath.Base(file.Name) != file.Name || file.Name == "." || file.Name == ".." || file.Size < 0 {
				t.Fatalf("accepted file %+v", file)
			}
		}
		// What was accepted can be written, and reads back the same.
		out, err := m.Encode()
		if err != nil {
			// Escapes may make it longer than what was read.
			if len(data) > MaxManifestSize/8 {
				return
			}
			t.Fatalf("accepted, but cannot be encoded: %v", err)
		}
		again, err := DecodeManifest(bytes.NewReader(out))
		if err != nil {
			t.Fatalf("encoded, but cannot be decoded: %v", err)
		}
		out2, err := again.Encode()
		if err != nil || !bytes.Equal(out, out2) {
			t.Fatalf("not stable (%v):\n%s\n%s", err, out, out2)
		}
	})
}

// FuzzFactsOf: whatever annotations say, what is read of them can be judged.
func FuzzFactsOf(f *testing.F) {
	for k, v := range Annotations(sample()) {
		f.Add(k, v)
	}
	good := Annotations(sample())
	f.Fuzz(func(t *testing.T, key, value string) {
		all := maps.Clone(good)
		all[key] = value
		m, ok := FactsOf(all)
		if said := all[AnnotationVersion]; ok != (said != "" && !hasControls(said)) {
			t.Fatalf("%q=%q: %v", key, value, ok)
		}
		if ok && (m.Host.PageSize < 0 || m.CRIU.Minimum < 0 || m.CRIU.Minimum > 999999 || len(m.Files) != 1 || m.Files[0].Size < 0) {
			t.Fatalf("%q=%q: %+v", key, value, m)
		}
	})
}

func TestVersionString(t *testing.T) {
	for v, want := range map[int]string{40101: "4.1.1", 40100: "4.1", 31710: "3.17.10", 0: "0.0", 100000: "10.0"} {
		if got := VersionString(v); got != want {
			t.Errorf("%d: got %s, want %s", v, got, want)
		}
	}
}

func TestFactsOfSpec(t *testing.T) {
	spec := &specs.Spec{
		Hostname: "h",
		Process: &specs.Process{
			Args: []string{"a", "b"}, Cwd: "/c", Terminal: true,
			User: specs.User{UID: 1, GID: 2, AdditionalGids: []uint32{3}},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc"},
			{Destination: "data", Type: "bind"},
			{Destination: "/a/../b/", Type: "tmpfs"},
			{Destination: "/b", Type: "bind"},
		},
		Linux: &specs.Linux{
			Namespaces:  []specs.LinuxNamespace{{Type: "pid"}, {Type: "network", Path: "/run/netns/x"}, {Type: "ipc"}},
			UIDMappings: []specs.LinuxIDMapping{{ContainerID: 0, HostID: 5, Size: 6}},
		},
	}
	got, err := json.Marshal(struct {
		C Container
		M []Mount
	}{ContainerOf(spec), MountsOf(spec)})
	if err != nil {
		t.Fatal(err)
	}
	want := `{"C":{"id":"","hostname":"h","args":["a","b"],"cwd":"/c","uid":1,"gid":2,"additionalGids":[3],"terminal":true,` +
		`"namespaces":["ipc","network","pid"],"uidMappings":[{"containerID":0,"hostID":5,"size":6}]},` +
		`"M":[{"destination":"/b","type":"bind"},{"destination":"/data","type":"bind"},{"destination":"/proc","type":"proc"}]}`
	if string(got) != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	// Specs come from clients; any part may be missing.
	ContainerOf(&specs.Spec{})
	MountsOf(&specs.Spec{})
}
