// Package shim turns containerd task calls into container operations, and
// outcomes into events and gRPC errors.
//
// It is translation only: it knows neither CRIU nor tar. What is asked is oci's
// to read, what there is, images' to find, and what is done, runtime's to do.
package shim
