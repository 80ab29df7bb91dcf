package integration

import (
	"bufio"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/integration/harness"
	"github.com/crac-shim/crac/runtime/thread"
)

// bigRedis starts a Redis that holds some hundred megabytes which do not compress, and tells a
// digest of all of them.
func bigRedis(t *harness.T, flags ...string) (b *box, digest string) {
	t.Helper()
	needImage(t, "redis")
	b = start(t, how{image: harness.ImageRef("redis"), flags: flags})
	b.Eventually("redis answers", func() bool {
		out, err := b.tryExec("redis-cli", "ping")
		return err == nil && strings.TrimSpace(out) == "PONG"
	})
	b.exec("redis-cli", "eval", `
		math.randomseed(7)
		for i = 1, 1500 do
			local part = {}
			for j = 1, 1000 do part[j] = string.format('%016x%016x%016x%016x', math.random(2^52), math.random(2^52), math.random(2^52), math.random(2^52)) end
			redis.call('set', 'key:' .. i, table.concat(part))
		end`, "0")
	return b, b.redisDigest()
}

// redisDigest reads everything.
func (b *box) redisDigest() string {
	b.Helper()
	return b.exec("redis-cli", "debug", "digest")
}

// killPager kills the process that brings a container its memory, which is a child of the
// container's shim, some time after it has seen one, and those that it sees from then on, until
// stop is closed. If it is to hold it, it does nothing any more from when it is seen. It tells
// whether it has killed any.
func killPager(t *harness.T, id string, hold bool, later time.Duration, stop <-chan struct{}) (killed bool) {
	var due time.Time
	for stopped := false; !stopped; {
		select {
		case <-stop:
			stopped = true
			if !hold {
				return killed
			}
			due = time.Now() // nothing else would end it
		default:
		}
		shim, err := t.ShimPID(id)
		if err != nil {
			continue // not yet
		}
		pagers := pagersOf(shim)
		if len(pagers) > 0 && due.IsZero() {
			due = time.Now().Add(later)
		}
		for _, pid := range pagers {
			if hold {
				_ = unix.Kill(pid, unix.SIGSTOP)
			}
			if !time.Now().Before(due) && unix.Kill(pid, unix.SIGKILL) == nil {
				killed = true
			}
		}
	}
	return killed
}

