package oci

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"path"
	"slices"
	"strings"
	"time"
	"unicode"
)

// Limits of a manifest that a reader accepts. A pulled image is hostile input:
// they bound what one can make a host read, hash and keep. maxString is in bytes.
const (
	MaxManifestSize = 4 << 20
	MaxFiles        = 1 << 16
	maxList         = 1 << 14
	maxString       = 1 << 16
	maxPath         = 4096
	// Pages are of 4 KiB to 64 KiB wherever CRIU runs.
	minPage, maxPage = 1 << 12, 1 << 20
)

// UnknownKernel is a manifest's Host.Kernel where nobody knows it.
const UnknownKernel = "unknown"

// ErrInvalid is wrapped by every error about a manifest's content.
var ErrInvalid = errors.New("invalid checkpoint manifest")

// Manifest is .crac/v1/manifest.json: what a checkpoint is and what it needs.
type Manifest struct {
	Version string `json:"version"`
	// Name is what the image was called when it was made; empty for a dump that
	// is in no image.
	Name string `json:"name,omitempty"`
	// Created is when the workload stood still, to the microsecond.
	Created  time.Time `json:"created"`
	Platform Platform  `json:"platform"`
	Host     Host      `json:"host"`
	CRIU     CRIU      `json:"criu"`

	Container Container `json:"container"`
	// Mounts are the mounts that the dump refers to and a restore must offer.
	Mounts []Mount `json:"mounts,omitempty"`
	Base   Base    `json:"base"`
	// TCPEstablished is true when the dump holds established connections.
	TCPEstablished bool `json:"tcpEstablished,omitempty"`
	// Requires names, sorted, what a reader must know and a host must have: see
	// the constants Require….
	Requires []string `json:"requires,omitempty"`

	// Parent is the dump that this one continues; nil for a whole one.
	Parent *Parent `json:"parent,omitempty"`

	// Files are the files of the dump, by name below CRIUDirName, sorted.
	Files []File `json:"files"`
}

// Platform is what the dumped code was compiled for.
type Platform struct {
	OS           string `json:"os"`
	Architecture string `json:"architecture"`
	// Variant is for people: what of a kind of the architecture the code may use, the
	// features of the CPU say.
	Variant string `json:"variant,omitempty"`
}

// Host describes the machine of the dump, as far as a restore depends on it.
type Host struct {
	Kernel        string `json:"kernel"`
	PageSize      int    `json:"pageSize"`
	CgroupVersion int    `json:"cgroupVersion"`
	CPU           CPU    `json:"cpu"`
}

// CPU is the processor that the workload saw.
type CPU struct {
	Vendor string `json:"vendor,omitempty"`
	Model  string `json:"model,omitempty"`
	// Features are the instruction sets and register sets that a workload may
	// have chosen its code by, under the kernel's names, sorted.
	Features []string `json:"features,omitempty"`
}

// CRIU gives versions as CRIU's own RPC does: 4.1.1 is 40101.
type CRIU struct {
	Version int `json:"version"`
	// Minimum is the oldest version that can restore the dump.
	Minimum int `json:"minimum"`
}

// Container is what a restore cannot change about the workload, and its names.
type Container struct {
	ID             string   `json:"id"`
	Hostname       string   `json:"hostname,omitempty"`
	Args           []string `json:"args"`
	Cwd            string   `json:"cwd,omitempty"`
	UID            uint32   `json:"uid"`
	GID            uint32   `json:"gid"`
	AdditionalGids []uint32 `json:"additionalGids,omitempty"`
	Terminal       bool     `json:"terminal,omitempty"`
	// Seccomp: it was started under a seccomp filter, which is the oldest of each
	// process's.
	Seccomp bool `json:"seccomp,omitempty"`
	// Namespaces are the types of the namespaces that the container has for
	// itself, under the runtime spec's names, sorted.
	Namespaces  []string    `json:"namespaces,omitempty"`
	UIDMappings []IDMapping `json:"uidMappings,omitempty"`
	GIDMappings []IDMapping `json:"gidMappings,omitempty"`
	LSM         *LSM        `json:"lsm,omitempty"`
}

// IDMapping is one line of a user namespace's map.
type IDMapping struct {
	ContainerID uint32 `json:"containerID"`
	HostID      uint32 `json:"hostID"`
	Size        uint32 `json:"size"`
}

// Mount is a mount by the place it has in the container.
type Mount struct {
	Destination string `json:"destination"`
	Type        string `json:"type,omitempty"`
}

// ManifestMount is Mount under the name that other packages use for it.
type ManifestMount = Mount

