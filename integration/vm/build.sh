#!/bin/bash
# build.sh makes what run.sh boots: a QEMU guest that is a second host for the
# end-to-end tests (cgroup v2, another kernel, another CPU model, AppArmor).
#
#   usage: integration/vm/build.sh [--force]
#
# Into build/vm/ go
#   qemu/       QEMU and the libraries it needs, of a newer Debian suite than
#               the host's (QEMU 7.2 of Debian 12 corrupts its guests here). It is
#               only unpacked, and qemu/run starts it through its own dynamic
#               loader: no host package is touched and no chroot needed.
#   vmlinuz     that suite's cloud kernel. NVMe and ext4 are built into it, so
#               the guest boots from an NVMe disk without any initrd.
#   root.ext4   a minimal Debian with systemd and CRIU, and the guest/ files
#   packages    the versions that went into root.ext4
# Each is rebuilt only when this script or guest/ changed, or with --force.
#
# The mirror is the one the host's own apt uses; what comes from it is verified
# with the Debian keyring. Apt's configuration and state are mmdebstrap's own.
#
# From nothing: two minutes on two cores that others use too, 0.5 GB on disk.
# When nothing changed: no measurable time.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
vm=$repo/build/vm

# The release after the host's: QEMU 10, CRIU 4.1, kernel 6.12.
suite=trixie
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
# Sparse: room for images, snapshots and dumps under /var and /tmp.
root_size=24G

guest_packages=(
	# The system itself. tiny-initramfs only satisfies the kernel's dependency.
	linux-image-cloud-amd64 tiny-initramfs systemd systemd-sysv udev dbus kmod
	# What containerd, its clients, CNI plugins and the tests call.
	criu iproute2 iptables nftables libseccomp2 procps curl ca-certificates fuse3
	# Debian kernels enforce AppArmor: nothing else here tests profiles.
	apparmor
)

# Shares of documentation and translations are never read in the guest.
dpkg_exclude=(
	--dpkgopt='path-exclude=/usr/share/doc/*'
	--dpkgopt='path-exclude=/usr/share/man/*'
	--dpkgopt='path-exclude=/usr/share/locale/*'
)

log() { printf 'vm: %s\n' "$*" >&2; }

die() {
	log "$*"
	exit 1
}

