package inspect

import (
	"context"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/content"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/oci"
)

// Report is all that is told about a checkpoint image. Sizes are bytes.
type Report struct {
	Name   string `json:"name"`
	Digest string `json:"digest"` // of the manifest
	// Size is what a registry stores, CheckpointSize of it the checkpoint layer;
	// DumpSize is what that takes unpacked.
	Size           int64     `json:"size"`
	CheckpointSize int64     `json:"checkpointSize"`
	DumpSize       int64     `json:"dumpSize"`
	Created        time.Time `json:"created"`
	// Covered: layers lie above the checkpoint, so that it is not restored.
	Covered bool    `json:"covered,omitempty"`
	Layers  []Stage `json:"layers"`
	// Manifest is the checkpoint's own.
	Manifest  *oci.Manifest `json:"manifest"`
	Processes []Process     `json:"processes"`
	Here      Fit           `json:"here"`
}

// Stage is a layer of the image, lowest first.
type Stage struct {
	Digest    string     `json:"digest"`
	MediaType string     `json:"mediaType"`
	Size      int64      `json:"size"`
	Kind      string     `json:"kind"` // base, changes or checkpoint
	Created   *time.Time `json:"created,omitempty"`
	CreatedBy string     `json:"createdBy,omitempty"`
}

// Fit tells whether a host can restore a checkpoint.
type Fit struct {
	OK      bool     `json:"ok"`
	Reasons []Reason `json:"reasons,omitempty"`
}

// Reason is images.Reason, as JSON.
type Reason struct {
	Code string `json:"code"`
	Text string `json:"text"`
}

// FitOf asks the gate that the shim asks, as far as no request is needed.
func FitOf(m *oci.Manifest, host images.Host) Fit {
	var f Fit
	for _, r := range images.GateHost(m, host) {
		f.Reasons = append(f.Reasons, Reason(r))
	}
	f.OK = len(f.Reasons) == 0
	return f
}

// Stages lists the image's layers.
func (i *Image) Stages() []Stage {
	all := make([]Stage, len(i.Manifest.Layers))
	for n, l := range i.Manifest.Layers {
		all[n] = Stage{Digest: l.Digest.String(), MediaType: l.MediaType, Size: l.Size, Kind: i.Kind(n)}
		if h := i.History(n); h != nil {
			all[n].Created, all[n].CreatedBy = h.Created, h.CreatedBy
		}
	}
	return all
}

// Inspect reads all that is to be told about a checkpoint image.
func Inspect(ctx context.Context, store content.Provider, img *Image, host images.Host, o Options) (*Report, error) {
	l, err := img.Read(ctx, store, o)
	if err != nil {
		return nil, err
	}
	r := &Report{
		Name: img.Name, Digest: img.Desc.Digest.String(), Size: img.Size(), CheckpointSize: img.Manifest.Layers[img.Checkpoint].Size,
		Created: l.Manifest.Created, Covered: img.Covered(), Layers: img.Stages(), Manifest: l.Manifest, Here: FitOf(l.Manifest, host),
	}
	for _, f := range l.Found {
		r.DumpSize += f.Size
	}
	if r.Processes, err = l.Processes(); err != nil {
		return nil, err
	}
	return r, nil
}

// Sockets are the internet sockets of all processes, each once: listening first.
func (r *Report) Sockets() []Socket {
	var all []Socket
	seen := make(map[Socket]bool)
	for _, p := range r.Processes {
		for _, d := range p.Descriptors {
			if d.Socket != nil && !seen[*d.Socket] {
				seen[*d.Socket] = true
				all = append(all, *d.Socket)
			}
		}
	}
	slices.SortStableFunc(all, func(a, b Socket) int {
		listens := func(s Socket) int {
			if s.State == "listen" {
				return 0
			}
			return 1
		}
		return listens(a) - listens(b)
	})
	return all
}
