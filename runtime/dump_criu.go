package runtime

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	criurpc "github.com/checkpoint-restore/go-criu/v7/rpc"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer/configs"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// dumpLog is CRIU's log in the work directory.
const dumpLog = "dump.log"

// stageDump is the stage at which CRIU has found out about the kernel and the CPU,
// and not yet looked at the workload.
const stageDump = "pre-dump"

// stageDumped is the stage at which all is written, and the workload not yet let go.
const stageDumped = "post-dump"

const (
	// watchEvery is how often it is looked whether the workload still lives, and patience how
	// long CRIU has to notice by itself that it does not: then it undoes what it has done to
	// the network.
	watchEvery = 50 * time.Millisecond
	patience   = time.Second
)

// criuDump is a dump of a container by CRIU. libcontainer has one of its own, which
// needs the workload to stand still before it starts CRIU, twice; this one asks for
// that when CRIU is about to look at the workload.
type criuDump struct {
	c     *Container
	dir   string
	o     CRIUOptions
	opts  *criurpc.CriuOpts
	files []*os.File
	tmpfs *tmpfsPack // of a dump that need not pack all by itself
	// inside: CRIU is in the workload's network namespace.
	inside bool
	// begin is called when CRIU is ready, if that is to be told: what it does, CRIU
	// finds done. It may be called again.
	begin func() error
}

// newDump makes everything ready for a dump into dir, which it makes. close must be called.
func (c *Container) newDump(dir string, o CRIUOptions) (*criuDump, error) {
	if o.WorkDir == "" {
		o.WorkDir = dir
	}
	opts, err := c.criuOptions(o, dumpLog)
	if err != nil {
		return nil, err
	}
	d := &criuDump{c: c, dir: dir, o: o, opts: opts}
	if err := d.prepare(); err != nil {
		d.close()
		return nil, err
	}
	return d, nil
}

// prepare finds out what CRIU has to be told.
func (d *criuDump) prepare() (err error) {
	if d.opts.ImagesDirFd, err = d.directory(d.dir); err != nil {
		return err
	}
	if d.opts.WorkDirFd, err = d.directory(d.o.WorkDir); err != nil {
		return err
	}
	state, err := d.c.lc.State()
	if err != nil {
		return err
	}
	d.opts.Pid = proto.Int32(int32(state.InitProcessPid))
	d.opts.Root = proto.String(d.c.config.Rootfs)
	if freezer, ok := state.CgroupPaths["freezer"]; ok {
		d.opts.FreezeCgroup = proto.String(freezer)
	} else if unified := state.CgroupPaths[""]; unified != "" {
		d.opts.FreezeCgroup = proto.String(unified)
	}
	if d.o.TCP != TCPEstablished && d.o.CanSkipNetworkLock {
		// The lock is for connections that a clone goes on with. Without it no packet
		// to the original is lost, and the dump does not wait for a packet filter: 77 ms
		// of 183 of a small one.
		d.opts.NetworkLock = criurpc.CriuNetworkLockMethod_SKIP.Enum()
	}
	if err := d.namespaces(state.InitProcessPid); err != nil {
		return err
	}
	if err := d.mounts(state.InitProcessPid); err != nil {
		return err
	}
	// What a restore hands on; runc's reads the same file.
	descriptors, err := json.Marshal(state.ExternalDescriptors)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(d.dir, descriptorsName), descriptors, 0o600)
}

// directory makes and opens a directory for CRIU.
func (d *criuDump) directory(path string) (fd *int32, err error) {
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	d.files = append(d.files, f)
	return proto.Int32(int32(f.Fd())), nil
}

func (d *criuDump) close() {
	d.tmpfs.close()
	for _, f := range d.files {
		f.Close()
	}
}

