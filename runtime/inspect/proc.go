package inspect

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// procDir is the directory of one process in /proc. It stays that process's:
// once it has ended, nothing can be read there.
type procDir struct {
	dir   *os.File
	pidfd int
}

func openProc(pid int) (*procDir, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, gone(os.NewSyscallError("pidfd_open", err))
	}
	dir, err := os.Open(fmt.Sprintf("/proc/%d", pid))
	if err == nil {
		// Whoever has the pid now had it before the directory was opened.
		err = unix.PidfdSendSignal(pidfd, 0, nil, 0)
	}
	if err != nil {
		unix.Close(pidfd)
		dir.Close()
		return nil, gone(err)
	}
	return &procDir{dir, pidfd}, nil
}

func (d *procDir) close() {
	unix.Close(d.pidfd)
	d.dir.Close()
}

func (d *procDir) open(name string) (*os.File, error) {
	fd, err := unix.Openat(int(d.dir.Fd()), name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, gone(&os.PathError{Op: "open", Path: d.dir.Name() + "/" + name, Err: err})
	}
	return os.NewFile(uintptr(fd), d.dir.Name()+"/"+name), nil
}

func (d *procDir) read(name string) ([]byte, error) {
	f, err := d.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(f)
	if err != nil {
		return nil, gone(err)
	}
	return data, nil
}

// stat follows the links of /proc, which lead to the thing itself whatever its
// name is. It takes what the kernel knows already: a network's file system may be
// far away, and one of FUSE may be a process of the workload, which is frozen.
func (d *procDir) stat(name string) (fileStat, error) {
	var x unix.Statx_t
	if err := unix.Statx(int(d.dir.Fd()), name, unix.AT_STATX_DONT_SYNC, unix.STATX_BASIC_STATS, &x); err != nil {
		return fileStat{}, gone(&os.PathError{Op: "stat", Path: d.dir.Name() + "/" + name, Err: err})
	}
	return fileStat{
		Mode: uint32(x.Mode), Nlink: uint64(x.Nlink), Ino: x.Ino, Blocks: int64(x.Blocks),
		Dev: unix.Mkdev(x.Dev_major, x.Dev_minor), Rdev: unix.Mkdev(x.Rdev_major, x.Rdev_minor),
	}, nil
}

// fileStat has what is asked for of unix.Stat_t, with the same types on all architectures.
type fileStat struct {
	Mode       uint32
	Nlink, Ino uint64
	Blocks     int64 // of 512 bytes
	Dev, Rdev  uint64
}

func (d *procDir) readlink(name string) (string, error) {
	buf := make([]byte, unix.PathMax+64)
	n, err := unix.Readlinkat(int(d.dir.Fd()), name, buf)
	if err != nil {
		return "", gone(&os.PathError{Op: "readlink", Path: d.dir.Name() + "/" + name, Err: err})
	}
	return string(buf[:n]), nil
}

// names lists a directory below the process's.
func (d *procDir) names(name string) ([]string, error) {
	f, err := d.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil {
		return nil, gone(err)
	}
	return names, nil
}

func (d *procDir) process() (*Process, error) {
	data, err := d.read("status")
	if err != nil {
		return nil, err
	}
	p, err := parseStatus(data)
	if err != nil {
		return nil, fmt.Errorf("%s/status: %w", d.dir.Name(), err)
	}
	args, err := d.read("cmdline")
	if err != nil {
		return nil, err
	}
	if args = bytes.TrimRight(args, "\x00"); len(args) > 0 {
		p.Args = strings.Split(string(args), "\x00")
	}
	return p, nil
}

// User gives the user and the group by which a process opens files, as the host
// sees them.
func User(pid int) (uid, gid int, err error) {
	d, err := openProc(pid)
	if err != nil {
		return 0, 0, err
	}
	defer d.close()
	data, err := d.read("status")
	if err != nil {
		return 0, 0, err
	}
	p, err := parseStatus(data)
	if err == nil && (len(p.Users) != 4 || len(p.Groups) != 4) {
		err = errors.New("without Uid and Gid")
	}
	if err != nil {
		return 0, 0, fmt.Errorf("%s/status: %w", d.dir.Name(), err)
	}
	return int(p.Users[3]), int(p.Groups[3]), nil
}

// parseStatus reads proc_pid_status(5).
func parseStatus(data []byte) (*Process, error) {
	p := &Process{}
	seen := 0
	for line := range strings.Lines(string(data)) {
		key, value, ok := strings.Cut(line, ":")
		fields := strings.Fields(value)
		if !ok || len(fields) == 0 {
			continue
		}
		first, _ := strconv.Atoi(fields[0])
		last, _ := strconv.Atoi(fields[len(fields)-1])
		switch key {
		case "Name":
			p.Name = unescape(strings.TrimSpace(value))
		case "State":
			p.Zombie = fields[0] == "Z" || fields[0] == "X"
		case "Pid":
			p.PID, p.Inside = first, first
			seen++
		case "PPid":
			p.Parent = first
			seen++
		case "TracerPid":
			p.Tracer = first
		case "Uid":
			p.Users = ids(fields)
		case "Gid":
			p.Groups = ids(fields)
		case "NSpid":
			p.Inside = last
		case "NSsid":
			p.Detached = last == 0
		}
	}
	if seen < 2 {
		return nil, errors.New("without Pid and PPid")
	}
	return p, nil
}

