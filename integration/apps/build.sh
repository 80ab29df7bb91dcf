#!/usr/bin/env bash
# Builds application images from Debian packages, without a registry:
# build/images/NAME.tar, an OCI archive whose reference is crac.test/NAME:latest.
#
# usage: build.sh [NAME...]     without a name: all of them
#
# Each directory beside this file is an application:
#   config.json   the image's configuration (Entrypoint, Env, User, ...)
#   packages      Debian packages to install on the base that all of them share,
#                 or main.go: a static Go program on the busybox layer
#   files/        copied over the root file system
#   customize.sh  then run with the root directory as its argument
# They run as root, as most images of these programs do (PostgreSQL refuses to):
# CRIU needs CAP_SYS_RESOURCE to dump another user's process, which sandboxes lack.
# An image is the base layer and one layer of what the application adds. It is
# rebuilt only when one of these files changed. Logs: build/logs/image-NAME.log.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
CRAC_BUILD=${CRAC_BUILD:-$root/build}
CRAC_PROG=images
# shellcheck source=integration/tools/lib.sh
. "$root/integration/tools/lib.sh"
# shellcheck source=integration/tools/versions.env
. "$root/integration/tools/versions.env"

# Times in layers are clamped to this, so that equal files are equal layers.
export SOURCE_DATE_EPOCH=1700000000
images=$CRAC_BUILD/images
cache=$images/.cache
umask 022
mkdir -p "$cache" "$CRAC_LOGS"
[ ! -x /usr/local/go/bin/go ] || PATH=$PATH:/usr/local/go/bin
export PATH

exec 9>"$images/.lock"
if ! flock -n 9; then
  say "another run is at work on $images: waiting for it"
  flock 9
fi

# sweep DIR: removes a directory that may hold a root file system, but never
# through a mount: a /proc left mounted by a killed run is detached first.
sweep() {
  local m
  awk -v d="$1/" 'index($5, d) == 1 { print $5 }' /proc/self/mountinfo | sort -r | while read -r m; do
    umount -l "$m"
  done
  rm -rf --one-file-system "$1"
}

for old in "$images"/.tmp.*; do
  [ ! -e "$old" ] || sweep "$old"
