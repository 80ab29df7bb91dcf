package oci

import (
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestParseOptions(t *testing.T) {
	defaults := Options{
		Restore: "auto", Memory: "auto", TCP: "close", Hooks: "optional", HookTimeout: 10 * time.Second,
		CheckpointAllow: "none", CheckpointPreDump: "auto", CheckpointWhen: "asked", Java: "off",
	}
	with := func(change func(*Options)) Options {
		o := defaults
		change(&o)
		return o
	}
	p := func(s string) string { return AnnotationPrefix + s }
	for _, tt := range []struct {
		name        string
		annotations map[string]string
		env         []string
		want        Options
		wantErr     string // a part of it
	}{
		{name: "nothing", want: defaults},
		{
			name: "other annotations and variables", annotations: map[string]string{"io.kubernetes.pod": "x", "io.containerd.cracker": "y"},
			env: []string{"CRAC_DIR=/run/crac", "CRAC_WHATEVER=1", "PATH=/bin", "CRAC_RESTORE"}, want: defaults,
		},
		{
			name: "annotation", annotations: map[string]string{p("restore"): "require", p("tcp"): "close"},
			want: with(func(o *Options) { o.Restore, o.TCP = RestoreRequire, TCPClose }),
		},
		{
			name: "environment", env: []string{"CRAC_CHECKPOINT_EXIT=true", "CRAC_FD_POLICY=type: socket\naction: close", "CRAC_HOOK_TIMEOUT=1m"},
			want: with(func(o *Options) {
				o.CheckpointExit, o.FDPolicy, o.HookTimeout = true, "type: socket\naction: close", time.Minute
			}),
		},
		{
			name: "an image does not choose for the operator",
			env:  []string{"CRAC_CHECKPOINT_IMAGE=docker.io/library/nginx:latest", "CRAC_CHECKPOINT_ALLOW=workload", "CRAC_CHECKPOINT_PUSH=true", "CRAC_CHECKPOINT_WHEN=ready"}, want: defaults,
		},
		{
			name: "where an image goes, and how", annotations: map[string]string{p("checkpoint.push"): "true", p("checkpoint.compression"): "gzip", p("checkpoint.index"): "true", p("checkpoint.pre-dump"): "off"},
			want: with(func(o *Options) {
				o.CheckpointPush, o.CheckpointIndex, o.CheckpointCompression, o.CheckpointPreDump = true, true, CompressionGzip, PreDumpOff
			}),
		},
		{name: "java", env: []string{"CRAC_JAVA=env"}, annotations: map[string]string{p("java"): "auto"}, want: with(func(o *Options) { o.Java = JavaAuto })},
		{name: "java of an image", env: []string{"CRAC_JAVA=env"}, want: with(func(o *Options) { o.Java = JavaEnv })},
		{
			name: "annotation wins", annotations: map[string]string{p("memory"): "eager"}, env: []string{"CRAC_MEMORY=lazy"},
			want: with(func(o *Options) { o.Memory = MemoryEager }),
		},
		{
			name: "annotation wins over a bad variable", annotations: map[string]string{p("memory"): "eager"}, env: []string{"CRAC_MEMORY=nonsense"},
			want: with(func(o *Options) { o.Memory = MemoryEager }),
		},
		{
			name: "the last variable counts", env: []string{"CRAC_TCP=close", "CRAC_TCP=established"},
			want: with(func(o *Options) { o.TCP = TCPEstablished }),
		},
		{
			name: "policy in the image", env: []string{"CRAC_FD_POLICY=file:/etc/crac/policy.yaml"},
			want: with(func(o *Options) { o.FDPolicy = "file:/etc/crac/policy.yaml" }),
		},
		{name: "facts on an image are no options", annotations: map[string]string{AnnotationPageSize: "4096", LayerAnnotation: "checkpoint"}, want: defaults},
		{
			name: "all hooks", annotations: map[string]string{p("hooks"): "required", p("hook.before-checkpoint"): "/a b", p("hook.after-restore"): "http://x", p("hook.after-resume"): "USR1", p("checkpoint.allow"): "workload"},
			want: with(func(o *Options) {
				o.Hooks, o.HookBeforeCheckpoint, o.HookAfterRestore, o.HookAfterResume, o.CheckpointAllow = "required", "/a b", "http://x", "USR1", "workload"
			}),
		},
		{
			name: "when ready", annotations: map[string]string{p("checkpoint.when"): "ready", p("checkpoint.image"): "app:warm"}, env: []string{"CRAC_CHECKPOINT_PROBE=http://localhost/", "CRAC_CHECKPOINT_WARMUP=20"},
			want: with(func(o *Options) {
				o.CheckpointWhen, o.CheckpointImage, o.CheckpointProbe, o.CheckpointWarmup = "ready", "app:warm", "http://localhost/", 20
			}),
		},
		{name: "ready without a probe", annotations: map[string]string{p("checkpoint.when"): "ready", p("checkpoint.image"): "app:warm"}, wantErr: "checkpoint.probe"},
		{name: "ready without an image", annotations: map[string]string{p("checkpoint.when"): "ready", p("checkpoint.probe"): "true"}, wantErr: "checkpoint.image"},
		{name: "warm-up out of range", annotations: map[string]string{p("checkpoint.warmup"): "-1"}, wantErr: "a number of requests"},
		{name: "warm-up that is no number", annotations: map[string]string{p("checkpoint.warmup"): "many"}, wantErr: "a number of requests"},

		{name: "unknown key", annotations: map[string]string{p("restor"): "auto"}, wantErr: p("checkpoint.image")},
		{name: "unknown key is named", annotations: map[string]string{p("restor"): "auto"}, wantErr: `"io.containerd.crac.restor"`},
		{name: "prefix alone", annotations: map[string]string{AnnotationPrefix: ""}, wantErr: "no option"},
		{name: "unknown value lists the known", annotations: map[string]string{p("restore"): "maybe"}, wantErr: "auto, require, never"},
		{name: "bad variable is named", env: []string{"CRAC_RESTORE=maybe"}, wantErr: "environment variable CRAC_RESTORE"},
		{name: "empty value", annotations: map[string]string{p("restore"): ""}, wantErr: `value ""`},
		{name: "empty image", annotations: map[string]string{p("checkpoint.image"): " "}, wantErr: "an image name"},
		{name: "image name with a space", annotations: map[string]string{p("checkpoint.image"): "a b"}, wantErr: "' '"},
		{name: "recipients", annotations: map[string]string{p("checkpoint.encrypt-to"): "jwe:/k.pem, pgp:ops@example.org"}, want: with(func(o *Options) {
			o.CheckpointEncryptTo = []string{"jwe:/k.pem", "pgp:ops@example.org"}
		})},
		{name: "recipients of the image's choice", env: []string{"CRAC_CHECKPOINT_ENCRYPT_TO=jwe:/k.pem"}, want: defaults},
		{name: "a recipient somewhere", annotations: map[string]string{p("checkpoint.encrypt-to"): "jwe:k.pem"}, wantErr: "absolute"},
		{name: "no recipient", annotations: map[string]string{p("checkpoint.encrypt-to"): "jwe:/k.pem,"}, wantErr: "PUBLIC-KEY-FILE"},
		{name: "nobody and somebody", annotations: map[string]string{p("checkpoint.encrypt-to"): "none,jwe:/k.pem"}, wantErr: "goes with no other"},
		{name: "unknown compression", annotations: map[string]string{p("checkpoint.compression"): "lz4"}, wantErr: "zstd, gzip"},
		{name: "bad pre-dump", annotations: map[string]string{p("checkpoint.pre-dump"): "always"}, wantErr: "auto, require, off"},
		{name: "bad push", annotations: map[string]string{p("checkpoint.push"): "later"}, wantErr: "true, false"},
		{name: "bad bool", annotations: map[string]string{p("checkpoint.exit"): "yes"}, wantErr: "true, false"},
		{name: "bad duration", annotations: map[string]string{p("hook.timeout"): "10"}, wantErr: "a duration"},
		{name: "bad policy", annotations: map[string]string{p("fd-policy"): "type: socket\naction: shut"}, wantErr: `unknown action "shut"`},
		{name: "policy of a relative path", env: []string{"CRAC_FD_POLICY=file:policy.yaml"}, wantErr: "absolute"},
		{name: "policy that climbs", env: []string{"CRAC_FD_POLICY=file:/a/../../b"}, wantErr: "clean"},
		{name: "long policy in a short message", annotations: map[string]string{p("fd-policy"): strings.Repeat("x", 1000)}, wantErr: `xxx" (`},
		{name: "no duration", annotations: map[string]string{p("hook.timeout"): "0s"}, wantErr: "longer than 0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseOptions(tt.annotations, tt.env)
			if tt.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), tt.wantErr) {
					t.Fatalf("got error %v, want one with %q", err, tt.wantErr)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got  %+v\nwant %+v", got, tt.want)
			}
		})
	}
}

