package runtime

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	criurpc "github.com/checkpoint-restore/go-criu/v7/rpc"
	"github.com/opencontainers/runc/libcontainer"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runc/libcontainer/system"
	"github.com/opencontainers/runc/libcontainer/utils"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/crac-shim/crac/runtime/pager"
	"github.com/crac-shim/crac/runtime/trace"
)

// restoreLog is CRIU's log in the work directory.
const restoreLog = "restore.log"

// criuRestore is one call of CRIU. libcontainer has one of its own, which calls
// nobody between the restore of a workload and its first instruction; this one
// does, and leaves behind what libcontainer would have left: a cgroup, and a
// state file for libcontainer.Load.
type criuRestore struct {
	c     *Container
	dir   string // of the dump, as CRIU is to see it
	o     CRIUOptions
	stdio Stdio
	criu  *readyCRIU
	// created is called when the first process is there, in its namespaces, and nothing
	// else. An error undoes the restore.
	created func(pid int) error
	// beforeRun is called when every process is there, with its memory, files
	// and mounts, and none has run: what it does, the workload finds done. pid is
	// that of the first process. An error undoes the restore.
	beforeRun func(pid int) error

	pager   *pager.Process // unless all memory is there before anything runs
	paging  chan struct{}  // closed when the pager has started, or not
	pageErr error          // why it has not
	pid     int            // of the first process, as soon as there is one
}

// run restores, and returns when the workload runs. On an error nothing of it has
// run, and nothing is left of it but its cgroup.
func (r *criuRestore) run() (pid int, err error) {
	images, err := os.Open(r.dir)
	if err != nil {
		return 0, err
	}
	defer images.Close()
	if r.o.WorkDir == "" {
		r.o.WorkDir = r.dir
	}
	if err := os.Mkdir(r.o.WorkDir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return 0, err
	}
	work, err := os.Open(r.o.WorkDir)
	if err != nil {
		return 0, err
	}
	defer work.Close()
	prepare := r.c.cfg.Trace.Step("make mount points and options")
	if err := makeMountPoints(r.c.config.Rootfs, r.c.config.Mounts); err != nil {
		return 0, err
	}
	root, unmount, err := r.root()
	if err != nil {
		return 0, err
	}
	defer unmount()
	opts, err := r.options()
	if err != nil {
		return 0, err
	}
	opts.ImagesDirFd, opts.WorkDirFd, opts.Root = proto.Int32(int32(images.Fd())), proto.Int32(int32(work.Fd())), &root
	prepare()
	wait := r.c.cfg.Trace.Step("wait for CRIU to be ready")
	criu, err := r.criu.get()
	wait()
	if err != nil {
		return 0, err
	}
	opts.InheritFd, opts.JoinNs = append(opts.InheritFd, criu.inherit...), criu.join
	for controller, path := range criu.cgroups {
		opts.CgRoot = append(opts.CgRoot, &criurpc.CgroupRoot{Ctrl: proto.String(controller), Path: proto.String(path)})
	}
	if err := r.mounts(opts, criu.cgroups); err != nil {
		return 0, err
	}
	detach, err := r.c.tmpfs.attach(filepath.Join(r.c.cfg.Root, r.c.cfg.ID, "criu-tmpfs"), opts)
	defer detach()
	if err != nil {
		return 0, err
	}
	if r.o.Lazy {
		if err := r.beginPager(criu.cgroupDirs); err != nil {
			return 0, err
		}
		opts.LazyPages = proto.Bool(true)
		defer func() {
			if err != nil {
				r.stopPager()
			}
		}()
	}
	var refused error
	restore := r.c.cfg.Trace.Step("CRIU restores")
	stages := criuStages{trace: r.c.cfg.Trace, since: time.Now()}
	err = criu.call(&criurpc.CriuReq{Type: criurpc.CriuReqType_RESTORE.Enum(), Opts: opts}, func(stage string, pid int, file *os.File) error {
		stages.reached(stage)
		refused = r.stage(stage, pid, file)
		stages.answered(stage)
		return refused
	})
	stages.reached("its end")
	restore()
	if err == nil && r.pid == 0 {
		err = errors.New("CRIU did not say what it has restored")
	}
	if err == nil {
		return r.pid, nil
	}
	// Without a pager CRIU only knows that it is not answered.
	if perr := r.pagerStarted(); perr != nil {
		err, refused = perr, perr
	}
	if r.pid != 0 {
		// CRIU kills what it has restored half-way, unless it has died itself.
		// It is our child: the pid stays its own until it is reaped.
		_ = unix.Kill(r.pid, unix.SIGKILL)
		_ = unix.Waitid(unix.P_PID, r.pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
	}
	if refused != nil {
		return 0, err
	}
	return 0, newCRIUError("restore", filepath.Join(r.o.WorkDir, restoreLog), err)
}

// root mounts the root file system where CRIU wants it: it must be a mount, and
// nothing may be mounted over its parent.
func (r *criuRestore) root() (dir string, unmount func(), err error) {
	dir, err = filepath.EvalSymlinks(filepath.Join(r.c.cfg.Root, r.c.cfg.ID))
	if err != nil {
		return "", nil, err
	}
	dir = filepath.Join(dir, "criu-root")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", nil, err
	}
	if err := unix.Mount(r.c.config.Rootfs, dir, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		os.Remove(dir)
		return "", nil, &os.PathError{Op: "bind mount", Path: r.c.config.Rootfs, Err: err}
	}
	return dir, func() {
		_ = unix.Unmount(dir, unix.MNT_DETACH)
		os.Remove(dir)
	}, nil
}

