// Package pager serves the memory of restored processes on demand, through
// userfaultfd(2). It speaks CRIU's lazy-pages protocol to an unmodified CRIU
// (`criu restore --lazy-pages`), in the place of `criu lazy-pages`.
//
// A restored process runs as soon as CRIU is through with everything but its
// memory. A page that it asks for is copied from the dump while it waits; all
// others follow in the background, in large batches by several threads. When
// everything is there the pager ends, and nothing is left of it.
//
// # The protocol
//
// CRIU connects to the unix socket lazy-pages.socket in its working directory and
// sends for every process its number in the dump (4 bytes) and a userfaultfd
// (SCM_RIGHTS); for a zombie the negative number alone. Faults may come from then
// on. When all processes are there, and before any of them runs, it sends
// 0x52535446, and does not wait for an answer.
//
// CRIU registers every private anonymous area that is neither locked nor of huge
// pages, and leaves the pages of those that the dump's page map calls lazy to us.
// All others it reads itself: of a dump that builds on another one those that did
// not change, and the stacks. Memory that is marked MADV_WIPEONFORK comes up
// empty, as in a fork: what is in it may not be shared by two processes.
//
// # Never silent zeroes
//
// When the last descriptor of a userfaultfd is closed, the kernel unregisters the
// memory, and pages that are missing read as zeroes, in silence. That must not
// happen while the workload lives: it must get its memory or die. Who holds the
// descriptors, then?
//
//   - Up to the end of the restore, CRIU's own process. It closes its descriptor,
//     and the workload cannot be made to hold one: it might close it, and a dump
//     of it would find it.
//   - The pager: a process of its own, not a part of the shim. It holds the socket
//     before CRIU connects, so the descriptors under way are held as well.
//   - Its guardian: a process that shares the pager's table of file descriptors
//     (CLONE_FILES). There is nothing to hand over and so no moment in which only
//     one of the two has a descriptor: not between accept(2) and recvmsg(2), not
//     when a fork event brings a new one. The kernel closes the table when the
//     later of the two is dead.
//
// When the pager dies the guardian takes notice, kills everything in the
// workload's cgroups, waits until nothing is left in them, and lets go. Whoever
// asks for a page meanwhile waits. When the guardian dies the pager makes
// another one. When CRIU dies before it has sent 0x52535446, none of the
// workload's processes has left CRIU's code, nor ever will: the restore has
// failed, and the pager kills nothing. The death of the shim means nothing: the
// pager brings the rest of the memory without delay and ends.
//
// So both must die within the few milliseconds that one needs to notice the other
// for a workload to read zeroes. Then whoever has started the pager (Process) kills
// the workload, as soon as it learns of it by the end of their common socket: it may
// have read zeroes for a moment, but it does not go on with them. Only when that
// process is dead as well, at the same time, is nobody left. What kills many at once must not kill both and
// spare the workload: neither bears the name of the shim's program, for those who
// kill by name; neither is a candidate of the OOM killer (oom_score_adj -1000,
// where allowed), nor heeds a signal but SIGKILL; and the guardian can be put into
// another cgroup (ProcessConfig.GuardianCgroups), for those who kill by cgroup.
// No order of the kernel's helps beyond that: a process's files are closed before
// anybody is told of its end by a parent-death signal, a ptrace option or the end
// of a pid namespace.
//
// What cannot be served ends in the same way, with a reason: a file of pages that
// is damaged, short or unreadable, memory that CRIU has not registered, a
// container at its limit of memory.
//
// # Limits
//
// In a user namespace CRIU can make a userfaultfd only where the sysctl
// vm.unprivileged_userfaultfd is 1.
//
// The kernel tells nobody of MADV_GUARD_INSTALL, and lets a copy replace a guard.
// So guards that a workload puts, after its restore, on memory that is still
// missing are lost when that comes; those that it had when it was dumped are not.
// Nor does it tell of MADV_WIPEONFORK: what the workload marks while it is missing
// is not empty in a child that is forked before it has come.
package pager