func TestCheckRef(t *testing.T) {
	for ref, ok := range map[string]bool{
		"app:warm": true, "registry.example:5000/a/b_c-d/e:v1.2+x": true, "[::1]:5000/a@sha256:" + strings.Repeat("0", 64): true,
		"": false, "a b": false, "a\n": false, "a\x1b[0m": false, "ä": false, "$(x)": false, strings.Repeat("a", 1000): false,
	} {
		if err := CheckRef(ref); (err == nil) != ok {
			t.Errorf("%q: %v", ref, err)
		}
	}
}

func TestCheckPushRef(t *testing.T) {
	for ref, want := range map[string]string{
		"registry.example/app:warm":          "",
		"localhost/app:warm":                 "",
		"localhost:5000/a/b:1":               "",
		"[::1]:5000/a:1":                     "",
		"docker.io/library/app:1":            "",
		"app:warm":                           "no registry",
		"library/app:warm":                   "no registry",
		"registry.example/app":               "no tag",
		"registry.example:5000/app":          "no tag",
		"registry.example/app:":              "such as registry.example/app:warm",
		"registry.example/a:1@sha256:abcdef": "digest",
		"registry.example/a:1 ":              "holds",
		"":                                   "empty",
	} {
		err := CheckPushRef(ref)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: got %v, want an error with %q", ref, err, want)
		}
	}
}

