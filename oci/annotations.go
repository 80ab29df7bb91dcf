package oci

import (
	"maps"
	"strconv"
	"strings"
	"time"
)

// Annotations of a checkpoint image's manifest, and of an index that lists it.
// The org.criu.checkpoint.* names are those that checkpointctl defines and
// other tools read, but for container.name: Kubernetes' engines (containerd 2.1 to 2.3,
// CRI-O) take an image that has it for an archive of their own, and start no container
// from it but by restoring that.
const (
	AnnotationEngine        = "org.criu.checkpoint.engine.name"
	AnnotationRootfsImage   = "org.criu.checkpoint.rootfsImageName"
	AnnotationRootfsSha     = "org.criu.checkpoint.rootfsImageSha"
	AnnotationRuntime       = "org.criu.checkpoint.runtime.name"
	AnnotationCRIUVersion   = "org.criu.checkpoint.criu.version"
	AnnotationHostArch      = "org.criu.checkpoint.host.arch"
	AnnotationHostKernel    = "org.criu.checkpoint.host.kernel"
	AnnotationCgroupVersion = "org.criu.checkpoint.cgroup.version"

	AnnotationVersion        = ImagePrefix + "version"
	AnnotationContainer      = ImagePrefix + "container"
	AnnotationBaseName       = ImagePrefix + "base.name"
	AnnotationBaseDigest     = ImagePrefix + "base.digest"
	AnnotationCPUVendor      = ImagePrefix + "cpu.vendor"
	AnnotationCPUModel       = ImagePrefix + "cpu.model"
	AnnotationCPUFeatures    = ImagePrefix + "cpu.features"
	AnnotationPageSize       = ImagePrefix + "page-size"
	AnnotationCRIUMinimum    = ImagePrefix + "criu.minimum"
	AnnotationTCPEstablished = ImagePrefix + "tcp-established"
	AnnotationDumpBytes      = ImagePrefix + "dump-bytes"
	AnnotationRequires       = ImagePrefix + "requires"
	AnnotationLSM            = ImagePrefix + "lsm"
	AnnotationDepth          = ImagePrefix + "depth"
	// AnnotationManifest is the digest of manifest.json in the checkpoint layer: whoever
	// signs the image's manifest signs the checkpoint.
	AnnotationManifest = ImagePrefix + "manifest"

	// The OCI image specification's own.
	annotationCreated    = "org.opencontainers.image.created"
	annotationBaseName   = "org.opencontainers.image.base.name"
	annotationBaseDigest = "org.opencontainers.image.base.digest"
)

// IsAnnotation tells whether an annotation of an image is about a checkpoint in it.
func IsAnnotation(key string) bool {
	return strings.HasPrefix(key, AnnotationPrefix) || strings.HasPrefix(key, "org.criu.checkpoint.")
}

// AnnotationsOf are those of an image's annotations that are about a checkpoint in
// it, as the image's entry in an index has them; nil if there are none.
func AnnotationsOf(image map[string]string) map[string]string {
	var all map[string]string
	for k, v := range image {
		if IsAnnotation(k) {
			if all == nil {
				all = make(map[string]string)
			}
			all[k] = v
		}
	}
	return all
}

// RuntimeName is the name that containerd's clients give to select the runtime.
const RuntimeName = "io.containerd.crac.v2"