// Base is the image that the container was made from.
type Base struct {
	Name   string `json:"name,omitempty"`
	Digest string `json:"digest,omitempty"`
	// Args are what the image runs when a start asks for nothing else. A start
	// with these arguments asks for no other program than the dumped one.
	Args []string `json:"args,omitempty"`
}

// File is one file of the dump.
type File struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	Digest string `json:"digest"`
}

// Encode validates the manifest and writes it: the same manifest gives the same
// bytes. Lists whose order has no meaning are sorted, also in m.
func (m *Manifest) Encode() ([]byte, error) {
	m.Created = m.Created.UTC().Truncate(time.Microsecond)
	slices.SortFunc(m.Files, func(a, b File) int { return strings.Compare(a.Name, b.Name) })
	slices.SortFunc(m.Mounts, func(a, b Mount) int { return strings.Compare(a.Destination, b.Destination) })
	slices.Sort(m.Host.CPU.Features)
	slices.Sort(m.Container.Namespaces)
	slices.Sort(m.Requires)
	if m.Container.LSM != nil {
		slices.Sort(m.Container.LSM.Profiles)
	}
	if err := m.Validate(); err != nil {
		return nil, err
	}
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(m); err != nil {
		return nil, fmt.Errorf("encode the checkpoint manifest: %w", err)
	}
	if buf.Len() > MaxManifestSize {
		return nil, fmt.Errorf("%w: %d bytes; a reader accepts %d", ErrInvalid, buf.Len(), MaxManifestSize)
	}
	return buf.Bytes(), nil
}

// DecodeManifest reads and validates a manifest. It trusts nothing: see
// Validate. Unknown fields are left alone, so that a later minor version can
// add some.
func DecodeManifest(r io.Reader) (*Manifest, error) {
	data, err := io.ReadAll(io.LimitReader(r, MaxManifestSize+1))
	if err != nil {
		return nil, fmt.Errorf("read the checkpoint manifest: %w", err)
	}
	if len(data) > MaxManifestSize {
		return nil, fmt.Errorf("%w: larger than %d bytes", ErrInvalid, MaxManifestSize)
	}
	// The version first: a later major version need not even parse as this one.
	var head struct {
		Version string `json:"version"`
	}
	if err := json.Unmarshal(data, &head); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if err := checkVersion(head.Version); err != nil {
		return nil, err
	}
	m := new(Manifest)
	if err := json.Unmarshal(data, m); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if err := m.Validate(); err != nil {
		return nil, err
	}
	return m, nil
}

func checkVersion(v string) error {
	if major, _, _ := strings.Cut(v, "."); major != Version {
		return fmt.Errorf("%w: format version %q; this version reads %s", ErrInvalid, v, Version)
	}
	return nil
}

