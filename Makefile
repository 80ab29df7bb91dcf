# crac: a containerd runtime that starts containers warm. `make help` lists the targets.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
# The steps share two cores and lock files: one after the other is faster.
.NOTPARALLEL:

include integration/tools/versions.env

BUILD   := $(abspath build)
PREFIX  ?= /usr/local
DESTDIR ?=
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
# Where Go is when it is not on PATH: as its own installation guide says.
export PATH := $(PATH):/usr/local/go/bin

# One set for all, so that a package is compiled once; Go's own resolver and
# user database are what a static binary can have.
export GOTAGS := seccomp,netgo,osusergo
LDFLAGS := -s -w -X main.version=$(VERSION)
# The shim is executed twice on the way to a container's first instruction:
# without gRPC's servers, which nobody calls, and without a dynamic loader's work.
SHIM_TAGS    := $(GOTAGS),no_grpc
SHIM_LDFLAGS := $(LDFLAGS) -linkmode external -extldflags -static
export CRAC_BUILD := $(BUILD)
# Everywhere, not only for the binaries: what was compiled for one is then there for
# the tests, the demo and the guest.
export GOFLAGS := $(strip $(GOFLAGS) -trimpath)

# The end-to-end tests need root, containerd and minutes; the rest are unit tests.
UNIT = $$(go list -tags $(GOTAGS) ./... | grep -v '/integration$$')

.PHONY: help
help: ## say what the targets do
	@awk -F ':.*## ' '/^[a-z][a-z0-9-]*:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: host
host:
	@integration/tools/install.sh host go

.PHONY: build
build: host ## the shim, cracctl and, with a JDK, the Java library, into build/bin
	@mkdir -p $(BUILD)/bin
	CGO_ENABLED=1 go build -tags '$(SHIM_TAGS)' -ldflags '$(SHIM_LDFLAGS)' -o $(BUILD)/bin/ ./cmd/containerd-shim-crac-v2
	CGO_ENABLED=1 go build -tags '$(GOTAGS)' -ldflags '$(LDFLAGS)' -o $(BUILD)/bin/ ./cmd/cracctl
	@sdk/java/build.sh $(BUILD)/bin/crac.jar '$(VERSION)'

.PHONY: tools
tools: ## containerd, runc, nerdctl, registry, CNI plugins and CRIU, into build/tools
	@integration/tools/install.sh

.PHONY: images
images: ## the test applications' images, into build/images (APPS="tomcat redis" for some)
	@integration/apps/build.sh $(APPS)

.PHONY: test
test: test-unit test-e2e ## unit tests, then end-to-end tests

.PHONY: test-unit
test-unit: host ## unit tests with the race detector
	@integration/tools/install.sh jdk jdk25
	go test -race -tags '$(GOTAGS)' -timeout 10m $(UNIT)

# Every fuzz target, each with one worker, and five for a CPU: three dozen targets
# for a minute each take five minutes on two CPUs then, and eighteen otherwise.
# Minimizing would take most of the time.
FUZZTIME ?= 1m
FUZZJOBS ?= $(shell echo $$((5 * $$(nproc))))
.PHONY: fuzz
fuzz: host ## every fuzz target, for FUZZTIME=1m each
	@git grep -H '^func Fuzz' -- '*_test.go' | sed -n 's|^\(.*\)/[^/]*:func \(Fuzz[A-Za-z0-9]*\)(.*|\1 \2|p' | sort -u | \
	  xargs -P '$(FUZZJOBS)' -L 1 integration/tools/fuzz.sh '$(FUZZTIME)'

.PHONY: test-e2e
test-e2e: tools build images ## end-to-end tests on real containerd, CRIU and registry (root; RUN=regexp for some)
	@integration/tools/install.sh jdk jdk25
	$(if $(RUN),,CRAC_PAGER_TEST=require go test -tags '$(GOTAGS)' ./runtime/pager -count=1 -timeout 6m)
	go test -tags '$(GOTAGS)' ./integration -count=1 -v -timeout 20m $(if $(RUN),-run '$(RUN)')

