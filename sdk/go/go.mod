module github.com/crac-shim/crac/sdk/go

go 1.22
