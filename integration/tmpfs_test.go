package integration

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	containerd "github.com/containerd/containerd/v2/client"
)

// tmpfsTree fills some tmpfs mounts with all that they may hold, and keeps some of it open.
const tmpfsTree = `set -e; cd /dev/shm
mkdir -p dir/deep sticky; chmod 1777 sticky; chmod 2750 dir/deep; chown 12:34 dir
echo text >dir/file; chmod 4711 dir/file; chown 5:6 dir/file; chmod 0 sticky
ln dir/file hard; ln -s dir/file soft; chown -h 7:8 soft; ln -s /nowhere dangling
mkfifo pipe; chmod 640 pipe; mknod null c 1 3; mknod block b 7 99
: >empty; echo secret >none; chmod 000 none
mkdir open; dd if=/dev/urandom of=sparse bs=4096 seek=20 count=1 2>/dev/null; truncate -s 200000 sparse
echo 'odd name' >"a b*c\\n"; long=$(printf '%0120d' 0); mkdir $long; echo deep >$long/$long
touch -d '2001-02-03 04:05:06' dir/file dir soft sticky .
echo run >/run/file; mkdir /dev/own; echo dev >/dev/own/file
dd if=/dev/urandom of=/large/file bs=65536 count=40 2>/dev/null; echo kept >/large/other
echo ro >/small/file
exec 7>/dev/shm/open/unlinked 8</dev/shm/hard 9>>/run/log; rm /dev/shm/open/unlinked; echo gone >&7
cp /large/other /large/open; exec 6<>/large/open
`

// seen prints what a container has of these mounts: all of their files, and how they are mounted.
const seen = `for d in /dev /dev/shm /run /large /small /proc/acpi /sys/firmware; do
	[ -d $d ] || continue
	find $d -xdev ! -path /dev/console -exec stat -c '%n|%F|%N|%a|%u|%g|%h|%t:%T|%Y' {} \; | grep -vE '^(/dev/shm/sparse|/dev/(mqueue|pts)|/run/crac|/dev/shm/open)[|]'
	find $d -xdev -type f -exec md5sum {} \;
	ls -lAR $d >/dev/null
done
stat -c '%n|%s|%b|%a' /dev/shm/sparse
grep ' - tmpfs ' /proc/self/mountinfo`

// mountIDs are numbers of mounts, their parents and devices.
var mountIDs = regexp.MustCompile(`(?m)^\d+ \d+ \d+:\d+ `)

func (b *box) seesTmpfs() (lines []string) {
	b.Helper()
	out := b.exec("sh", "-c", seen)
	for line := range strings.Lines(mountIDs.ReplaceAllString(out, "mount ")) {
		// It is written to. And what hides a file is taken from this host, or hides the dump.
		if !strings.Contains(line, "/run/log") && !strings.HasPrefix(line, "mount /null ") && !strings.Contains(line, " /.crac ") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	slices.Sort(lines)
	return lines
}

// What a container has in its tmpfs mounts, and how they are mounted, is in its clone as it was:
// in small ones, which are there before CRIU is, and in others.
func TestTmpfsAsItWas(tb *testing.T) {
	onlyCrac(tb)
	for name, flags := range map[string][]string{"host's users": nil, "user namespace": ownMaps} {
		tb.Run(name, func(tb *testing.T) {
			t := setupDebug(tb)
			image := ref(t)
			mounts := []string{
				"--mount", "type=tmpfs,src=tmpfs,dst=/large,options=size=16m:mode=1777:noatime",
				"--mount", "type=tmpfs,src=a-source,dst=/small,options=nosuid:noexec:size=64k:nr_inodes=9:mode=0751",
			}
			script := tmpfsTree
			if flags != nil {
				script = strings.ReplaceAll(script, "mknod null c 1 3; mknod block b 7 99", ":") // not there
			}
			script += "echo ready\ni=0; while :; do i=$((i+1)); echo $i >&9; sleep 0.05; done"
			b := start(t, how{args: []string{"sh", "-c", script}, flags: slices.Concat([]string{option("checkpoint.image", image), "--cap-add", "CAP_MKNOD"}, mounts, flags)})
			t.Eventually("the workload runs", func() bool { return strings.Contains(b.log(), "ready") })
			want := b.seesTmpfs()
			b.checkpoint("--exit")
			log, err := os.ReadFile(filepath.Join(t.Dir, "root/io.containerd.runtime.v2.task", t.Namespace, b.id, "criu/dump.log"))
			if err != nil {
				t.Fatal(err)
			}
			for place, want := range map[string]bool{"/dev": true, "/dev/shm": false, "/run": true, "/small": true, "/large": false} {
				packed := regexp.MustCompile(`Found crac-packed-\d+ mapping for \.` + place + ` mountpoint`).Match(log)
				if want = want && flags == nil; packed != want {
					t.Errorf("%s was packed before: %v, want %v", place, packed, want)
				}
			}
			b.remove()

			clone := start(t, how{image: image, args: []string{"sh", "-c", script}, flags: slices.Concat([]string{option("restore", "require")}, mounts, flags)})
			clone.wantStatus(containerd.Running)
			got := clone.seesTmpfs()
			if !slices.Equal(got, want) {
				t.Errorf("the clone lacks %q\nand has %q", without(want, got), without(got, want))
			}
			size := func() string { return clone.exec("stat", "-c", "%s", "/run/log") }
			before := size()
			t.Eventually("the clone writes on", func() bool { return size() != before })
			if out := clone.exec("sh", "-c", "cat /proc/1/fd/7; cat <&- /proc/1/fd/8; cat /proc/1/fd/6; ls -l /proc/1/fd"); !strings.Contains(out, "gone") ||
				!strings.Contains(out, "text") || !strings.Contains(out, "kept") || !strings.Contains(out, "/dev/shm/open/unlinked (deleted)") {
				t.Errorf("open files: %s", out)
			}
			t.Eventually("nothing is left mounted", func() bool {
				mounted, err := os.ReadFile("/proc/self/mountinfo")
				return err == nil && !strings.Contains(string(mounted), "criu-tmpfs")
			})
			log, err = os.ReadFile(filepath.Join(t.Dir, "root/io.containerd.runtime.v2.task", t.Namespace, clone.id, "criu/restore.log"))
			if err != nil {
				t.Fatal(err)
			}
			for place, before := range map[string]bool{"/dev": true, "/dev/shm": true, "/run": true, "/small": true, "/large": false} {
				id := regexp.MustCompile(`Will mount (\d+) @ \S+ ` + place + `\n`).FindStringSubmatch(string(log))
				if id == nil {
					t.Fatalf("no mount %s:\n%s", place, log)
				}
				was := regexp.MustCompile(`Will mount ` + id[1] + ` from \S+/criu-tmpfs/`).Match(log)
				if want := before && flags == nil; was != want {
					t.Errorf("%s was made before: %v, want %v", place, was, want)
				}
			}
		})
	}
}

func without(all, those []string) []string {
	return slices.DeleteFunc(slices.Clone(all), func(l string) bool { return slices.Contains(those, l) })
}