// options are those that say how, and not what.
func (r *criuRestore) options() (*criurpc.CriuOpts, error) {
	opts, err := r.c.criuOptions(r.o, restoreLog)
	if err != nil {
		return nil, err
	}
	opts.RstSibling = proto.Bool(true) // the workload is our child, not CRIU's
	opts.EvasiveDevices = proto.Bool(true)
	return opts, r.inheritStdio(opts)
}

// descriptorsName is a file of the dump that is not CRIU's: what the first three
// descriptors of the init were, by the names that /proc gives them. runc has it, too.
const descriptorsName = "descriptors.json"

// inheritStdio hands our ends of the standard streams to the processes that had
// theirs when they were dumped. The dump names its pipes in a file of its own.
func (r *criuRestore) inheritStdio(opts *criurpc.CriuOpts) error {
	f, err := os.Open(filepath.Join(r.dir, descriptorsName))
	if err != nil {
		return err
	}
	defer f.Close()
	var names []string
	if err := json.NewDecoder(io.LimitReader(f, 1<<16)).Decode(&names); err != nil {
		return fmt.Errorf("descriptors.json of the dump: %w", err)
	}
	for i, name := range names {
		// The descriptors behind the three are not a dump's to choose from.
		if i < 3 && strings.HasPrefix(name, "pipe:") {
			opts.InheritFd = append(opts.InheritFd, &criurpc.InheritFd{Key: proto.String(name), Fd: proto.Int32(int32(i))})
		}
	}
	return nil
}

// mounts says where the mounts come from that the dump marks as external. A dump
// may lack some of them: see mountTrees.
func (r *criuRestore) mounts(opts *criurpc.CriuOpts, own map[string]string) (err error) {
	opts.ExtMnt, err = r.c.externalMounts(own)
	if len(r.c.config.MaskPaths) > 0 {
		opts.ExtMnt = append(opts.ExtMnt, &criurpc.ExtMountMap{Key: proto.String(os.DevNull), Val: proto.String(os.DevNull)})
	}
	return err
}

// stage does what is due at a stage of the restore.
func (r *criuRestore) stage(stage string, pid int, file *os.File) error {
	if pid != 0 {
		r.pid = pid
	}
	switch stage {
	case stageNamespaces:
		return r.created(pid)
	case stageRestored:
		// From here on it is in the pager's hands.
		if err := r.pagerStarted(); err != nil {
			return err
		}
		if err := r.saveState(); err != nil {
			return err
		}
		return r.beforeRun(pid)
	case stageTerminal:
		if file == nil || r.stdio.Console == nil {
			return errors.New("the dump has a terminal and the request has none")
		}
		return utils.SendFile(r.stdio.Console, file)
	}
	return nil
}

// saveState writes the file that libcontainer.Load reads.
func (r *criuRestore) saveState() error {
	state, err := r.c.lc.State()
	if err != nil {
		return err
	}
	stat, err := system.Stat(r.pid)
	if err != nil {
		return err
	}
	state.InitProcessPid, state.InitProcessStartTime, state.Created = r.pid, stat.StartTime, time.Now().UTC()
	if !state.Config.Namespaces.Contains(configs.NEWTIME) && configs.IsNamespaceSupported(configs.NEWTIME) {
		// CRIU has made one, for the clocks to go on from the dump; what is
		// started in the container later must see the same time.
		state.Config.Namespaces = append(state.Config.Namespaces, configs.Namespace{Type: configs.NEWTIME})
	}
	for _, t := range configs.NamespaceTypes() {
		if configs.IsNamespaceSupported(t) {
			state.NamespacePaths[t] = (&configs.Namespace{Type: t}).GetPath(r.pid)
		}
	}
	for _, ns := range state.Config.Namespaces {
		state.NamespacePaths[ns.Type] = ns.GetPath(r.pid)
	}
	state.ExternalDescriptors, err = r.stdio.names()
	if err != nil {
		return err
	}
	return writeState(filepath.Join(r.c.cfg.Root, r.c.cfg.ID, "state.json"), state)
}

func writeState(path string, state *libcontainer.State) error {
	data, err := json.Marshal(state)
	if err != nil {
		return err
	}
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// criuStages traces what CRIU does between the stages at which it asks whether to go
// on: it says at none how long anything has taken.
type criuStages struct {
	trace *trace.Recorder
	since time.Time
}

func (s *criuStages) reached(stage string) {
	now := time.Now()
	s.trace.Add(trace.CRIU, "until "+stage, s.since, now)
	s.since = now
}

// answered: what we did at the stage is over, and was not CRIU's.
func (s *criuStages) answered(stage string) {
	now := time.Now()
	s.trace.Add(trace.CRIU, "waits for us at "+stage, s.since, now)
	s.since = now
}
