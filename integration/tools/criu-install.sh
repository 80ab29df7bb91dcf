#!/usr/bin/env bash
# `make install` and `make uninstall`, for CRIU: copies the one of build/tools to
# where the installed programs look for it, unless the host has its own.
#
# usage: criu-install.sh install PREFIX [DESTDIR]
#        criu-install.sh remove  PREFIX [DESTDIR]
#
# It goes to PREFIX/lib/crac/criu: bin/criu, and lib/ with all that it is linked
# with, down to the dynamic loader, so that the host's own libraries do not matter.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
CRAC_BUILD=${CRAC_BUILD:-$(cd "$here/../.." && pwd)/build}
CRAC_PROG=install
# shellcheck source=integration/tools/lib.sh
. "$here/lib.sh"

[ "$#" -ge 2 ] || die "usage: criu-install.sh install|remove PREFIX [DESTDIR]"
prefix=${2%/} destdir=${3:-}
# The loader's path is written into the binary: a relative one would depend on
# where it is started.
[[ $prefix == /* ]] || die "PREFIX is '$2': give an absolute path"
final=$prefix/lib/crac/criu
target=$destdir$final
from=$CRAC_BUILD/tools/criu

remove() {
  rm -rf "$target"
  # Ours as well, but only as long as nothing else is in it.
  [ ! -d "${target%/*}" ] || rmdir --ignore-fail-on-non-empty "${target%/*}"
}

install_criu() {
  [ -x "$from/bin/criu" ] || die "$from/bin/criu is missing: make it with integration/tools/install.sh criu (make install does)"
  if [ -L "$from/bin/criu" ]; then
    remove # an older copy of ours would be preferred to the host's
    say "the host's CRIU is new enough: $(readlink "$from/bin/criu")"
    return
  fi
  mkdir -p "${target%/*}"
  new=$(mktemp -d "${target%/*}/.criu.XXXXXX")
  trap 'rm -rf "$new"' EXIT
  cp -a "$from/bin" "$from/lib" "$from/doc" "$new/"
  chmod 0755 "$new"
  local loader
  loader=$(find "$new/lib" -maxdepth 1 -name 'ld-linux*.so*' -printf '%f\n' | head -n1)
  [ -n "$loader" ] || die "$from/lib has no dynamic loader: remove $from and try again"
  # DT_RPATH, unlike DT_RUNPATH, also serves the libraries' own dependencies.
  patchelf --set-interpreter "$final/lib/$loader" --force-rpath --set-rpath "$final/lib" "$new/bin/criu"
  # A running CRIU keeps the files that it has open.
  rm -rf "$target"
  mv "$new" "$target"
  trap - EXIT
  if [ -z "$destdir" ]; then
    "$target/bin/criu" --version >/dev/null || die "$target/bin/criu does not run: see above"
  fi
  say "CRIU in $target"
}

case $1 in
install) install_criu ;;
remove) remove ;;
*) die "unknown command '$1': the commands are install and remove" ;;
esac
