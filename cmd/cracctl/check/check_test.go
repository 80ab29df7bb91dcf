package check

import (
	"bytes"
	"encoding/json"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crac-shim/crac/cmd/cracctl/doctor"
	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/runtime/hook"
	"github.com/crac-shim/crac/runtime/inspect"
)

func report(findings ...inspect.Finding) *Report {
	r := &Report{Container: "web", Processes: 3, Findings: findings}
	r.finish()
	return r
}

func TestTable(t *testing.T) {
	connection := inspect.Finding{Level: inspect.Warning, Code: "connection", PID: 700, Inside: 1, Program: "java", FDs: []int{5, 6}, What: "tcp to 10.0.0.9:5432", Why: "a clone finds it closed", Fix: "connect again"}
	ring := inspect.Finding{Level: inspect.Error, Code: "io_uring", PID: 701, Inside: 7, Program: "node", FDs: []int{9}, Others: 2, What: "io_uring", Why: "CRIU cannot carry io_uring", Fix: "switch it off"}
	exec := inspect.Finding{Level: inspect.Info, Code: "exec", PID: 702, Inside: 9, Program: "sh", What: "the process", Why: "no dump holds it"}
	host := inspect.Finding{Level: inspect.Error, Code: "host", What: "this host: CRIU", Why: "none", Fix: "install it"}
	for _, tt := range []struct {
		name   string
		report *Report
		want   string
	}{
		{"nothing", report(), "web: 3 processes. Nothing stands in the way of a checkpoint.\n"},
		{"names that a workload has chosen", report(inspect.Finding{Level: inspect.Info, PID: 1, Inside: 1, Program: "a\x1b[2J\nerror", What: "/b\nc", Why: "d\te"}), `info     process 1 (a\u001b[2J\nerror, 1 inside): /b\nc
         d\te

web: 3 processes. Nothing stands in the way of a checkpoint.
`},
		{"a warning", report(exec, connection), `warning  process 700 (java, 1 inside), descriptors 5 and 6: tcp to 10.0.0.9:5432
         a clone finds it closed
         → connect again

info     process 702 (sh, 9 inside)
         no dump holds it

web: 3 processes. Nothing stands in the way of a checkpoint; a clone would meet what is marked warning.
`},
		{"errors", report(connection, host, ring), `error    this host: CRIU
         none
         → install it

error    process 701 (node, 7 inside) and 2 others, descriptor 9: io_uring
         CRIU cannot carry io_uring
         → switch it off

warning  process 700 (java, 1 inside), descriptors 5 and 6: tcp to 10.0.0.9:5432
         a clone finds it closed
         → connect again

web: 3 processes. 2 things stand in the way of a checkpoint.
`},
	} {
		var out bytes.Buffer
		if err := Table(&out, tt.report); err != nil {
			t.Fatal(err)
		}
		if out.String() != tt.want {
			t.Errorf("%s: got\n%s\nwant\n%s", tt.name, out.String(), tt.want)
		}
		if tt.report.OK != (tt.name != "errors") {
			t.Errorf("%s: OK is %v", tt.name, tt.report.OK)
		}
	}
	r := report(ring)
	r.Participants = 1
	var out bytes.Buffer
	if err := Table(&out, r); err != nil || !strings.HasSuffix(out.String(), "web: 3 processes, 1 participant. One thing stands in the way of a checkpoint. What participants would close at before-checkpoint is counted, too.\n") {
		t.Errorf("%v: %s", err, out.String())
	}
	if got := descriptors([]int{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}); got != "descriptors 1, 2, 3, 4, 5, 6, 7, 8 and 2 more" {
		t.Error(got)
	}
	// Programs find a list, also an empty one.
	data, err := json.Marshal(report())
	if err != nil || !strings.Contains(string(data), `"findings":[]`) {
		t.Errorf("%s, %v", data, err)
	}
}

func (r *Report) text() string {
	var b strings.Builder
	for _, f := range r.Findings {
		b.WriteString(string(f.Level) + " " + f.Code + ": " + f.What + ": " + f.Why + ": " + f.Fix + "\n")
	}
	return b.String()
}

func TestPolicy(t *testing.T) {
	socket := func(n int, cookie uint64, peer string) inspect.FD {
		return inspect.FD{Number: n, Kind: inspect.Socket, Inode: cookie, Socket: &inspect.SocketInfo{Family: "ipv4", Protocol: "tcp", State: "established", Cookie: cookie, Peer: netip.MustParseAddrPort(peer)}}
	}
	held := &inspect.Container{Init: 7, Processes: []inspect.Process{{PID: 7, Inside: 1, Name: "p", FDs: []inspect.FD{
		socket(3, 30, "10.0.0.9:1"), socket(4, 40, "10.0.0.9:2"), {Number: 5, Kind: inspect.File, Path: "/f"}, {Number: 6, Kind: inspect.File, Path: "/g"},
	}}}}
	r := &Report{}
	closed := r.policy(oci.Options{FDPolicy: "type: socket\nremotePort: 1\naction: close\n---\ntype: file\npath: /f\naction: close\n---\ntype: file\naction: ignore"}, nil, t.TempDir(), held)
	got := r.text()
	for _, want := range []string{
		"error policy: file /f: the descriptor policy refuses it, by rule 2 (line 5",
		"warning policy: tcp to 10.0.0.9:1: the descriptor policy closes it",
		"info policy: file /g: the descriptor policy: left to CRIU",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, got)
		}
	}
	fds := held.Processes[0].FDs
	if !closed(&fds[0]) || closed(&fds[1]) || closed(&fds[2]) {
		t.Error("the wrong ones count as closed")
	}
	r = &Report{}
	r.policy(oci.Options{FDPolicy: "file:/none"}, nil, t.TempDir(), held)
	if got := r.text(); !strings.HasPrefix(got, "error policy: the descriptor policy: descriptor policy /none of the image") {
		t.Error(got)
	}
	// A JVM's own rules are the same to it as to the shim.
	r = &Report{}
	jvm := &specs.Process{Args: []string{"java", "-Djdk.crac.resource-policies=p"}, Cwd: "/jvm"}
	r.policy(oci.Options{Java: oci.JavaAuto}, jvm, t.TempDir(), held)
	if got := r.text(); !strings.HasPrefix(got, "error policy: the descriptor policy: descriptor policy /jvm/p of the image") {
		t.Error(got)
	}
}

