package runtime

import (
	"fmt"
	"os"
	"path/filepath"

	criurpc "github.com/checkpoint-restore/go-criu/v7/rpc"
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/cgroups/manager"
	"github.com/opencontainers/runc/libcontainer/configs"
	"google.golang.org/protobuf/proto"

	"github.com/crac-shim/crac/runtime/trace"
)

// readyCRIU is a CRIU that is started before it is known what to restore, or whether: it waits in
// the container's cgroup, with the container's streams and namespaces.
type readyCRIU struct {
	done chan struct{} // closed when it is ready, or never will be
	err  error

	*swrk
	extra      []*os.File // CRIU's, beside stdio
	inherit    []*criurpc.InheritFd
	join       []*criurpc.JoinNamespace
	cgroups    map[string]string // the container's, by controller, as in /proc/PID/cgroup
	cgroupDirs map[string]string
}

// readyCRIU begins to start one, and returns at once. close must be called.
func (c *Container) readyCRIU(stdio Stdio) *readyCRIU {
	r := &readyCRIU{done: make(chan struct{})}
	config := c.config
	go func() {
		defer close(r.done)
		defer c.cfg.Trace.On(trace.Background, "start CRIU")()
		r.err = r.start(c, config, stdio)
	}()
	return r
}

// get waits until it is ready.
func (r *readyCRIU) get() (*readyCRIU, error) {
	<-r.done
	return r, r.err
}

// close ends it, ready or not, unless it has ended. It may be called on nil.
func (r *readyCRIU) close() {
	if r == nil {
		return
	}
	<-r.done
	if r.swrk != nil {
		r.swrk.close()
	}
	for _, f := range r.extra {
		f.Close()
	}
	r.extra = nil
}

func (r *readyCRIU) start(c *Container, config *configs.Config, stdio Stdio) (err error) {
	if err := r.namespaces(config); err != nil {
		return err
	}
	if r.swrk, err = startSwrk(c.cfg.Reaper, [3]*os.File{stdio.Stdin, stdio.Stdout, stdio.Stderr}, r.extra); err != nil {
		return err
	}
	if err := noteCgroup(filepath.Join(c.cfg.Root, c.cfg.ID), config.Cgroups); err != nil {
		return err
	}
	if err := r.enterCgroup(config.Cgroups); err != nil {
		return fmt.Errorf("cgroup of container %s: %w", c.cfg.ID, err)
	}
	return nil
}

// externalNamespaces are those whose places alone a dump has, under the names that
// libcontainer gives them.
var externalNamespaces = map[configs.NamespaceType]string{configs.NEWNET: "extRootNetNS", configs.NEWPID: "extRootPidNS"}

// namespaces names those that exist already. Those that are not external CRIU joins.
func (r *readyCRIU) namespaces(config *configs.Config) error {
	for _, ns := range config.Namespaces {
		if ns.Path == "" {
			continue
		}
		if key := externalNamespaces[ns.Type]; key != "" {
			f, err := os.Open(ns.Path)
			if err != nil {
				return fmt.Errorf("namespace of the request: %w", err)
			}
			r.inherit = append(r.inherit, &criurpc.InheritFd{Key: proto.String(key), Fd: proto.Int32(int32(swrkExtra + len(r.extra)))})
			r.extra = append(r.extra, f)
			continue
		}
		if ns.Type == configs.NEWCGROUP {
			return fmt.Errorf("CRIU cannot restore into the existing cgroup namespace %s", ns.Path)
		}
		r.join = append(r.join, &criurpc.JoinNamespace{Ns: proto.String(configs.NsName(ns.Type)), NsFile: proto.String(ns.Path)})
	}
	return nil
}

// enterCgroup makes the container's cgroup and puts CRIU into it, and so all that
// it restores.
func (r *readyCRIU) enterCgroup(config *cgroups.Cgroup) error {
	cg, err := manager.New(config)
	if err != nil {
		return err
	}
	if err := cg.Apply(r.pid()); err != nil {
		return err
	}
	if err := cg.Set(config.Resources); err != nil {
		return err
	}
	r.cgroupDirs = cg.GetPaths()
	r.cgroups, err = cgroups.ParseCgroupFile(fmt.Sprintf("/proc/%d/cgroup", r.pid()))
	return err
}