// namespaces marks those that a clone brings its own of: the dump has only their
// places. The names are those by which libcontainer inherits them.
func (d *criuDump) namespaces(pid int) error {
	for kind, key := range externalNamespaces {
		if kind == configs.NEWNET && d.c.userNetwork {
			continue // it is dumped as an empty one
		}
		path := d.c.config.Namespaces.PathOf(kind)
		if path == "" && kind == configs.NEWNET && d.c.externalNetwork() {
			path = fmt.Sprintf("/proc/%d/ns/net", pid)
		}
		if path == "" {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return fmt.Errorf("%s namespace of process %d: %w", configs.NsName(kind), pid, &os.PathError{Op: "stat", Path: path, Err: err})
		}
		d.opts.External = append(d.opts.External, fmt.Sprintf("%s[%d]:%s", configs.NsName(kind), st.Ino, key))
		if kind == configs.NEWNET {
			// CRIU locks all of its own network, or none of it.
			d.inside = d.opts.NetworkLock != nil && d.opts.GetEmptyNs() == 0
		}
	}
	return nil
}

// mounts marks those that come from outside. A clone's are its own.
func (d *criuDump) mounts(pid int) error {
	own, err := cgroups.ParseCgroupFile("/proc/self/cgroup")
	if err != nil {
		return err
	}
	if d.opts.ExtMnt, err = d.c.externalMounts(own); err != nil {
		return err
	}
	for _, m := range d.opts.ExtMnt {
		m.Val = m.Key
	}
	for _, path := range d.c.config.MaskPaths {
		st, err := os.Stat(fmt.Sprintf("/proc/%d/root/%s", pid, path))
		switch {
		case errors.Is(err, os.ErrNotExist):
		case err != nil:
			return err
		case !st.IsDir(): // a directory is masked by a tmpfs
			d.opts.ExtMnt = append(d.opts.ExtMnt, &criurpc.ExtMountMap{Key: proto.String(path), Val: proto.String(os.DevNull)})
		}
	}
	return nil
}

// leaveOutTmpfs has CRIU dump nothing of small tmpfs mounts but their places.
func (d *criuDump) leaveOutTmpfs() {
	d.tmpfs = d.c.findTmpfs(int(d.opts.GetPid()))
	for _, m := range d.tmpfs.mounts {
		d.opts.ExtMnt = append(d.opts.ExtMnt, &criurpc.ExtMountMap{Key: proto.String(m.mountpoint), Val: proto.String(m.key())})
	}
}

// leaveNothingOut has CRIU dump everything by itself, from where it is.
func (d *criuDump) leaveNothingOut() {
	d.inside = false
	if d.tmpfs == nil {
		return
	}
	d.opts.ExtMnt = d.opts.ExtMnt[:len(d.opts.ExtMnt)-len(d.tmpfs.mounts)]
	d.tmpfs.close()
	d.tmpfs = nil
}

// complete puts into the dump what CRIU has left out.
func (d *criuDump) complete() error {
	if d.inside {
		if err := markNetworkExternal(d.dir, externalNamespaces[configs.NEWNET]); err != nil {
			return err
		}
	}
	return d.tmpfs.addTo(d.dir)
}

// since dumps what the pre-dump in this directory lacks, or everything if it is
// empty.
func (d *criuDump) since(preDump string) error {
	if preDump == "" {
		return d.dump()
	}
	link, err := filepath.Rel(d.dir, preDump)
	if err != nil {
		return fmt.Errorf("pre-dump %s: %w", preDump, err)
	}
	d.opts.ParentImg, d.opts.TrackMem = proto.String(link), proto.Bool(true) // as CRIU sees it from its images
	since := d.dump()
	if since == nil || errors.Is(since, ErrNotRunning) || d.c.stopped() || d.c.killed.Load() {
		return since
	}
	// It was to be faster, and must not be the reason that there is no checkpoint:
	// not by the room that it takes, either.
	if err := errors.Join(os.RemoveAll(preDump), d.clear()); err != nil {
		return errors.Join(since, err)
	}
	if d.o.Warn != nil {
		d.o.Warn(fmt.Errorf("all of the memory is dumped, and not only what has changed since the pre-dump: %w", since))
	}
	d.opts.ParentImg, d.opts.TrackMem = nil, nil
	return d.dump()
}

