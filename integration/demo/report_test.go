package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/crac-shim/crac/oci"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func good() *Report {
	return &Report{
		ColdMS: 3100, WarmMS: 100, Ratio: 31, StateOK: true, FileOK: true, ClonesOK: true,
		ColdUnderRuncOK: true, DumpHiddenOK: true, PoolOKWithHook: true, PoolFailsWithoutHook: true, ImageBytes: 150 << 20, CheckpointLayerBytes: 30 << 20,
		ClonesMS: []float64{110, 120}, Steps: []Step{{"push", 812}},
	}
}

func TestReportIsOKOnlyWhenEverythingIs(t *testing.T) {
	if !good().ok() {
		t.Fatal("a report in which all is well is not ok")
	}
	for name, spoil := range map[string]func(*Report){
		"state":   func(r *Report) { r.StateOK = false },
		"file":    func(r *Report) { r.FileOK = false },
		"clones":  func(r *Report) { r.ClonesOK = false },
		"runc":    func(r *Report) { r.ColdUnderRuncOK = false },
		"hidden":  func(r *Report) { r.DumpHiddenOK = false },
		"pool":    func(r *Report) { r.PoolOKWithHook = false },
		"no pool": func(r *Report) { r.PoolFailsWithoutHook = false },
		"problem": func(r *Report) { r.problem("registry is %s", "gone") },
	} {
		r := good()
		spoil(r)
		if r.ok() {
			t.Errorf("%s: the report is ok all the same", name)
		}
	}
}

// The names are what other programs read.
func TestReportKeys(t *testing.T) {
	file := filepath.Join(t.TempDir(), "build", "demo.json")
	if err := good().save(file); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(data, &m); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{
		"cold_ms", "warm_ms", "ratio", "state_ok", "file_ok", "clones_ok", "cold_under_runc_ok",
		"dump_hidden_ok", "image_bytes", "checkpoint_layer_bytes", "steps",
	} {
		if _, ok := m[key]; !ok {
			t.Errorf("demo.json lacks %q", key)
		}
	}
	step := m["steps"].([]any)[0].(map[string]any)
	if step["name"] != "push" || step["ms"] != 812.0 {
		t.Errorf("a step is %v", step)
	}
}

func TestReportTable(t *testing.T) {
	r := good()
	r.ClonesOK = false
	r.problem("clone-2 has the hostname of clone-1")
	var b strings.Builder
	if err := r.print(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"3100 ms", "31x as fast", "150.0 MiB", "NO", "push", "PROBLEM: clone-2 has the hostname"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("the table lacks %q:\n%s", want, b.String())
		}
	}
}

func TestMeasure(t *testing.T) {
	m := ocispec.Manifest{
		Config: ocispec.Descriptor{Size: 1},
		Layers: []ocispec.Descriptor{
			{Size: 20},
			{Size: 300, Annotations: map[string]string{oci.LayerAnnotation: oci.LayerCheckpoint}},
		},
		Annotations: map[string]string{oci.AnnotationDumpBytes: "4000"},
	}
	r := &Report{}
	if err := r.measure(m); err != nil {
		t.Fatal(err)
	}
	if r.ImageBytes != 321 || r.CheckpointLayerBytes != 300 || r.DumpBytes != 4000 {
		t.Errorf("got %+v", r)
	}
	m.Layers = m.Layers[:1]
	if err := r.measure(m); err == nil {
		t.Error("an image without a checkpoint layer was measured")
	}
	if err := r.measure(ocispec.Manifest{}); err == nil {
		t.Error("an image without layers was measured")
	}
}
