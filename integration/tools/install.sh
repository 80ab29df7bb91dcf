#!/usr/bin/env bash
# Installs what the build and the tests need, into build/tools:
#
#   bin/        containerd ctr containerd-shim-runc-v2 runc nerdctl registry ctd-decoder
#   cni/bin/    bridge host-local loopback portmap firewall tuning
#   criu/       a CRIU new enough for today's kernels, with its own libraries
#   jdk25/      the newer of the two JDKs that the Java library is tested with
#   podman/     podman with conmon, netavark and their libraries; it runs our runc
#   lint/       golangci-lint gofumpt
#
# usage: install.sh [TARGET...]   host go jdk criu jdk25 podman runc containerd cni registry nerdctl imgcrypt lint
# Without a target: all but lint and the JDKs. Every tool is built only when it is missing or its
# version in versions.env changed, under another name first, so that an interrupted
# run leaves the old tool or none, never half of one. Logs: build/logs.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
CRAC_BUILD=${CRAC_BUILD:-$root/build}
CRAC_PROG=tools
# shellcheck source=integration/tools/lib.sh
. "$here/lib.sh"
# shellcheck source=integration/tools/versions.env
. "$here/versions.env"

umask 022
mkdir -p "$CRAC_BUILD/tools/bin" "$CRAC_LOGS"
# Several checkouts may share one directory, by links; some tools hold its path.
tools=$(readlink -f "$CRAC_BUILD/tools")
stamps=$tools/.stamps
mkdir -p "$stamps"

# The newest Go wins over an older one that comes first on PATH.
[ ! -x /usr/local/go/bin/go ] || PATH=$PATH:/usr/local/go/bin
export PATH GOWORK=off

# One run at a time; a second one waits and then finds the work done.
exec 9>"$tools/.lock"
if ! flock -n 9; then
  say "another run is at work on $tools: waiting for it"
  flock 9
fi

