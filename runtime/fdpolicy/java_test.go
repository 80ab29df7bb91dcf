package fdpolicy

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crac-shim/crac/oci"
)

func TestJavaPolicy(t *testing.T) {
	root := t.TempDir()
	for name, text := range map[string]string{
		"work/opts": "# the rules\n-Xmx1g -Djdk.crac.resource-policies=/file\n-cp\n/a:/b\n",
		"opts":      "-Djdk.crac.resource-policies='/of the root'",
		"main":      "Main -Djdk.crac.resource-policies=/file",
	} {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const d = "-Djdk.crac.resource-policies="
	for name, tt := range map[string]struct {
		args, env []string
		want      string
	}{
		"none":            {args: []string{"java", "Main"}},
		"argument":        {args: []string{"java", d + "/etc/p.yaml", "Main"}, want: "/etc/p.yaml"},
		"the last":        {args: []string{"java", d + "/a", d + "/b"}, want: "/b"},
		"relative":        {args: []string{"java", d + "p.yaml"}, want: "/work/p.yaml"},
		"environment":     {args: []string{"run.sh"}, env: []string{"JDK_JAVA_OPTIONS=-Xmx1g " + d + "/e"}, want: "/e"},
		"arguments later": {args: []string{"java", d + "/a"}, env: []string{"JAVA_TOOL_OPTIONS=" + d + "/e"}, want: "/a"},
		"tools' options first, the JVM's last": {
			args: []string{"java", d + "/a"}, env: []string{"JAVA_TOOL_OPTIONS=" + d + "/t", "JDK_JAVA_OPTIONS=" + d + "/j", "_JAVA_OPTIONS=" + d + "/u"}, want: "/u",
		},
		"launcher's before the arguments": {args: []string{"java", d + "/a"}, env: []string{"JDK_JAVA_OPTIONS=" + d + "/j"}, want: "/a"},
		"no java":                         {args: []string{"run.sh", d + "/a"}},
		"the program's own":               {args: []string{"java", "Main", d + "/a"}},
		"of a jar":                        {args: []string{"java", d + "/a", "-jar", "x.jar", d + "/b"}, want: "/a"},
		"of a module":                     {args: []string{"java", "-m", "x/y", d + "/b"}},
		"of a module, in one":             {args: []string{"java", "--module=x/y", d + "/b"}},
		"a class path is no program":      {args: []string{"java", "-cp", "/x", d + "/a", "Main"}, want: "/a"},
		"quotes":                          {env: []string{`JDK_JAVA_OPTIONS="` + d + `/a b" -Xmx1g`}, args: []string{"x"}, want: "/a b"},
		"quotes within":                   {env: []string{`_JAVA_OPTIONS=` + d + `'/a "b"'c`}, args: []string{"x"}, want: `/a "b"c`},
		"not an option but a part of one": {env: []string{`JAVA_TOOL_OPTIONS="-Dx=y ` + d + `/a"`}, args: []string{"x"}},
		"the last variable":               {env: []string{"_JAVA_OPTIONS=" + d + "/a", "_JAVA_OPTIONS=-Xmx1g"}, args: []string{"x"}},
		"file of arguments":               {args: []string{"java", "@opts", "Main"}, want: "/file"},
		"file of the root":                {args: []string{"java", "@/opts", "Main"}, want: "/of the root"},
		"file in the environment":         {env: []string{"JDK_JAVA_OPTIONS=@/opts"}, args: []string{"x"}, want: "/of the root"},
		"no file there":                   {args: []string{"java", d + "/a", "@/none", "Main"}, want: "/a"},
		"no files":                        {args: []string{"java", "--disable-@files", "@/opts"}},
		"no file but an argument":         {args: []string{"java", "@@/opts", d + "/a"}},
		"file with the program in it":     {args: []string{"java", "@/main", d + "/a"}},
		"program's file":                  {args: []string{"java", "Main", "@/opts"}},
		"no arguments":                    {},
	} {
		if got := javaPolicy(&specs.Process{Args: tt.args, Env: tt.env, Cwd: "/work"}, root); got != tt.want {
			t.Errorf("%s: %q, want %q", name, got, tt.want)
		}
	}
}

func TestArgumentFile(t *testing.T) {
	for text, want := range map[string][]string{
		"":                                  nil,
		" \n\t":                             nil,
		"-a  -b\r\n-c":                      {"-a", "-b", "-c"},
		"# nothing\n-a # more\n-b":          {"-a", "-b"},
		`"-a b" -c'd e'f`:                   {"-a b", "-cd ef"},
		`"C:\\a\"b" C:\a`:                   {`C:\a"b`, `C:\a`},
		"\"a\\\n   b\\tc\" \"not ended\n-d": {"ab\tc", "not ended", "-d"},
		`""`:                                {""},
		`'#' "\`:                            {"#", `\`},
	} {
		if got := argumentFile(text); !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

func TestFor(t *testing.T) {
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "p"), []byte("type: file\naction: ignore\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	jvm := &specs.Process{Args: []string{"java", policyProperty + "/p"}, Cwd: "/"}
	for name, tt := range map[string]struct {
		options oci.Options
		process *specs.Process
		rules   int
		says    string
	}{
		"nothing said":        {process: jvm},
		"java":                {options: oci.Options{Java: oci.JavaAuto}, process: jvm, rules: 1},
		"java without a file": {options: oci.Options{Java: oci.JavaEnv}, process: &specs.Process{Args: []string{"java", policyProperty + "/none"}, Cwd: "/"}, says: "/none of the image"},
		"java without hooks":  {options: oci.Options{Java: oci.JavaAuto, Hooks: oci.HooksOff}, process: jvm},
		"the option's own":    {options: oci.Options{Java: oci.JavaAuto, FDPolicy: "type: file\naction: error\n---\ntype: pipe\naction: error"}, process: jvm, rules: 2},
		"no process":          {options: oci.Options{Java: oci.JavaAuto}},
	} {
		p, err := For(tt.options, tt.process, root)
		if len(p.Rules) != tt.rules || (err == nil) != (tt.says == "") || err != nil && !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v, %v", name, p, err)
		}
	}
}
