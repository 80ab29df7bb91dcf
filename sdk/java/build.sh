#!/usr/bin/env bash
# Makes the Java library's jar with nothing but a JDK.
#
# usage: build.sh JAR [VERSION]
#
# Does nothing when the jar is newer than the sources, and, with a word about it,
# where there is no javac: the rest of the project does not need the jar.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
jar=$1 version=${2:-unknown}

if ! command -v javac >/dev/null; then
  echo "sdk/java: no javac on PATH: $jar is not made, and the option java=auto will not work; install a JDK (Debian: default-jdk-headless)" >&2
  exit 0
fi
if [ -f "$jar" ] && [ -z "$(find "$here/src" "$here/build.sh" -newer "$jar" -print -quit)" ]; then
  exit 0
fi
mkdir -p "$(dirname "$jar")"
tmp=$(mktemp -d "$jar.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
mapfile -t sources < <(find "$here/src" -name '*.java' | LC_ALL=C sort)
# Strings are put together without invokedynamic, whose first use costs a JVM's
# start more than all of this library.
javac --release 17 -encoding UTF-8 -Xlint:all -XDstringConcat=inline -g:source,lines -d "$tmp/classes" "${sources[@]}"
printf 'Implementation-Title: crac\nImplementation-Version: %s\nAutomatic-Module-Name: io.github.cracshim\n' "$version" >"$tmp/manifest"
# The same sources give the same bytes: a container that has the jar need not get it again.
cp -R "$here/src/META-INF" "$tmp/classes/"
jar --create --file "$tmp/crac.jar" --manifest "$tmp/manifest" --date=1980-01-02T00:00:00Z -C "$tmp/classes" .
chmod 0644 "$tmp/crac.jar"
mv "$tmp/crac.jar" "$jar"