// pagersOf lists the pagers that a shim has started and that live.
func pagersOf(shim int) (pids []int) {
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", shim))
	if err != nil {
		return nil
	}
	for _, list := range lists {
		children, err := os.ReadFile(list)
		if err != nil {
			continue
		}
		for field := range strings.FieldsSeq(string(children)) {
			comm, err := os.ReadFile("/proc/" + field + "/comm")
			if err != nil || strings.TrimSpace(string(comm)) != "crac-pager" {
				continue
			}
			if pid, err := strconv.Atoi(field); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// held starts a holder (integration/holder) of so many megabytes; image is that of a checkpoint of
// one, or empty.
func held(t *harness.T, image string, mb int, flags ...string) *box {
	t.Helper()
	b := startHolder(t, image, mb, flags...)
	b.Eventually("the holder", func() bool {
		out, err := b.tryAsk("hello")
		return err == nil && out == "hello"
	})
	return b
}

// startHolder does not wait for it.
func startHolder(t *harness.T, image string, mb int, flags ...string) *box {
	t.Helper()
	dir, err := t.Path("holder")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "build", "-o", filepath.Join(dir, "holder"), "./holder")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
	}
	flags = append([]string{"--mount", "type=bind,src=" + dir + ",dst=/opt/holder,options=rbind:ro"}, flags...)
	return start(t, how{image: image, flags: flags, args: []string{"/opt/holder/holder", "-mb", strconv.Itoa(mb)}})
}

// askHolder asks a holder, by an exec.
func (b *box) askHolder(command ...string) string {
	b.Helper()
	out, err := b.tryAsk(command...)
	if err != nil {
		b.Fatal(err)
	}
	return out
}

func (b *box) tryAsk(command ...string) (string, error) {
	out, err := b.tryExec(append([]string{"/opt/holder/holder", "ask", "127.0.0.1:9000"}, command...)...)
	return strings.TrimSpace(out), err
}

// wasLazy tells whether a clone was given a pager.
func (b *box) wasLazy() bool {
	b.Helper()
	_, err := os.Stat(filepath.Join(b.Dir, "root/io.containerd.runtime.v2.task", b.Namespace, b.id, "criu/pager.log"))
	return err == nil
}

// With memory=lazy a clone runs before it has its memory, and has all of it right in the end, also
// when it is checkpointed meanwhile, and when it is killed meanwhile nothing stays.
func TestLazyMemory(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	first, second := ref(t), ref(t)
	b, want := bigRedis(t, option("checkpoint.image", first))
	b.checkpoint("--exit")
	b.remove()

	lazy := []string{option("restore", "require"), option("memory", "lazy")}
	clone := start(t, how{image: first, flags: append(lazy, option("checkpoint.image", second))})
	// Two more, of which one is checkpointed and one killed as soon as they run.
	again := start(t, how{image: first, flags: append(lazy, option("checkpoint.image", second))})
	again.checkpoint("--exit")
	gone := start(t, how{image: first, flags: lazy})
	if !gone.wasLazy() {
		t.Error("a clone with lazy memory has no pager")
	}
	if err := gone.task().Kill(t.Ctx, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	t.Eventually("its end", func() bool { return gone.status() == containerd.Stopped })
	gone.remove()

	if got := clone.redisDigest(); got != want {
		t.Errorf("the clone has %s, the original had %s", got, want)
	}
	clone.remove()
	again.remove()

	clone = start(t, how{image: second, flags: lazy})
	if got := clone.redisDigest(); got != want {
		t.Errorf("the clone of a clone has %s, the original had %s", got, want)
	}
	clone.remove()
}

// Memory that is marked as not to be had by two processes, as random generators mark their state,
// comes up empty in a clone, and in no other way; the original keeps it.
func TestMarkedMemory(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image := ref(t)
	original := held(t, "", 8, option("checkpoint.image", image))
	before := original.askHolder("marked")
	if !strings.HasPrefix(before, "wipe=full drop=") {
		t.Fatalf("the original says %q", before)
	}
	original.checkpoint()
	if after := original.askHolder("marked"); after != before {
		t.Errorf("after its checkpoint the original says %q, before it %q", after, before)
	}
	original.remove()
	want := strings.ReplaceAll(before, "full", "zero")
	for _, memory := range []string{"eager", "lazy"} {
		clone := held(t, image, 8, option("restore", "require"), option("memory", memory))
		if clone.wasLazy() != (memory == "lazy") {
			t.Errorf("memory=%s: there was a pager: %v", memory, clone.wasLazy())
		}
		if got := clone.askHolder("marked"); got != want {
			t.Errorf("memory=%s: the clone says %q, want %q", memory, got, want)
		}
		if got := clone.askHolder("check"); got != "ok" {
			t.Errorf("memory=%s: %s", memory, got)
		}
		clone.remove()
	}
}

// A clone whose pager is killed has its memory already, or dies and says why, or was never started:
// it does not read zeroes.
func TestLazyMemoryWithoutPager(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image := ref(t)
	b, want := bigRedis(t, option("checkpoint.image", image))
	b.checkpoint("--exit")
	b.remove()
	right, dead, refused := 0, 0, 0
	for i := range times(10) {
		failed := watch(t, "/crac/memory-failed")
		clone := newBox(t, newID(t))
		stop, killed := make(chan struct{}), make(chan bool)
		// At any moment, and in the middle.
		go func() { killed <- killPager(t, clone.id, i%2 == 0, anyMoment(), stop) }()
		_, err := t.Ctr(t.Ctx, "run", "--detach", "--runtime", testRuntime, "--log-uri", "file://"+clone.out,
			option("restore", "require"), option("memory", "lazy"), image, clone.id)
		close(stop)
		switch hit := <-killed; {
		case err != nil && !hit:
			t.Fatal(err)
		case err != nil:
			refused++
			// It is kept for whoever wants to know why.
			if err := os.Remove(filepath.Join(t.Dir, "root/io.containerd.runtime.v2.task", t.Namespace, clone.id+".restore.log")); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Error(err)
			}
		default:
			got, err := clone.tryExec("redis-cli", "debug", "digest")
			if err == nil && strings.TrimSpace(got) == want {
				right++
				break
			}
			if !hit {
				t.Errorf("nobody has killed the pager, and the clone has %q, %v; want %s", got, err, want)
				break
			}
			dead++
			if f := failed.of(clone.id); !strings.Contains(fmt.Sprint(f["reason"]), "pager") {
				t.Errorf("the event says %v", f)
			}
			t.Eventually("the end of the clone", func() bool { return clone.status() == containerd.Stopped })
		}
		clone.remove()
	}
	t.Logf("right %d, dead %d, not started %d", right, dead, refused)
	if dead+refused == 0 {
		t.Error("no pager was killed in time")
	}
}

// Whoever of those around a clone is killed while its memory comes, it has the right memory or is
// dead.
func TestLazyMemoryKills(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	image := ref(t)
	original := held(t, "", 64, option("checkpoint.image", image))
	original.checkpoint("--exit")
	original.remove()
	victims := []string{"containerd", "shim", "pager"}
	counts := make(map[string]int)
	for i := range times(6) {
		victim := victims[i%len(victims)]
		failed := watch(t, "/crac/memory-failed")
		b := startHolder(t, image, 64, option("restore", "require"), option("memory", "lazy"))
		pid := int(b.task().Pid())
		time.Sleep(anyMoment())
		if err := b.killOne(victim); err != nil {
			t.Fatalf("kill %s: %v", victim, err)
		}
		answer, err := checkHolder(pid)
		switch {
		case err == nil && answer == "ok":
			counts[victim+" killed, right"]++
		case err == nil:
			t.Errorf("%s was killed, and the clone reads what is not there: %s", victim, answer)
		case victim == "containerd":
			t.Errorf("%s was killed, and the clone is dead: %v", victim, err)
		default:
			counts[victim+" killed, dead"]++
			if victim == "pager" {
				if f := failed.of(b.id); !strings.Contains(fmt.Sprint(f["reason"]), "pager") {
					t.Errorf("the event says %v", f)
				}
			}
		}
		if victim == "shim" {
			t.Eventually("the end of a clone without its shim", func() bool { return unix.Kill(pid, 0) != nil })
		}
		b.remove()
	}
	t.Log(counts)
}

// anyMoment is how long to wait for any moment until after the last page, whose time depends on
// what else the machine does. The first clones' memory waits for 100 ms for what they ask for.
func anyMoment() time.Duration {
	return time.Duration(rand.ExpFloat64() * float64(150*time.Millisecond))
}

func (b *box) killOne(victim string) error {
	if victim == "containerd" {
		return shared.Restart(b.Ctx, true)
	}
	shim, err := b.ShimPID(b.id)
	if err != nil {
		return err
	}
	if victim == "shim" {
		// Nobody removes the socket of a killed shim, for the next one of the same id takes it over.
		address, err := os.ReadFile(filepath.Join(b.Dir, "state/io.containerd.runtime.v2.task", b.Namespace, b.id, "address"))
		if err != nil {
			return err
		}
		b.Cleanup(func() { _ = os.Remove(strings.TrimPrefix(string(address), "unix://")) })
		return unix.Kill(shim, unix.SIGKILL)
	}
	for _, pid := range pagersOf(shim) {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
	return nil // it may be through
}

// checkHolder has a holder look at all of its memory. The process is the holder's own; with an
// error it is dead, or does not answer in time.
func checkHolder(pid int) (answer string, err error) {
	err = thread.InNetwork(pid, func() error {
		conn, err := net.Dial("tcp", "127.0.0.1:9000")
		if err != nil {
			return err
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(2 * harness.WaitLimit)); err != nil {
			return err
		}
		if _, err := fmt.Fprintln(conn, "check"); err != nil {
			return err
		}
		answer, err = bufio.NewReader(conn).ReadString('\n')
		answer = strings.TrimSpace(answer)
		return err
	})
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return "does not answer", nil
	}
	return answer, err
}

// In a user namespace memory comes lazily where the kernel offers what that takes to everybody, and first where it
// does not.
func TestLazyMemoryInUserNamespace(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	const sysctl = "/proc/sys/vm/unprivileged_userfaultfd"
	changesHost(t, sysctl)
	image := ref(t)
	b := held(t, "", 16, append([]string{option("checkpoint.image", image)}, ownMaps...)...)
	want := b.askHolder("check")
	b.checkpoint("--exit")
	b.remove()
	for _, value := range []string{"0", "1"} {
		if err := os.WriteFile(sysctl, []byte(value), 0o644); err != nil { //nolint:gosec // it exists
			t.Fatal(err)
		}
		clone := held(t, image, 16, append([]string{option("memory", "lazy"), option("restore", "require")}, ownMaps...)...)
		if lazy := clone.wasLazy(); lazy != (value == "1") {
			t.Errorf("%s is %s, and the memory came lazily: %v", sysctl, value, lazy)
		}
		if got := clone.askHolder("check"); got != want {
			t.Errorf("%s is %s: the holder says %q, the original %q", sysctl, value, got, want)
		}
		clone.remove()
	}
}
