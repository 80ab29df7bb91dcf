package main

import (
	"os"

	"github.com/opencontainers/runc/libcontainer"
	_ "github.com/opencontainers/runc/libcontainer/nsenter" // enters the container's namespaces before Go starts

	"github.com/crac-shim/crac/runtime"
	"github.com/crac-shim/crac/runtime/pager"
)

// libcontainer starts this binary again as the first process of a container.
// It never gets to main, but the packages that main needs have been initialised
// by now: what they do then is on the way of every container.
func init() {
	if len(os.Args) > 1 && os.Args[1] == "init" {
		libcontainer.Init()
	}
	// And as what brings memory to restored processes, and what compiles a seccomp
	// filter.
	pager.Main()
	runtime.SeccompHelper(os.Args[1:])
}
