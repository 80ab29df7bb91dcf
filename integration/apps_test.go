package integration

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/integration/harness"
)

// app is a real program: how it is brought to have state, and how a clone of it is still right.
type app struct {
	name string
	// prepare waits until the program serves, gives it state, and returns what check is to find.
	prepare func(*box) string
	check   func(b *box, before string)
}

var apps = []app{
	{"goserver", requests("/count", "count", 3), checkCounter}, // goroutines on threads, epoll, a timer, a pipe
	{"nginx", requests("/count", "count", 3), checkCounter},    // a master, two workers, memory that they share
	{"node", requests("/count", "count", 3), checkCounter},     // a worker thread, a timer, epoll, eventfds
	{"python", requests("/count", "count", 3), checkCounter},   // a thread, a child process behind two pipes
	{"redis", prepareRedis, checkRedis},
	{"postgres", preparePostgres, checkPostgres},
	{"tomcat", requests("/examples/crac.jsp", "hits", 20), checkTomcat},
}

// TestApplications is the main job: cold run, checkpoint, image, restore, still right.
func TestApplications(tb *testing.T) {
	onlyCrac(tb)
	for _, a := range apps {
		tb.Run(a.name, func(tb *testing.T) {
			t := setup(tb)
			needImage(t, a.name)
			image := ref(t)
			var flags []string
			cni := true
			if a.name == "postgres" && !hasSysResource(t) {
				// PostgreSQL refuses to run as root, and here the kernel refuses CRIU the limits of
				// another user's processes, except of those in a user namespace below its own.
				refusesForLackOfSysResource(t)
				flags = []string{"--uidmap", "0:100000:65536", "--gidmap", "0:100000:65536", "--remap-labels"}
				// ctr asks for the network before there is a process, and the namespace of a network
				// below a user namespace is made together with that by CRIU.
				cni = false
			}
			sameCgroups(t, func(onlyOf func(...*box)) {
				original := start(t, how{image: harness.ImageRef(a.name), cni: cni, flags: append(flags, option("checkpoint.image", image))})
				state := a.prepare(original)
				processes := original.settled()
				original.checkpoint("--exit")
				original.wantStatus(containerd.Stopped)
				original.remove()

				clone := start(t, how{image: image, cni: cni, flags: append(flags, "--hostname", "clone", option("restore", "require"))})
				// A server may start one more for a while.
				t.Eventually(fmt.Sprintf("the clone has as many processes as the original had: %q", processes), func() bool { return len(clone.commands()) == len(processes) })
				a.check(clone, state)
				clone.seesNoDump()
				onlyOf(clone)
			})
		})
	}
}

// hasSysResource tells whether root has CAP_SYS_RESOURCE. Some sandboxes take it away.
func hasSysResource(t *harness.T) bool {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		var effective uint64
		if _, err := fmt.Sscanf(line, "CapEff:\t%x", &effective); err == nil {
			return effective&(1<<unix.CAP_SYS_RESOURCE) != 0
		}
	}
	t.Fatal("no CapEff in /proc/self/status")
	return false
}

// refusesForLackOfSysResource checks that a dump that the kernel refuses says what it lacks, and
// harms nobody.
func refusesForLackOfSysResource(t *harness.T) {
	t.Helper()
	b := start(t, how{image: harness.ImageRef("postgres")})
	preparePostgres(b)
	_, err := b.Ctr(b.Ctx, "tasks", "checkpoint", "--exit", b.id)
	if err == nil || !strings.Contains(err.Error(), "CAP_SYS_RESOURCE") {
		b.Errorf("a dump of another user's processes without CAP_SYS_RESOURCE gives %v, want an error that names it", err)
	}
	b.wantStatus(containerd.Running)
	if got := b.sql("select count(*) from t"); got != "20000" {
		b.Errorf("after the refused dump the table has %s rows, want 20000", got)
	}
	b.remove()
}

// settled is what commands are when they have been the same for a while: servers start processes for a
// moment, and one that has just begun or ended has no command line.
func (b *box) settled() (lines []string) {
	b.Helper()
	since := time.Now()
	b.Eventually("its processes stay as they are", func() bool {
		now := b.commands()
		passing := slices.ContainsFunc(now, func(line string) bool { return strings.HasPrefix(line, "[") })
		if passing || !slices.Equal(now, lines) {
			lines, since = now, time.Now()
		}
		return time.Since(since) > 300*time.Millisecond
	})
	return lines
}

// commands are the command lines of a container's processes, sorted.
func (b *box) commands() (lines []string) {
	b.Helper()
	pids, err := b.task().Pids(b.Ctx)
	if err != nil {
		b.Fatal(err)
	}
	for _, p := range pids {
		if proc, err := harness.ReadProcess(int(p.Pid)); err == nil { // or it has just ended
			lines = append(lines, proc.Cmdline)
		}
	}
	slices.Sort(lines)
	return lines
}

