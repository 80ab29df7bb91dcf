// Package harness runs a private containerd, registry and network for the end-to-end tests,
// the demo and the benchmarks, and proves that nothing of them is left behind.
//
// It works without *testing.T: functions return errors. The thin wrappers for tests are in t.go.
//
// A Daemon owns one directory and one containerd namespace with a random name. Everything that
// it makes carries one of the two: sockets, state and mounts lie below the directory, cgroups
// below a cgroup named after the namespace, and processes have the directory in their
// environment. So it can find and remove what is its own on a machine that other daemons use too.
package harness
