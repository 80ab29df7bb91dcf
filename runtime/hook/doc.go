// Package hook tells a container's participants what happens to it: the
// coordination contract, host side.
//
// A participant is a process of the workload that listens on a unix socket in
// /run/crac, a directory that the shim makes for each container (MakeDir). It is
// told by one line of JSON and answers by one (Notifier). Workloads that cannot be
// changed have an Adapter instead: a command, an HTTP request or a signal. The
// other way round, the workload asks the shim on control.sock (Control). The
// contract is docs/hooks.md.
//
// Everything in the directory is the workload's doing and taken for hostile:
// no link is followed, nothing that could block is opened, every size and every
// wait has a bound.
package hook
