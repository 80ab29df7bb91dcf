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

# A second instance, with a database: its own classes, the driver, and Tomcat's configuration. They are
# written to org.crac, which is in a Maven repository only: its stand-in comes with them.
here=$(cd "$(dirname "$0")" && pwd)
pool=$root/var/lib/tomcat10-pool
command -v javac >/dev/null || {
  echo "javac is not on PATH: integration/tools/install.sh jdk installs it" >&2
  exit 1
}
classes=$(mktemp -d)
jars=$(find "$root/usr/share/java" -name 'tomcat10-*.jar' -printf '%p:')
javac --release 17 -cp "$jars" -d "$classes" "$here"/src/demo/*.java "$here"/../../../sdk/java/test/orgcrac/org/crac/*.java
mkdir -p "$pool/lib" "$pool/logs" "$pool/work"
jar --create --file "$pool/lib/demo.jar" --date=1980-01-02T00:00:00Z -C "$classes" .
rm -rf "$classes"
ln -s /usr/share/java/postgresql.jar "$pool/lib/postgresql.jar"
for f in catalina.properties web.xml context.xml logging.properties; do
  ln -s "/etc/tomcat10/$f" "$pool/conf/$f"
done
