package compress

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"github.com/crac-shim/crac/oci"
)

const text = "what a layer holds"

func read(t *testing.T, r io.ReadCloser, err error) string {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	data, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestFormats(t *testing.T) {
	for _, name := range []oci.Compression{"", oci.CompressionZstd, oci.CompressionGzip} {
		f, err := Of(name)
		if err != nil {
			t.Fatal(err)
		}
		var stored bytes.Buffer
		w, err := f.NewWriter(&stored)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, text); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		r, err := NewReader(bytes.NewReader(stored.Bytes()), f.MediaType)
		if got := read(t, r, err); got != text {
			t.Errorf("%q as %s: %q", name, f.MediaType, got)
		}
		r, err = Detect(bytes.NewReader(stored.Bytes()))
		if got := read(t, r, err); got != text {
			t.Errorf("%q, found out: %q", name, got)
		}
	}
	if _, err := Of("lz4"); err == nil || !strings.Contains(err.Error(), "known are zstd, gzip") {
		t.Errorf("lz4: %v", err)
	}
	for _, plain := range []string{"", "a", text} {
		r, err := Detect(strings.NewReader(plain))
		if got := read(t, r, err); got != plain {
			t.Errorf("plain %q: %q", plain, got)
		}
	}
	for _, magic := range []string{"BZh9", "\xfd7zXZ"} {
		if _, err := Detect(strings.NewReader(magic)); !errors.Is(err, ErrUnknown) {
			t.Errorf("%q: %v", magic, err)
		}
	}
	if _, err := NewReader(strings.NewReader(""), "application/x"); err == nil {
		t.Error("any media type is taken")
	}
}

// A stream must not decide how much memory it takes.
func TestWindow(t *testing.T) {
	for _, tt := range []struct {
		size int
		ok   bool
	}{{maxWindow, true}, {2 * maxWindow, false}} {
		var stored bytes.Buffer
		w, err := zstd.NewWriter(&stored, zstd.WithWindowSize(tt.size), zstd.WithSingleSegment(false), zstd.WithEncoderConcurrency(1))
		if err != nil {
			t.Fatal(err)
		}
		// Enough for a frame that has a window.
		for range 2 {
			if _, err := w.Write(make([]byte, 1<<20)); err != nil {
				t.Fatal(err)
			}
			if err := w.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		r, err := Detect(&stored)
		if err != nil {
			t.Fatal(err)
		}
		_, err = io.Copy(io.Discard, r)
		_ = r.Close()
		if (err == nil) != tt.ok {
			t.Errorf("a window of %d bytes: %v", tt.size, err)
		}
	}
}
