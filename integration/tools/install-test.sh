#!/usr/bin/env bash
# Tests `make install`, `make uninstall` and `make doctor`: into a package's directory
# (DESTDIR) and for this machine, both below build/. What is installed runs, and
# nothing of it stays.
#
# usage: install-test.sh
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
CRAC_BUILD=${CRAC_BUILD:-$root/build}
CRAC_PROG=install-test
# shellcheck source=integration/tools/lib.sh
. "$root/integration/tools/lib.sh"

mkdir -p "$CRAC_BUILD"
dir=$(mktemp -d "$CRAC_BUILD/.install.XXXXXX")
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
cd "$root"

# has DIR FILE...: these are there, and not empty.
has() {
  local at=$1 f
  shift
  for f in "$@"; do
    [ -s "$at/$f" ] || die "make install: $at/$f is missing"
  done
}

# installed DIR: all that make install puts there, but for what depends on the host.
installed() {
  has "$1" bin/containerd-shim-crac-v2 bin/cracctl share/man/man1/cracctl.1 share/man/man1/cracctl-checkpoint.1 \
    share/bash-completion/completions/cracctl share/zsh/site-functions/_cracctl share/fish/vendor_completions.d/cracctl.fish
}

# removed DIR: no file, and no directory that only we would have made.
removed() {
  local left
  left=$(cd "$1" && find . ! -type d -o -name '*crac*')
  [ -z "$left" ] || die "make uninstall leaves:"$'\n'"$left"
}

say "into a package's directory"
make install DESTDIR="$dir/pkg" PREFIX=/usr >"$dir/log"
installed "$dir/pkg/usr"
# A file that is not ours stays, and so does its directory.
mkdir -p "$dir/pkg/usr/share/crac"
echo other >"$dir/pkg/usr/share/crac/other"
make uninstall DESTDIR="$dir/pkg" PREFIX=/usr >"$dir/log"
[ "$(cat "$dir/pkg/usr/share/crac/other")" = other ] || die "make uninstall removed a file that it did not install"
rm -r "$dir/pkg/usr/share/crac"
removed "$dir/pkg"

say "for this machine"
make install PREFIX="$dir/prefix" >"$dir/log"
installed "$dir/prefix"
make install PREFIX="$dir/prefix" >"$dir/log" # again: an update
version=$("$CRAC_BUILD/bin/cracctl" version)
[ "$("$dir/prefix/bin/cracctl" version)" = "$version" ] || die "the installed cracctl is not the one that was built"
[[ $("$dir/prefix/bin/containerd-shim-crac-v2" -v) == "containerd-shim-crac-v2 "* ]] || die "the installed shim does not tell its version"
criu=$dir/prefix/lib/crac/criu/bin/criu
if [ -e "$criu" ]; then # or the host's is new enough
  found=$(env -u CRAC_CRIU "$dir/prefix/bin/cracctl" doctor) || die "doctor:"$'\n'"$found"
  [[ $found == *" at $criu"* ]] || die "what is installed does not use the CRIU that was installed with it:"$'\n'"$found"
fi
make uninstall PREFIX="$dir/prefix" >"$dir/log"
removed "$dir/prefix"

say "make doctor"
make doctor