# Kills at random moments, also of the shim and of containerd. N=1 takes some ten seconds.
N ?= 100
.PHONY: soak
soak: tools build ## N=100 rounds of killing who brings a clone its memory: it has the right one, or is dead and says why
	@integration/apps/build.sh busybox redis
	CRAC_PAGER_TEST=require CRAC_ROUNDS='$(N)' go test -tags '$(GOTAGS)' ./runtime/pager -count=1 -v -run '^TestKill$$' -timeout 12h
	CRAC_ROUNDS='$(N)' go test -tags '$(GOTAGS)' ./integration -count=1 -v -run '^TestLazyMemory(Kills|WithoutPager)$$' -timeout 12h

# What differs in the guest: cgroup v2, systemd, AppArmor, another CRIU, kernel
# and CPU. Hooks thaw, freeze and execute something in a cgroup of it. All of the
# tests (CRAC_VM_RUN=.) take an hour where it is emulated.
# The host and the guest also take images from each other: Test(Leave|Take)….
CRAC_VM_RUN ?= ^(TestExitCode|TestStats|TestUpdate|TestOOM|TestCgroupPath|TestSystemdCgroup|TestSystemdCgroupOfAClone|TestAppArmor|TestCloneIsUnderTheRequestsProfile|TestUserNamespace|TestTasksCheckpoint|TestCheckpointImage|TestTwoClonesAtOnce|TestApplications|TestTakeFromAnotherHost|TestLeaveForAnotherHost|TestPreDump|TestHooksOfPausedTask|TestHooksBeforeCheckpoint)$$/^(leave-running-image|exit-path|goserver|postgres|exec-ack|exec-veto)$$

.PHONY: test-vm
test-vm: tools build images ## the core of the end-to-end tests in a QEMU guest with cgroup v2 and another kernel
	CRAC_VM_RUN='$(CRAC_VM_RUN)' integration/vm/run.sh

# Fails when ours is slower or larger by more than chance. Not part of CI: nothing timed is.
.PHONY: bench-start
bench-start: tools build ## start-up time and memory beside containerd's runc shim
	@integration/apps/build.sh busybox
	go run -tags '$(GOTAGS)' ./integration/bench/start

# BENCH="-workloads mem-10m,mem-1g -runs 5", BENCH=-quick; BENCH=-help lists the options.
.PHONY: bench
bench: tools build ## restores, clones, checkpoints and cold starts beside every peer, into build/bench.json (BENCH=options)
	@integration/tools/install.sh jdk jdk25 podman
	@integration/apps/build.sh memory tomcat redis python
	@go build -tags '$(GOTAGS)' -o $(BUILD)/bench-program ./integration/bench
	@$(BUILD)/bench-program $(BENCH)

.PHONY: bench-delta
bench-delta: tools build ## what a second checkpoint of a JVM takes in a registry, as a delta and whole
	@integration/apps/build.sh tomcat
	go run -tags '$(GOTAGS)' ./integration/bench/delta

.PHONY: demo
demo: tools build ## the whole story on Tomcat: cold, warm, checkpoint, push, pull, clones
	@integration/apps/build.sh busybox tomcat postgres
	go run -tags '$(GOTAGS)' ./integration/demo

.PHONY: test-demo
test-demo: tools build
	@integration/apps/build.sh busybox tomcat postgres
	@integration/tools/demo-test.sh

.PHONY: test-install
test-install: build man
	@integration/tools/install-test.sh

.PHONY: doctor
doctor: build ## what this machine can and cannot do, and how to fix it
	@PATH=$(BUILD)/tools/criu/bin:$(BUILD)/tools/bin:$$PATH $(BUILD)/bin/cracctl doctor

