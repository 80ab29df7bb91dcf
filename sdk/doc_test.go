// Package sdk tests the libraries that workloads use, and the examples of
// docs/hooks.md, against a runtime that is played by the test.
//
// A language whose interpreter is missing is skipped; with CRAC_TEST_ALL=1, as in
// CI, that is a failure.
package sdk