done
tmp=$(mktemp -d "$images/.tmp.XXXXXX")
# The root file system must be reachable for the packages' own users.
chmod 0755 "$tmp"
cleanup() {
  stop_child
  sweep "$tmp"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# inputs PATH...: one hash over the content and modes of files.
inputs() {
  (cd "$here" && find "$@" -type f -printf '%p %m\n' | LC_ALL=C sort | while read -r f mode; do
    printf '%s %s ' "$f" "$mode"
    sha256sum <"$f"
  done | sha256sum | cut -c1-32)
}

ociimage() {
  "$tmp/ociimage" "$@"
}

# bootstrap DIR OPTION...: mmdebstrap with what base and applications share.
bootstrap() {
  local dir=$1 mirror proxy='' no
  shift
  mirror=$(debian_mirror)
  eval "$(apt-config shell proxy Acquire::http::Proxy)"
  [ -z "$proxy" ] || export http_proxy=$proxy
  # The result is thrown away when the machine stops half-way: no need to sync.
  local opts=(--dpkgopt=force-unsafe-io)
  # What no program reads: documentation, translations, and the JIT compiler of
  # PostgreSQL, which is larger than everything else together.
  for no in /usr/share/{doc,man,info,locale,lintian,bug}/'*' '/usr/lib/llvm-*/*' \
    '/usr/lib/*/libLLVM*' '/usr/lib/postgresql/*/lib/bitcode/*' '/usr/lib/*/libz3.so*'; do
    opts+=(--dpkgopt="path-exclude=$no")
  done
  # resolv.conf and hostname are copied from the builder: they are not the image's.
  # In a mount namespace of its own: whatever becomes of mmdebstrap, its mounts go with it.
  # shellcheck disable=SC2016 # $1 is for the shell that runs the hook
  unshare --mount --propagation private mmdebstrap --mode=root --format=directory "${opts[@]}" --aptopt='Acquire::Retries "3"' \
    --customize-hook='rm -rf "$1"/etc/resolv.conf "$1"/etc/hostname "$1"/etc/apt/apt.conf.d/99mmdebstrap "$1"/etc/dpkg/dpkg.cfg.d/99mmdebstrap' \
    --customize-hook='rm -rf "$1"/var/log/* "$1"/var/cache/ldconfig/* "$1"/var/cache/debconf/*-old "$1"/var/lib/dpkg/*-old' \
    --customize-hook='rm -f "$1"/etc/passwd- "$1"/etc/group- "$1"/etc/shadow- "$1"/etc/gshadow-' \
    --customize-hook='rm -f "$1"/etc/apt/sources.list' "$@" \
    "$APPS_SUITE" "$dir" \
    "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $APPS_SUITE main"
}

build_base() {
  # Alternatives link manual pages into here, and packages fail without it.
  # shellcheck disable=SC2016
  bootstrap "$tmp/base" --variant=essential --setup-hook='mkdir -p "$1"/usr/share/man/man1'
  mkdir -p "$tmp/base/var/log"
  ociimage layer -root "$tmp/base" -out "$tmp/base.layer"
  sweep "$cache/base"
  mv "$tmp/base" "$cache/base"
  mv "$tmp/base.layer" "$tmp/base.layer.json" "$cache/"
}

build_busybox_layer() {
  local r=$tmp/busybox a
  mkdir -p "$r"/{bin,sbin,usr/bin,usr/sbin,etc,root,tmp,var/tmp,proc,sys,dev,run}
  chmod 1777 "$r/tmp" "$r/var/tmp"
  mkdir -p "$tmp/apt"
  private_apt "$tmp/apt" "$APPS_SUITE"
  (cd "$tmp/apt" && apt-get "${APT_PRIVATE[@]}" download busybox-static)
  dpkg -x "$tmp"/apt/busybox-static_*.deb "$tmp/busybox.deb"
  cp "$tmp/busybox.deb/bin/busybox" "$r/bin/busybox"
  while read -r a; do
    [ "$a" = busybox ] || ln -s busybox "$r/bin/$a"
  done < <("$r/bin/busybox" --list)
  printf 'root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n' >"$r/etc/passwd"
  printf 'root:x:0:\nnogroup:x:65534:\n' >"$r/etc/group"
  ociimage layer -root "$r" -out "$tmp/busybox.layer"
  mv "$tmp/busybox.layer" "$tmp/busybox.layer.json" "$cache/"
}

# layer NAME KEY FUNCTION: a layer that several images share, made when KEY changed.
layer() {
  local name=$1 key=$2 fn=$3
  if [ "$(cat "$cache/$name.key" 2>/dev/null)" = "$key" ] && [ -f "$cache/$name.layer" ]; then
    return 0
  fi
  rm -f "$cache/$name.key"
  logged "image-$name-layer" "$name: the layer that images share" "$fn"
  printf '%s\n' "$key" >"$cache/$name.key"
}

pack() {
  local name=$1
  shift
  ociimage pack -name "crac.test/$name:latest" -config "$here/$name/config.json" "$@" -out "$images/$name.tar"
}

build_busybox() {
  pack busybox -layer "$cache/busybox.layer"
}

# build_go NAME: a static program on the busybox layer, so that tests have a shell.
build_go() {
  local name=$1 r=$tmp/$1
  mkdir -p "$r/usr/bin"
  (cd "$root" && CGO_ENABLED=0 go build -trimpath -ldflags '-s -w' -o "$r/usr/bin/$name" "./integration/apps/$name")
  ociimage layer -root "$r" -out "$tmp/$name.layer"
  pack "$name" -layer "$cache/busybox.layer" -layer "$tmp/$name.layer"
  sweep "$r"
}

# build_debian NAME: packages, files and customize.sh on the shared base.
build_debian() {
  local name=$1 hooks=()
  # shellcheck disable=SC2016
  [ ! -x "$here/$name/prepare.sh" ] || hooks+=(--setup-hook="$here/$name/prepare.sh \"\$1\"")
  [ ! -d "$here/$name/files" ] || hooks+=(--customize-hook="cp -r --preserve=mode $here/$name/files/. \"\$1\"")
  [ ! -x "$here/$name/customize.sh" ] || hooks+=(--customize-hook="$here/$name/customize.sh \"\$1\"")
  bootstrap "$tmp/$name" --variant=custom --setup-hook="cp -a $cache/base/. \"\$1\"" "${hooks[@]}" \
    --include="$(grep -v '^#' "$here/$name/packages" | paste -sd, -)"
  mkdir -p "$tmp/$name/var/log"
  ociimage layer -base "$cache/base" -root "$tmp/$name" -out "$tmp/$name.layer"
  pack "$name" -layer "$cache/base.layer" -layer "$tmp/$name.layer"
  sweep "$tmp/$name"
  rm -f "$tmp/$name.layer"*
}

all=()
for f in "$here"/*/config.json; do
  f=${f%/config.json}
  all+=("${f##*/}")
done

[ "$#" -gt 0 ] || set -- "${all[@]}"
# recipe FUNCTION...: one hash over this file's part in an image.
recipe() {
  printf '%s %s %s' "$(inputs ociimage)" "$(declare -f "$@" | sha256sum | cut -c1-32)" "$APPS_SUITE"
}

base_key=$(recipe bootstrap build_base)
busybox_key=$(recipe build_busybox_layer)
debian_key=$(recipe bootstrap build_base build_debian pack)
go_key=$(recipe build_busybox_layer build_busybox build_go pack)
for name in "$@"; do
  [ -f "$here/$name/config.json" ] || die "no application '$name': there are ${all[*]}"
  if [ -f "$here/$name/packages" ]; then
    want="$debian_key $(inputs "$name")"
  else
    want="$go_key $(inputs "$name")"
  fi
  if [ -f "$images/$name.tar" ] && [ "$(cat "$cache/image-$name.key" 2>/dev/null)" = "$want" ]; then
    continue
  fi
  rm -f "$cache/image-$name.key"
  if [ ! -x "$tmp/ociimage" ]; then
    [ "$(id -u)" = 0 ] || die "images are built as root, because their files belong to several users"
    "$root/integration/tools/install.sh" host go jdk
    logged ociimage "ociimage: building" env CGO_ENABLED=0 go build -C "$root" -trimpath -o "$tmp/ociimage" ./integration/apps/ociimage
  fi
  if [ -f "$here/$name/packages" ]; then
    layer base "$base_key" build_base
    how=(build_debian "$name")
  else
    layer busybox "$busybox_key" build_busybox_layer
    how=(build_busybox)
    [ ! -f "$here/$name/main.go" ] || how=(build_go "$name")
  fi
  logged "image-$name" "$name: building the image" "${how[@]}"
  say "$name: $(du -h "$images/$name.tar" | cut -f1) in build/images/$name.tar"
  printf '%s\n' "$want" >"$cache/image-$name.key"
done
