package build

import (
	"encoding/json"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// FuzzMerge: whatever list a registry has, an image put into it is there once, alone for its
// platform, and what is kept for the garbage collector is all of them.
func FuzzMerge(f *testing.F) {
	own := ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("own"), Size: 1, Platform: &ocispec.Platform{OS: "linux", Architecture: "amd64"},
	}
	other := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("other"), Platform: &ocispec.Platform{OS: "linux", Architecture: "arm64", Variant: "v8"}}
	same := own
	same.Digest = digest.FromString("same")
	said := ocispec.Descriptor{Digest: digest.FromString("said"), Platform: &ocispec.Platform{OS: unknown, Architecture: unknown}, Annotations: map[string]string{attestationOf: same.Digest.String()}}
	for _, list := range [][]ocispec.Descriptor{nil, {own}, {other, same, said}, {own, own, {}, said, other}} {
		data, err := json.Marshal(ocispec.Index{Manifests: list, Annotations: map[string]string{"a": "b"}})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte(`{"manifests":[{"platform":{"os":"LINUX","architecture":"x86_64"}},{"platform":null,"digest":"\u0000"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var list ocispec.Index
		if json.Unmarshal(data, &list) != nil {
			return
		}
		merged := merge(merge(ocispec.Index{}, list), ocispec.Index{Manifests: []ocispec.Descriptor{own}})
		found := 0
		for _, m := range merged.Manifests {
			switch {
			case m.Digest == own.Digest:
				found++
			case samePlatform(m.Platform, own.Platform):
				t.Errorf("%s is for the same platform", m.Digest)
			}
		}
		if found != 1 {
			t.Errorf("it is there %d times", found)
		}
		kept := make(map[string]bool)
		for _, d := range gcLabels(merged.Manifests) {
			kept[d] = true
		}
		for _, m := range merged.Manifests {
			if !kept[m.Digest.String()] {
				t.Errorf("%q is not kept", m.Digest)
			}
		}
	})
}