# Left by a run that was killed: nobody else can be using it while we hold the lock.
find "$tools" -maxdepth 1 -name '.tmp.*' -exec chmod -R u+w {} + -exec rm -rf {} +
tmp=$(mktemp -d "$tools/.tmp.XXXXXX")
cleanup() {
  stop_child
  chmod -R u+w "$tmp" 2>/dev/null || true
  rm -rf "$tmp"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# fresh NAME KEY FILE...: the stamp of NAME says KEY and every FILE is there.
fresh() {
  local name=$1 key=$2 f
  shift 2
  [ "$(cat "$stamps/$name" 2>/dev/null)" = "$key" ] || return 1
  for f in "$@"; do
    [ -x "$f" ] || return 1
  done
}

stamp() {
  printf '%s\n' "$2" >"$stamps/.$1.new"
  mv "$stamps/.$1.new" "$stamps/$1"
}

# key VERSION FUNCTION...: what a tool depends on: its version and its recipe.
key() {
  local version=$1
  shift
  printf '%s %s' "$version" "$(declare -f "$@" | sha256sum | cut -c1-16)"
}

install_host() {
  # For cgo (nsenter, seccomp), for CRIU's prefix, and for what the tests call.
  debian_packages gcc libc6-dev make pkg-config libseccomp-dev ca-certificates \
    iproute2 iptables procps util-linux zstd patchelf mmdebstrap \
    python3 nodejs socat skopeo umoci curl
}

install_jdk() {
  # Whatever JDK there is will do, unless it is older than the library's bytecode.
  local have
  have=$(javac -version 2>&1 | sed -n 's/^javac //p' || true)
  have_version "$JDK_MIN" "${have:-0}" || debian_packages default-jdk-headless
}

install_go() {
  local have
  command -v go >/dev/null ||
    die "Go is not installed: install Go $GO_MIN or newer so that 'go' is on PATH or in /usr/local/go/bin"
  have=$(go env -C "$root" GOVERSION 2>/dev/null || true)
  have=${have#go}
  [ -n "$have" ] ||
    die "$(command -v go) does not run here: $(cd "$root" && go version 2>&1 | tail -n1); install Go $GO_MIN or newer"
  have_version "$GO_MIN" "${have%% *}" ||
    die "Go $have is too old: install Go $GO_MIN or newer (or unset GOTOOLCHAIN, which lets Go 1.21 and newer fetch it)"
}

# source_of MODULE VERSION DIR: a writable copy of a module's source, checked
# against the checksum database by the go command, to be built with that module's
# own go.mod and go.sum: the dependencies are those that its authors released.
source_of() {
  local dir
  dir=$(cd "$tmp" && go mod download -json "$1@$2" | sed -n 's/^\t"Dir": "\(.*\)",*$/\1/p')
  [ -d "$dir" ] || {
    echo "go mod download $1@$2 gave no source directory"
    return 1
  }
  rm -rf "$3"
  cp -r "$dir" "$3"
  chmod -R u+w "$3"
  rm -rf "$3/vendor"
}

# put DIR FILE...: moves finished binaries into place, each atomically.
put() {
  local dir=$1 f
  shift
  mkdir -p "$dir"
  for f in "$@"; do
    chmod 0755 "$f"
    mv "$f" "$dir/"
  done
}

build_containerd() {
  local src=$tmp/containerd
  source_of github.com/containerd/containerd/v2 "$CONTAINERD_VERSION" "$src"
  cd "$src"
  mkdir out
  CGO_ENABLED=0 go build -trimpath -tags 'no_btrfs no_devmapper no_zfs' \
    -ldflags "-s -w -X github.com/containerd/containerd/v2/version.Version=$CONTAINERD_VERSION" \
    -o out/ ./cmd/containerd ./cmd/ctr ./cmd/containerd-shim-runc-v2
  put "$tools/bin" out/*
}

build_runc() {
  local src=$tmp/runc
  source_of github.com/opencontainers/runc "$RUNC_VERSION" "$src"
  cd "$src"
  CGO_ENABLED=1 go build -trimpath -tags 'seccomp urfave_cli_no_docs' -ldflags '-s -w' -o runc .
  put "$tools/bin" runc
}

build_nerdctl() {
  local src=$tmp/nerdctl
  source_of github.com/containerd/nerdctl/v2 "$NERDCTL_VERSION" "$src"
  cd "$src"
  # nerdctl's go.mod replaces its test framework with a directory that the module
  # proxy does not carry; its commands need no more of it than this interface.
  mkdir -p mod/tigron/tig
  printf 'module github.com/containerd/nerdctl/mod/tigron\n\ngo 1.24\n' >mod/tigron/go.mod
  cat >mod/tigron/tig/t.go <<'GO'
// Package tig stands in for the test framework's handle.
package tig

// T is the part of testing.T that nerdctl's packages name.
type T interface {
	Helper()
	FailNow()
	Log(args ...any)
	Name() string
	TempDir() string
}
GO
  CGO_ENABLED=0 go build -trimpath \
    -ldflags "-s -w -X github.com/containerd/nerdctl/v2/pkg/version.Version=$NERDCTL_VERSION" \
    -o nerdctl ./cmd/nerdctl
  put "$tools/bin" nerdctl
}

build_imgcrypt() {
  local src=$tmp/imgcrypt
  source_of github.com/containerd/imgcrypt "$IMGCRYPT_VERSION" "$src"
  cd "$src"
  CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o ctd-decoder ./cmd/ctd-decoder
  put "$tools/bin" ctd-decoder
}

build_registry() {
  local src=$tmp/registry
  source_of github.com/distribution/distribution/v3 "$REGISTRY_VERSION" "$src"
  cd "$src"
  # The drivers of cloud storage are most of the build and no test stores there.
  sed -i -E '/storage\/driver\/(azure|gcs|s3-aws|middleware\/cloudfront)"/d' cmd/registry/main.go
  CGO_ENABLED=0 go build -trimpath \
    -ldflags "-s -w -X github.com/distribution/distribution/v3/version.version=$REGISTRY_VERSION" \
    -o out/registry ./cmd/registry
  put "$tools/bin" out/registry
}

# build_debian_registry: Debian's, an older line than ours. Taken out of its
# package, which would start a service.
build_debian_registry() {
  mkdir -p "$tmp/debian-registry"
  cd "$tmp/debian-registry"
  apt-get -o APT::Sandbox::User=root download docker-registry
  dpkg -x docker-registry_*.deb root
  put "$tools/bin" root/usr/bin/docker-registry
}

build_cni() {
  local src=$tmp/cni
  source_of github.com/containernetworking/plugins "$CNI_PLUGINS_VERSION" "$src"
  cd "$src"
  mkdir out
  CGO_ENABLED=0 go build -trimpath \
    -ldflags "-s -w -X github.com/containernetworking/plugins/pkg/utils/buildversion.BuildVersion=$CNI_PLUGINS_VERSION" \
    -o out/ ./plugins/main/bridge ./plugins/main/loopback ./plugins/ipam/host-local \
    ./plugins/meta/portmap ./plugins/meta/firewall ./plugins/meta/tuning
  put "$tools/cni/bin" out/*
}

build_lint() {
  mkdir -p "$tmp/lint"
  cd "$tmp/lint"
  GOBIN=$tmp/lint CGO_ENABLED=0 go install -trimpath -ldflags '-s -w' "mvdan.cc/gofumpt@$GOFUMPT_VERSION"
  GOBIN=$tmp/lint CGO_ENABLED=0 go install -trimpath -ldflags "-s -w -X main.version=${GOLANGCI_LINT_VERSION#v}" \
    "github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$GOLANGCI_LINT_VERSION"
  put "$tools/lint" gofumpt golangci-lint
}

# criu_version BINARY: its version, or nothing when it does not run.
criu_version() {
  "$1" --version 2>/dev/null | sed -n 's/^Version: *//p'
}

# criu_needed: the oldest CRIU that can work on the running kernel.
criu_needed() {
  local kernel
  kernel=$(uname -r)
  if have_version 6.16 "${kernel%%-*}"; then
    echo "$CRIU_MIN_KERNEL_6_16"
  else
    echo "$CRIU_MIN"
  fi
}

# criu_patch DIR: makes DIR/bin/criu use the loader and libraries beside it. Both
# are absolute paths, so this is done again when the checkout has moved.
criu_patch() {
  local dir=$1 loader
  loader=$(find "$dir/lib" -maxdepth 1 -name 'ld-linux*.so*' | head -n1)
  [ -n "$loader" ] || {
    echo "no dynamic loader in $dir/lib"
    return 1
  }
  cp "$dir/bin/criu" "$tmp/criu.patched"
  # DT_RPATH, unlike DT_RUNPATH, also serves the libraries' own dependencies.
  patchelf --set-interpreter "$loader" --force-rpath --set-rpath "$dir/lib" "$tmp/criu.patched"
  mv "$tmp/criu.patched" "$dir/bin/criu"
}

# build_criu: takes CRIU and its libraries, down to libc, from the oldest suite
# that is new enough, into a prefix; the host's own packages stay as they are.
build_criu() {
  local suite apt=$tmp/apt new=$tmp/criu deb candidate='' tried='' needed
  needed=$(criu_needed)
  for suite in ${CRIU_SUITES//,/ }; do
    rm -rf "$apt"
    mkdir -p "$apt"
    if ! private_apt "$apt" "$suite"; then
      tried="$tried $suite (no valid package lists)"
      continue
    fi
    candidate=$(apt-cache "${APT_PRIVATE[@]}" policy criu | sed -n 's/^ *Candidate: *//p')
    if [ -n "$candidate" ] && [ "$candidate" != '(none)' ] && have_version "$needed" "$candidate"; then
      break
    fi
    tried="$tried $suite (${candidate:-none})"
    candidate=
  done
  [ -n "$candidate" ] || {
    echo "no Debian suite has CRIU >= $needed, which kernel $(uname -r) needs; tried:$tried"
    return 1
  }
  echo "CRIU $candidate from $suite"
  apt-get "${APT_PRIVATE[@]}" -y --download-only install criu
  for deb in "$apt"/cache/archives/*.deb; do
    dpkg -x "$deb" "$tmp/criu.root"
  done
  mkdir -p "$new/bin" "$new/lib" "$new/doc"
  cp "$tmp/criu.root"/usr/sbin/criu "$new/bin/criu"
  # Suites before the /usr merge keep some libraries in /lib.
  find "$tmp/criu.root" -path '*/lib/*-linux-*/*' -name '*.so*' -prune \
    ! -path '*/gconv/*' ! -path '*/audit/*' -exec cp -a -t "$new/lib" {} +
  find "$tmp/criu.root" -maxdepth 3 -name 'ld-linux*.so*' -type f -exec cp -an -t "$new/lib" {} +
  (cd "$apt/cache/archives" && ls -1 -- *.deb) >"$new/doc/packages"
  rm -rf "$tools/criu"
  mv "$new" "$tools/criu"
  criu_patch "$tools/criu"
}

# criu_works BINARY: the kernel check, then a real dump and restore of a process
# that listens. In namespaces of its own: nobody can take the id or the port that
# the restore needs, and nothing survives.
criu_works() {
  local criu=$1
  "$criu" check
  mkdir -p "$tmp/selftest"
  # shellcheck disable=SC2016 # the inner shell expands it
  unshare --pid --net --fork --kill-child --mount-proc bash -euo pipefail -c '
    criu=$1 dir=$2
    # Files opened outside this mount namespace are nothing that CRIU can find.
    for fd in /proc/self/fd/*; do
      fd=${fd##*/}
      [ "$fd" -le 2 ] || eval "exec $fd>&-"
    done
    # CRIU probes the kernel over the loopback, which is down in a new namespace.
    ip link set lo up
    # Perl is in every Debian.
    setsid perl -MSocket -e "
      socket(S, PF_INET, SOCK_STREAM, 0) && bind(S, sockaddr_in(7777, INADDR_ANY)) && listen(S, 1) or die;
      sleep 1000 while 1" </dev/null >/dev/null 2>&1 &
    pid=$!
    listens() { grep -q ":1E61 .* 0A " /proc/net/tcp; }
    for _ in $(seq 100); do
      if listens; then break; fi
      sleep 0.1
    done
    listens || { echo "the process to dump did not start"; exit 1; }
    "$criu" dump -t "$pid" -D "$dir" -v4 -o dump.log || { grep Error "$dir/dump.log"; exit 1; }
    wait "$pid" || true
    [ ! -e "/proc/$pid" ] || { echo "the process $pid outlived its dump"; exit 1; }
    if listens; then echo "the port outlived the dump"; exit 1; fi
    "$criu" restore -d -D "$dir" -v4 -o restore.log || { grep Error "$dir/restore.log"; exit 1; }
    [ "$(cat "/proc/$pid/comm")" = perl ] || { echo "the restored process $pid is not there"; exit 1; }
    listens || { echo "the restored process does not listen"; exit 1; }
    kill -KILL "$pid"
    echo "dump and restore work"
  ' selftest "$criu" "$tmp/selftest"
  rm -rf "$tmp/selftest"
}

# build_jdk25: takes the JDK and its libraries, down to libc, from Debian into a
# prefix, as build_criu does: the host's libc may be older than it needs.
build_jdk25() {
  local apt=$tmp/jdk.apt root=$tmp/jdk.root new=$tmp/jdk25 home deb f to loader final=$1
  mkdir -p "$apt"
  private_apt "$apt" "$JDK25_SUITE"
  apt-get "${APT_PRIVATE[@]}" -y --download-only install openjdk-25-jdk-headless
  mkdir -p "$root" "$new/crac"
  for deb in "$apt"/cache/archives/*.deb; do
    case ${deb##*/} in
    openjdk-25-* | libc6_* | libgcc-s1_* | libstdc++6_* | zlib1g_*) dpkg -x "$deb" "$root" ;;
    esac
  done
  home=$(find "$root/usr/lib/jvm" -maxdepth 1 -type d -name 'java-25-openjdk-*')
  cp -a "$home/." "$new/"
  find "$root/usr/lib" "$root/lib" -path '*-linux-gnu/*' -name '*.so*' ! -path '*/gconv/*' ! -path '*/jvm/*' \
    -exec cp -a -t "$new/crac" {} + 2>/dev/null || true
  find "$root" -maxdepth 3 -name 'ld-linux*.so*' -type f -exec cp -an -t "$new/crac" {} +
  # Its configuration is linked from /etc.
  find "$new" -type l -lname '/etc/java-25-openjdk/*' -print | while read -r f; do
    to=$(readlink "$f")
    rm "$f"
    cp -a "$root$to" "$f"
  done
  loader=$(find "$new/crac" -maxdepth 1 -name 'ld-linux*.so*' -type f | head -n1)
  [ -n "$loader" ] || {
    echo "no dynamic loader in $new/crac"
    return 1
  }
  # The loader's path is absolute, the libraries' is not.
  for f in "$new"/bin/*; do
    patchelf --set-interpreter "$final/crac/${loader##*/}" --force-rpath \
      --set-rpath "\$ORIGIN/../lib:\$ORIGIN/../lib/server:\$ORIGIN/../crac" "$f"
  done
  (cd "$apt/cache/archives" && ls -1 -- openjdk-25-*.deb) >"$new/crac/packages"
  rm -rf "$final"
  mv "$new" "$final"
  "$final/bin/java" -version
}