// Validate checks everything that a reader relies on: the version, that what must be
// there is, bounded lists and strings, file names that name a file in one directory and
// nothing else, sensible sizes, complete digests, absolute and clean mount points.
func (m *Manifest) Validate() error {
	if err := checkVersion(m.Version); err != nil {
		return err
	}
	invalid := func(format string, a ...any) error {
		return fmt.Errorf("%w: %s", ErrInvalid, fmt.Sprintf(format, a...))
	}
	switch {
	case m.Created.IsZero():
		return invalid("no time when it was created")
	case m.Platform.OS == "" || m.Platform.Architecture == "":
		return invalid("no platform")
	case m.Host.Kernel == "":
		return invalid("no host.kernel, not even %q", UnknownKernel)
	case m.Host.PageSize < minPage || m.Host.PageSize > maxPage || m.Host.PageSize&(m.Host.PageSize-1) != 0:
		return invalid("page size %d", m.Host.PageSize)
	case m.Host.CgroupVersion != 1 && m.Host.CgroupVersion != 2:
		return invalid("cgroup version %d", m.Host.CgroupVersion)
	case m.CRIU.Version <= 0 || m.CRIU.Minimum <= 0:
		return invalid("CRIU version %d, minimum %d", m.CRIU.Version, m.CRIU.Minimum)
	case m.Container.ID == "":
		return invalid("no container.id")
	case len(m.Container.Args) == 0:
		return invalid("no arguments of the container's process")
	case len(m.Files) == 0:
		return invalid("no files")
	case len(m.Files) > MaxFiles:
		return invalid("%d files; at most %d are allowed", len(m.Files), MaxFiles)
	case max(len(m.Mounts), len(m.Container.Args), len(m.Base.Args), len(m.Container.AdditionalGids), len(m.Host.CPU.Features),
		len(m.Container.Namespaces), len(m.Requires), len(m.Container.UIDMappings), len(m.Container.GIDMappings)) > maxList:
		return invalid("a list with more than %d entries", maxList)
	}

	if i := slices.IndexFunc(m.Requires, func(s string) bool { return !validName(s) }); i >= 0 {
		return invalid("requirement %q is no name of small letters, digits, - and .", m.Requires[i])
	}
	if !m.Parent.valid(m.Requires) {
		return invalid("parent %+v, requirements %q: a dump that continues another one says so in both, with the digest of its manifest and a depth of 1 to %d", m.Parent, m.Requires, MaxDepth)
	}
	if !m.Container.LSM.valid() {
		return invalid("container.lsm names no module or no profile")
	}

	// These strings reach annotations, logs and terminals.
	for name, s := range m.shown() {
		if len(s) > maxString || hasControls(s) {
			return invalid("%s is too long or holds control characters", name)
		}
	}
	// These may hold anything, and are quoted where they are shown.
	for _, arg := range slices.Concat(m.Container.Args, m.Base.Args) {
		if len(arg) > maxString {
			return invalid("an argument with %d bytes; at most %d are allowed", len(arg), maxString)
		}
	}
	if m.Base.Digest != "" && !validDigest(m.Base.Digest) {
		return invalid("base digest %q is not sha256:<64 hexadecimal digits>", m.Base.Digest)
	}
	for _, mount := range m.Mounts {
		if !path.IsAbs(mount.Destination) || path.Clean(mount.Destination) != mount.Destination || len(mount.Destination) > maxPath {
			return invalid("mount destination %q is not an absolute, clean path", mount.Destination)
		}
	}

	seen := make(map[string]struct{}, len(m.Files))
	for _, f := range m.Files {
		if !ValidFileName(f.Name) {
			return invalid("file name %q; letters, digits and ._- are allowed, not starting with a dot", f.Name)
		}
		if _, twice := seen[f.Name]; twice {
			return invalid("file %s is listed twice", f.Name)
		}
		seen[f.Name] = struct{}{}
		if f.Size < 0 {
			return invalid("file %s has size %d", f.Name, f.Size)
		}
		if !validDigest(f.Digest) {
			return invalid("file %s has digest %q, which is not sha256:<64 hexadecimal digits>", f.Name, f.Digest)
		}
	}
	return nil
}

// shown are the strings that people are shown as they are, with their names.
func (m *Manifest) shown() iter.Seq2[string, string] {
	return func(yield func(string, string) bool) {
		lists := []struct {
			name string
			list []string
		}{
			{"version", []string{m.Version}},
			{"name", []string{m.Name}},
			{"platform", []string{m.Platform.OS, m.Platform.Architecture, m.Platform.Variant}},
			{"host.kernel", []string{m.Host.Kernel}},
			{"host.cpu", append([]string{m.Host.CPU.Vendor, m.Host.CPU.Model}, m.Host.CPU.Features...)},
			{"container.id", []string{m.Container.ID}},
			{"container.hostname", []string{m.Container.Hostname}},
			{"container.cwd", []string{m.Container.Cwd}},
			{"container.namespaces", m.Container.Namespaces},
			{"base.name", []string{m.Base.Name}},
		}
		if l := m.Container.LSM; l != nil {
			lists = append(lists, struct {
				name string
				list []string
			}{"container.lsm", l.Profiles})
		}
		for _, l := range lists {
			for _, s := range l.list {
				if !yield(l.name, s) {
					return
				}
			}
		}
		for _, mount := range m.Mounts {
			if !yield("a mount's destination", mount.Destination) || !yield("a mount's type", mount.Type) {
				return
			}
		}
	}
}

// hasControls tells whether a string has control characters, which a terminal obeys.
func hasControls(s string) bool { return strings.ContainsFunc(s, unicode.IsControl) }

// ValidFileName tells whether a dump may hold a file of this name: a plain base
// name that means the same to every tool that handles it.
func ValidFileName(name string) bool {
	if name == "" || len(name) > 255 || name[0] == '.' || name[0] == '-' {
		return false
	}
	for _, c := range []byte(name) {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', c == '.', c == '_', c == '-':
		default:
			return false
		}
	}
	return true
}

func validDigest(d string) bool {
	hex, ok := strings.CutPrefix(d, "sha256:")
	if !ok || len(hex) != 64 {
		return false
	}
	for _, c := range []byte(hex) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// VersionString writes a CRIU version number as people do: 40101 is 4.1.1.
func VersionString(v int) string {
	s := fmt.Sprintf("%d.%d", v/10000, v/100%100)
	if sub := v % 100; sub != 0 {
		s += fmt.Sprintf(".%d", sub)
	}
	return s
}
