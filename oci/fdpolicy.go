package oci

import (
	"fmt"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
)

// FDType is what a rule of a policy is about.
type FDType string

// FDAction is what a rule of a policy asks for.
type FDAction string

// FDFamily is a socket's family, as rules name it.
type FDFamily string

// The values are those of CRaC's resource policies (jdk.crac.resource-policies).
const (
	FDFile   FDType = "file"           // whatever has a path: files, directories, devices, named pipes
	FDPipe   FDType = "pipe"           // without a name
	FDSocket FDType = "socket"         // of the network, or unix
	FDOther  FDType = "filedescriptor" // none of these; or any, by its number or description

	FDError  FDAction = "error"  // no checkpoint
	FDIgnore FDAction = "ignore" // what CRIU makes of it
	FDClose  FDAction = "close"  // closed before the checkpoint
	FDReopen FDAction = "reopen" // open again in a clone

	FDIPv4 FDFamily = "ipv4"
	FDIPv6 FDFamily = "ipv6"
	FDIP   FDFamily = "ip" // a rule's only: either
	FDUnix FDFamily = "unix"
)

// FDPolicy is what to do about what a container's processes hold open: an
// ordered list of rules, of which the first that matches counts. The zero value
// has none and matches nothing.
type FDPolicy struct {
	Rules []FDRule
}

// FDRule is one rule, as ParseFDPolicy read it. Fields that it did not give are
// empty and match anything.
type FDRule struct {
	Number int // of the rule, from 1
	Line   int // where it begins, from 1
	Type   FDType
	Action FDAction
	Warn   bool // tell of what it matches; true unless the rule says otherwise

	Path string // of a file: a glob

	Family                    FDFamily
	LocalAddress, LocalPort   string // an address or a number; "*" for any, but there must be one
	RemoteAddress, RemotePort string
	LocalPath, RemotePath     string // of a unix socket: globs
	Listening                 string // "true", "false" or neither

	Value int    // the descriptor's number; -1 for any
	Regex string // of the whole of its description

	path, localPath, remotePath, regex *regexp.Regexp
}

// FD is what rules look at: one descriptor of a process.
type FD struct {
	Number int
	Type   FDType
	// Description is what the descriptor is and what /proc names it by, such as
	// "regular: /etc/passwd" or "unknown: anon_inode:[eventfd]".
	Description string
	// Stdio tells that it is one of the container's own streams. They are
	// connected anew in a clone, so that rules must pick them by number or
	// description to mean them.
	Stdio bool

	Path string // of a file, as the process sees it

	Family        FDFamily
	Local, Remote netip.AddrPort // the zero value: not bound, not connected
	LocalPath     string         // of a unix socket; "@…" for an abstract name
	RemotePath    string
	Listening     bool
}

// Match finds the rule for a descriptor.
func (p FDPolicy) Match(fd FD) (rule FDRule, ok bool) {
	for _, r := range p.Rules {
		if r.matches(fd) {
			return r, true
		}
	}
	return FDRule{}, false
}

func (r FDRule) matches(fd FD) bool {
	picked := r.Value >= 0 || r.regex != nil
	if fd.Stdio && !picked || r.Type != fd.Type && (r.Type != FDOther || !picked) {
		return false
	}
	switch r.Type {
	case FDFile:
		return globMatches(r.path, fd.Path)
	case FDSocket:
		return r.Family.has(fd.Family) &&
			endMatches(r.LocalAddress, r.LocalPort, fd.Local) && endMatches(r.RemoteAddress, r.RemotePort, fd.Remote) &&
			globMatches(r.localPath, fd.LocalPath) && globMatches(r.remotePath, fd.RemotePath) &&
			(r.Listening == "" || r.Listening == strconv.FormatBool(fd.Listening))
	case FDOther:
		return (r.Value < 0 || r.Value == fd.Number) && (r.regex == nil || r.regex.MatchString(fd.Description))
	}
	return true
}

func (f FDFamily) has(other FDFamily) bool {
	return f == "" || f == other || f == FDIP && (other == FDIPv4 || other == FDIPv6)
}

func globMatches(glob *regexp.Regexp, path string) bool {
	return glob == nil || path != "" && glob.MatchString(path)
}

// endMatches compares one end of a connection. An IPv4 address inside an IPv6
// one is the IPv4 address.
func endMatches(address, port string, end netip.AddrPort) bool {
	if address == "" && port == "" {
		return true
	}
	if !end.IsValid() {
		return false
	}
	if address != "" && address != "*" {
		want, err := netip.ParseAddr(address)
		if err != nil || want.Unmap().WithZone("") != end.Addr().Unmap().WithZone("") {
			return false
		}
	}
	return port == "" || port == "*" || port == strconv.Itoa(int(end.Port()))
}

// String names the rule, for messages.
func (r FDRule) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "rule %d (line %d: type: %s", r.Number, r.Line, r.Type)
	for _, f := range r.fields() {
		if f.value != "" {
			value := f.value
			if strings.ContainsFunc(value, func(r rune) bool { return !strconv.IsPrint(r) }) {
				value = strconv.Quote(value)
			}
			fmt.Fprintf(&b, ", %s: %s", f.key, value)
		}
	}
	fmt.Fprintf(&b, ", action: %s)", r.Action)
	return b.String()
}

// fields are those that select, in the order in which they are documented.
func (r FDRule) fields() []fdField {
	value := ""
	if r.Value >= 0 {
		value = strconv.Itoa(r.Value)
	}
	return []fdField{
		{key: "path", value: r.Path},
		{key: "family", value: string(r.Family)},
		{key: "localAddress", value: r.LocalAddress},
		{key: "localPort", value: r.LocalPort},
		{key: "remoteAddress", value: r.RemoteAddress},
		{key: "remotePort", value: r.RemotePort},
		{key: "localPath", value: r.LocalPath},
		{key: "remotePath", value: r.RemotePath},
		{key: "listening", value: r.Listening},
		{key: "value", value: value},
		{key: "regex", value: r.Regex},
	}
}