# build_podman: takes podman and what it starts, with their libraries, from Debian into
# a prefix, as build_criu does. Nothing of it is configured or started on the host.
build_podman() {
  local apt=$tmp/podman.apt root=$tmp/podman.root new=$tmp/podman deb loader final=$1 f
  mkdir -p "$apt" "$root" "$new/bin" "$new/lib" "$new/doc"
  private_apt "$apt" "$PODMAN_SUITE"
  apt-get "${APT_PRIVATE[@]}" -y --download-only install podman conmon netavark
  for deb in "$apt"/cache/archives/*.deb; do
    case ${deb##*/} in
    # For what no test does; crun refuses hosts with cgroups of both versions.
    crun_* | containernetworking-plugins_* | gnupg* | gpg* | dirmngr_* | passwd_* | iptables_* | pinentry* | debconf_*) ;;
    *) dpkg -x "$deb" "$root" ;;
    esac
  done
  for f in podman conmon netavark; do
    cp "$(find "$root/usr/bin" "$root/usr/lib/podman" "$root/usr/libexec/podman" -type f -name "$f" 2>/dev/null | head -n1)" "$new/bin/$f"
  done
  find "$root" -path '*/lib/*-linux-*/*' -name '*.so*' -prune \
    ! -path '*/gconv/*' ! -path '*/audit/*' -exec cp -a -t "$new/lib" {} +
  find "$root" -maxdepth 3 -name 'ld-linux*.so*' -type f -exec cp -an -t "$new/lib" {} +
  loader=$(find "$new/lib" -maxdepth 1 -name 'ld-linux*.so*' | head -n1)
  [ -n "$loader" ] || {
    echo "no dynamic loader in $new/lib"
    return 1
  }
  for f in "$new"/bin/*; do
    patchelf --set-interpreter "$final/lib/${loader##*/}" --force-rpath --set-rpath "$final/lib" "$f"
  done
  (cd "$apt/cache/archives" && ls -1 -- podman_*.deb conmon_*.deb netavark_*.deb) >"$new/doc/packages"
  rm -rf "$final"
  mv "$new" "$final"
  "$final/bin/podman" --version
  "$final/bin/conmon" --version
}

