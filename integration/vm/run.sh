#!/bin/bash
# run.sh boots the guest that build.sh makes, runs one command in it as a systemd
# service, shows its output as it comes, and exits with the command's exit code.
# The guest is thrown away: nothing written in it reaches the disk images, and
# QEMU ends with this script however it ends. What it leaves in /crac/exchange/out
# comes back through a port of its own.
#
#   usage: integration/vm/run.sh                    the end-to-end tests, and what
#                                                   takes images from the one machine to the other
#          integration/vm/run.sh -- COMMAND...      one command
#          integration/vm/run.sh --shell TEXT       one shell command line
#
# In the guest /crac is a copy of what the tests need of this repository, at the
# same relative places: build/bin, build/tools/bin, build/tools/cni/bin,
# build/images and integration/, but not our CRIU: the guest has Debian's. The
# command starts in /crac/integration with CRAC_VM=1, CRAC_BUILD=/crac/build and
# this environment's other CRAC_* variables.
#
#   CRAC_VM_RUN      which tests (go test's -run), default all
#   CRAC_VM_TIMEOUT  seconds the command may take, default 3600
#   CRAC_VM_MEMORY   of the guest, default 5G
#   CRAC_VM_ACCEL    tcg or kvm; default kvm where it works, which it has to prove
#
# Exit code: the command's; 124 when its time is up; 125 when the guest itself
# failed, with the end of its console.
# Time, under emulation: 23 s to boot on two cores with little else to do, 85 s
# with a load of 12; one container run takes 4 to 10 s. Nothing timed in here
# means anything.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repo=$(cd "$here/../.." && pwd)
vm=$repo/build/vm

timeout=${CRAC_VM_TIMEOUT:-3600}
memory=${CRAC_VM_MEMORY:-5G}
# Seven times what a busy machine has been seen to need.
boot_timeout=600
# Every x86-64 machine of the last 15 years can be a Nehalem, and it lacks what
# the host has (AVX and up): code that took the host's features for granted fails.
cpu=Nehalem

log() { printf 'vm: %s\n' "$*" >&2; }

die() {
	log "$*"
	exit 125
}

usage() {
	sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}" >&2
	exit 125
}

