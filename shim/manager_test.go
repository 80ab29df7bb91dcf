package shim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/runtime"
)

func TestToGRPC(t *testing.T) {
	for name, tt := range map[string]struct {
		err  error
		want codes.Code
	}{
		"state":            {&runtime.StateError{ID: "c", From: runtime.Paused, To: runtime.Paused}, codes.FailedPrecondition},
		"not started":      {fmt.Errorf("x: %w", runtime.ErrNotStarted), codes.FailedPrecondition},
		"exists":           {fmt.Errorf("x: %w", runtime.ErrExists), codes.AlreadyExists},
		"not running":      {fmt.Errorf("x: %w", runtime.ErrNotRunning), codes.NotFound},
		"process done":     {fmt.Errorf("x: %w", os.ErrProcessDone), codes.NotFound},
		"of errdefs":       {fmt.Errorf("x: %w", errdefs.ErrInvalidArgument), codes.InvalidArgument},
		"classified":       {classified{errors.New("words"), errdefs.ErrUnavailable}, codes.Unavailable},
		"cancelled":        {context.Canceled, codes.Canceled},
		"any other":        {errors.New("words"), codes.Unknown},
		"in company":       {errors.Join(errors.New("first"), runtime.ErrNotRunning), codes.NotFound},
		"cold, when asked": {(&service{}).cold(&container{id: "c"}, &coldReason{code: "x", err: errors.New("why"), required: true}), codes.FailedPrecondition},
	} {
		err := toGRPC(tt.err)
		if got := status.Code(err); got != tt.want {
			t.Errorf("%s: %s, want %s (%v)", name, got, tt.want, err)
		}
		if first, _, _ := strings.Cut(tt.err.Error(), "\n"); !strings.Contains(err.Error(), first) {
			t.Errorf("%s: the words %q are lost in %q", name, first, err)
		}
	}
	if err := toGRPC(nil); err != nil {
		t.Errorf("of no error: %v", err)
	}
	if c := (classified{errors.New("words"), errdefs.ErrUnavailable}); c.Error() != "words" {
		t.Errorf("a class changes the words to %q", c)
	}
}

func TestReasonOf(t *testing.T) {
	for name, tt := range map[string]struct {
		err  error
		code string
	}{
		"damaged": {fmt.Errorf("x: %w", images.ErrDamaged), "damaged"},
		"covered": {fmt.Errorf("x: %w", images.ErrCovered), "covered"},
		"its own": {fmt.Errorf("x: %w", &coldReason{code: "criu", err: errors.New("y")}), "criu"},
		"any":     {errors.New("x"), ""},
	} {
		for _, required := range []bool{false, true} {
			if got := reasonOf(tt.err, required); got.code != tt.code || got.required != required {
				t.Errorf("%s: code %q, required %v; want %q, %v", name, got.code, got.required, tt.code, required)
			}
		}
	}
}

func TestGroupOf(t *testing.T) {
	for name, tt := range map[string]struct{ config, want string }{
		"none":       {`{}`, "id"},
		"empty":      {`{"annotations":{"io.kubernetes.cri.sandbox-id":""}}`, "id"},
		"Kubernetes": {`{"annotations":{"io.kubernetes.cri.sandbox-id":"pod","other":"x"}}`, "pod"},
		"runc's":     {`{"annotations":{"io.kubernetes.cri.sandbox-id":"pod","io.containerd.runc.v2.group":"g"}}`, "g"},
	} {
		path := filepath.Join(t.TempDir(), "config.json")
		if err := os.WriteFile(path, []byte(tt.config), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := groupOf(path, "id"); err != nil || got != tt.want {
			t.Errorf("%s: %q, %v; want %q", name, got, err, tt.want)
		}
	}
	path := filepath.Join(t.TempDir(), "config.json")
	if _, err := groupOf(path, "id"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no file: %v", err)
	}
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := groupOf(path, "id"); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("no JSON: %v, want an error that names the file", err)
	}
}

