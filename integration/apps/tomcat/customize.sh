#!/bin/sh
# $1 is the image's root directory.
set -eu
root=$1

# /usr/lib/jvm/default-java comes with a package that needs a larger JRE.
java=$(find "$root/usr/lib/jvm" -maxdepth 1 -name 'java-17-openjdk-*' ! -name '.*' -type d -printf '%f\n')
[ -e "$root/usr/lib/jvm/default-java" ] || ln -s "$java" "$root/usr/lib/jvm/default-java"

# The page /examples/crac.jsp keeps a file here.
mkdir -p "$root/var/lib/crac-demo"
# build.sh removes what packages left in /var/log; Tomcat needs its own directory.
chroot "$root" install -d -o tomcat -g adm -m 2770 /var/log/tomcat10
