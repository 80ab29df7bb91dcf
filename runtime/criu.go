package runtime

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/runtime/inspect"
)

// TCPMode says what a dump does about established TCP connections.
type TCPMode int

const (
	// TCPClose leaves connections out of the dump: a clone finds them closed.
	TCPClose TCPMode = iota
	// TCPEstablished keeps them: a clone with the same address may go on.
	TCPEstablished
	// TCPError refuses to dump while there are any.
	TCPError
)

// CRIUOptions are what a dump and a restore have in common. The zero value
// works.
type CRIUOptions struct {
	// WorkDir gets CRIU's log. Empty: the directory of the images.
	WorkDir string
	TCP     TCPMode
	// CanSkipNetworkLock: this CRIU can leave the network unlocked; 4.2 and newer.
	// An older one refuses the word, and ends.
	CanSkipNetworkLock bool
	// ExternalUnixSockets allows connections to sockets outside the container.
	ExternalUnixSockets bool
	// ShellJob allows a controlling terminal from outside the container.
	ShellJob bool
	// EmptyNamespaces are not dumped, or restored empty. CRIU knows "network".
	EmptyNamespaces []string
	// ConfigFile is a CRIU configuration file of the user's (criu(8),
	// CONFIGURATION FILES). What it says wins over everything here.
	ConfigFile string
	// Lazy lets a restored workload run before its memory is there: a pager
	// brings it. See CanBeLazy.
	Lazy bool
	// WorkingSet and Record are files for a lazy restore's pager: see pager.Config.
	// Empty: none.
	WorkingSet, Record string
	// Warn, unless nil, is told what a dump or a restore has gone on without.
	Warn func(error)
	// Parents are the directories of the dumps that the one to restore continues,
	// the nearest first.
	Parents []string
	// Images are image files, by name, that a restore reads instead of the
	// dump's.
	Images map[string][]byte

	packed []packedTmpfs // that a dump need not
}

// CRIUError is a dump or restore that CRIU gave up.
type CRIUError struct {
	Op   string   // "dump" or "restore"
	Log  string   // path of CRIU's log
	Last []string // the last lines of the log that tell of errors
	Err  error
}

// Error implements error.
func (e *CRIUError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "criu %s failed", e.Op)
	if len(e.Last) > 0 {
		fmt.Fprintf(&b, ": %s", strings.Join(e.Last, "; "))
	} else {
		fmt.Fprintf(&b, ": %v", e.Err)
	}
	for _, h := range criuHints {
		if strings.Contains(b.String(), h.says) {
			fmt.Fprintf(&b, "; %s", h.means)
			break
		}
	}
	fmt.Fprintf(&b, " (log: %s)", e.Log)
	return b.String()
}

// criuHints are failures that users meet, and the way out of each.
var criuHints = []struct{ says, means string }{
	{"Can't get rlimit", "CRIU needs CAP_SYS_RESOURCE to dump processes of another user, and containerd's root lacks it here: grant it, or run the container as root or in a user namespace (see `cracctl doctor`)"},
	{"Unsupported proto 262", "the workload listens with Multipath TCP, which CRIU cannot dump: set GODEBUG=multipathtcp=0 for a Go program, or the sysctl net.mptcp.enabled=0"},
	{"consider using --tcp-established", "the workload has established connections: close them, or set the annotation io.containerd.crac.tcp to close or established"},
}

// Unwrap returns libcontainer's error.
func (e *CRIUError) Unwrap() error { return e.Err }

// maxLogErrors is how many of the log's error lines go into an error message.
const maxLogErrors = 4

// harmlessError is logged, and then ignored, whenever CRIU may not raise its own
// limit of open files.
const harmlessError = "Can't setup RLIMIT_NOFILE for self"

func newCRIUError(op, log string, err error) *CRIUError {
	return &CRIUError{Op: op, Log: log, Last: lastErrors(log), Err: err}
}

// lastErrors reads the last lines with an error from a CRIU log. They look like
// "(00.012345)   1234: Error (criu/file.c:12): what went wrong".
func lastErrors(path string) []string {
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	var last []string
	lines := bufio.NewScanner(f)
	lines.Buffer(make([]byte, 0, 4096), 1<<20)
	for lines.Scan() {
		_, message, ok := strings.Cut(lines.Text(), "Error (")
		if !ok || strings.Contains(message, harmlessError) {
			continue
		}
		if last = append(last, "Error ("+message); len(last) > maxLogErrors {
			last = last[1:]
		}
	}
	return last
}