# job_command is what /crac/job executes in the guest.
job_command=()
parse_arguments() {
	case ${1-} in
	"")
		build_test=1
		job_command=(./e2e.test -test.v -test.run "${CRAC_VM_RUN:-.}"
			# A hung test should say where, before the whole guest is ended.
			-test.timeout "$((timeout > 120 ? timeout - 60 : timeout))s")
		;;
	--)
		[[ $# -ge 2 ]] || usage
		job_command=("${@:2}")
		;;
	--shell)
		[[ $# -eq 2 ]] || usage
		job_command=(bash -c "$2")
		;;
	*) usage ;;
	esac
}

# write_job makes the script that the guest's crac-job runs.
write_job() {
	local name
	echo '#!/bin/bash'
	echo 'set -o pipefail'
	echo 'cd /crac/integration'
	for name in $(compgen -e CRAC_); do
		[[ $name == CRAC_VM* || $name == CRAC_BUILD || $name == CRAC_EXCHANGE ]] && continue
		printf 'export %s=%q\n' "$name" "${!name}"
	done
	echo 'export CRAC_VM=1 CRAC_BUILD=/crac/build'
	[[ -z $exchange ]] || echo 'export CRAC_EXCHANGE=/crac/exchange'
	printf 'code=0;'
	printf ' %q' "${job_command[@]}"
	echo ' || code=$?'
	# The host waits for the end of the archive, so there is one in any case.
	echo 'mkdir -p /crac/exchange/out'
	echo '[[ -c /dev/virtio-ports/crac.files ]] && tar -c -C /crac/exchange/out . >/dev/virtio-ports/crac.files || exit 125'
	# shellcheck disable=SC2016 # the guest's shell expands it
	echo 'exit $code'
}

# What the guest gets of build/: flat directories, of which only finished files
# are taken. Dot files and directories may be the work of a build going on.
shipped=(bin tools/bin tools/cni/bin images)

# stage lays out what becomes the guest's /crac. The large files are hard links:
# the only copy made is the one into the disk image.
stage() {
	local tree=$run/tree dir
	mkdir -p "$tree/integration"
	write_job >"$tree/job"
	for dir in "${shipped[@]}"; do
		mkdir -p "$tree/build/$dir"
		[[ ! -d $repo/build/$dir ]] ||
			find "$repo/build/$dir/" -maxdepth 1 ! -type d ! -name '.*' -exec cp -al -t "$tree/build/$dir" {} +
	done
	(cd "$here/.." && tar -c --exclude=./vm .) | tar -x -C "$tree/integration"
	[[ -z $build_test ]] || ln "$run/e2e.test" "$tree/integration/e2e.test"
	[[ -z $exchange ]] || {
		mkdir -p "$tree/exchange"
		mv "$run/exchange/out" "$tree/exchange/in"
	}
}

# wants tells whether CRAC_VM_RUN selects a test. The part before the first slash
# is for the tests themselves, and such a pattern means the same to bash.
wants() {
	local pattern=${CRAC_VM_RUN:-.}
	[[ $1 =~ ${pattern%%/*} ]]
}

# host_test runs one of the tests here, beside the guest's: the two machines
# exchange what they make in $run/exchange.
host_test() {
	log "on this host: $1"
	(cd "$repo/integration" && CRAC_EXCHANGE=$run/exchange CRAC_BUILD=$repo/build \
		"$run/e2e.test" -test.v -test.run "^$1\$" -test.timeout 10m)
}

write_disk() {
	local kib
	kib=$(du -sk "$run/tree" | cut -f1)
	# Half a gigabyte for the file system's own tables and what tests write here.
	truncate -s "$((kib * 11 / 10 + 524288))K" "$run/crac.ext4"
	mke2fs -q -t ext4 -L crac-job -O ^has_journal -E assume_storage_prezeroed=1 \
		-d "$run/tree" "$run/crac.ext4"
	rm -rf "$run/tree"
}

# kvm_works boots the guest's kernel without a disk. /dev/kvm is not enough: there
# are machines where it opens, creates a CPU, and that CPU cannot run a kernel.
kvm_works() {
	[[ -w /dev/kvm ]] || return 1
	timeout --kill-after=5 30 "$vm/qemu/run" -accel kvm -cpu "$cpu,enforce" -machine q35 -m 1G \
		-nodefaults -nic none -display none -no-reboot -serial stdio \
		-kernel "$vm/vmlinuz" -append 'console=ttyS0 panic=-1' </dev/null 2>/dev/null |
		grep -q 'Kernel panic.*VFS'
}

pick_accelerator() {
	case ${CRAC_VM_ACCEL-} in
	tcg) accel=tcg,thread=multi,tb-size=512 ;;
	kvm)
		kvm_works || die "CRAC_VM_ACCEL=kvm, but this machine's KVM does not boot the guest's kernel \
on a $cpu: leave the variable unset to run it under emulation"
		accel=kvm
		;;
	"") if kvm_works; then accel=kvm; else accel=tcg,thread=multi,tb-size=512; fi ;;
	*) die "CRAC_VM_ACCEL=$CRAC_VM_ACCEL: known are tcg and kvm" ;;
	esac
}

boot() {
	# The output goes through a FIFO and cat, so that it may be anything here: a
	# terminal, a pipe, a file opened for appending.
	mkfifo "$run/output"
	cat "$run/output" &
	cat_pid=$!
	# The root is NVMe because the kernel has that driver built in. The other disk is
	# not, so that each kind has one disk and no scan can swap their names.
	#
	# mitigations=off: a Nehalem is vulnerable to Meltdown, and page-table isolation
	# makes each emulated system call six times slower (measured: 85 to 13 µs).
	#
	# setpriv: QEMU dies with this script even when the script is killed with -9.
	TMPDIR=$run setpriv --pdeathsig KILL "$vm/qemu/run" \
		-name crac-vm -accel "$accel" -cpu "$cpu" -machine q35 -smp 2 -m "$memory" \
		-nodefaults -nic none -display none -no-reboot -device virtio-rng-pci \
		-kernel "$vm/vmlinuz" \
		-append 'root=/dev/nvme0n1 rootfstype=ext4 rootwait rw console=ttyS0 panic=-1 mitigations=off quiet loglevel=4 systemd.show_status=false' \
		-drive "file=$vm/root.ext4,format=raw,if=none,id=root,snapshot=on,cache=unsafe,discard=unmap" \
		-drive "file=$run/crac.ext4,format=raw,if=none,id=crac,snapshot=on,cache=unsafe" \
		-device nvme,drive=root,serial=root -device virtio-blk-pci,drive=crac \
		-device virtio-serial-pci \
		-chardev "file,id=files,path=$run/files.tar" -device virtserialport,chardev=files,name=crac.files \
		-chardev "file,id=output,path=$run/output" -device virtserialport,chardev=output,name=crac.output \
		-chardev "file,id=status,path=$run/status" -device virtserialport,chardev=status,name=crac.status \
		-serial "file:$run/console" \
		</dev/null >"$run/qemu.log" 2>&1 &
	qemu_pid=$!
}

# guest_failed ends the run when the guest did not get to tell an exit code.
guest_failed() {
	log "--- QEMU said:"
	cat "$run/qemu.log" >&2
	log "--- the end of the guest's console:"
	# The firmware draws on it; only its text is of use.
	tr -cd '\t\n -~' 2>/dev/null <"$run/console" | tail -n 60 >&2 || true
	die "$1"
}

# watch waits for the guest to power off, within the time that booting and the
# command are each allowed.
watch() {
	local began=$SECONDS started=""
	while kill -0 "$qemu_pid" 2>/dev/null; do
		if [[ -z $started ]] && grep -qs '^started' "$run/status"; then
			started=$SECONDS
			log "up after $((started - began)) s (${accel%%,*})"
		fi
		if [[ -z $started ]] && ((SECONDS - began > boot_timeout)); then
			guest_failed "the guest did not come up within $boot_timeout s"
		fi
		if [[ -n $started ]] && ((SECONDS - started > timeout)); then
			log "the command was still running after $timeout s (CRAC_VM_TIMEOUT): ended it with the guest"
			exit 124
		fi
		# A pause that a signal ends at once, unlike a foreground sleep.
		sleep 0.5 &
		wait "$!" || true
	done
	wait "$qemu_pid" || guest_failed "QEMU failed"
	qemu_pid=""
	wait "$cat_pid" || true
	cat_pid=""
	grep -qs '^started' "$run/status" || guest_failed "the guest powered off before it ran the command"
	log "down after $((SECONDS - began)) s"
}

# shellcheck disable=SC2317 # the trap calls it
cleanup() {
	[[ -z $qemu_pid ]] || { kill -KILL "$qemu_pid" && wait "$qemu_pid"; } 2>/dev/null || true
	# QEMU held the FIFO open: cat ends by itself once it is gone, unless QEMU
	# never opened it.
	[[ -z $cat_pid ]] || { kill "$cat_pid" && wait "$cat_pid"; } 2>/dev/null || true
	rm -rf "$run"
}

# remove_stale removes what a run left that was killed before it could clean up.
remove_stale() {
	local dir pid
	for dir in "$vm"/run.*; do
		pid=${dir##*.}
		[[ -d $dir ]] && ! kill -0 "$pid" 2>/dev/null && rm -rf "$dir"
	done
	return 0
}

# main is one function so that bash has read all of this file before it starts:
# the file may change while the guest runs.
main() {
	qemu_pid="" cat_pid="" accel="" build_test="" exchange=""
	parse_arguments "$@"
	"$here/build.sh" || die "the guest could not be built: see above"
	remove_stale
	run=$vm/run.$$
	mkdir -p "$run"
	trap cleanup EXIT
	trap 'exit 130' INT
	trap 'exit 143' TERM

	if [[ -n $build_test ]]; then
		log "compiling the end-to-end tests"
		(cd "$repo" && CGO_ENABLED=1 go test -c -tags "${GOTAGS:-seccomp}" -o "$run/e2e.test" ./integration)
		if wants TestTakeFromAnotherHost || wants TestLeaveForAnotherHost; then
			exchange=1
			mkdir -p "$run/exchange/out" "$run/exchange/in"
			host_test TestLeaveForAnotherHost
		fi
	fi
	stage
	write_disk
	pick_accelerator
	boot
	watch

	code=$(sed -n 's/^exit //p' "$run/status")
	[[ -n $code ]] || guest_failed "the guest powered off without telling the command's exit code"
	if [[ $code == 0 && -n $exchange ]] && wants TestLeaveForAnotherHost; then
		tar -x -C "$run/exchange/in" -f "$run/files.tar" || die "the guest did not hand out what it made"
		host_test TestTakeFromAnotherHost
	fi
	exit "$code"
}

main "$@"
