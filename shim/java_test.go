package shim

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/oci"
)

func TestJavaProcess(t *testing.T) {
	const class, compat = "-Xbootclasspath/a:/usr/lib/crac/crac.jar", "-Dorg.crac.Core.Compat=io.github.cracshim"
	for name, tt := range map[string]struct {
		mode      oci.JavaMode
		args, env []string
		wantArgs  []string // nil: it is left alone
		wantEnv   []string
	}{
		"java": {
			mode: oci.JavaAuto, args: []string{"java", "-jar", "a.jar"}, env: []string{"A=1"},
			wantArgs: []string{"java", class, compat, "-jar", "a.jar"}, wantEnv: []string{"A=1"},
		},
		"path": {
			mode: oci.JavaAuto, args: []string{"/opt/jdk/bin/java"},
			wantArgs: []string{"/opt/jdk/bin/java", class, compat},
		},
		"script":       {mode: oci.JavaAuto, args: []string{"catalina.sh", "run"}},
		"another java": {mode: oci.JavaAuto, args: []string{"javac"}},
		"environment": {
			mode: oci.JavaEnv, args: []string{"catalina.sh", "run"}, env: []string{"A=1"},
			wantArgs: []string{"catalina.sh", "run"}, wantEnv: []string{"A=1", "JDK_JAVA_OPTIONS=" + class + " " + compat},
		},
		"the environment's own options come later, and win": {
			mode: oci.JavaEnv, args: []string{"run"}, env: []string{"JDK_JAVA_OPTIONS=-Xmx1g", "B=2", "JDK_JAVA_OPTIONS=-Xmx2g"},
			wantArgs: []string{"run"}, wantEnv: []string{"B=2", "JDK_JAVA_OPTIONS=" + class + " " + compat + " -Xmx2g"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			args, env := slices.Clone(tt.args), slices.Clone(tt.env)
			of := &specs.Process{Args: args, Env: env, Cwd: "/work"}
			got := javaProcess(tt.mode, of)
			if !slices.Equal(of.Args, tt.args) || !slices.Equal(of.Env, tt.env) {
				t.Errorf("the request was changed to %q, %q", of.Args, of.Env)
			}
			if got == nil {
				if tt.wantArgs != nil {
					t.Error("it was left alone")
				}
				return
			}
			if !slices.Equal(got.Args, tt.wantArgs) || !slices.Equal(got.Env, tt.wantEnv) || got.Cwd != "/work" {
				t.Errorf("args %q, env %q, want %q, %q", got.Args, got.Env, tt.wantArgs, tt.wantEnv)
			}
		})
	}
}

func TestReadJar(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "crac.jar")
	if _, err := readFirst(filepath.Join(dir, "other"), name); err == nil || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "make install") {
		t.Errorf("error %v", err)
	}
	if err := os.WriteFile(name, []byte("jar"), 0o600); err != nil {
		t.Fatal(err)
	}
	if data, err := readFirst(filepath.Join(dir, "other"), name); err != nil || string(data) != "jar" {
		t.Errorf("%q, %v", data, err)
	}
}

// TestPutFile: an image is hostile.
func TestPutFile(t *testing.T) {
	const dir, name, content = "usr/lib/crac", "crac.jar", "the library"
	for what, tt := range map[string]struct {
		prepare func(t *testing.T, root, outside string) error
		at      string // below root; empty: refused
	}{
		"nothing there": {at: dir, prepare: func(*testing.T, string, string) error { return nil }},
		"another version": {at: dir, prepare: func(_ *testing.T, root, _ string) error {
			return write(filepath.Join(root, dir, name), "another one", 0o600)
		}},
		"the same, unreadable": {at: dir, prepare: func(_ *testing.T, root, _ string) error {
			return write(filepath.Join(root, dir, name), content, 0o600)
		}},
		"left by a failed write": {at: dir, prepare: func(_ *testing.T, root, _ string) error {
			return write(filepath.Join(root, dir, "."+name+".new"), "half", 0o600)
		}},
		"file is a link": {at: dir, prepare: func(_ *testing.T, root, outside string) error {
			return link(filepath.Join(outside, "victim"), filepath.Join(root, dir, name))
		}},
		"temporary file is a link": {at: dir, prepare: func(_ *testing.T, root, outside string) error {
			return link(filepath.Join(outside, "victim"), filepath.Join(root, dir, "."+name+".new"))
		}},
		"FIFO": {at: dir, prepare: func(_ *testing.T, root, _ string) error {
			path := filepath.Join(root, dir, name)
			return errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), unix.Mkfifo(path, 0o644))
		}},
		"directory is a link inside": {at: "real/lib/crac", prepare: func(_ *testing.T, root, _ string) error {
			return errors.Join(os.Mkdir(filepath.Join(root, "real"), 0o755), link("/real", filepath.Join(root, "usr")))
		}},
		"directory is a link outside": {prepare: func(_ *testing.T, root, outside string) error {
			return link(outside, filepath.Join(root, "usr/lib/crac"))
		}},
		"directory is a link upwards": {prepare: func(_ *testing.T, root, _ string) error {
			return link("../../../outside", filepath.Join(root, "usr/lib/crac"))
		}},
		"directory is a file": {prepare: func(_ *testing.T, root, _ string) error {
			return write(filepath.Join(root, "usr/lib/crac"), "", 0o644)
		}},
		"file is a directory": {prepare: func(_ *testing.T, root, _ string) error {
			return os.MkdirAll(filepath.Join(root, dir, name, "x"), 0o755)
		}},
	} {
		t.Run(what, func(t *testing.T) {
			top := t.TempDir()
			root, outside := filepath.Join(top, "root"), filepath.Join(top, "outside")
			if err := errors.Join(os.Mkdir(root, 0o755), os.Mkdir(outside, 0o755), write(filepath.Join(outside, "victim"), "precious", 0o644), tt.prepare(t, root, outside)); err != nil {
				t.Fatal(err)
			}
			err := putFile(root, dir, name, []byte(content))
			if (err == nil) != (tt.at != "") {
				t.Errorf("error %v", err)
			}
			if tt.at != "" {
				path := filepath.Join(root, tt.at, name)
				data, err := os.ReadFile(path)
				st, statErr := os.Lstat(path)
				if err != nil || statErr != nil || string(data) != content || st.Mode() != 0o644 {
					t.Fatalf("it is %q, %v, %v", data, st, err)
				}
				// The same again is not written again: a JVM may have it open.
				if err := putFile(root, dir, name, []byte(content)); err != nil {
					t.Fatal(err)
				}
				if again, err := os.Lstat(path); err != nil || !os.SameFile(st, again) {
					t.Errorf("it was written anew: %v", err)
				}
				if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
					t.Errorf("left beside it: %v, %v", entries, err)
				}
			}
			if entries, err := os.ReadDir(outside); err != nil || len(entries) != 1 {
				t.Errorf("written outside: %v, %v", entries, err)
			}
			if data, err := os.ReadFile(filepath.Join(outside, "victim")); err != nil || string(data) != "precious" {
				t.Errorf("the file outside is %q, %v", data, err)
			}
		})
	}
}

func write(name, content string, mode os.FileMode) error {
	return errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, []byte(content), mode))
}

func link(target, name string) error {
	return errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.Symlink(target, name))
}