// options translates for libcontainer and writes the configuration file with
// what libcontainer cannot say. pid is the process whose namespaces are external
// to a dump; 0 in a restore.
func (c *Container) criuOptions(dir string, o CRIUOptions, pid int) (*libcontainer.CriuOpts, error) {
	if o.WorkDir == "" {
		o.WorkDir = dir
	}
	emptyNS, err := emptyNamespaces(o.EmptyNamespaces)
	if err != nil {
		return nil, err
	}
	if err := c.writeCRIUConfig(o, pid); err != nil {
		return nil, err
	}
	return &libcontainer.CriuOpts{
		ImagesDirectory:         dir,
		WorkDirectory:           o.WorkDir,
		TcpEstablished:          o.TCP == TCPEstablished,
		ExternalUnixConnections: o.ExternalUnixSockets,
		ShellJob:                o.ShellJob,
		FileLocks:               true,
		EmptyNs:                 emptyNS,
		ManageCgroupsMode:       c.cgroupsMode(),
		StatusFd:                -1,
	}, nil
}

// cgroupsMode keeps CRIU's hands off cgroups that are ours to manage. Without a
// cgroup namespace the restored processes are where CRIU itself was put, which
// is the container's cgroup, and nothing needs doing; left to itself CRIU makes
// every hierarchy anew in which the container has no cgroup of its own. With a
// cgroup namespace CRIU must manage, or the clone would see the host's tree.
func (c *Container) cgroupsMode() string {
	if private(c.spec, specs.CgroupNamespace) {
		return "soft"
	}
	return "ignore"
}

func emptyNamespaces(names []string) (mask uint32, err error) {
	for _, name := range names {
		if name != "network" {
			return 0, fmt.Errorf("empty namespace %q: CRIU can leave only \"network\" empty", name)
		}
		mask |= unix.CLONE_NEWNET
	}
	return mask, nil
}

// writeCRIUConfig writes the file that the container's label names.
func (c *Container) writeCRIUConfig(o CRIUOptions, pid int) error {
	var b strings.Builder
	fmt.Fprintf(&b, "ghost-limit %d\n", inspect.GhostLimit)
	if o.TCP == TCPClose {
		b.WriteString("tcp-close\n")
	}
	if pid != 0 && o.TCP != TCPEstablished && o.CanSkipNetworkLock {
		// The lock is for connections that a clone goes on with. Without it no packet
		// to the original is lost, and neither dump nor restore waits for a packet
		// filter: 77 ms of 183 of a small dump.
		b.WriteString("network-lock skip\n")
	}
	if pid != 0 && c.externalNetwork() {
		// A clone brings its own network namespace: the dump only marks the
		// place. The name is the one that libcontainer inherits it by.
		var st unix.Stat_t
		if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/net", pid), &st); err != nil {
			return fmt.Errorf("network namespace of process %d: %w", pid, err)
		}
		fmt.Fprintf(&b, "external net[%d]:extRootNetNS\n", st.Ino)
	}
	for _, p := range o.packed {
		fmt.Fprintf(&b, "external mnt[%s]:%s\n", p.mountpoint, p.key())
	}
	if o.ConfigFile != "" {
		user, err := os.ReadFile(o.ConfigFile)
		if err != nil {
			return fmt.Errorf("CRIU configuration file (annotation %s): %w", criuConfigLabel, err)
		}
		b.Write(user)
	}
	return os.WriteFile(c.cfg.criuConfig(), []byte(b.String()), 0o600)
}

// externalNetwork tells whether the container has a network namespace that is
// new, and no path that libcontainer would mark as external by itself. With a
// user namespace the network namespace belongs to it, and CRIU has to make both.
func (c *Container) externalNetwork() bool { return OwnNetwork(c.spec) }

// OwnNetwork tells whether a container of this spec gets a new network namespace
// that belongs to the host's user namespace.
func OwnNetwork(spec *specs.Spec) bool {
	return private(spec, specs.NetworkNamespace) && !private(spec, specs.UserNamespace)
}

