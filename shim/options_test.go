package shim

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
)

func TestRuntimeOptions(t *testing.T) {
	file := filepath.Join(t.TempDir(), "options.toml")
	if err := os.WriteFile(file, []byte("Root = '/from/file'\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	toml := func(body string) *runtimeoptions.Options { return &runtimeoptions.Options{ConfigBody: []byte(body)} }
	all := &runcoptions.Options{NoPivotRoot: true, NoNewKeyring: true, ShimCgroup: "/c", IoUid: 1, IoGid: 2, Root: "/r", SystemdCgroup: true, CriuImagePath: "/i", CriuWorkPath: "/w"}
	for name, tt := range map[string]struct {
		options proto.Message
		want    *runcoptions.Options
		says    string
	}{
		"runc's":          {all, all, ""},
		"a binary's name": {&runcoptions.Options{BinaryName: "/usr/bin/runc"}, nil, `BinaryName="/usr/bin/runc"`},
		"generic, all keys": {
			toml("NoPivotRoot=true\nNoNewKeyring=true\nShimCgroup='/c'\nIoUid=1\nIoGid=2\nRoot='/r'\nSystemdCgroup=true\nCriuImagePath='/i'\nCriuWorkPath='/w'\n"), all, "",
		},
		"generic, the envelope's keys": {toml("TypeUrl='x'\nConfigPath='y'\nConfigBody='z'\nRoot='/r'"), &runcoptions.Options{Root: "/r"}, ""},
		"generic, nothing in it":       {&runtimeoptions.Options{TypeUrl: "x"}, &runcoptions.Options{}, ""},
		"generic, a file":              {&runtimeoptions.Options{ConfigPath: file}, &runcoptions.Options{Root: "/from/file"}, ""},
		"generic, body before file":    {&runtimeoptions.Options{ConfigPath: file, ConfigBody: []byte("Root='/body'")}, &runcoptions.Options{Root: "/body"}, ""},
		"generic, no such file":        {&runtimeoptions.Options{ConfigPath: file + "x"}, nil, file + "x"},
		"generic, unknown key":         {toml("Root='/r'\nRoots='/r'"), nil, "Roots"},
		"generic, wrong type":          {toml("SystemdCgroup='yes'"), nil, "runtime options"},
		"generic, no TOML":             {toml("{"), nil, "runtime options"},
		"generic, a binary's name":     {toml("BinaryName='x'"), nil, `BinaryName="x"`},
		"another type":                 {durationpb.New(1), nil, "google.protobuf.Duration"},
	} {
		t.Run(name, func(t *testing.T) {
			asked, err := typeurl.MarshalAnyToProto(tt.options)
			if err != nil {
				t.Fatal(err)
			}
			got, err := runtimeOptions(asked)
			if tt.says != "" {
				if err == nil || !strings.Contains(err.Error(), tt.says) {
					t.Fatalf("got %v, %v; want an error that says %q", got, err, tt.says)
				}
				if !errors.Is(err, errdefs.ErrInvalidArgument) && !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%v has no class", err)
				}
				return
			}
			if err != nil || !proto.Equal(got, tt.want) {
				t.Errorf("got  %v, %v\nwant %v", got, err, tt.want)
			}
		})
	}
	for name, none := range map[string]*anypb.Any{"nil": nil, "empty": {}, "a type alone": {TypeUrl: "runc.Options"}} {
		if got, err := runtimeOptions(none); err != nil || !proto.Equal(got, &runcoptions.Options{}) {
			t.Errorf("%s: %v, %v; want the zero options", name, got, err)
		}
	}
	_, err := runtimeOptions(&anypb.Any{TypeUrl: "no.such/Type", Value: []byte("x")})
	if !errors.Is(err, errdefs.ErrInvalidArgument) || !strings.Contains(err.Error(), "no.such/Type") {
		t.Errorf("an unknown type: %v, want an error that names it", err)
	}
}

func FuzzRuntimeOptions(f *testing.F) {
	for _, m := range []proto.Message{&runcoptions.Options{Root: "/r"}, &runtimeoptions.Options{ConfigBody: []byte("Root='/r'")}, &runtimeoptions.Options{ConfigBody: []byte("[[")}} {
		a, err := typeurl.MarshalAnyToProto(m)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(a.TypeUrl, a.Value)
	}
	f.Fuzz(func(t *testing.T, url string, value []byte) {
		var generic runtimeoptions.Options
		if proto.Unmarshal(value, &generic) == nil && generic.ConfigPath != "" {
			t.Skip("it would read a file of the host")
		}
		o, err := runtimeOptions(&anypb.Any{TypeUrl: url, Value: value})
		if (o == nil) == (err == nil) {
			t.Errorf("%v, %v", o, err)
		}
		if o != nil && o.BinaryName != "" {
			t.Errorf("BinaryName %q got through", o.BinaryName)
		}
	})
}
