package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"text/tabwriter"

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
	return len(r.Problems) == 0 && r.StateOK && r.FileOK && r.ClonesOK && r.ColdUnderRuncOK && r.DumpHiddenOK
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

// print writes the tables that a person reads.
func (r *Report) print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	row := func(format string, args ...any) { _, _ = fmt.Fprintf(w, format+"\n", args...) }

	row("")
	row("TIME TO THE FIRST HTTP 200 OF A JSP\t\t")
	row("  cold start\t%s\tfrom the application's image", ms(r.ColdMS))
	row("  warm start\t%s\tfrom the checkpoint image, %s", ms(r.WarmMS), times(r.Ratio))
	for i, c := range r.ClonesMS {
		row("  clone %d of %d\t%s\tat the same time", i+2, len(r.ClonesMS)+1, ms(c))
	}
	row("  checkpoint image under runc\t%s\tcold: any runtime can run it", ms(r.ColdUnderRuncMS))
	row("")
	row("SIZES (as the registry keeps them)\t\t")
	row("  application's image\t%s\t", mib(r.BaseImageBytes))
	row("  checkpoint image\t%s\t", mib(r.ImageBytes))
	row("  its checkpoint layer\t%s\t%s of dump, compressed", mib(r.CheckpointLayerBytes), mib(r.DumpBytes))
	row("")
	row("WHAT WAS CHECKED\t\t")
	row("  the session and the counters are there\t%s\t", yes(r.StateOK))
	row("  the file that the application wrote is there\t%s\t", yes(r.FileOK))
	row("  clones have own hostname, address, state\t%s\t", yes(r.ClonesOK))
	row("  the dump is not visible inside\t%s\t", yes(r.DumpHiddenOK))
	row("  the same image starts cold under runc\t%s\t", yes(r.ColdUnderRuncOK))
	row("")
	row("WHERE THE TIME WENT\t\t")
	for _, s := range r.Steps {
		row("  %s\t%s\t", s.Name, ms(s.MS))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, p := range r.Problems {
		if _, err := fmt.Fprintf(out, "\nPROBLEM: %s\n", p); err != nil {
			return err
		}
	}
	return nil
}

// Numbers are right-aligned by their own width: a table mixes words and numbers in a column.

func ms(v float64) string {
	if v == 0 {
		return fmt.Sprintf("%10s", "-")
	}
	return fmt.Sprintf("%7.0f ms", v)
}

func mib(n int64) string {
	if n == 0 {
		return fmt.Sprintf("%10s", "-")
	}
	return fmt.Sprintf("%6.1f MiB", float64(n)/(1<<20))
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
		return fmt.Sprintf("%10s", "yes")
	}
	return fmt.Sprintf("%10s", "NO")
}
