// Package check tells what would stop a checkpoint of a running container, or
// make its clones differ, without making one.
package check

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/cmd/cracctl/doctor"
	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/runtime/fdpolicy"
	"github.com/crac-shim/crac/runtime/hook"
	"github.com/crac-shim/crac/runtime/inspect"
)

// Container is what to check.
type Container struct {
	ID     string
	Init   int    // host pid
	Shim   int    // host pid of who would dump it
	Bundle string // containerd's directory for its task
	Image  string // empty: it was made from none
	Paused bool   // nobody in it can answer
	// Address is containerd's socket.
	Address string
	// TCP is what the checkpoint would do about established connections; empty is
	// the container's own option.
	TCP oci.TCPMode
}

// Report is the result.
type Report struct {
	Container string `json:"container"`
	// OK tells that nothing that was found would stop a checkpoint.
	OK           bool              `json:"ok"`
	Processes    int               `json:"processes"`
	Participants int               `json:"participants"`
	Findings     []inspect.Finding `json:"findings"`
}

// hooksDir is the directory of hooks in the bundle.
const hooksDir = "crac"

// turnWait is how long a checkpoint that is being made is waited for: a small one is
// made in less.
const turnWait = time.Second

// Run looks at everything that can be seen from outside, and asks the
// participants. It changes nothing.
func Run(ctx context.Context, c Container) (*Report, error) {
	spec, err := LoadSpec(c.Bundle)
	if err != nil {
		return nil, err
	}
	var env []string
	if spec.Process != nil {
		env = spec.Process.Env
	}
	options, err := oci.ParseOptions(spec.Annotations, env)
	if err != nil {
		return nil, err
	}
	pids, err := inspect.Pids(c.Init)
	if err != nil {
		return nil, err
	}
	held, err := inspect.Inspect(c.Init, pids, inspect.Options{Memory: true})
	if err != nil {
		return nil, err
	}
	if held.Process(c.Init) == nil {
		return nil, fmt.Errorf("container %s has ended", c.ID)
	}
	shim, err := shimOf(c)
	if err != nil {
		return nil, err
	}
	r := &Report{Container: c.ID, Processes: len(held.Processes)}
	closed := r.policy(options, spec.Process, rootfs(c.Bundle, spec), held)
	r.Findings = append(r.Findings, held.Judge(inspect.Conditions{
		TCP:     cmp.Or(c.TCP, options.TCP),
		Closed:  closed,
		Limits:  mayReadLimits(c.Shim),
		UserNS:  shim.Namespaces["user"],
		HostIPC: shim.Namespaces["ipc"],
		Runtime: func(inode uint64) bool {
			return slices.ContainsFunc(shim.FDs, func(fd inspect.FD) bool { return fd.Socket != nil && fd.Inode == inode })
		},
	})...)
	r.participants(ctx, c, options)
	// The network is locked for connections that a clone goes on with. (CRIU before 4.2
	// locks it always, and fails by name where it cannot.)
	locks := cmp.Or(c.TCP, options.TCP) == oci.TCPEstablished && held.Process(c.Init).Namespaces["net"] != shim.Namespaces["net"]
	r.host(doctor.Run(ctx, doctor.Options{Address: c.Address}), locks)
	if c.Image == "" {
		r.add(inspect.Info, "image", "the container", "it was not made from an image, so a checkpoint of it can go into a directory, and into no image", "")
	}
	r.finish()
	return r, nil
}

// shimOf looks at the process that would make the dump.
func shimOf(c Container) (*inspect.Process, error) {
	all, err := inspect.Inspect(c.Shim, []int{c.Shim}, inspect.Options{})
	if err == nil && all.Process(c.Shim) == nil {
		err = fmt.Errorf("process %d has ended", c.Shim)
	}
	if err != nil {
		return nil, fmt.Errorf("the shim of container %s: %w", c.ID, err)
	}
	return all.Process(c.Shim), nil
}

func (r *Report) add(level inspect.Level, code, what, why, fix string) {
	r.Findings = append(r.Findings, inspect.Finding{Level: level, Code: code, What: what, Why: why, Fix: fix})
}

// Image adds what is said of the image that a checkpoint would make: warnings, and why it
// cannot be made, if it cannot.
func (r *Report) Image(ref string, warnings []string, refused error) {
	for _, w := range warnings {
		r.add(inspect.Warning, "image", "image "+ref, w, "")
	}
	if refused != nil {
		r.add(inspect.Error, "image", "image "+ref, refused.Error(), "")
	}
	r.finish()
}

// finish sorts what was found, the worst first.
func (r *Report) finish() {
	order := []inspect.Level{inspect.Error, inspect.Warning, inspect.Info}
	slices.SortStableFunc(r.Findings, func(a, b inspect.Finding) int {
		return slices.Index(order, a.Level) - slices.Index(order, b.Level)
	})
	r.OK = r.count(inspect.Error) == 0
	if r.Findings == nil {
		r.Findings = []inspect.Finding{} // [] in JSON
	}
}

func (r *Report) count(level inspect.Level) (n int) {
	for _, f := range r.Findings {
		if f.Level == level {
			n++
		}
	}
	return n
}

