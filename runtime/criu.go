package runtime

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	criurpc "github.com/checkpoint-restore/go-criu/v7/rpc"
	securejoin "github.com/cyphar/filepath-securejoin"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

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
	// Debug has CRIU log all it does. Otherwise it logs errors and warnings: to write thousands
	// of lines takes milliseconds, of a freeze too.
	Debug bool
	TCP   TCPMode
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
		fmt.Fprintf(&b, ": %s", strings.Join(slices.Compact(slices.Clone(e.Last)), "; "))
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
	{"No space left on device", "a dump needs as much room as the container has memory: free some where the log is"},
	{"Can't get rlimit", "CRIU needs CAP_SYS_RESOURCE to dump processes of another user, and containerd's root lacks it here: grant it, or run the container as root or in a user namespace (see `cracctl doctor`)"},
	{"Unsupported proto 262", "the workload listens with Multipath TCP, which CRIU cannot dump: set GODEBUG=multipathtcp=0 for a Go program, or the sysctl net.mptcp.enabled=0"},
	{"consider using --tcp-established", "the workload has established connections: close them, or set the annotation io.containerd.crac.tcp to close or established"},
}

// Unwrap returns what CRIU, or the way to it, has answered.
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

// criuOptions are those that a dump and a restore have in common. log is the name of
// CRIU's log in the work directory.
func (c *Container) criuOptions(o CRIUOptions, log string) (*criurpc.CriuOpts, error) {
	emptyNS, err := emptyNamespaces(o.EmptyNamespaces)
	if err != nil {
		return nil, err
	}
	if c.userNetwork {
		// A clone's interfaces are its own, and CRIU makes the namespace that they are put into.
		emptyNS |= unix.CLONE_NEWNET
	}
	level := int32(2) // LOG_WARN in CRIU's sources
	if o.Debug {
		level = 4 // LOG_DEBUG
	}
	opts := &criurpc.CriuOpts{
		LogFile:           proto.String(log),
		LogLevel:          proto.Int32(level),
		NotifyScripts:     proto.Bool(true),
		ManageCgroups:     proto.Bool(true),
		ManageCgroupsMode: c.cgroupsMode().Enum(),
		ShellJob:          proto.Bool(o.ShellJob),
		OrphanPtsMaster:   proto.Bool(true),
		ExtUnixSk:         proto.Bool(o.ExternalUnixSockets),
		TcpEstablished:    proto.Bool(o.TCP == TCPEstablished),
		TcpClose:          proto.Bool(o.TCP == TCPClose),
		FileLocks:         proto.Bool(true),
		GhostLimit:        proto.Uint32(inspect.GhostLimit),
		EmptyNs:           proto.Uint32(emptyNS),
	}
	if o.ConfigFile != "" {
		// CRIU takes a file that it cannot read for an empty one.
		if err := unix.Access(o.ConfigFile, unix.R_OK); err != nil {
			return nil, fmt.Errorf("CRIU configuration file: %w", &os.PathError{Op: "read", Path: o.ConfigFile, Err: err})
		}
		opts.ConfigFile = proto.String(o.ConfigFile)
	}
	return opts, nil
}

// cgroupsMode keeps CRIU's hands off cgroups that are ours to manage. Without a
// cgroup namespace the restored processes are where CRIU itself was put, which
// is the container's cgroup, and nothing needs doing; left to itself CRIU makes
// every hierarchy anew in which the container has no cgroup of its own. With a
// cgroup namespace CRIU must manage, or the clone would see the host's tree.
func (c *Container) cgroupsMode() criurpc.CriuCgMode {
	if private(c.spec, specs.CgroupNamespace) {
		return criurpc.CriuCgMode_SOFT
	}
	return criurpc.CriuCgMode_IGNORE
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

// externalMounts are those that came from outside when the container was created,
// by where they are in it. own is where the processes that CRIU is to see are in each
// hierarchy of cgroups.
func (c *Container) externalMounts(own map[string]string) (mounts []*criurpc.ExtMountMap, err error) {
	add := func(destination, source string) error {
		inside, err := securejoin.SecureJoin(c.config.Rootfs, destination)
		if err != nil {
			return fmt.Errorf("mount %s: %w", destination, err)
		}
		mounts = append(mounts, &criurpc.ExtMountMap{Key: proto.String(strings.TrimPrefix(inside, c.config.Rootfs)), Val: proto.String(source)})
		return nil
	}
	var errs []error
	for _, m := range c.config.Mounts {
		switch {
		case m.Device == "bind":
			errs = append(errs, add(m.Destination, m.Source))
		case m.Device == "cgroup" && !cgroups.IsCgroup2UnifiedMode() && !private(c.spec, specs.CgroupNamespace):
			// A bind mount for each hierarchy, of the container's place in it.
			hierarchies, err := cgroups.GetCgroupMounts(false)
			errs = append(errs, err)
			for _, h := range hierarchies {
				path, err := h.GetOwnCgroup(own)
				if err != nil {
					errs = append(errs, err)
					continue
				}
				below, err := filepath.Rel(h.Root, path)
				errs = append(errs, err, add(filepath.Join(m.Destination, filepath.Base(h.Mountpoint)), filepath.Join(h.Mountpoint, below)))
			}
		}
	}
	for _, d := range c.config.Devices {
		errs = append(errs, add(d.Path, d.Path))
	}
	return mounts, errors.Join(errs...)
}

// externalNetwork tells whether the container has a network namespace that is
// new, and no path that libcontainer would mark as external by itself. With a
// user namespace the network namespace belongs to it, and CRIU has to make both.
func (c *Container) externalNetwork() bool {
	_, mapped := namespace(c.spec, specs.UserNamespace)
	return OwnNetwork(c.spec) && !mapped
}

// OwnNetwork tells whether a container of this spec gets a new network namespace.
func OwnNetwork(spec *specs.Spec) bool { return private(spec, specs.NetworkNamespace) }
