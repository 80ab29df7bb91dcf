package inspect

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	criucore "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fs"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pstree"
	skinet "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-inet"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/oci/criuimage"
)

// Process is a process of the dump.
type Process struct {
	PID     uint32 `json:"pid"`
	Parent  uint32 `json:"parent"` // 0 for the first
	Session uint32 `json:"session"`
	Threads int    `json:"threads"`
	// Command is the name that the kernel keeps, of at most 15 bytes.
	Command    string `json:"command"`
	Executable string `json:"executable,omitempty"`
	Directory  string `json:"directory,omitempty"`
	// State is running, stopped, dead or zombie.
	State string `json:"state"`
	UID   uint32 `json:"uid"`
	GID   uint32 `json:"gid"`
	// Mapped is the size of all mappings, Dumped what is in the dump of them, and
	// InParent what is in the dump that this one continues, in bytes.
	Mapped      int64        `json:"mapped"`
	Dumped      int64        `json:"dumped"`
	InParent    int64        `json:"inParent,omitempty"`
	Mappings    []Mapping    `json:"mappings,omitempty"`
	Descriptors []Descriptor `json:"descriptors,omitempty"`
}

// Mapping is a part of a process's address space.
type Mapping struct {
	Start       string `json:"start"` // hexadecimal
	Size        int64  `json:"size"`  // bytes
	Permissions string `json:"permissions"`
	// Kind is heap, stack, anonymous, shared, file, memfd, sysv, vdso or other.
	Kind string `json:"kind"`
	// Path is of the file that is mapped, in the container.
	Path     string `json:"path,omitempty"`
	Dumped   int64  `json:"dumped"`
	InParent int64  `json:"inParent,omitempty"`

	start, end uint64
}

// Descriptor is an open file.
type Descriptor struct {
	FD   uint32 `json:"fd"`
	Kind string `json:"kind"`
	// Name is a path, a socket's addresses or whatever tells one from another.
	Name   string  `json:"name,omitempty"`
	Socket *Socket `json:"socket,omitempty"`
}

// Socket is an internet socket.
type Socket struct {
	Protocol string `json:"protocol"` // tcp, udp, or a number
	State    string `json:"state,omitempty"`
	Local    string `json:"local"`
	Remote   string `json:"remote,omitempty"`
}

// Processes reads the processes of a layer, in the order of the dump, which is
// parents first. Errors wrap images.ErrDamaged.
func (l *Layer) Processes() ([]Process, error) {
	d := dump(l.Images)
	pageSize := uint64(l.Manifest.Host.PageSize)
	tree, err := each[pstree.PstreeEntry](d, "pstree.img", criuimage.Pstree)
	if err != nil {
		return nil, err
	}
	if len(tree) == 0 {
		return nil, damaged(fmt.Errorf("pstree.img lists no process"))
	}
	files, err := each[fdinfo.FileEntry](d, "files.img", criuimage.Files)
	if err != nil {
		return nil, err
	}
	open := openFiles{byID: make(map[fileKey]*fdinfo.FileEntry, len(files)), paths: make(map[uint32]string)}
	for _, f := range files {
		open.byID[fileKey{f.GetType(), f.GetId()}] = f
	}
	var (
		all                   []Process
		seen                  = make(map[uint32]bool)
		mappings, descriptors int
	)
	for _, e := range tree {
		p := Process{PID: e.GetPid(), Parent: e.GetPpid(), Session: e.GetSid(), Threads: len(e.GetThreads())}
		if seen[p.PID] {
			return nil, damaged(fmt.Errorf("pstree.img lists process %d twice", p.PID))
		}
		seen[p.PID] = true
		if err := d.process(&p, open, pageSize); err != nil {
			return nil, err
		}
		mappings += len(p.Mappings)
		descriptors += len(p.Descriptors) // many processes may share one table
		if max(mappings, descriptors) > maxMessages {
			return nil, damaged(fmt.Errorf("its processes have more than %d mappings or open files", maxMessages))
		}
		all = append(all, p)
	}
	return all, nil
}

// fileKey is how files.img is looked up.
type fileKey struct {
	kind fdinfo.FdTypes
	id   uint32
}

// openFiles are what files.img says. Many mappings are of one file.
type openFiles struct {
	byID  map[fileKey]*fdinfo.FileEntry
	paths map[uint32]string
}

// path is where a regular file is, in the container.
func (o openFiles) path(id uint32) string {
	p, ok := o.paths[id]
	if !ok {
		p = printable(o.byID[fileKey{fdinfo.FdTypes_REG, id}].GetReg().GetName())
		o.paths[id] = p
	}
	return p
}

// Task states of CRIU's pid.h.
var taskStates = map[uint32]string{1: "running", 2: "dead", 3: "stopped", 6: "zombie"}

