#!/bin/sh
# $1 is the image's root directory.
set -eu
root=$1
data=/var/lib/postgresql/data

# The package makes a cluster in Debian's layout, with files of configuration and
# log elsewhere; one directory is easier to see whole.
chroot "$root" pg_dropcluster 15 main
chroot "$root" install -d -o postgres -g postgres -m 0700 "$data"
# A sync of everything at the end would be for nothing: the layer is packed from here.
chroot "$root" runuser -u postgres -- /usr/lib/postgresql/15/bin/initdb \
  -D "$data" --encoding=UTF8 --locale=C.UTF-8 --auth=trust --no-sync
cat >>"$root$data/postgresql.conf" <<'CONF'
listen_addresses = '*'
# The compiler is not in this image.
jit = off
# /run is empty in a container.
unix_socket_directories = '/tmp'
CONF
# A test image: whoever reaches the container's network may connect.
echo 'host all all all trust' >>"$root$data/pg_hba.conf"
