package trust

import (
	"bytes"
	"encoding/json"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/notaryproject/notation-go/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// labels of content, in memory.
type labels struct {
	mu  sync.Mutex
	all map[digest.Digest]map[string]string
}

func (l *labels) Get(d digest.Digest) (map[string]string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all[d], nil
}

func (l *labels) Set(d digest.Digest, all map[string]string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all[d] = all
	return nil
}

func (l *labels) Update(d digest.Digest, update map[string]string) (map[string]string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.all[d] == nil {
		l.all[d] = make(map[string]string)
	}
	for k, v := range update {
		l.all[d][k] = v
	}
	return l.all[d], nil
}

// FuzzStore: whatever manifest a registry sends, it says something of the image that it was
// asked about, or nothing; and what is stored of it is listed without a fault.
func FuzzStore(f *testing.F) {
	image := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("image"), Size: int64(len("image"))}
	another := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("another"), Size: int64(len("another"))}
	for _, subject := range []*ocispec.Descriptor{nil, &image, &another} {
		data, err := json.Marshal(ocispec.Manifest{
			MediaType: ocispec.MediaTypeImageManifest, Config: ocispec.Descriptor{MediaType: registry.ArtifactTypeNotation, Digest: digest.FromString("{}")},
			Layers: []ocispec.Descriptor{image}, Subject: subject,
		})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte(`{"subject":{"digest":"sha256:x"},"layers":[{},{"digest":"\n"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		all := &labels{all: make(map[digest.Digest]map[string]string)}
		cs, err := local.NewLabeledStore(t.TempDir(), all)
		if err != nil {
			t.Fatal(err)
		}
		for _, text := range []string{"image", "another"} {
			desc := ocispec.Descriptor{Digest: digest.FromString(text), Size: int64(len(text))}
			if err := content.WriteBlob(t.Context(), cs, text, strings.NewReader(text), desc); err != nil {
				t.Fatal(err)
			}
		}
		s := store{cs, image.Digest}
		desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(data), Size: int64(len(data))}
		err = s.Push(t.Context(), desc, bytes.NewReader(data))
		if len(all.all[another.Digest]) > 0 {
			t.Errorf("another image has the labels %v", all.all[another.Digest])
		}
		found, lerr := signatures(t.Context(), s, image)
		if err == nil && lerr != nil {
			t.Errorf("it was stored, and cannot be listed: %v", lerr)
		}
		if err != nil && len(found) > 0 {
			t.Errorf("it was refused (%v), and is listed: %v", err, found)
		}
		_, _ = s.Resolve(t.Context(), desc.Digest.String())
	})
}