// clear removes what a call has left behind that has failed.
func (d *criuDump) clear() error {
	left, err := os.ReadDir(d.dir)
	for _, e := range left {
		if e.Name() != descriptorsName {
			err = errors.Join(err, os.RemoveAll(filepath.Join(d.dir, e.Name())))
		}
	}
	return err
}

// dump has CRIU dump the workload.
func (d *criuDump) dump() error {
	err := d.call(criurpc.CriuReqType_DUMP)
	if errors.Is(err, errTmpfsChanged) || errors.Is(err, errNetworks) {
		d.leaveNothingOut()
		err = d.call(criurpc.CriuReqType_DUMP)
	}
	return err
}

// stillSo tells whether the workload, which is frozen now, is as it was thought to
// be, and packs what CRIU was told to leave out.
func (d *criuDump) stillSo() error {
	if d.inside {
		pids, err := d.c.lc.Processes()
		if err != nil {
			return err
		}
		if err := sameNetwork(pids); err != nil {
			return err
		}
	}
	return d.tmpfs.pack()
}

// endWithInit kills CRIU when the container's init ends while it is dumped, until stop is
// called. Else neither would end: the init of a pid namespace waits for everybody in it, the
// others, which CRIU traces, for CRIU to take notice of their end, and CRIU (compel's wait4)
// for the init.
func (d *criuDump) endWithInit(criu *swrk) (stop func()) {
	if d.c.SharesPIDs() {
		return func() {}
	}
	var wg sync.WaitGroup
	stopped := make(chan struct{})
	wg.Go(func() {
		tick := time.NewTicker(watchEvery)
		defer tick.Stop()
		var since time.Time // it has been ending
		for {
			select {
			case <-stopped:
				return
			case <-criu.ended:
				return
			case <-tick.C:
			}
			switch {
			case !isExiting(int(d.opts.GetPid())):
			case since.IsZero():
				since = time.Now()
			case time.Since(since) > patience:
				_ = criu.cmd.Process.Kill()
				return
			}
		}
	})
	return sync.OnceFunc(func() {
		close(stopped)
		wg.Wait()
	})
}

// isExiting tells whether all of a process is on its way out, or gone. What cannot be
// found out is not.
func isExiting(pid int) bool {
	const exiting = 0x4 // PF_EXITING, include/linux/sched.h
	gone := func(err error) bool { return errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) }
	tasks := fmt.Sprintf("/proc/%d/task", pid)
	threads, err := os.ReadDir(tasks)
	if err != nil {
		return gone(err)
	}
	for _, t := range threads {
		fields, err := statOf(filepath.Join(tasks, t.Name(), "stat"))
		if err != nil {
			if !gone(err) {
				return false
			}
			continue
		}
		if flags, err := strconv.ParseUint(fields[6], 10, 64); err != nil || flags&exiting == 0 {
			return false
		}
	}
	return true
}

// call has CRIU dump, or pre-dump.
func (d *criuDump) call(what criurpc.CriuReqType) error {
	var criu *swrk
	err := d.insideNetwork(func() (err error) {
		criu, err = startSwrk(d.c.cfg.Reaper, [3]*os.File{}, nil)
		return err
	})
	if err != nil {
		return err
	}
	defer criu.close()
	stop := d.endWithInit(criu)
	defer stop()
	var begun bool
	var refused error
	err = criu.call(&criurpc.CriuReq{Type: what.Enum(), Opts: d.opts}, func(stage string, _ int, _ *os.File) error {
		switch {
		case stage == stageDumped:
			stop() // what comes now is the end of the workload, if it is to end
		case stage == stageDump && d.begin != nil:
			begun = true
			if refused = d.begin(); refused == nil {
				refused = d.stillSo()
			}
		}
		return refused
	})
	switch {
	case err != nil && isExiting(int(d.opts.GetPid())):
		return fmt.Errorf("container %s ended while it was dumped: %w", d.c.cfg.ID, ErrNotRunning)
	case refused != nil:
		return refused
	case err != nil:
		return newCRIUError("dump", filepath.Join(d.o.WorkDir, dumpLog), err)
	case d.begin != nil && !begun:
		return errors.New("CRIU did not say when it began to dump")
	}
	return nil
}