// DumpOptions say what happens around a dump. The zero value works.
type DumpOptions struct {
	// Exit ends the workload after a dump that went well, Pause leaves it
	// paused; otherwise it is as it came.
	Exit, Pause bool
	// PreDump is the directory of a PreDump of this workload, or empty. The dump then
	// leaves out what it has, and continues it: dir has a link named parent. If that
	// goes wrong, the dump is a whole one, without that link, and the pre-dump is
	// removed.
	PreDump string
	// BeforeDump, unless nil, runs when the workload is frozen and before it is
	// dumped, with the ids of its processes. It must not call the Container.
	BeforeDump func(pids []int) error
	// WhileFrozen, unless nil, runs after the dump and before the workload does:
	// what it sees of the files agrees with the memory. It must not call the
	// Container.
	WhileFrozen func() error
}

// Dump writes the workload's memory and kernel state into dir, which it makes
// if need be. From a Running or Paused container it goes to Quiesced and back,
// or to what the options ask for.
//
// On any error the container is as it was, but for what BeforeDump has changed.
func (c *Container) Dump(dir string, o CRIUOptions, d DumpOptions) (err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refresh()
	came := c.machine.state
	if came == Created {
		return fmt.Errorf("checkpoint container %s: it was not started yet", c.cfg.ID)
	}
	if err := c.machine.can(Quiesced); err != nil {
		return err
	}
	// It runs on meanwhile.
	if err := c.finishMemory(); err != nil {
		return err
	}
	if err := c.machine.to(Quiesced); err != nil {
		return err
	}
	defer expectBreakpoints()()
	// Freeze it ourselves: CRIU leaves frozen what it found frozen, and so
	// nothing runs between the dump and WhileFrozen.
	if came == Running {
		if err := c.freeze(); err != nil {
			_ = c.machine.to(Running)
			return fmt.Errorf("freeze container %s: %w", c.cfg.ID, err)
		}
	}
	defer func() {
		next := came
		if err == nil && d.Pause {
			next = Paused
		}
		switch {
		case c.stopped():
			next = Stopped
		case err == nil && d.Exit:
			if err = c.lc.Signal(unix.SIGKILL); err == nil {
				<-c.init.Done()
				next = Stopped
			}
		case next == Running:
			err = errors.Join(err, c.lc.Resume())
		}
		_ = c.machine.to(next)
	}()
	if d.BeforeDump != nil {
		pids, err := c.lc.Processes()
		if err != nil {
			return err
		}
		if err := d.BeforeDump(pids); err != nil {
			return err
		}
	}
	if o.ConfigFile == "" { // the user's may have a word for the same mounts
		o.packed = c.packTmpfs(c.init.Pid())
	}
	opts, err := c.criuOptions(dir, o, c.init.Pid())
	if err != nil {
		return err
	}
	// Established connections outlive a killed process only if CRIU kills it
	// while they are locked.
	opts.LeaveRunning = !d.Exit || o.TCP != TCPEstablished
	if err := c.dumpSince(d.PreDump, opts, o.Warn); err != nil {
		return err
	}
	if err := completeDump(dir, o.packed); err != nil {
		return err
	}
	if d.WhileFrozen == nil {
		return nil
	}
	return d.WhileFrozen()
}

// dumpSince dumps what a pre-dump lacks, if there is one, and otherwise all.
func (c *Container) dumpSince(preDump string, opts *libcontainer.CriuOpts, warn func(error)) error {
	if preDump == "" {
		return c.criuDump(opts)
	}
	dir := opts.ImagesDirectory
	link, err := filepath.Rel(dir, preDump)
	if err != nil {
		return fmt.Errorf("pre-dump %s: %w", preDump, err)
	}
	opts.ParentImage = link // as CRIU sees it from its images
	since := c.criuDump(opts)
	if since == nil || c.stopped() {
		return since
	}
	// It was to be faster, and must not be the reason that there is no checkpoint:
	// not by the room that it takes, either.
	if err := errors.Join(os.RemoveAll(preDump), os.RemoveAll(dir), os.Mkdir(dir, 0o700)); err != nil {
		return errors.Join(since, err)
	}
	if warn != nil {
		warn(fmt.Errorf("all of the memory is dumped, and not only what has changed since the pre-dump: %w", since))
	}
	opts.ParentImage = ""
	return c.criuDump(opts)
}

func (c *Container) stopped() bool {
	select {
	case <-c.init.Done():
		return true
	default:
		return false
	}
}

func (c *Container) criuDump(opts *libcontainer.CriuOpts) error {
	defer c.cfg.Reaper.Hold()()
	if err := c.lc.Checkpoint(opts); err != nil {
		return newCRIUError("dump", filepath.Join(opts.WorkDirectory, "dump.log"), err)
	}
	return nil
}
