package shim

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/crac-shim/crac/oci"
)

func TestOwnWorkingSet(t *testing.T) {
	s := &service{ctx: context.Background(), node: t.TempDir()}
	digest := "sha256:" + strings.Repeat("a", 64)
	dir := filepath.Join(s.node, oci.WorkingSetDir)
	path := filepath.Join(dir, strings.Repeat("a", 64))

	// A dump without a name, and a node without a place.
	if w := s.ownWorkingSet(""); w != (workingSet{}) {
		t.Errorf("without a digest: %+v", w)
	}
	if w := (&service{ctx: s.ctx}).ownWorkingSet(digest); w != (workingSet{}) {
		t.Errorf("without a directory: %+v", w)
	}

	// One learns, nobody else waits with it.
	first := s.ownWorkingSet(digest)
	if first.use != "" || first.record != path || first.lock == "" {
		t.Errorf("the first: %+v", first)
	}
	if w := s.ownWorkingSet(digest); w != (workingSet{}) {
		t.Errorf("beside the first: %+v", w)
	}
	// It was killed, long ago.
	old := time.Now().Add(-2 * learningTime)
	if err := os.Chtimes(first.lock, old, old); err != nil {
		t.Fatal(err)
	}
	if w := s.ownWorkingSet(digest); w != first {
		t.Errorf("after a killed one: %+v", w)
	}
	first.done()
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 0 {
		t.Errorf("it leaves %v, %v", entries, err)
	}

	// What is known is used, by all, and added to.
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if w := s.ownWorkingSet(digest); w != (workingSet{use: path, record: path}) {
			t.Errorf("with a file: %+v", w)
		}
	}
}

func TestForget(t *testing.T) {
	s := &service{ctx: context.Background(), node: t.TempDir()}
	dir := filepath.Join(s.node, oci.WorkingSetDir)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	for i := range maxWorkingSets + 3 {
		path := filepath.Join(dir, fmt.Sprintf("%064x", i))
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		at := now.Add(time.Duration(i-1000) * time.Hour)
		if err := os.Chtimes(path, at, at); err != nil {
			t.Fatal(err)
		}
	}
	w := s.ownWorkingSet("sha256:" + strings.Repeat("f", 64))
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != maxWorkingSets {
		t.Fatalf("%d files, %v", len(entries), err)
	}
	if name := entries[0].Name(); name != fmt.Sprintf("%064x", 4) {
		t.Errorf("the oldest that is left is %s", name)
	}
	if _, err := os.Stat(w.lock); err != nil {
		t.Error(err)
	}
}
