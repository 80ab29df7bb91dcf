package inspect

// Level says what a finding means.
type Level string

// The levels.
const (
	Error   Level = "error"   // no checkpoint can be made
	Warning Level = "warning" // a clone differs, or needs something to start
	Info    Level = "info"
)

// Finding is one reason why a checkpoint fails, or why a clone will not be what
// the original is.
type Finding struct {
	Level Level  `json:"level"`
	Code  string `json:"code"` // for programs
	// The process, in the host's pid namespace and in its own; 0 if the finding
	// is about none.
	PID     int    `json:"pid,omitempty"`
	Inside  int    `json:"container_pid,omitempty"`
	Program string `json:"program,omitempty"`
	FDs     []int  `json:"descriptors,omitempty"`
	// Others is how many more processes hold the same.
	Others int    `json:"other_processes,omitempty"`
	What   string `json:"what"`
	Why    string `json:"why"`
	Fix    string `json:"fix,omitempty"`
}

// Findings collects them. The zero value is empty.
type Findings struct {
	All  []Finding
	seen map[key]int // the index of the finding
}

// key is what makes two findings one.
type key struct {
	code, what, why string
	pid             int    // the process, or
	dev, object     uint64 // a file, which processes may share
}

// Add notes a finding about a process and, unless nil, one of its descriptors. The
// same of other descriptors of the process, and the same file in other processes,
// become one.
func (l *Findings) Add(p *Process, fd *FD, f Finding) {
	if l.seen == nil {
		l.seen = make(map[key]int)
	}
	mine := key{code: f.Code, what: f.What, why: f.Why, pid: p.PID}
	if fd != nil {
		file := key{code: f.Code, what: f.What, why: f.Why, dev: fd.Device, object: fd.Inode}
		if i, ok := l.seen[file]; ok && l.All[i].PID != p.PID {
			counted := mine
			counted.object = uint64(i) + 1
			if _, ok := l.seen[counted]; !ok {
				l.seen[counted] = i
				l.All[i].Others++
			}
			return
		}
		if i, ok := l.seen[mine]; ok {
			l.seen[file] = i
			l.All[i].FDs = append(l.All[i].FDs, fd.Number)
			return
		}
		l.seen[file] = len(l.All)
	} else if _, ok := l.seen[mine]; ok {
		return
	}
	l.seen[mine] = len(l.All)
	f.PID, f.Inside, f.Program = p.PID, p.Inside, Printable(p.Name)
	if fd != nil {
		f.FDs = []int{fd.Number}
	}
	l.All = append(l.All, f)
}