// LoadSpec reads the container's OCI spec as containerd wrote it into the bundle.
func LoadSpec(bundle string) (*specs.Spec, error) {
	path := filepath.Join(bundle, "config.json")
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("%w; if containerd's state directory is another one, give it with --state", err)
	}
	defer f.Close()
	var spec specs.Spec
	if err := json.NewDecoder(io.LimitReader(f, 16<<20)).Decode(&spec); err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return &spec, nil
}

func rootfs(bundle string, spec *specs.Spec) string {
	path := "rootfs"
	if spec.Root != nil && spec.Root.Path != "" {
		path = spec.Root.Path
	}
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(bundle, path)
}

// policy tells what a descriptor policy would do, and returns which descriptors it
// would close.
func (r *Report) policy(o oci.Options, process *specs.Process, rootfs string, held *inspect.Container) (closed func(*inspect.FD) bool) {
	p, err := fdpolicy.For(o, process, rootfs)
	if err != nil {
		r.add(inspect.Error, "policy", "the descriptor policy", err.Error(), "correct it (docs/fd-policy.md)")
		return nil
	}
	actions, refused := fdpolicy.Plan(p, held)
	var found inspect.Findings
	note := func(level inspect.Level, a fdpolicy.Action, why, fix string) {
		what := a.FD.String()
		if s := a.FD.Socket; s != nil && s.Peer.IsValid() {
			what = s.Connection()
		}
		found.Add(a.Process, a.FD, inspect.Finding{Level: level, Code: "policy", What: what, Why: why, Fix: fix})
	}
	for _, a := range refused {
		note(inspect.Error, a, fmt.Sprintf("the descriptor policy refuses it, by %s", a.Rule), a.Note)
	}
	closes := make(map[uint64]bool)
	for _, a := range actions {
		switch {
		case a.Close:
			closes[a.FD.Socket.Cookie] = true
			note(inspect.Warning, a, fmt.Sprintf("the descriptor policy closes it, in the original as well, by %s", a.Rule), "")
		case a.Rule.Warn:
			note(inspect.Info, a, fmt.Sprintf("the descriptor policy: %s, by %s", a.Note, a.Rule), "")
		}
	}
	r.Findings = append(r.Findings, found.All...)
	return func(fd *inspect.FD) bool { return fd.Socket != nil && closes[fd.Socket.Cookie] }
}

// participants asks who would be told, whether they could.
func (r *Report) participants(ctx context.Context, c Container, o oci.Options) {
	n := hook.Notifier{Dir: filepath.Join(c.Bundle, hooksDir), Timeout: o.HookTimeout}
	if _, err := os.Stat(n.Dir); err != nil {
		if o.Hooks == oci.HooksOff {
			return
		}
		n.Dir = "" // the shim found no place for it in the container
	}
	adapters := o.HookBeforeCheckpoint != "" || o.HookAfterResume != "" || o.HookAfterRestore != ""
	if c.Paused {
		r.add(inspect.Info, "paused", "the container", "it is paused, so that its participants were not asked; a checkpoint resumes it for them", "resume it, and check again")
		return
	}
	wait, cancel := context.WithTimeout(ctx, turnWait)
	defer cancel()
	end, err := hook.Turn(wait, c.Bundle)
	if err != nil {
		r.add(inspect.Info, "busy", "the container", fmt.Sprintf("its participants were not asked, because a checkpoint is being made, or somebody else asks them (%v)", err), "check again when it is made")
		return
	}
	defer end()
	told := n.Notify(ctx, hook.Message{Event: hook.Check})
	r.Participants = told.Told()
	for _, p := range told.Results {
		if p.Err != nil {
			r.add(inspect.Error, "participant", "participant "+inspect.Printable(p.Name), p.Err.Error(), "its own log tells more; a participant that does not agree prevents the checkpoint (docs/hooks.md)")
		}
	}
	if told.Problem != nil {
		r.add(inspect.Error, "participant", "the participants", told.Problem.Error(), "see docs/hooks.md")
	}
	if adapters {
		r.add(inspect.Info, "adapter", "what the options hook.* name", "it is told of a checkpoint, and cannot be asked before", "")
	}
	if o.Hooks == oci.HooksRequired && r.Participants == 0 && !adapters {
		r.add(inspect.Error, "nobody", "hooks=required", "there is nobody to tell of the checkpoint", "start a participant, name an adapter, or set hooks=optional (docs/hooks.md)")
	}
}

// host takes from the doctor's report what a checkpoint needs.
func (r *Report) host(d doctor.Report, locksNetwork bool) {
	for _, c := range d.Checks {
		level := inspect.Error
		switch {
		case c.Status == doctor.Fail:
		case c.Status == doctor.Warn && c.Name == "network lock" && locksNetwork:
		case c.Status == doctor.Warn && c.Name == "cracctl":
			level = inspect.Warning
		default:
			continue
		}
		r.add(level, "host", "this host: "+c.Name, c.Found, c.Fix)
	}
}

// mayReadLimits tells whether a process has CAP_SYS_RESOURCE. What cannot be
// read counts as having it: a dump will tell.
func mayReadLimits(pid int) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return true
	}
	for line := range strings.Lines(string(data)) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			caps, err := strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
			return err != nil || caps&(1<<unix.CAP_SYS_RESOURCE) != 0
		}
	}
	return true
}