install_host_packages() {
	local need=()
	command -v mmdebstrap >/dev/null || need+=(mmdebstrap)
	command -v mke2fs >/dev/null || need+=(e2fsprogs)
	[[ -e $keyring ]] || need+=(debian-archive-keyring)
	[[ ${#need[@]} -eq 0 ]] && return
	log "installing ${need[*]}"
	apt-get -qq update
	DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends -y "${need[@]}" >/dev/null
}

# debian_mirror prints the base address of the Debian archive that the host's apt
# uses. Apt reads its own sources, so deb822 and one-line files both work. The
# archive is recognised by its Release file, because vendors' repositories use
# Debian's suite names too.
debian_mirror() {
	# shellcheck disable=SC2016 # the fields are apt's, not the shell's
	apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(REPO_URI)' 'Created-By: Packages' |
		awk -F'|' '$1 == "Debian" && $2 == "Debian" { print $3; exit }'
}

# host_apt_options prints those of the host's apt settings that decide whether
# its mirror can be used at all: proxies, and how dates are checked.
host_apt_options() {
	apt-config dump | grep -E '^Acquire::(https?::|Check-|Retries|ForceIPv)' || true
}

bootstrap() { # variant target packages [mmdebstrap options...]
	local variant=$1 target=$2 packages=$3
	shift 3
	local mirror
	mirror=$(debian_mirror)
	if [[ -z $mirror ]]; then
		# Apt knows an archive's origin only once it has its lists.
		apt-get -qq update
		mirror=$(debian_mirror)
	fi
	[[ -n $mirror ]] || die "no Debian archive among this host's apt sources: \
add one (deb or deb822 form) to /etc/apt and run apt-get update"
	host_apt_options >"$work/apt.conf"
	mmdebstrap --quiet --mode=root --format=directory --variant="$variant" \
		--aptopt='APT::Install-Recommends "false"' --aptopt="$work/apt.conf" \
		--keyring="$keyring" --include="$packages" "$@" \
		"$suite" "$target" "deb $mirror $suite main"
}

build_qemu() {
	log "unpacking QEMU of Debian $suite"
	# The variant "extract" unpacks a package with what it depends on, and
	# configures nothing.
	bootstrap extract "$work/qemu" qemu-system-x86 "${dpkg_exclude[@]}"
	# The library path given to the loader reaches no program but this one.
	cat >"$work/qemu/run" <<'END'
#!/bin/sh
here=$(cd "$(dirname "$0")" && pwd)
lib=$here/usr/lib/x86_64-linux-gnu
export QEMU_MODULE_DIR="$lib/qemu"
exec "$lib/ld-linux-x86-64.so.2" --library-path "$lib" \
	"$here/usr/bin/qemu-system-x86_64" \
	-L "$here/usr/share/qemu" -L "$here/usr/share/seabios" "$@"
END
	chmod 0755 "$work/qemu/run"
	"$work/qemu/run" --version >"$work/version"
	log "$(head -n 1 "$work/version")"
	rm -rf "$vm/qemu"
	mv "$work/qemu" "$vm/qemu"
}

configure_root() {
	local root=$1 unit
	cp -a "$here/guest/." "$root/"
	chown -R 0:0 "$root/etc" "$root/usr/local"
	chmod 0755 "$root/usr/local/sbin/crac-job"

	echo crac-vm >"$root/etc/hostname"
	printf '127.0.0.1 localhost crac-vm\n::1 localhost\n' >"$root/etc/hosts"
	# There is no network, but clients copy this file into containers.
	echo 'nameserver 127.0.0.1' >"$root/etc/resolv.conf"
	# With an identity of its own, systemd does not take each boot for the first.
	tr -d - </proc/sys/kernel/random/uuid >"$root/etc/machine-id"

	ln -sfn /usr/lib/systemd/system/multi-user.target "$root/etc/systemd/system/default.target"
	mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
	ln -sfn ../crac-job.service "$root/etc/systemd/system/multi-user.target.wants/crac-job.service"
	# Nobody logs in, nothing lives long enough to need care, and each of these
	# costs seconds under emulation. tmp.mount: dumps in /tmp belong on the
	# disk, not into the guest's memory.
	for unit in tmp.mount getty.target \
		apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer fstrim.timer \
		systemd-tmpfiles-clean.timer apparmor.service ldconfig.service \
		systemd-firstboot.service systemd-hwdb-update.service systemd-journal-catalog-update.service \
		systemd-machine-id-commit.service systemd-random-seed.service systemd-update-done.service \
		systemd-sysusers.service systemd-pstore.service systemd-binfmt.service \
		systemd-hibernate-clear.service systemd-journal-flush.service remote-fs.target \
		systemd-logind.service systemd-user-sessions.service \
		systemd-ask-password-wall.path systemd-ask-password-console.path; do
		ln -sfn /dev/null "$root/etc/systemd/system/$unit"
	done
}

build_root() {
	log "bootstrapping the guest: Debian $suite"
	local root=$work/root packages
	packages=$(IFS=, && echo "${guest_packages[*]}")
	bootstrap minbase "$root" "$packages" "${dpkg_exclude[@]}"
	configure_root "$root"
	# shellcheck disable=SC2016 # the fields are dpkg's, not the shell's
	chroot "$root" dpkg-query -W -f '${Package} ${Version}\n' >"$work/packages"
	cp --dereference "$root/vmlinuz" "$work/vmlinuz"

	log "writing the guest's disk"
	truncate -s "$root_size" "$work/root.ext4"
	# The guest is thrown away: a journal would only cost it time.
	mke2fs -q -t ext4 -L crac-root -O ^has_journal -E assume_storage_prezeroed=1 \
		-d "$root" "$work/root.ext4"
	mv "$work/vmlinuz" "$work/packages" "$work/root.ext4" "$vm/"
}

# fingerprint prints what a built thing depends on, as one digest.
fingerprint() {
	(cd "$here" && find build.sh guest -type f -print0 | sort -z | xargs -0 sha256sum) | sha256sum
}

# main is one function so that bash has read all of this file before it starts.
main() {
	[[ $(id -u) -eq 0 ]] || die "building the guest needs root (mmdebstrap mounts in the tree it makes): run it as root"
	[[ $(uname -m) == x86_64 ]] || die "the guest is x86-64 only and this machine is $(uname -m): run the end-to-end tests on the host itself"

	mkdir -p "$vm"
	exec 9>"$vm/lock"
	flock 9

	local want
	want=$(fingerprint)
	if [[ ${1-} != --force && -e $vm/stamp && $(<"$vm/stamp") == "$want" ]]; then
		exit 0
	fi
	rm -f "$vm/stamp"
	rm -rf "$vm"/new.* # of a build that was killed; the lock is ours
	work=$(mktemp -d "$vm/new.XXXXXX")
	trap 'rm -rf "$work"' EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM

	install_host_packages
	build_qemu
	build_root
	echo "$want" >"$vm/stamp"
	log "built in ${SECONDS} s: $vm"
}

main "$@"