install_podman() {
  local want final
  final=$tools/podman
  want="$(key "$PODMAN_SUITE" build_podman) $final"
  fresh podman "$want" "$final/bin/podman" "$final/bin/conmon" "$final/bin/netavark" && return 0
  rm -f "$stamps/podman"
  logged podman "podman: from Debian, into build/tools/podman" build_podman "$final"
  stamp podman "$want"
}

install_jdk25() {
  local want final
  final=$tools/jdk25
  want="$(key "$JDK25_SUITE" build_jdk25) $final"
  fresh jdk25 "$want" "$final/bin/java" && return 0
  rm -f "$stamps/jdk25"
  logged jdk25 "JDK 25: from Debian, into build/tools/jdk25" build_jdk25 "$final"
  stamp jdk25 "$want"
}

install_criu() {
  local host want bin=$tools/criu/bin/criu
  host=$(command -v criu || true)
  # Our own may be on PATH: it is no host's.
  case $(readlink -f "${host:-/}") in "$tools"/*) host= ;; esac
  # A host's own CRIU is used when it is new enough: it was made for this host.
  if [ -n "$host" ] && have_version "$(criu_needed)" "$(criu_version "$host")"; then
    want="host $host $(criu_version "$host")"
    fresh criu "$want" "$bin" && return 0
    rm -rf "$tools/criu"
    mkdir -p "$tools/criu/bin"
    ln -s "$host" "$bin"
  else
    want=$(key "$(criu_needed) $CRIU_SUITES" build_criu criu_patch)
    if fresh criu "$want $tools" "$bin"; then
      return 0
    fi
    if [ "$(sed "s|^\($want\) .*|\1|" "$stamps/criu" 2>/dev/null)" = "$want" ] && [ -f "$bin" ]; then
      logged criu "criu: the checkout moved, setting its library paths anew" criu_patch "$tools/criu"
    else
      rm -f "$stamps/criu"
      logged criu "criu: from Debian, into build/tools/criu" build_criu
    fi
    want="$want $tools"
  fi
  [ "$(id -u)" = 0 ] || die "criu: only root can dump and restore, so only root can check it: run this as root"
  logged criu-selftest "criu $(criu_version "$bin"): checking it on this kernel" criu_works "$bin"
  stamp criu "$want"
}

# install_built NAME VERSION FUNCTION FILE...
install_built() {
  local name=$1 version=$2 fn=$3 want
  shift 3
  want=$(key "$version" "$fn" source_of)
  fresh "$name" "$want" "$@" && return 0
  rm -f "$stamps/$name"
  logged "$name" "$name $version: building" "$fn"
  stamp "$name" "$want"
}

install_one() {
  local b=$tools/bin c=$tools/cni/bin
  case $1 in
  host) install_host ;;
  go) install_go ;;
  jdk) install_jdk ;;
  jdk25) install_jdk25 ;;
  podman) install_podman ;;
  criu) install_criu ;;
  containerd)
    install_built containerd "$CONTAINERD_VERSION" build_containerd \
      "$b/containerd" "$b/ctr" "$b/containerd-shim-runc-v2"
    ;;
  runc) install_built runc "$RUNC_VERSION" build_runc "$b/runc" ;;
  nerdctl) install_built nerdctl "$NERDCTL_VERSION" build_nerdctl "$b/nerdctl" ;;
  imgcrypt) install_built imgcrypt "$IMGCRYPT_VERSION" build_imgcrypt "$b/ctd-decoder" ;;
  registry) install_built registry "$REGISTRY_VERSION" build_registry "$b/registry" ;;
  debian-registry) install_built debian-registry debian build_debian_registry "$b/docker-registry" ;;
  cni)
    install_built cni "$CNI_PLUGINS_VERSION" build_cni \
      "$c/bridge" "$c/loopback" "$c/host-local" "$c/portmap" "$c/firewall" "$c/tuning"
    ;;
  lint)
    debian_packages shellcheck
    install_built lint "$GOLANGCI_LINT_VERSION $GOFUMPT_VERSION" build_lint \
      "$tools/lint/golangci-lint" "$tools/lint/gofumpt"
    ;;
  *) die "unknown target '$1': the targets are host go jdk criu jdk25 podman runc containerd cni registry debian-registry nerdctl imgcrypt lint" ;;
  esac
}

[ "$#" -gt 0 ] || set -- host go criu podman runc containerd cni registry debian-registry nerdctl imgcrypt
for target in "$@"; do
  install_one "$target"
done
