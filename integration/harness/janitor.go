package harness

import (
	"fmt"
	"io"
	"os/exec"
	"syscall"
)

// janitor is a shell that removes everything of a daemon when the program that uses the harness
// dies without Stop: killed, or ended by a panic. It learns of the death by the end of its stdin,
// whose other end only this program holds.
type janitor struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
}

const janitorScript = `
dir=$1 ns=$2 marker=$3
trap '' INT TERM HUP
read -r line && [ "$line" = stopped ] && exit 0
own() {
	for p in /proc/[0-9]*; do
		if grep -qzxF "$marker=$dir" "$p/environ" || grep -q "/$ns/" "$p/cgroup"; then
			echo "${p#/proc/}"
		fi
	done 2>/dev/null
}
for _ in 1 2 3 4 5 6 7 8 9 10; do
	pids=$(own)
	[ -n "$pids" ] || break
	# shellcheck disable=SC2086 # a list
	kill -9 $pids 2>/dev/null
	sleep 0.2
done
while read -r _ at _; do
	case $at in "$dir"/* | /run/netns/"$ns"-*) umount -l "$at"; rm -f "$at" ;; esac
done 2>/dev/null <<END
$(sort -r /proc/mounts)
END
find /sys/fs/cgroup -depth -type d -path "*$ns*" -exec rmdir {} + 2>/dev/null
rm -f /run/netns/"$ns"-*
rm -rf /run/containerd/*/"$ns" /run/crac/"$ns" /run/nerdctl/"$ns"
[ -f "$dir/bridge" ] && ip link delete "$(cat "$dir/bridge")" 2>/dev/null
rm -rf --one-file-system "$dir"
`

func (d *Daemon) startJanitor() (*janitor, error) {
	j := &janitor{cmd: exec.Command("/bin/sh", "-c", janitorScript, "janitor", d.Dir, d.Namespace, markerEnv)}
	j.cmd.Dir = "/"
	j.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	var err error
	if j.stdin, err = j.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	if err := j.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the janitor: %w", err)
	}
	return j, nil
}

// dismiss tells the janitor that there is nothing to do.
func (j *janitor) dismiss() error {
	if _, err := io.WriteString(j.stdin, "stopped\n"); err != nil {
		return fmt.Errorf("dismiss the janitor: %w", err)
	}
	_ = j.stdin.Close()
	return j.cmd.Wait()
}
