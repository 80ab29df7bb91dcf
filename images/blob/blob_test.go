package blob

import (
	"context"
	"errors"
	"io"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
)

// newStore is a content store as the daemon has it.
func newStore(t *testing.T) (context.Context, content.Store) {
	t.Helper()
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
	db := metadata.NewDB(bdb, cs, nil)
	ctx := namespaces.WithNamespace(t.Context(), "test")
	if err := db.Init(ctx); err != nil {
		t.Fatal(err)
	}
	return ctx, db.ContentStore()
}

const data = "data"

var of = ocispec.Descriptor{MediaType: "m", Digest: digest.FromString(data), Size: int64(len(data))}

// ways are those to store data.
var ways = map[string]func(context.Context, content.Store, map[string]string) (ocispec.Descriptor, error){
	"Store": func(ctx context.Context, cs content.Store, labels map[string]string) (ocispec.Descriptor, error) {
		return Store(ctx, cs, "crac-"+of.Digest.String(), "m", func(w io.Writer) (map[string]string, error) {
			_, err := io.WriteString(w, data)
			return labels, err
		})
	},
	"Write": func(ctx context.Context, cs content.Store, labels map[string]string) (ocispec.Descriptor, error) {
		return of, Write(ctx, cs, of, []byte(data), labels)
	},
}

func nothingUnfinished(ctx context.Context, t *testing.T, cs content.Store) {
	t.Helper()
	if all, err := cs.ListStatuses(ctx); err != nil || len(all) > 0 {
		t.Errorf("unfinished: %v, %v", all, err)
	}
}

func TestStored(t *testing.T) {
	for name, store := range ways {
		t.Run(name, func(t *testing.T) {
			ctx, cs := newStore(t)
			// One that was killed.
			cw, err := cs.Writer(ctx, content.WithRef("crac-"+of.Digest.String()))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := cw.Write([]byte("a beginning")); err != nil {
				t.Fatal(err)
			}
			if err := cw.Close(); err != nil {
				t.Fatal(err)
			}
			// Once more than is needed, to say more about what is there.
			for _, labels := range []map[string]string{nil, {"containerd.io/x": "y"}, {"containerd.io/x": "z"}} {
				desc, err := store(ctx, cs, labels)
				if err != nil || desc.Digest != of.Digest || desc.Size != of.Size || desc.MediaType != "m" {
					t.Fatalf("%+v, %v", desc, err)
				}
			}
			if got, err := content.ReadBlob(ctx, cs, of); err != nil || string(got) != data {
				t.Errorf("stored is %q, %v", got, err)
			}
			if info, err := cs.Info(ctx, of.Digest); err != nil || info.Labels["containerd.io/x"] != "y" {
				t.Errorf("%+v, %v", info, err)
			}
			nothingUnfinished(ctx, t, cs)
		})
	}
}

// A name that is locked, as containerd's is after a full disk, holds nobody up.
func TestStoredBesideLocked(t *testing.T) {
	for name, store := range ways {
		t.Run(name, func(t *testing.T) {
			ctx, cs := newStore(t)
			cw, err := cs.Writer(ctx, content.WithRef("crac-"+of.Digest.String()))
			if err != nil {
				t.Fatal(err)
			}
			defer cw.Close()
			if _, err := store(ctx, cs, nil); err != nil {
				t.Fatal(err)
			}
			if _, err := cs.Info(ctx, of.Digest); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestNotStored(t *testing.T) {
	ctx, cs := newStore(t)
	failed := errors.New("failed")
	_, err := Store(ctx, cs, "ref", "m", func(w io.Writer) (map[string]string, error) {
		_, _ = io.WriteString(w, "half")
		return nil, failed
	})
	if !errors.Is(err, failed) {
		t.Errorf("got %v", err)
	}
	stopped, stop := context.WithCancel(ctx)
	_, err = Store(stopped, cs, "ref", "m", func(w io.Writer) (map[string]string, error) {
		stop()
		_, err := io.WriteString(w, "half")
		return nil, err
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	for _, other := range []string{"date", data + "more"} {
		if err := Write(ctx, cs, of, []byte(other), nil); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "unexpected") && !strings.Contains(err.Error(), "size") {
			t.Errorf("%q is stored as something else: %v", other, err)
		}
	}
	nothingUnfinished(ctx, t, cs)
	if _, err := cs.Info(ctx, of.Digest); !errdefs.IsNotFound(err) {
		t.Errorf("stored: %v", err)
	}
}

func TestReadJSON(t *testing.T) {
	ctx, cs := newStore(t)
	write := func(data string) ocispec.Descriptor {
		t.Helper()
		desc := ocispec.Descriptor{MediaType: "m", Digest: digest.FromString(data), Size: int64(len(data))}
		if err := Write(ctx, cs, desc, []byte(data), nil); err != nil {
			t.Fatal(err)
		}
		return desc
	}
	var a, b struct{ A int }
	if err := ReadJSON(ctx, cs, write(`{"a":7}`), &a, &b); err != nil || a.A != 7 || b.A != 7 {
		t.Errorf("%+v, %+v, %v", a, b, err)
	}
	for text, want := range map[string]string{"{": "m sha256:", `{"a":7}` + strings.Repeat(" ", maxSmall): "no more than"} {
		if err := ReadJSON(ctx, cs, write(text), &a); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.20q: %v, want %q", text, err, want)
		}
	}
	if err := ReadJSON(ctx, cs, of, &a); !errdefs.IsNotFound(err) {
		t.Errorf("what is not there: %v", err)
	}
}