// Annotations are the facts of a manifest that a tool or a scheduler wants to
// know before it fetches a layer. Facts that are not known have no annotation.
func Annotations(m *Manifest) map[string]string {
	var bytes int64
	for _, f := range m.Files {
		bytes += f.Size
	}
	all := map[string]string{
		AnnotationEngine:        "containerd",
		AnnotationRootfsImage:   m.Base.Name,
		AnnotationRootfsSha:     strings.TrimPrefix(m.Base.Digest, "sha256:"),
		AnnotationRuntime:       RuntimeName,
		AnnotationCRIUVersion:   VersionString(m.CRIU.Version),
		AnnotationHostArch:      m.Platform.Architecture,
		AnnotationHostKernel:    m.Host.Kernel,
		AnnotationCgroupVersion: "v" + strconv.Itoa(m.Host.CgroupVersion),

		AnnotationVersion:     m.Version,
		AnnotationContainer:   m.Container.ID,
		AnnotationBaseName:    m.Base.Name,
		AnnotationBaseDigest:  m.Base.Digest,
		AnnotationCPUVendor:   m.Host.CPU.Vendor,
		AnnotationCPUModel:    m.Host.CPU.Model,
		AnnotationCPUFeatures: strings.Join(m.Host.CPU.Features, ","),
		AnnotationPageSize:    strconv.Itoa(m.Host.PageSize),
		AnnotationCRIUMinimum: VersionString(m.CRIU.Minimum),
		AnnotationDumpBytes:   strconv.FormatInt(bytes, 10),
		AnnotationRequires:    strings.Join(m.Requires, ","),

		annotationCreated:    m.Created.UTC().Format(time.RFC3339),
		annotationBaseName:   m.Base.Name,
		annotationBaseDigest: m.Base.Digest,
	}
	if m.TCPEstablished {
		all[AnnotationTCPEstablished] = "true"
	}
	if m.Parent != nil {
		all[AnnotationDepth] = strconv.Itoa(m.Parent.Depth)
	}
	if m.Container.LSM != nil {
		all[AnnotationLSM] = m.Container.LSM.Name
	}
	for k, v := range all {
		if v == "" {
			delete(all, k)
		}
	}
	return all
}

// FactsOf reads what Annotations wrote, as far as a restore can be judged by it:
// the manifest in the layer is what counts. ok tells whether the annotations are a
// checkpoint image's. What they lack or misspell is zero, and so is what would do
// something to a terminal.
func FactsOf(annotations map[string]string) (m *Manifest, ok bool) {
	annotations = maps.Clone(annotations)
	maps.DeleteFunc(annotations, func(_, v string) bool { return hasControls(v) })
	version := annotations[AnnotationVersion]
	if version == "" {
		return nil, false
	}
	list := func(key string) []string {
		if annotations[key] == "" {
			return nil
		}
		return strings.Split(annotations[key], ",")
	}
	number := func(s string) int64 {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil || n < 0 {
			return 0
		}
		return n
	}
	m = &Manifest{
		Version:  version,
		Platform: Platform{OS: "linux", Architecture: annotations[AnnotationHostArch]},
		Host: Host{
			Kernel: annotations[AnnotationHostKernel], PageSize: int(number(annotations[AnnotationPageSize])),
			CgroupVersion: int(number(strings.TrimPrefix(annotations[AnnotationCgroupVersion], "v"))),
			CPU: CPU{
				Vendor: annotations[AnnotationCPUVendor], Model: annotations[AnnotationCPUModel], Features: list(AnnotationCPUFeatures),
			},
		},
		CRIU:           CRIU{Version: versionNumber(annotations[AnnotationCRIUVersion]), Minimum: versionNumber(annotations[AnnotationCRIUMinimum])},
		Container:      Container{ID: annotations[AnnotationContainer]},
		Base:           Base{Name: annotations[AnnotationBaseName], Digest: annotations[AnnotationBaseDigest]},
		TCPEstablished: annotations[AnnotationTCPEstablished] == "true",
		Requires:       list(AnnotationRequires),
		// How many files, they do not say.
		Files: []File{{Size: number(annotations[AnnotationDumpBytes])}},
	}
	if name := annotations[AnnotationLSM]; name != "" {
		// By which profiles, they do not say.
		m.Container.LSM = &LSM{Name: name}
	}
	if depth := number(annotations[AnnotationDepth]); depth > 0 {
		// What it continues, they do not say.
		m.Parent = &Parent{Depth: int(depth)}
	}
	if created, err := time.Parse(time.RFC3339, annotations[annotationCreated]); err == nil {
		m.Created = created
	}
	return m, true
}

// versionNumber is VersionString's reverse; 0 for what is none.
func versionNumber(s string) int {
	n, parts := 0, strings.Split(s, ".")
	for i, weight := range []int{10000, 100, 1} {
		if i == len(parts) {
			break
		}
		v, err := strconv.Atoi(parts[i])
		if err != nil || v < 0 || v > 99 {
			return 0
		}
		n += v * weight
	}
	return n
}
