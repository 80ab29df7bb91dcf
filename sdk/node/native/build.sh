#!/bin/sh
# Builds reseed.c beside itself, as PLATFORM-ARCH.node in Node's words. With CC a cross
# compiler, ARCH names what it compiles for: CC=aarch64-linux-gnu-gcc ARCH=arm64.
set -eu
cd "$(dirname "$0")"
case ${ARCH:=$(uname -m)} in
x86_64) ARCH=x64 ;;
aarch64) ARCH=arm64 ;;
esac
"${CC:-cc}" -shared -fPIC -O2 -s -nostdlib -o "linux-$ARCH.node.new" reseed.c
mv "linux-$ARCH.node.new" "linux-$ARCH.node"