func (b *box) get(path string) string {
	b.Helper()
	body, _, err := harness.WaitHTTP(b.Ctx, "http://"+b.address()+":8080"+path)
	if err != nil {
		b.Fatal(err)
	}
	return body
}

// value is what a page of key=value lines says about a key, "" when it does not.
func value(body, key string) string {
	for line := range strings.Lines(body) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), key+"="); ok {
			return v
		}
	}
	return ""
}

func number(tb testing.TB, body, key string) (n int) {
	tb.Helper()
	if _, err := fmt.Sscan(value(body, key), &n); err != nil {
		tb.Fatalf("no number %s in %q", key, body)
	}
	return n
}

// requests asks for a page that counts so many times, and returns its last answer.
func requests(path, key string, times int) func(*box) string {
	return func(b *box) (last string) {
		b.Helper()
		for range times {
			last = b.get(path)
		}
		if n := number(b, last, key); n != times {
			b.Fatalf("the page counts %d, want %d", n, times)
		}
		return last
	}
}

func checkCounter(b *box, before string) {
	b.Helper()
	countsOn(b.T, func() string { b.Helper(); return b.get("/count") }, before)
}

// countsOn checks that a server that counts goes on from its answer before.
func countsOn(t *harness.T, ask func() string, before string) {
	t.Helper()
	last := number(t, before, "count")
	for want := last + 1; want <= last+3; want++ {
		body := ask()
		if n := number(t, body, "count"); n != want {
			t.Errorf("the clone counts %d, want %d", n, want)
		}
		// What goes through a pipe, a thread or a child process and comes back.
		if value(before, "echo") != "" && number(t, body, "echo") != want {
			t.Errorf("the clone's other half says %s, want %d", value(body, "echo"), want)
		}
		if value(body, "child") != value(before, "child") {
			t.Errorf("the clone's child is %s, the original's %s", value(body, "child"), value(before, "child"))
		}
	}
	if value(before, "ticks") != "" {
		first := number(t, ask(), "ticks")
		t.Eventually("the clone's timer fires", func() bool { return number(t, ask(), "ticks") > first })
	}
}

func prepareRedis(b *box) string {
	b.Helper()
	b.Eventually("redis answers", func() bool {
		out, err := b.tryExec("redis-cli", "ping")
		return err == nil && strings.TrimSpace(out) == "PONG"
	})
	b.exec("redis-cli", "set", "greeting", "hello")
	b.exec("redis-cli", "eval", "for i = 1, 20000 do redis.call('set', 'key:' .. i, string.rep('x', 100)) end", "0")
	b.exec("redis-cli", "rpush", "list", "a", "b", "c")
	return b.exec("redis-cli", "info", "server")
}

func checkRedis(b *box, before string) {
	b.Helper()
	run := func(info string) string {
		return strings.TrimSpace(value(strings.ReplaceAll(info, ":", "="), "run_id"))
	}
	if was, is := run(before), run(b.exec("redis-cli", "info", "server")); was == "" || was != is {
		b.Errorf("the clone's run_id is %q, the original's %q: it was started anew", is, was)
	}
	for _, c := range [][2]string{
		{"get greeting", "hello"},
		{"dbsize", "20002"},
		{"strlen key:19999", "100"},
		{"lrange list 2 2", "c"},
		{"incr counter", "1"},
		{"bgsave", "Background saving started"}, // forks
	} {
		if got := b.exec(append([]string{"redis-cli"}, strings.Fields(c[0])...)...); got != c[1] {
			b.Errorf("redis-cli %s says %q, want %q", c[0], got, c[1])
		}
	}
	b.Eventually("the background save succeeds", func() bool {
		info := b.exec("redis-cli", "info", "persistence")
		return strings.Contains(info, "rdb_bgsave_in_progress:0") && strings.Contains(info, "rdb_last_bgsave_status:ok")
	})
}

func (b *box) sql(statements string) string {
	b.Helper()
	return b.exec("psql", "-qtA", "-d", "postgres", "-c", statements)
}

func preparePostgres(b *box) string {
	b.Helper()
	b.Eventually("PostgreSQL accepts connections", func() bool {
		_, err := b.tryExec("pg_isready", "-q")
		return err == nil
	})
	b.sql("create table t (id int primary key, note text); create table rolled (id int)")
	// Changes that are in the buffers and the log, but not yet in the table's file; one
	// transaction is done, one is not.
	b.sql("insert into t select i, md5(i::text) from generate_series(1, 20000) i")
	b.sql("begin; insert into rolled select generate_series(1, 1000); rollback")
	started := b.sql("select pg_postmaster_start_time()")
	// The client is gone, but its process in the server ends a moment after it; and what was
	// written may be looked at by a process that ends then.
	b.Eventually("only the server's own processes are left", func() bool {
		return !slices.ContainsFunc(b.commands(), func(line string) bool {
			return strings.Contains(line, "[local]") || strings.Contains(line, "autovacuum worker")
		})
	})
	return started
}