func (d dump) process(p *Process, files openFiles, pageSize uint64) error {
	var core criucore.CoreEntry
	if err := d.must(fmt.Sprintf("core-%d.img", p.PID), criuimage.Core, &core); err != nil {
		return err
	}
	p.Command = printable(core.GetTc().GetComm())
	state := core.GetTc().GetTaskState()
	p.State = cmp.Or(taskStates[state], strconv.Itoa(int(state)))
	creds := core.GetThreadCore().GetCreds()
	p.UID, p.GID = creds.GetUid(), creds.GetGid()
	if p.State == "dead" || p.State == "zombie" {
		return nil // nothing else of it is there
	}
	if err := d.memory(p, files, pageSize); err != nil {
		return err
	}
	var ids criucore.TaskKobjIdsEntry
	if ok, err := d.one(fmt.Sprintf("ids-%d.img", p.PID), criuimage.IDs, &ids); err != nil || !ok {
		return err
	}
	open, err := each[fdinfo.FdinfoEntry](d, fmt.Sprintf("fdinfo-%d.img", ids.GetFilesId()), criuimage.Fdinfo)
	if err != nil {
		return err
	}
	for _, f := range open {
		p.Descriptors = append(p.Descriptors, describe(f.GetFd(), f.GetType(), files.byID[fileKey{f.GetType(), f.GetId()}]))
	}
	slices.SortStableFunc(p.Descriptors, func(a, b Descriptor) int { return cmp.Compare(a.FD, b.FD) })
	var dirs fs.FsEntry
	ok, err := d.one(fmt.Sprintf("fs-%d.img", p.PID), criuimage.FS, &dirs)
	if ok && err == nil {
		p.Directory = files.path(dirs.GetCwdId())
	}
	return err
}

// Kinds of mappings (image.h's VMA_AREA_…), the more telling first.
var mappingKinds = []struct {
	bit  uint32
	kind string
}{
	{1 << 5, "heap"},
	{1 << 1, "stack"},
	{1 << 3, "vdso"},
	{1 << 12, "vdso"}, // its variables
	{1 << 2, "vdso"},  // its predecessor
	{1 << 14, "memfd"},
	{1 << 6, "file"},
	{1 << 7, "file"},
	{1 << 10, "sysv"},
	{1 << 8, "shared"},
	{1 << 9, "anonymous"},
}

// maxMapped is more than any processor can address.
const maxMapped = 1 << 60

// Fields of mm_entry.
const (
	mmExecutable = 12
	mmMapping    = 14
)

func (d dump) memory(p *Process, files openFiles, pageSize uint64) error {
	name := fmt.Sprintf("mm-%d.img", p.PID)
	data, ok := d[name]
	if !ok {
		return nil // it shares its memory with another
	}
	message, err := criuimage.One(data, criuimage.MM)
	if err == nil {
		// One mapping after the other: all of them, as messages, take many times their size.
		err = criuimage.Fields(message, func(num protowire.Number, kind protowire.Type, value []byte) error {
			switch {
			case num == mmExecutable && kind == protowire.VarintType:
				id, _ := protowire.ConsumeVarint(value)
				p.Executable = files.path(uint32(id))
			case num == mmMapping && kind == protowire.BytesType:
				entry, _ := protowire.ConsumeBytes(value)
				return p.add(entry, files)
			}
			return nil
		})
	}
	if err != nil {
		return damaged(fmt.Errorf("%s: %w", name, err))
	}
	slices.SortStableFunc(p.Mappings, func(a, b Mapping) int { return cmp.Compare(a.start, b.start) })
	for i := 1; i < len(p.Mappings); i++ {
		if p.Mappings[i].start < p.Mappings[i-1].end {
			return damaged(fmt.Errorf("%s has two mappings at %#x", name, p.Mappings[i].start))
		}
	}
	name = fmt.Sprintf("pagemap-%d.img", p.PID)
	if data, ok = d[name]; !ok {
		return nil
	}
	pagemap, err := images.ParsePagemap(data, pageSize)
	if err != nil {
		return damaged(fmt.Errorf("%s: %w", name, err))
	}
	p.count(pagemap.Runs, pageSize)
	return nil
}

// add adds a mapping.
func (p *Process) add(entry []byte, files openFiles) error {
	v := new(vma.VmaEntry)
	if err := proto.Unmarshal(entry, v); err != nil {
		return err
	}
	size := v.GetEnd() - v.GetStart()
	if v.GetEnd() < v.GetStart() || size > maxMapped || p.Mapped+int64(size) > maxMapped {
		return fmt.Errorf("it has a mapping from %#x to %#x", v.GetStart(), v.GetEnd())
	}
	if len(p.Mappings) == maxMessages {
		return fmt.Errorf("it has more than %d mappings", maxMessages)
	}
	p.Mappings = append(p.Mappings, mappingOf(v, files))
	p.Mapped += int64(size)
	return nil
}

// count adds what is in the dump to the mappings. Both lists are in order of
// addresses; a run may span mappings.
func (p *Process) count(runs []images.Run, pageSize uint64) {
	i := 0
	for _, r := range runs {
		end := r.End(pageSize)
		for i < len(p.Mappings) && p.Mappings[i].end <= r.Start {
			i++
		}
		for k := i; k < len(p.Mappings) && p.Mappings[k].start < end; k++ {
			m := &p.Mappings[k]
			n := int64(min(end, m.end) - max(r.Start, m.start))
			switch {
			case r.InParent():
				m.InParent += n
				p.InParent += n
			case r.Present():
				m.Dumped += n
				p.Dumped += n
			}
		}
	}
}