func TestHost(t *testing.T) {
	for _, tt := range []struct {
		check doctor.Check
		own   bool
		want  string
	}{
		{doctor.Check{Name: "CRIU", Status: doctor.Fail, Found: "none", Fix: "install"}, false, "error host: this host: CRIU: none: install\n"},
		{doctor.Check{Name: "CRIU", Status: doctor.OK}, false, ""},
		{doctor.Check{Name: "soft-dirty", Status: doctor.Warn}, true, ""},
		{doctor.Check{Name: "network lock", Status: doctor.Warn, Found: "none", Fix: "install"}, true, "error host: this host: network lock: none: install\n"},
		{doctor.Check{Name: "network lock", Status: doctor.Warn}, false, ""},
		{doctor.Check{Name: "cracctl", Status: doctor.Warn, Found: "none", Fix: "install"}, false, "warning host: this host: cracctl: none: install\n"},
	} {
		r := &Report{}
		r.host(doctor.Report{Checks: []doctor.Check{tt.check}}, tt.own)
		if got := r.text(); got != tt.want {
			t.Errorf("%+v: got %q, want %q", tt.check, got, tt.want)
		}
	}
}

func TestParticipants(t *testing.T) {
	bundle := t.TempDir() // without a directory of hooks
	for _, tt := range []struct {
		name string
		c    Container
		o    oci.Options
		want string
	}{
		{name: "no place for hooks", c: Container{Bundle: bundle}},
		{name: "off", c: Container{Bundle: bundle, Paused: true}, o: oci.Options{Hooks: oci.HooksOff}},
		{name: "paused", c: Container{Bundle: bundle, Paused: true}, want: "info paused"},
		{name: "required", c: Container{Bundle: bundle}, o: oci.Options{Hooks: oci.HooksRequired}, want: "error nobody"},
		{name: "adapter", c: Container{Bundle: bundle}, o: oci.Options{Hooks: oci.HooksRequired, HookBeforeCheckpoint: "signal:SIGUSR2"}, want: "info adapter"},
	} {
		r := &Report{}
		r.participants(t.Context(), tt.c, tt.o)
		if got := r.text(); !strings.HasPrefix(got, tt.want) || tt.want == "" && got != "" || strings.Count(got, "\n") > 1 {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
	if err := os.Mkdir(filepath.Join(bundle, hooksDir), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(bundle, hooksDir, "no-socket"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r := &Report{}
	r.participants(t.Context(), Container{Bundle: bundle}, oci.Options{})
	if r.Participants != 0 || len(r.Findings) != 0 {
		t.Errorf("what is no participant: %d, %s", r.Participants, r.text())
	}

	// Nobody is asked while a checkpoint is being made. hooks=off does not matter to a clone of a
	// dump that has the directory.
	l, err := net.Listen("unix", filepath.Join(bundle, hooksDir, "p.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	asked := make(chan struct{}, 1)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			asked <- struct{}{}
			_, _ = c.Write([]byte("{\"ok\":true}\n"))
			c.Close()
		}
	}()
	off := oci.Options{Hooks: oci.HooksOff}
	end, err := hook.Turn(t.Context(), bundle)
	if err != nil {
		t.Fatal(err)
	}
	r = &Report{}
	r.participants(t.Context(), Container{Bundle: bundle}, off)
	if got := r.text(); !strings.HasPrefix(got, "info busy") || len(asked) > 0 {
		t.Errorf("while a checkpoint is made: %q, asked: %d", got, len(asked))
	}
	end()
	r = &Report{}
	r.participants(t.Context(), Container{Bundle: bundle}, off)
	if len(asked) != 1 || r.Participants != 1 || len(r.Findings) != 0 {
		t.Errorf("a participant that agrees: asked %d, %d participants, %s", len(asked), r.Participants, r.text())
	}
}

func TestBundle(t *testing.T) {
	bundle := t.TempDir()
	if _, err := LoadSpec(bundle); err == nil || !strings.Contains(err.Error(), "--state") {
		t.Errorf("no bundle: %v", err)
	}
	if err := os.WriteFile(filepath.Join(bundle, "config.json"), []byte(`{"root":{"path":"/somewhere"}}`), 0o600); err != nil {
		t.Fatal(err)
	}
	spec, err := LoadSpec(bundle)
	if err != nil || rootfs(bundle, spec) != "/somewhere" {
		t.Errorf("%+v, %v", spec, err)
	}
	if got := rootfs(bundle, &specs.Spec{}); got != filepath.Join(bundle, "rootfs") {
		t.Error(got)
	}
	if got := rootfs(bundle, &specs.Spec{Root: &specs.Root{Path: "fs"}}); got != filepath.Join(bundle, "fs") {
		t.Error(got)
	}
}
