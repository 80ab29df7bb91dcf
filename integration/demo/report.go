package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/crac-shim/crac/oci"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Report is what the demo found, as it is written to build/demo.json. Times are milliseconds from
// the start of the command to the first HTTP 200.
type Report struct {
	ColdMS               float64   `json:"cold_ms"`
	WarmMS               float64   `json:"warm_ms"`
	Ratio                float64   `json:"ratio"` // cold_ms / warm_ms
	StateOK              bool      `json:"state_ok"`
	FileOK               bool      `json:"file_ok"`
	ClonesOK             bool      `json:"clones_ok"`
	ColdUnderRuncOK      bool      `json:"cold_under_runc_ok"`
	DumpHiddenOK         bool      `json:"dump_hidden_ok"`
	PoolOKWithHook       bool      `json:"pool_ok_with_hook"`
	PoolFailsWithoutHook bool      `json:"pool_fails_without_hook"`
	ImageBytes           int64     `json:"image_bytes"`
	CheckpointLayerBytes int64     `json:"checkpoint_layer_bytes"`
	BaseImageBytes       int64     `json:"base_image_bytes"`
	DumpBytes            int64     `json:"dump_bytes"`
	ClonesMS             []float64 `json:"clones_ms"`
	ColdUnderRuncMS      float64   `json:"cold_under_runc_ms"`
	Steps                []Step    `json:"steps"`
	// Problems says in words what was not as it should be; empty on success.
	Problems []string `json:"problems"`
}

// ok is true when every step was what it should be.
func (r *Report) ok() bool {
	return len(r.Problems) == 0 && r.StateOK && r.FileOK && r.ClonesOK && r.ColdUnderRuncOK && r.DumpHiddenOK &&
		r.PoolOKWithHook && r.PoolFailsWithoutHook
}

func (r *Report) problem(format string, args ...any) {
	r.Problems = append(r.Problems, fmt.Sprintf(format, args...))
}

// measure takes the sizes from the checkpoint image's manifest.
func (r *Report) measure(m ocispec.Manifest) error {
	r.ImageBytes = m.Config.Size
	for _, l := range m.Layers {
		r.ImageBytes += l.Size
	}
	top := ocispec.Descriptor{}
	if n := len(m.Layers); n > 0 {
		top = m.Layers[n-1]
	}
	if top.Annotations[oci.LayerAnnotation] != oci.LayerCheckpoint {
		return fmt.Errorf("the image's topmost layer %q is not marked as a checkpoint layer", top.Digest)
	}
	r.CheckpointLayerBytes = top.Size
	var err error
	if r.DumpBytes, err = strconv.ParseInt(m.Annotations[oci.AnnotationDumpBytes], 10, 64); err != nil {
		return fmt.Errorf("the image's annotation %s: %w", oci.AnnotationDumpBytes, err)
	}
	return nil
}

// save writes the report so that a reader never sees half of it.
func (r *Report) save(file string) error {
	if r.Problems == nil {
		r.Problems = []string{}
	}
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	tmp := file + ".tmp"
	if err := os.WriteFile(tmp, append(data, '\n'), 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, file)
}

// line is one line of the tables: a heading has no value.
type line struct{ label, value, note string }

// print writes the tables that a person reads.
func (r *Report) print(out io.Writer) error {
	lines := []line{
		{label: "Time to the first HTTP 200 of a JSP"},
		{"cold start", ms(r.ColdMS), "the application's image"},
		{"warm start", ms(r.WarmMS), times(r.Ratio) + ": the checkpoint image"},
	}
	for i, c := range r.ClonesMS {
		lines = append(lines, line{fmt.Sprintf("clone %d", i+2), ms(c), "of the same image, both at the same time"})
	}
	lines = append(
		lines,
		line{"checkpoint image under runc", ms(r.ColdUnderRuncMS), "a cold start: any runtime can run it"},
		line{label: "Sizes, as the registry keeps them"},
		line{"application's image", mib(r.BaseImageBytes), ""},
		line{"checkpoint image", mib(r.ImageBytes), ""},
		line{"of it the checkpoint layer", mib(r.CheckpointLayerBytes), strings.TrimSpace(mib(r.DumpBytes)) + " before compression"},
		line{label: "What was checked"},
		line{"session and counters are there", yes(r.StateOK), ""},
		line{"the application's file is there", yes(r.FileOK), ""},
		line{"clones have own hostname, address and state", yes(r.ClonesOK), ""},
		line{"the dump is not visible inside", yes(r.DumpHiddenOK), ""},
		line{"the same image starts cold under runc", yes(r.ColdUnderRuncOK), ""},
		line{"a clone's pool of database connections works", yes(r.PoolOKWithHook), "with a participant that closes and opens it"},
		line{"and fails", yes(r.PoolFailsWithoutHook), "without one: that is what it is for"},
		line{label: "Where the time went"},
	)
	for _, s := range r.Steps {
		lines = append(lines, line{s.Name, ms(s.MS), ""})
	}
	width := 0
	for _, l := range lines {
		width = max(width, utf8.RuneCountInString(l.label))
	}
	var b strings.Builder
	for _, l := range lines {
		if l.value == "" {
			fmt.Fprintf(&b, "\n%s\n", l.label)
			continue
		}
		b.WriteString(strings.TrimRight(fmt.Sprintf("  %-*s  %12s  %s", width, l.label, l.value, l.note), " ") + "\n")
	}
	for _, p := range r.Problems {
		fmt.Fprintf(&b, "\nPROBLEM: %s\n", p)
	}
	_, err := io.WriteString(out, b.String())
	return err
}

const unknown = "-"

func ms(v float64) string {
	if v == 0 {
		return unknown
	}
	return fmt.Sprintf("%.0f ms", v)
}

func mib(n int64) string {
	if n == 0 {
		return unknown
	}
	return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20))
}

func times(ratio float64) string {
	switch {
	case ratio == 0:
		return "not measured"
	case ratio < 10:
		return fmt.Sprintf("%.1fx as fast", ratio)
	default:
		return fmt.Sprintf("%.0fx as fast", ratio)
	}
}

func yes(ok bool) string {
	if ok {
		return "yes"
	}
	return "NO"
}