.PHONY: lint
lint: host ## golangci-lint, gofumpt and shellcheck, and types on another architecture
	@integration/tools/install.sh lint
	$(BUILD)/tools/lint/golangci-lint run ./...
	cd sdk/go && $(BUILD)/tools/lint/golangci-lint run ./...
	GOARCH=arm64 CGO_ENABLED=0 go vet ./oci/... ./images ./runtime/inspect ./runtime/pager ./runtime/hook ./runtime/tmpfs
	@bad=$$($(BUILD)/tools/lint/gofumpt -l $$(git ls-files --cached --others --exclude-standard '*.go')); \
	  if [ -n "$$bad" ]; then printf 'not formatted as gofumpt does (make fmt):\n%s\n' "$$bad" >&2; exit 1; fi
	shellcheck -x $$(git ls-files --cached --others --exclude-standard '*.sh' .ci/run)

.PHONY: fmt
fmt: ## format the Go source with gofumpt
	@integration/tools/install.sh lint
	$(BUILD)/tools/lint/gofumpt -w $$(git ls-files --cached --others --exclude-standard '*.go')

# cracctl's manual pages and shell completions, made by itself. The pages say the
# defaults, which must not be those of who builds.
.PHONY: man
man: build
	@rm -rf $(BUILD)/man $(BUILD)/completions && mkdir -p $(BUILD)/completions
	@env -u CONTAINERD_ADDRESS -u CONTAINERD_NAMESPACE NERDCTL_TOML=/dev/null SOURCE_DATE_EPOCH="$$(git log -1 --format=%ct 2>/dev/null || echo 0)" \
	  $(BUILD)/bin/cracctl man $(BUILD)/man
	@$(BUILD)/bin/cracctl completion bash >$(BUILD)/completions/cracctl
	@$(BUILD)/bin/cracctl completion zsh >$(BUILD)/completions/_cracctl
	@$(BUILD)/bin/cracctl completion fish >$(BUILD)/completions/cracctl.fish

SHARE = $(DESTDIR)$(PREFIX)/share

.PHONY: install
install: build man ## the shim, cracctl and, where the host's is missing or too old, CRIU, into $(DESTDIR)$(PREFIX)
	@integration/tools/install.sh criu
	install -D -m 0755 -t '$(DESTDIR)$(PREFIX)/bin' $(BUILD)/bin/containerd-shim-crac-v2 $(BUILD)/bin/cracctl
	install -D -m 0644 -t '$(SHARE)/man/man1' $(BUILD)/man/*.1
	install -D -m 0644 -t '$(SHARE)/bash-completion/completions' $(BUILD)/completions/cracctl
	install -D -m 0644 -t '$(SHARE)/zsh/site-functions' $(BUILD)/completions/_cracctl
	install -D -m 0644 -t '$(SHARE)/fish/vendor_completions.d' $(BUILD)/completions/cracctl.fish
	[ ! -f $(BUILD)/bin/crac.jar ] || install -D -m 0644 -t '$(DESTDIR)$(PREFIX)/share/crac' $(BUILD)/bin/crac.jar
	@integration/tools/criu-install.sh install '$(PREFIX)' '$(DESTDIR)'

.PHONY: uninstall
uninstall: ## remove what install put there
	rm -f '$(DESTDIR)$(PREFIX)/bin/containerd-shim-crac-v2' '$(DESTDIR)$(PREFIX)/bin/cracctl'
	rm -f '$(SHARE)'/man/man1/cracctl*.1 '$(SHARE)/bash-completion/completions/cracctl' \
	  '$(SHARE)/zsh/site-functions/_cracctl' '$(SHARE)/fish/vendor_completions.d/cracctl.fish'
	rm -f '$(DESTDIR)$(PREFIX)/share/crac/crac.jar'
	@[ ! -d '$(DESTDIR)$(PREFIX)/share/crac' ] || rmdir --ignore-fail-on-non-empty '$(DESTDIR)$(PREFIX)/share/crac'
	@integration/tools/criu-install.sh remove '$(PREFIX)' '$(DESTDIR)'

.PHONY: clean
clean: ## remove build/, tools and images included
	@if grep -qF ' $(BUILD)/' /proc/self/mountinfo; then \
	  echo "clean: something is still mounted below $(BUILD): end the run that uses it first" >&2; exit 1; fi
	rm -rf --one-file-system '$(BUILD)'