func mappingOf(v *vma.VmaEntry, files openFiles) Mapping {
	m := Mapping{
		Start: strconv.FormatUint(v.GetStart(), 16), Size: int64(v.GetEnd() - v.GetStart()), Kind: "other",
		start: v.GetStart(), end: v.GetEnd(),
	}
	flags := []byte("---p")
	for i, bit := range []uint32{unix.PROT_READ, unix.PROT_WRITE, unix.PROT_EXEC} {
		if v.GetProt()&bit != 0 {
			flags[i] = "rwx"[i]
		}
	}
	if v.GetFlags()&unix.MAP_SHARED != 0 {
		flags[3] = 's'
	}
	m.Permissions = string(flags)
	for _, k := range mappingKinds {
		if v.GetStatus()&k.bit != 0 {
			m.Kind = k.kind
			break
		}
	}
	if m.Kind == "file" {
		m.Path = files.path(uint32(v.GetShmid())) // the file's id is kept there
	}
	return m
}

// describe says what a descriptor is. f is nil when files.img does not have it.
func describe(fd uint32, kind fdinfo.FdTypes, f *fdinfo.FileEntry) Descriptor {
	d := Descriptor{FD: fd, Kind: kindName(kind)}
	switch {
	case f.GetReg() != nil:
		d.Name = printable(f.GetReg().GetName())
	case f.GetIsk() != nil:
		s := socketOf(f.GetIsk())
		d.Socket = &s
		d.Name = s.String()
	case f.GetUsk() != nil:
		name := string(f.GetUsk().GetName())
		switch {
		case strings.HasPrefix(name, "\x00"):
			d.Name = "@" + printable(name[1:])
		default:
			d.Name = printable(strings.TrimRight(name, "\x00"))
		}
	case f.GetPipe() != nil:
		d.Name = fmt.Sprintf("pipe %d", f.GetPipe().GetPipeId())
	case f.GetMemfd() != nil:
		d.Name = fmt.Sprintf("memfd %d", f.GetMemfd().GetInodeId())
	}
	return d
}

func kindName(kind fdinfo.FdTypes) string {
	names := map[fdinfo.FdTypes]string{
		fdinfo.FdTypes_REG: "file", fdinfo.FdTypes_INETSK: "socket", fdinfo.FdTypes_UNIXSK: "unix", fdinfo.FdTypes_PACKETSK: "packet",
		fdinfo.FdTypes_NETLINKSK: "netlink", fdinfo.FdTypes_NS: "namespace", fdinfo.FdTypes_TUNF: "tun", fdinfo.FdTypes_EXT: "external",
	}
	if n, ok := names[kind]; ok {
		return n
	}
	if _, known := fdinfo.FdTypes_name[int32(kind)]; known {
		return strings.ToLower(kind.String())
	}
	return fmt.Sprintf("type %d", int32(kind))
}

// States of net/tcp_states.h.
var tcpStates = []string{
	"", "established", "syn-sent", "syn-received", "fin-wait-1", "fin-wait-2", "time-wait", "closed", "close-wait", "last-ack", "listen", "closing", "new-syn-received",
}

func socketOf(s *skinet.InetSkEntry) Socket {
	out := Socket{Local: address(s.GetSrcAddr(), s.GetSrcPort())}
	switch s.GetProto() {
	case unix.IPPROTO_TCP:
		out.Protocol = "tcp"
		if i := int(s.GetState()); i < len(tcpStates) {
			out.State = tcpStates[i]
		}
	case unix.IPPROTO_UDP:
		out.Protocol = "udp"
	default:
		out.Protocol = fmt.Sprintf("protocol %d", s.GetProto())
	}
	if s.GetFamily() == unix.AF_INET6 {
		out.Protocol += "6"
	}
	if s.GetDstPort() != 0 {
		out.Remote = address(s.GetDstAddr(), s.GetDstPort())
	}
	return out
}

func (s Socket) String() string {
	parts := []string{s.Protocol, s.Local}
	if s.Remote != "" {
		parts = append(parts, "→", s.Remote)
	}
	if s.State != "" {
		parts = append(parts, s.State)
	}
	return strings.Join(parts, " ")
}

// address writes an address as CRIU keeps it: words in the network's order of
// bytes, read as the machine's.
func address(words []uint32, port uint32) string {
	var b []byte
	for _, w := range words {
		b = binary.NativeEndian.AppendUint32(b, w)
	}
	host := "?"
	if a, ok := netip.AddrFromSlice(b); ok {
		if a.IsUnspecified() {
			host = "*"
		} else if host = a.String(); a.Is6() {
			host = "[" + host + "]"
		}
	}
	return fmt.Sprintf("%s:%d", host, port)
}

// printable makes a name of the dump safe to show. No path of the kernel's is longer than
// 4096 bytes.
func printable(s string) string {
	s = s[:min(len(s), 4096)]
	q := strconv.Quote(s)
	return strings.ReplaceAll(strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`), `\\`, `\`)
}