func checkPostgres(b *box, started string) {
	b.Helper()
	if got := b.sql("select pg_postmaster_start_time()"); got != started {
		b.Errorf("the clone's server started at %s, the original's at %s: it was started anew", got, started)
	}
	for statement, want := range map[string]string{
		"select count(*) from t where note = md5(id::text)": "20000",
		"select count(*) from rolled":                       "0",
	} {
		if got := b.sql(statement); got != want {
			b.Errorf("%s: %s, want %s", statement, got, want)
		}
	}
	b.sql("insert into t select i, 'after' from generate_series(20001, 20100) i")
	b.sql("checkpoint")
	if got := b.sql("select count(*) from t"); got != "20100" {
		b.Errorf("after an insert and a checkpoint of its own the table has %s rows, want 20100", got)
	}
}

func checkTomcat(b *box, before string) {
	b.Helper()
	body := b.get("/examples/crac.jsp")
	for key, want := range map[string]string{
		"hits": "21", "file_before": value(before, "file"), "instance": value(before, "instance"), "hostname": "clone",
	} {
		if got := value(body, key); got != want {
			b.Errorf("the clone's page says %s=%q, want %q", key, got, want)
		}
	}
	// A page that the original never compiled: class loading, the compiler and its files work.
	if got := b.get("/examples/jsp/dates/date.jsp"); !strings.Contains(got, "Day of month") {
		b.Errorf("a page that is compiled after the restore: %.200q", got)
	}
}

// A shell on a terminal goes on with its variables, on the terminal of the clone.
func TestCheckpointWithTerminal(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	needImage(t, "busybox")
	image := ref(t)
	type shell struct {
		containerd.Task
		keys io.Writer
		out  *output
	}
	open := func(name string, annotations map[string]string) shell {
		t.Helper()
		img, err := t.Client.GetImage(t.Ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		if ok, err := img.IsUnpacked(t.Ctx, ""); err == nil && !ok {
			if err := img.Unpack(t.Ctx, ""); err != nil {
				t.Fatal(err)
			}
		}
		b := newBox(t, newID(t))
		c, err := t.Client.NewContainer(
			t.Ctx, b.id, containerd.WithImage(img), containerd.WithNewSnapshot(b.id, img), containerd.WithRuntime(cracRuntime, nil),
			containerd.WithNewSpec(oci.WithDefaultSpec(), oci.WithDefaultUnixDevices, oci.WithImageConfig(img), oci.WithTTY, oci.WithAnnotations(annotations)),
		)
		if err != nil {
			t.Fatal(err)
		}
		in, keys := io.Pipe()
		tb.Cleanup(func() { _ = keys.Close() })
		s := shell{keys: keys, out: &output{}}
		if s.Task, err = c.NewTask(t.Ctx, cio.NewCreator(cio.WithStreams(in, s.out, nil), cio.WithTerminal, cio.WithFIFODir(t.FIFODir()))); err != nil {
			t.Fatal(err)
		}
		if err := s.Start(t.Ctx); err != nil {
			t.Fatal(err)
		}
		return s
	}
	typed := func(s shell, line, want string) {
		t.Helper()
		if _, err := io.WriteString(s.keys, line+"\n"); err != nil {
			t.Fatal(err)
		}
		t.Eventually(fmt.Sprintf("%q on the terminal", want), func() bool { return strings.Contains(s.out.String(), want) })
	}

	original := open(harness.ImageRef("busybox"), map[string]string{"io.containerd.crac.checkpoint.image": image})
	if err := original.Resize(t.Ctx, 91, 17); err != nil {
		t.Fatal(err)
	}
	typed(original, "x=40; cd /usr; tty; echo first-$((x+1))", "first-41")
	t.CtrOK("tasks", "checkpoint", original.ID())
	typed(original, "echo second-$((x+2))", "second-42")

	clone := open(image, map[string]string{"io.containerd.crac.restore": "require"})
	if err := clone.Resize(t.Ctx, 123, 45); err != nil {
		t.Fatal(err)
	}
	typed(clone, "echo third-$((x+3)) $PWD", "third-43 /usr")
	typed(clone, "stty size; echo size-known", "45 123")
	// The terminal's own signals arrive: the line discipline is the clone's.
	if _, err := io.WriteString(clone.keys, "sleep 1000\n"); err != nil {
		t.Fatal(err)
	}
	t.Eventually("the shell's child runs", func() bool {
		pids, err := clone.Pids(t.Ctx)
		return err == nil && len(pids) == 2
	})
	typed(clone, "\x03", "^C")
	typed(clone, "echo fourth-$((x+4))", "fourth-44")
	typed(original, "echo fifth-$((x+5))", "fifth-45")

	exited, err := clone.Wait(t.Ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(clone.keys, "exit 9\n"); err != nil {
		t.Fatal(err)
	}
	if code := exitCode(t, exited); code != 9 {
		t.Errorf("the clone's shell ends with code %d, want 9", code)
	}
}
