// Command containerd-shim-crac-v2 is the containerd shim of the runtime
// io.containerd.crac.v2. containerd starts it: `start` and `delete` are its
// calls, and -info tells what it can do. What `start` leaves behind is the shim itself.
package main

import (
	"context"
	"fmt"
	"os"
	goruntime "runtime"
	"slices"

	cshim "github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/containerd/v2/pkg/shutdown"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"

	"github.com/crac-shim/crac/shim"
)

// version is set at build time.
var version = "dev"

// The first thread is the one by which /proc shows the process. libcontainer moves threads that
// it takes into a container's mount namespace and lets them end there, and this one, which
// cannot end, would stay: with another working directory, which cracctl finds the bundle by,
// and with a hold on the container's mounts. So it is main's alone. Only here: main itself may
// have been moved to another thread as soon as it has waited for anything.
func init() { goruntime.LockOSThread() }

func main() {
	shim.Version = version
	if len(os.Args) == 2 && slices.Contains([]string{"-v", "-version", "--version"}, os.Args[1]) {
		// containerd's package would tell containerd's own.
		fmt.Printf("containerd-shim-crac-v2 %s (%s)\n", version, goruntime.Version())
		return
	}
	ctx := context.Background()
	if args, answer, ok := starts(); ok {
		serve, err := shim.Begin(ctx, args, answer)
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", shim.Name, err)
			os.Exit(1)
		}
		if !serve {
			return
		}
	}
	registry.Register(&plugin.Registration{
		Type:     plugins.TTRPCPlugin,
		ID:       "task",
		Requires: []plugin.Type{plugins.EventPlugin, plugins.InternalPlugin},
		InitFn:   newService,
	})
	cshim.RunShim(ctx, shim.Manager{}, func(c *cshim.Config) {
		// Both are the service's: see runtime.Subreaper.
		c.NoReaper = true
		c.NoSubreaper = true
	})
}

func newService(ic *plugin.InitContext) (any, error) {
	publisher, err := ic.GetByID(plugins.EventPlugin, "publisher")
	if err != nil {
		return nil, err
	}
	sd, err := ic.GetByID(plugins.InternalPlugin, "shutdown")
	if err != nil {
		return nil, err
	}
	return shim.NewService(ic.Context, ic.Properties[plugins.PropertyGRPCAddress], publisher.(cshim.Publisher), sd.(shutdown.Service))
}