func ids(fields []string) (all []uint32) {
	for _, f := range fields {
		n, _ := strconv.ParseUint(f, 10, 32)
		all = append(all, uint32(n))
	}
	return all
}

// unescape undoes what the kernel does to newlines and backslashes of a name.
func unescape(name string) string {
	return strings.NewReplacer(`\n`, "\n", `\\`, `\`).Replace(name)
}

func (d *procDir) namespaces() (map[string]uint64, error) {
	names, err := d.names("ns")
	if err != nil {
		return nil, err
	}
	inodes := make(map[string]uint64, len(names))
	for _, name := range names {
		st, err := d.stat("ns/" + name)
		if err != nil {
			if errors.Is(err, errGone) {
				continue // pid_for_children has none before the first child
			}
			return nil, err
		}
		inodes[name] = st.Ino
	}
	return inodes, nil
}

// mounts adds the ids of the mounts that the process can see.
func (d *procDir) mounts(ids map[int]bool) error {
	data, err := d.read("mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(data)) {
		id, _, _ := strings.Cut(line, " ")
		if n, err := strconv.Atoi(id); err == nil {
			ids[n] = true
		}
	}
	return nil
}

func (d *procDir) fds() ([]FD, error) {
	names, err := d.names("fd")
	if err != nil {
		return nil, err
	}
	var all []FD
	for _, name := range names {
		n, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		fd, err := d.fd(n)
		if errors.Is(err, errGone) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("descriptor %d: %w", n, err)
		}
		all = append(all, *fd)
	}
	slices.SortFunc(all, func(a, b FD) int { return a.Number - b.Number })
	return all, nil
}

func (d *procDir) fd(n int) (*FD, error) {
	number := strconv.Itoa(n)
	link, err := d.readlink("fd/" + number)
	if err != nil {
		return nil, err
	}
	st, err := d.stat("fd/" + number)
	if err != nil {
		return nil, err
	}
	info, err := d.read("fdinfo/" + number)
	if err != nil {
		return nil, err
	}
	fd := newFD(n, link, st)
	fd.Flags, fd.mount = parseFdinfo(info)
	if fd.Kind == Socket {
		if fd.Socket, err = d.socket(n); err != nil {
			return nil, err
		}
	}
	return fd, nil
}

// parseFdinfo reads what all descriptors have in proc_pid_fdinfo(5).
func parseFdinfo(data []byte) (flags, mount int) {
	for line := range strings.Lines(string(data)) {
		key, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch key {
		case "flags":
			n, _ := strconv.ParseInt(value, 8, 64)
			flags = int(n)
		case "mnt_id":
			mount, _ = strconv.Atoi(value)
		}
	}
	return flags, mount
}

// mappings lists the mappings that stand for something outside the memory.
func (d *procDir) mappings() ([]Mapping, error) {
	data, err := d.read("maps")
	if err != nil {
		return nil, err
	}
	var all []Mapping
	for _, m := range parseMaps(data) {
		if m.Anon || m.SysV {
			all = append(all, m)
			continue
		}
		st, err := d.stat("map_files/" + trimRange(m.Range))
		if err != nil {
			if errors.Is(err, errGone) {
				continue // unmapped since, or no file
			}
			return nil, err
		}
		m.Links = st.Nlink
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFCHR, unix.S_IFBLK:
			m.Device = st.Rdev != unix.Mkdev(1, 5) // /dev/zero stands for memory
		}
		if m.Device || m.Deleted {
			all = append(all, m)
		}
	}
	return all, nil
}

// trimRange takes the leading zeroes off both addresses: the links in map_files
// have none.
func trimRange(r string) string {
	from, to, _ := strings.Cut(r, "-")
	return cmp.Or(strings.TrimLeft(from, "0"), "0") + "-" + cmp.Or(strings.TrimLeft(to, "0"), "0")
}

// parseMaps reads proc_pid_maps(5) and returns the mappings of files, and of what
// looks like one.
func parseMaps(data []byte) (all []Mapping) {
	for line := range strings.Lines(string(data)) {
		// address perms offset dev inode path; the path may hold anything but a
		// newline.
		rest := strings.TrimSuffix(line, "\n")
		var fields [5]string
		ok := true
		for i := range fields {
			if fields[i], rest, ok = strings.Cut(strings.TrimLeft(rest, " "), " "); !ok {
				break
			}
		}
		m := Mapping{Range: fields[0], Path: strings.TrimLeft(rest, " ")}
		if !ok || m.Path == "" || m.Path[0] == '[' {
			continue // memory
		}
		m.Path, m.Deleted = strings.CutSuffix(m.Path, deletedMark)
		switch {
		case strings.HasPrefix(m.Path, "/SYSV") && m.Deleted:
			m.SysV = true
		case strings.HasPrefix(m.Path, "anon_inode:"):
			m.Anon = true
		case m.Path == "/[aio]", m.Path == "/dev/zero" && m.Deleted, strings.HasPrefix(m.Path, "/memfd:"):
			continue // memory, too
		case m.Path[0] != '/':
			continue
		}
		all = append(all, m)
	}
	return all
}
