package hook

import (
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParseAdapter(t *testing.T) {
	for value, want := range map[string]string{
		`/bin/app`:                           `["/bin/app"]`,
		` app  --flag 'two words' `:          `["app","--flag","two words"]`,
		`app "a b" c\ d ''`:                  `["app","a b","c d",""]`,
		`sh -c 'a && b; c > /d | $(e) "$F"'`: `["sh","-c","a && b; c > /d | $(e) \"$F\""]`,
		`app $HOME "$HOME" # x`:              `["app","$HOME","$HOME","#","x"]`, // without a shell nothing is expanded
		`["/bin/app", "--flag", ""]`:         `["/bin/app","--flag",""]`,
		"[\"a\\nb\",\n\"<&>\"]":              `["a\nb","<&>"]`,
		`http-status`:                        `["http-status"]`,
		`signals`:                            `["signals"]`,
		`http://127.0.0.1:8080/path?a=b`:     `http://127.0.0.1:8080/path?a=b`,
		`http://localhost`:                   `http://localhost`,
		`HTTP://LOCALHOST:80/`:               `http://LOCALHOST:80/`,
		`http://[::1]:9000/x#part`:           `http://[::1]:9000/x`,
		`http://127.3.2.1/`:                  `http://127.3.2.1/`,
		`signal:SIGUSR2`:                     `signal:SIGUSR2`,
		`Signal: usr1 `:                      `signal:SIGUSR1`,
		`signal:SIGRTMIN+3`:                  `signal:SIGRTMIN+3`,
		`signal:12`:                          `signal:12`,
	} {
		a, err := ParseAdapter(value)
		if err != nil {
			t.Errorf("%s: %v", value, err)
			continue
		}
		if a.String() != want {
			t.Errorf("%s is %s, want %s", value, a, want)
		}
	}
	if a := adapter(t, "signal:usr2").(signalAdapter); a.sig != unix.SIGUSR2 {
		t.Errorf("usr2 is %v", a.sig)
	}
	for value, want := range map[string]string{
		``:                            "empty",
		" \t":                         "empty",
		"a\x00b":                      "NUL",
		`["a\u0000b"]`:                "NUL",
		`[]`:                          "names no program",
		`[""]`:                        "names no program",
		`''`:                          "names no program",
		`["a",1]`:                     "no JSON array of strings",
		`["a"] b`:                     "no JSON array of strings",
		`["a"`:                        "no JSON array of strings",
		`app 'open`:                   "not quoted as for a shell",
		`app \`:                       "not quoted as for a shell",
		`a; b`:                        `write ["sh","-c","…"]`,
		`a && b`:                      `write ["sh","-c","…"]`,
		`a > /tmp/x`:                  `write ["sh","-c","…"]`,
		`| a`:                         `write ["sh","-c","…"]`,
		`signal:`:                     `signal "" is not known`,
		`signal:SIGNOPE`:              `signal "SIGNOPE" is not known`,
		`signal:0`:                    "not known",
		`signal:65`:                   "not known",
		`signal:-1`:                   "not known",
		`signal:SIGKILL`:              "cannot be handled",
		`signal:19`:                   "cannot be handled",
		`https://localhost/`:          "only http",
		`http://10.0.0.1/`:            "must be localhost, 127.0.0.1 or [::1]",
		`http://localhost.evil.test/`: "must be localhost, 127.0.0.1 or [::1]",
		`http://0.0.0.0/`:             "must be localhost, 127.0.0.1 or [::1]",
		`http://[::1%25lo]/`:          "must be localhost, 127.0.0.1 or [::1]",
		`http:///x`:                   "must be localhost, 127.0.0.1 or [::1]",
		`http://u:p@localhost/`:       "names a user",
		`http://localhost/?a b`:       "write a space as %20",
		`http://localhost:0/`:         "the port must be",
		`http://localhost:65536/`:     "the port must be",
		`http://localhost:x/`:         "the hook's URL",
		"http://localhost/\nX: y":     "the hook's URL",
	} {
		a, err := ParseAdapter(value)
		if err == nil {
			t.Errorf("%q is %s", value, a)
			continue
		}
		wantErr(t, err, want)
	}
}

// FuzzParseAdapter: what is taken for an adapter says what it is, and reads back
// as the same.
func FuzzParseAdapter(f *testing.F) {
	for _, seed := range []string{
		`app 'a b' "c"`, `["a","b"]`, `http://localhost:1/x?y#z`, `signal:SIGUSR2`, `a;b`, "`a`", `$(a)`, `\`, "http://[::1%25lo]",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, value string) {
		a, err := ParseAdapter(value)
		if err != nil {
			if strings.ContainsAny(err.Error(), "\x00") {
				t.Errorf("%q: error %q", value, err)
			}
			return
		}
		switch a := a.(type) {
		case execAdapter:
			if len(a) == 0 || a[0] == "" || strings.ContainsRune(strings.Join(a, ""), 0) {
				t.Errorf("%q runs %q", value, a)
			}
		case signalAdapter:
			if a.sig < 1 || a.sig > 64 || a.sig == unix.SIGKILL || a.sig == unix.SIGSTOP {
				t.Errorf("%q sends %v", value, a.sig)
			}
		case httpAdapter:
			if a.url.Scheme != "http" || a.url.User != nil || strings.ContainsAny(a.url.RequestURI()+a.url.Host, " \r\n") {
				t.Errorf("%q posts to %v", value, a.url)
			}
		}
		again, err := ParseAdapter(a.String())
		if err != nil || again.String() != a.String() || reflect.TypeOf(again) != reflect.TypeOf(a) {
			t.Errorf("%q is %s, which is %v, %v", value, a, again, err)
		}
	})
}