func TestEnvName(t *testing.T) {
	seen := make(map[string]string)
	for _, k := range knownOptions() {
		name := envName(k.key)
		if other, ok := seen[name]; ok {
			t.Errorf("%s and %s share the variable %s", k.key, other, name)
		}
		if name == "CRAC_DIR" {
			t.Errorf("%s takes the variable that names the hooks' directory", k.key)
		}
		seen[name] = k.key
	}
}

func FuzzParseOptions(f *testing.F) {
	f.Add("restore", "require", "CRAC_MEMORY=lazy")
	f.Add("hook.timeout", "-9223372036854775808ns", "CRAC_HOOK_TIMEOUT=1h")
	f.Add("image.page-size", "", "CRAC_=")
	f.Fuzz(func(t *testing.T, key, value, env string) {
		o, err := ParseOptions(map[string]string{AnnotationPrefix + key: value}, []string{env})
		if err != nil {
			if !reflect.DeepEqual(o, Options{}) {
				t.Fatalf("options %+v beside error %v", o, err)
			}
			return
		}
		// What is accepted must be one of the documented values.
		if !slices.Contains([]RestoreMode{RestoreAuto, RestoreRequire, RestoreNever}, o.Restore) ||
			!slices.Contains([]MemoryMode{MemoryAuto, MemoryLazy, MemoryEager}, o.Memory) ||
			!slices.Contains([]TCPMode{TCPError, TCPClose, TCPEstablished}, o.TCP) ||
			!slices.Contains([]HooksMode{HooksOptional, HooksOff, HooksRequired}, o.Hooks) ||
			o.HookTimeout <= 0 {
			t.Fatalf("accepted %+v", o)
		}
	})
}

func TestBringsJava(t *testing.T) {
	for _, tt := range []struct {
		java  JavaMode
		hooks HooksMode
		want  bool
	}{
		{"", "", false},
		{JavaOff, HooksOptional, false},
		{JavaAuto, HooksOptional, true},
		{JavaEnv, HooksRequired, true},
		{JavaAuto, HooksOff, false},
	} {
		if got := (Options{Java: tt.java, Hooks: tt.hooks}).BringsJava(); got != tt.want {
			t.Errorf("java=%s hooks=%s: %v", tt.java, tt.hooks, got)
		}
	}
}