func FuzzGroupOf(f *testing.F) {
	f.Add([]byte(`{"annotations":{"io.kubernetes.cri.sandbox-id":"pod"}}`))
	f.Add([]byte(`{"annotations":[]}`))
	f.Fuzz(func(t *testing.T, config []byte) {
		path := filepath.Join(t.TempDir(), "config.json")
		if err := os.WriteFile(path, config, 0o600); err != nil {
			t.Fatal(err)
		}
		if group, err := groupOf(path, "id"); (group == "") == (err == nil) {
			t.Errorf("%q, %v", group, err)
		}
	})
}

func TestReadStart(t *testing.T) {
	marshal := func(m proto.Message) []byte {
		data, err := proto.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	options := func(o proto.Message) []byte {
		data, err := anypb.New(o)
		if err != nil {
			t.Fatal(err)
		}
		return marshal(data)
	}
	message := marshal(&bootapi.BootstrapParams{InstanceID: "id", Namespace: "ns", ContainerdGrpcAddress: "/a", LogLevel: bootapi.LogLevel_LOG_LEVEL_DEBUG})
	args := []string{"-namespace", "ns", "-address", "/b", "-publish-binary", "/c", "-id", "id"}
	for name, tt := range map[string]struct {
		args   []string
		input  []byte
		legacy bool
		debug  bool
		cgroup string
	}{
		"the message":                  {args, message, false, true, ""},
		"of older containerd":          {args, nil, true, false, ""},
		"of older containerd, debug":   {append([]string{"-debug"}, args...), nil, true, true, ""},
		"of older containerd, options": {args, options(&runcoptions.Options{ShimCgroup: "/s"}), true, false, "/s"},
	} {
		c, err := readStart(tt.args, bytes.NewReader(tt.input))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		address := "/a"
		if tt.legacy {
			address = "/b"
		}
		if c.InstanceID != "id" || c.Namespace != "ns" || c.ContainerdGrpcAddress != address || c.legacy != tt.legacy || c.debug() != tt.debug {
			t.Errorf("%s: %+v, legacy %v, debug %v", name, &c.BootstrapParams, c.legacy, c.debug())
		}
		if cgroup, err := shimCgroup(&c.BootstrapParams); err != nil || cgroup != tt.cgroup {
			t.Errorf("%s: the shim's cgroup is %q, %v; want %q", name, cgroup, err, tt.cgroup)
		}
	}
	for name, tt := range map[string]struct {
		args  []string
		input []byte
	}{
		"nothing":             {nil, nil},
		"no id":               {[]string{"-namespace", "ns"}, nil},
		"no namespace":        {[]string{"-id", "id"}, nil},
		"an unknown flag":     {append([]string{"-no-such-flag"}, args...), nil},
		"more than flags":     {append(args[:len(args):len(args)], "x"), nil},
		"nonsense":            {args, []byte("\xff\xff")},
		"cut short":           {args, message[:len(message)-3]},
		"another's message":   {[]string{"-namespace", "ns", "-id", "other"}, message},
		"another's namespace": {[]string{"-namespace", "default", "-id", "id"}, message},
	} {
		if c, err := readStart(tt.args, bytes.NewReader(tt.input)); err == nil {
			t.Errorf("%s: %+v, want an error", name, &c.BootstrapParams)
		}
	}
}

func FuzzReadStart(f *testing.F) {
	data, err := proto.Marshal(&bootapi.BootstrapParams{InstanceID: "id", Namespace: "ns"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Fuzz(func(t *testing.T, input []byte) {
		// Whatever it says, it is for the container that the flags name.
		c, err := readStart([]string{"-namespace", "ns", "-id", "id"}, bytes.NewReader(input))
		if err == nil && (c.InstanceID != "id" || c.Namespace != "ns") {
			t.Errorf("it is the message for %s of %s", c.InstanceID, c.Namespace)
		}
	})
}

func TestStartAnswer(t *testing.T) {
	var out bytes.Buffer
	if err := (&startCall{legacy: true}).answer(&out, "unix:///x"); err != nil || out.String() != `{"version":3,"address":"unix:///x","protocol":"ttrpc"}`+"\n" {
		t.Errorf("older containerd gets %q, %v", out.String(), err)
	}
	out.Reset()
	var result bootapi.BootstrapResult
	if err := (&startCall{}).answer(&out, "unix:///x"); err != nil || proto.Unmarshal(out.Bytes(), &result) != nil ||
		result.Address != "unix:///x" || result.Protocol != "ttrpc" || result.Version != protocolVersion {
		t.Errorf("containerd gets %+v, %v", &result, err)
	}
}

// The shim takes its socket away where containerd has asked for it.
func TestSocketDir(t *testing.T) {
	t.Chdir(t.TempDir())
	for _, dir := range []string{"/first", "/second"} { // again, after a start that failed
		if got, err := socketDir(dir); err != nil || got != dir {
			t.Errorf("%q, %v; want %q", got, err, dir)
		}
		if got, err := os.Readlink(socketDirLink); err != nil || got != dir {
			t.Errorf("the link leads to %q, %v; want %q", got, err, dir)
		}
	}
}

func TestListen(t *testing.T) {
	ctx := namespaces.WithNamespace(context.Background(), "ns")
	dir, err := os.MkdirTemp("", "s") // short: a socket's path has a bound
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	first, address, err := listen(ctx, dir, "/containerd", "group", false)
	if err != nil || first == nil {
		t.Fatalf("%v, %v", first, err)
	}
	again, same, err := listen(ctx, dir, "/containerd", "group", false)
	if again != nil || same != address || err != nil {
		t.Errorf("while a shim listens: %v, %s, %v; want its address %s alone", again, same, err, address)
	}
	other, elsewhere, err := listen(ctx, dir, "/containerd", "another", false)
	if other == nil || elsewhere == address || err != nil {
		t.Errorf("another group: %v, %s, %v", other, elsewhere, err)
	}
	other.Close()
	// The socket of a shim that was killed stays.
	first.Close()
	fresh, same, err := listen(ctx, dir, "/containerd", "group", false)
	if fresh == nil || same != address || err != nil {
		t.Errorf("after a shim was killed: %v, %s, %v", fresh, same, err)
	}
	fresh.Close()
}

func TestRecords(t *testing.T) {
	bundle := t.TempDir()
	if o, err := readOptions(bundle); err != nil || !proto.Equal(o, &runcoptions.Options{}) {
		t.Errorf("options of a shim that died early: %v, %v", o, err)
	}
	want := &runcoptions.Options{Root: "/r", SystemdCgroup: true}
	if err := writeOptions(bundle, want); err != nil {
		t.Fatal(err)
	}
	if o, err := readOptions(bundle); err != nil || !proto.Equal(o, want) {
		t.Errorf("options came back as %v, %v", o, err)
	}
	if _, err := readExit(bundle); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an exit that was not recorded: %v", err)
	}
	exit := exitRecord{Pid: 7, Status: 137, At: time.Now().Round(0)}
	if err := writeExit(bundle, exit); err != nil {
		t.Fatal(err)
	}
	got, err := readExit(bundle)
	if err != nil || !got.At.Equal(exit.At) || got.Pid != 7 || got.Status != 137 {
		t.Errorf("exit came back as %+v, %v", got, err)
	}
	if err := os.WriteFile(filepath.Join(bundle, exitFile), []byte(`{"pid":`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readExit(bundle); err == nil || !strings.Contains(err.Error(), exitFile) {
		t.Errorf("a torn record: %v, want an error that names the file", err)
	}
	entries, err := os.ReadDir(bundle)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if want := []string{exitFile, optionsFile}; err != nil || !reflect.DeepEqual(names, want) {
		t.Errorf("the bundle holds %v, %v; want %v", names, err, want)
	}
}

func TestStateRoot(t *testing.T) {
	if got := stateRoot(&runcoptions.Options{}, "ns", "/b"); got != "/b/state" {
		t.Error(got)
	}
	if got := stateRoot(&runcoptions.Options{Root: "/r"}, "ns", "/b"); got != "/r/ns" {
		t.Error(got)
	}
}

func TestWorkDir(t *testing.T) {
	bundle, work := t.TempDir(), t.TempDir()
	if got := workDir(bundle); got != bundle {
		t.Errorf("without a link: %s, want the bundle", got)
	}
	if err := os.Symlink(work, filepath.Join(bundle, "work")); err != nil {
		t.Fatal(err)
	}
	if got := workDir(bundle); got != work {
		t.Errorf("%s, want %s", got, work)
	}
}
