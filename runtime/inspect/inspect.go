// Package inspect tells what a container's processes hold, seen from outside and
// without changing anything.
//
// What it says of a container that runs is true of the moment at which it
// looked; of one that is frozen it stays true.
package inspect

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"golang.org/x/sys/unix"
)

// Container is what the processes of one container hold.
type Container struct {
	Init      int // host pid
	Processes []Process
}

// Process is one process, as the host sees it.
type Process struct {
	PID     int // in the host's pid namespace, as is Parent
	Inside  int // its pid in its own pid namespace
	Parent  int
	Name    string   // of the program, as the kernel keeps it: 15 bytes at most
	Args    []string // what it was started with, unless it has changed that
	Zombie  bool     // has ended, and holds nothing any more
	Users   []uint32 // real, effective, saved and file system user, of the host
	Groups  []uint32 // the same of groups
	Tracer  int      // who has it under ptrace(2); 0: nobody
	FDs     []FD
	Mapped  []Mapping
	Outside bool // no descendant of the init: started by exec, and in no dump

	// Detached tells that its session has no leader in its pid namespace: it was
	// started from a terminal or a session outside the container.
	Detached   bool
	Namespaces map[string]uint64 // by the names in /proc/PID/ns
}

// Mapping is a part of a process's memory that is worth a word.
type Mapping struct {
	Range   string // as /proc names it: hexadecimal addresses
	Path    string
	Device  bool // a character or block device
	SysV    bool // a System V shared memory segment
	Anon    bool // one of the kernel's objects without a name, such as io_uring
	Deleted bool
	Links   uint64 // names that the file still has
}

// Options say what to look at beside descriptors.
type Options struct {
	// Memory looks at memory mappings, which costs time with the number of them.
	Memory bool
}

// errGone is a process, or a descriptor, that has ended since it was listed.
var errGone = errors.New("gone")

// Inspect looks at processes by their host pids. Processes that end meanwhile
// are left out.
func Inspect(init int, pids []int, o Options) (*Container, error) {
	c := &Container{Init: init}
	mounts := &mounts{namespaces: make(map[uint64]bool), ids: make(map[int]bool)}
	for _, pid := range pids {
		p, err := inspect(pid, mounts, o)
		if errors.Is(err, errGone) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("inspect process %d: %w", pid, err)
		}
		c.Processes = append(c.Processes, *p)
	}
	if err := resolvePeers(c); err != nil {
		return nil, err
	}
	c.relate(mounts)
	return c, nil
}

// mounts are those that the container's processes can see, in one mount namespace
// or several.
type mounts struct {
	namespaces map[uint64]bool // those that were asked
	ids        map[int]bool
}

func inspect(pid int, mounts *mounts, o Options) (*Process, error) {
	d, err := openProc(pid)
	if err != nil {
		return nil, err
	}
	defer d.close()
	p, err := d.process()
	if err != nil {
		return nil, err
	}
	if p.Zombie {
		return p, nil
	}
	if p.Namespaces, err = d.namespaces(); err != nil {
		return nil, err
	}
	if ns := p.Namespaces["mnt"]; !mounts.namespaces[ns] {
		mounts.namespaces[ns] = true
		if err := d.mounts(mounts.ids); err != nil {
			return nil, err
		}
	}
	if p.FDs, err = d.fds(); err != nil {
		return nil, err
	}
	if o.Memory {
		p.Mapped, err = d.mappings()
	}
	return p, err
}

// relate finds out who belongs to the init, which descriptors are the container's
// own streams, and which come from outside.
func (c *Container) relate(mounts *mounts) {
	parent := make(map[int]int)
	for _, p := range c.Processes {
		parent[p.PID] = p.Parent
	}
	type file struct{ dev, inode uint64 }
	streams := make(map[file]bool)
	for i := range c.Processes {
		p := &c.Processes[i]
		p.Outside = !descends(parent, p.PID, c.Init)
		if p.PID != c.Init {
			continue
		}
		for _, fd := range p.FDs {
			if fd.Number <= 2 && fd.Socket == nil {
				streams[file{fd.Device, fd.Inode}] = true
			}
		}
	}
	for i := range c.Processes {
		for j := range c.Processes[i].FDs {
			fd := &c.Processes[i].FDs[j]
			fd.Foreign = fd.Path != "" && !mounts.ids[fd.mount]
			fd.Stdio = fd.Number <= 2 && fd.Socket == nil && streams[file{fd.Device, fd.Inode}]
		}
	}
	held := make(map[uint64]bool)
	ports := make(map[uint16]bool)
	for fd := range c.sockets() {
		held[fd.Inode] = true
		if s := fd.Socket; s.Listening() && s.Protocol != "" {
			ports[s.Local.Port()] = true
		}
	}
	for fd := range c.sockets() {
		s := fd.Socket
		s.External = s.PeerInode != 0 && !held[s.PeerInode]
		s.Inbound = s.Protocol != "" && !s.Listening() && ports[s.Local.Port()]
	}
}

func descends(parent map[int]int, pid, init int) bool {
	for range len(parent) + 1 {
		if pid == init {
			return true
		}
		next, ok := parent[pid]
		if !ok {
			return false
		}
		pid = next
	}
	return false
}

// sockets lists the sockets of the processes that a dump holds.
func (c *Container) sockets() func(yield func(*FD) bool) {
	return func(yield func(*FD) bool) {
		for i := range c.Processes {
			p := &c.Processes[i]
			for j := range p.FDs {
				if !p.Outside && p.FDs[j].Socket != nil && !yield(&p.FDs[j]) {
					return
				}
			}
		}
	}
}

// Process finds one of the processes by its host pid.
func (c *Container) Process(pid int) *Process {
	i := slices.IndexFunc(c.Processes, func(p Process) bool { return p.PID == pid })
	if i < 0 {
		return nil
	}
	return &c.Processes[i]
}

// gone tells errors that mean the end of a process from others.
func gone(err error) error {
	if errors.Is(err, unix.ESRCH) || errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", errGone, err)
	}
	return err
}
