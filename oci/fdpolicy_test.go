package oci

import (
	"encoding/json"
	"net/netip"
	"reflect"
	"strings"
	"testing"
)

func addr(s string) netip.AddrPort {
	if s == "" {
		return netip.AddrPort{}
	}
	return netip.MustParseAddrPort(s)
}

func TestParseFDPolicy(t *testing.T) {
	rule := func(change func(*FDRule)) FDRule {
		r := FDRule{Number: 1, Line: 1, Warn: true, Value: -1, Type: FDFile, Action: FDClose}
		change(&r)
		return r
	}
	for _, tt := range []struct {
		name, text string
		want       []FDRule
		wantErr    string
	}{
		{
			// The example of CRaC's documentation, which is not quite YAML.
			name: "CRaC's example", text: "type: file\npath: /path/to/my/file\naction: close\n---\n# Here is some comment\ntype: FILE\npath: **/*.log\naction: reopen\n",
			want: []FDRule{
				rule(func(r *FDRule) { r.Path = "/path/to/my/file" }),
				rule(func(r *FDRule) { r.Number, r.Line, r.Path, r.Action = 2, 6, "**/*.log", FDReopen }),
			},
		},
		{
			name: "all of a socket", text: "type: SOCKET\nfamily: INET4\nlocalAddress: *\nlocalport: 080\nremoteAddress: 10.0.0.1\nremotePort: '*'\nlistening: False\nwarn: false\naction: Ignore",
			want: []FDRule{rule(func(r *FDRule) {
				r.Type, r.Action, r.Warn, r.Family, r.Listening = FDSocket, FDIgnore, false, FDIPv4, "false"
				r.LocalAddress, r.LocalPort, r.RemoteAddress, r.RemotePort = "*", "80", "10.0.0.1", "*"
			})},
		},
		{
			name: "quotes and comments", text: "---\n\n---\r\n  type: file # the type\r\npath: \"/a\\tb # c\"  # d\naction:\tclose\n---\ntype: file\npath: 'it''s'\naction: close\n---\ntype: file\npath: a#b\naction: close\n---\n",
			want: []FDRule{
				rule(func(r *FDRule) { r.Line, r.Path = 4, "/a\tb # c" }),
				rule(func(r *FDRule) { r.Number, r.Line, r.Path = 2, 8, "it's" }),
				rule(func(r *FDRule) { r.Number, r.Line, r.Path = 3, 12, "a#b" }),
			},
		},
		{
			name: "a YAML list", text: "- type: pipe\n  action: error\n- type: filedescriptor\n  value: 7\n  action: close\n",
			want: []FDRule{
				rule(func(r *FDRule) { r.Type, r.Action = FDPipe, FDError }),
				rule(func(r *FDRule) { r.Number, r.Line, r.Type, r.Value = 2, 3, FDOther, 7 }),
			},
		},
		{
			name: "JSON", text: "\n[{\"type\":\"socket\",\"action\":\"close\",\n\"remotePort\":5432,\"warn\":false},\n{\"type\":\"filedescriptor\",\"action\":\"close\",\"regex\":\".*event.*\"}]\n",
			want: []FDRule{
				rule(func(r *FDRule) { r.Line, r.Type, r.RemotePort, r.Warn = 2, FDSocket, "5432", false }),
				rule(func(r *FDRule) { r.Number, r.Line, r.Type, r.Regex = 2, 4, FDOther, ".*event.*" }),
			},
		},
		{
			name: "one JSON object", text: `{"action":"reopen","type":"file","path":"{a,b}"}`,
			want: []FDRule{rule(func(r *FDRule) { r.Path, r.Action = "{a,b}", FDReopen })},
		},

		{name: "empty", text: " \n# nothing\n---\n", wantErr: "no rule"},
		{name: "empty list", text: "[]", wantErr: "no rule"},
		{name: "one word", text: "close", wantErr: `line 1: "close" is neither`},
		{name: "no space after the colon", text: "type: file\npath:/x\naction: close", wantErr: "line 2"},
		{name: "no type", text: "# a\naction: close", wantErr: "line 2 (rule 1): no type; known are file, pipe, socket and filedescriptor"},
		{name: "no action", text: "type: file\naction: close\n---\ntype: socket", wantErr: "line 4 (rule 2): no action; for the type socket there are error, ignore, close, reopen"},
		{name: "unknown type", text: "type: files\naction: close", wantErr: `line 1 (rule 1): unknown type "files"; known are`},
		{name: "unknown action", text: "type: file\naction: shut", wantErr: `line 2 (rule 1): unknown action "shut"; for the type file`},
		{name: "action of another type", text: "type: pipe\naction: reopen", wantErr: `unknown action "reopen"; for the type pipe there are error, ignore, close`},
		{name: "unknown key", text: "type: socket\nremoteprt: 1\naction: close", wantErr: `line 2 (rule 1): unknown key "remoteprt"; for the type socket there are type, action, warn, family, localAddress`},
		{name: "key of another type", text: "type: pipe\npath: /x\naction: close", wantErr: `unknown key "path"`},
		{name: "mistyped type", text: "typ: socket\naction: close", wantErr: `line 1 (rule 1): unknown key "typ"; known are type, action, warn, path, family`},
		{name: "mistyped action", text: "type: pipe\nactoin: close", wantErr: `line 2 (rule 1): unknown key "actoin"; for the type pipe there are type, action, warn`},
		{name: "key twice", text: "type: file\naction: close\ntype: pipe\naction: close", wantErr: "line 3 (rule 1): type was given on line 1; begin another rule"},
		{name: "key twice in JSON", text: `{"type":"file","action":"close","Action":"error"}`, wantErr: "was given"},
		{name: "empty value", text: "type: file\npath:\naction: close", wantErr: "line 2 (rule 1): path has no value"},
		{name: "comment for a value", text: "type: file\npath: # x\naction: close", wantErr: "path has no value"},
		{name: "open quotes", text: "type: 'file\naction: close", wantErr: "not well quoted"},
		{name: "bad escape", text: `type: "fi\le"` + "\naction: close", wantErr: "not well quoted"},
		{name: "after the quotes", text: "type: 'file' x\naction: close", wantErr: `"x" stands after`},
		{name: "unknown family", text: "type: socket\nfamily: ipx\naction: close", wantErr: `unknown family "ipx"; known are ipv4`},
		{name: "host name", text: "type: socket\nremoteAddress: db.example\naction: close", wantErr: "names of hosts"},
		{name: "port", text: "type: socket\nremotePort: 65536\naction: close", wantErr: "0 to 65535"},
		{name: "paths of ip", text: "type: socket\nlocalPath: /x\nfamily: ip\naction: close", wantErr: "no socket has both"},
		{name: "ports of unix", text: "type: socket\nlocalPort: 1\nfamily: unix\naction: close", wantErr: "no socket has both"},
		{name: "warn", text: "type: pipe\nwarn: maybe\naction: close", wantErr: "true and false"},
		{name: "listening", text: "type: socket\nlistening: 1\naction: close", wantErr: "true and false"},
		{name: "value", text: "type: filedescriptor\nvalue: -1\naction: close", wantErr: "number of a descriptor"},
		{name: "regex", text: "type: filedescriptor\nregex: (\naction: close", wantErr: "RE2"},
		{name: "regex that closes ours", text: "type: filedescriptor\nregex: a)|(b\naction: close", wantErr: "RE2"},
		{name: "lookahead", text: "type: filedescriptor\nregex: (?=a)\naction: close", wantErr: "lookaround"},
		{name: "regex too large", text: "type: filedescriptor\nregex: ((.{30}){30}){30}\naction: close", wantErr: "rule 1"},
		{name: "regexes too large together", text: strings.Repeat("type: filedescriptor\nregex: (abcdefgh){900}\naction: close\n---\n", 10), wantErr: "too large together"},
		{name: "glob without ]", text: "type: file\npath: a[b\naction: close", wantErr: "no ]"},
		{name: "glob without }", text: "type: file\npath: a{b\naction: close", wantErr: "no }"},
		{name: "nested {", text: "type: file\npath: '{a,{b}}'\naction: close", wantErr: "within"},
		{name: "trailing backslash", text: "type: file\npath: a\\\naction: close", wantErr: "nothing after"},
		{name: "slash in a set", text: "type: file\npath: a[/]\naction: close", wantErr: "cannot hold /"},
		{name: "backward range", text: "type: file\npath: a[z-a]\naction: close", wantErr: "range"},
		{name: "too long", text: strings.Repeat("#", MaxFDPolicy+1), wantErr: "at most"},
		{name: "too many", text: strings.Repeat("type: pipe\naction: error\n---\n", maxFDRules+1), wantErr: "257 rules"},
		{name: "JSON cut off", text: `[{"type":"file"`, wantErr: "unexpected EOF"},
		{name: "JSON twice", text: "{}\n{}", wantErr: "line 2: something stands after"},
		{name: "JSON list of words", text: `["close"]`, wantErr: "no object"},
		{name: "JSON nested", text: `[{"type":["file"]}]`, wantErr: "neither a string"},
		{name: "JSON null", text: `[{"type":null}]`, wantErr: "neither a string"},
		{name: "JSON without fields", text: `[{}]`, wantErr: "no type"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p, err := ParseFDPolicy([]byte(tt.text))
			if tt.wantErr != "" {
				if err == nil || !strings.Contains(err.Error(), tt.wantErr) {
					t.Fatalf("got error %v, want one with %q", err, tt.wantErr)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got := plain(p); !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got  %+v\nwant %+v", got, tt.want)
			}
		})
	}
}

// plain is a policy's rules without what was compiled of them.
func plain(p FDPolicy) (rules []FDRule) {
	for _, r := range p.Rules {
		r.path, r.localPath, r.remotePath, r.regex = nil, nil, nil, nil
		rules = append(rules, r)
	}
	return rules
}

func TestMatchFD(t *testing.T) {
	tcp := FD{Number: 5, Type: FDSocket, Family: FDIPv4, Local: addr("10.0.0.2:40000"), Remote: addr("10.0.0.9:5432"), Description: "socket: tcp"}
	listener := FD{Number: 3, Type: FDSocket, Family: FDIPv6, Local: addr("[::]:80"), Listening: true}
	mapped := FD{Number: 6, Type: FDSocket, Family: FDIPv4, Local: addr("[::ffff:10.0.0.2]:80"), Remote: addr("[::ffff:10.0.0.7]:1234")}
	unbound := FD{Number: 7, Type: FDSocket, Family: FDIPv4}
	unix := FD{Number: 8, Type: FDSocket, Family: FDUnix, LocalPath: "/run/app.sock", RemotePath: "@dbus"}
	file := FD{Number: 9, Type: FDFile, Path: "/var/log/a.log", Description: "regular: /var/log/a.log"}
	pipe := FD{Number: 10, Type: FDPipe, Description: "fifo: pipe:[7]"}
	stdout := FD{Number: 1, Type: FDPipe, Stdio: true, Description: "fifo: pipe:[8]"}
	event := FD{Number: 11, Type: FDOther, Description: "unknown: anon_inode:[eventfd]"}
	all := map[string]FD{"tcp": tcp, "listener": listener, "mapped": mapped, "unbound": unbound, "unix": unix, "file": file, "pipe": pipe, "stdout": stdout, "event": event}

	for _, tt := range []struct {
		rule string
		want string // of all, in the order of the letters
	}{
		{"type: file", "file"},
		{"type: pipe", "pipe"},
		{"type: socket", "listener mapped tcp unbound unix"},
		{"type: filedescriptor", "event"},

		{"type: socket\nfamily: ipv4", "mapped tcp unbound"},
		{"type: socket\nfamily: inet6", "listener"},
		{"type: socket\nfamily: ip", "listener mapped tcp unbound"},
		{"type: socket\nfamily: unix", "unix"},
		{"type: socket\nremotePort: 5432", "tcp"},
		{"type: socket\nremotePort: *", "mapped tcp"},
		{"type: socket\nremoteAddress: *", "mapped tcp"},
		{"type: socket\nlocalAddress: *", "listener mapped tcp"},
		{"type: socket\nlocalPort: 80", "listener mapped"},
		{"type: socket\nlocalPort: 80\nfamily: ipv4", "mapped"},
		{"type: socket\nlocalAddress: ::", "listener"},
		{"type: socket\nremoteAddress: 10.0.0.7", "mapped"},
		{"type: socket\nremoteAddress: ::ffff:10.0.0.9", "tcp"},
		{"type: socket\nremoteAddress: 10.0.0.9\nremotePort: 1", ""},
		{"type: socket\nlistening: true", "listener"},
		{"type: socket\nlistening: false", "mapped tcp unbound unix"},
		{"type: socket\nlocalPath: /run/*.sock", "unix"},
		{"type: socket\nremotePath: @*", "unix"},
		{"type: socket\nremotePath: /**", ""},

		{"type: filedescriptor\nvalue: 5", "tcp"},
		{"type: filedescriptor\nvalue: 1", "stdout"},
		{"type: filedescriptor\nregex: .*eventfd.*", "event"},
		{"type: filedescriptor\nregex: eventfd", ""}, // the whole has to match
		{"type: filedescriptor\nregex: fifo: .*\nvalue: 10", "pipe"},
	} {
		p, err := ParseFDPolicy([]byte(tt.rule + "\naction: error"))
		if err != nil {
			t.Errorf("%q: %v", tt.rule, err)
			continue
		}
		var got []string
		for _, name := range []string{"event", "file", "listener", "mapped", "pipe", "stdout", "tcp", "unbound", "unix"} {
			if _, ok := p.Match(all[name]); ok {
				got = append(got, name)
			}
		}
		if s := strings.Join(got, " "); s != tt.want {
			t.Errorf("%q matches %q, want %q", tt.rule, s, tt.want)
		}
	}
	if _, ok := (FDPolicy{}).Match(tcp); ok {
		t.Error("no policy matches")
	}
}

func TestFirstFDRuleCounts(t *testing.T) {
	p, err := ParseFDPolicy([]byte("type: socket\nremotePort: 5432\naction: close\n---\ntype: socket\naction: error"))
	if err != nil {
		t.Fatal(err)
	}
	r, ok := p.Match(FD{Type: FDSocket, Remote: addr("10.0.0.9:5432")})
	if !ok || r.Action != FDClose || r.String() != "rule 1 (line 1: type: socket, remotePort: 5432, action: close)" {
		t.Errorf("got %v, %v", r, ok)
	}
	if s := (FDRule{Number: 1, Line: 1, Type: FDFile, Action: FDError, Path: "/a\x1b[2J", Value: -1}).String(); strings.ContainsRune(s, '\x1b') {
		t.Errorf("%q would do something to a terminal", s)
	}
	r, ok = p.Match(FD{Type: FDSocket, Remote: addr("10.0.0.9:80")})
	if !ok || r.Action != FDError || r.Number != 2 || r.Line != 5 {
		t.Errorf("got %v, %v", r, ok)
	}
}

// The globs are Java's: java.nio.file.FileSystem.getPathMatcher says what they mean.
func TestFDGlobs(t *testing.T) {
	for _, tt := range []struct {
		glob, yes, no string // paths, separated by spaces
	}{
		{"*.java", "a.java .java", "a/b.java a.javac ajava"},
		{"**/*.log", "/a.log /var/log/a.log x/a.log", "a.log /a.logs"},
		{"*.{java,class}", "a.java a.class", "a.jar"},
		{"foo.?", "foo.a foo.ä", "foo. foo.ab foo./"},
		{"/home/*/*", "/home/gus/data", "/home/gus /home/gus/data/x"},
		{"/home/**", "/home/gus /home/gus/data", "/home"},
		{"[abce-g]", "a c f g", "d h /"},
		{"[!a-c]", "d", "a b c /"},
		{"[-a]", "- a", "b"},
		{"[!-a]", "b", "- a"},
		{"[]a]", "] a", "b"},
		{"[*?\\]", "* ? \\", "a"},
		{`\*\{a`, "*{a", "x{a"},
		{"a,b}", "a,b}", "a"},
		{"a.b+(c)|^$", "a.b+(c)|^$", "axb+(c)|^$"},
		{"", "", "a"},
	} {
		budget := maxFDPattern
		re, err := globPattern(tt.glob, &budget)
		if err != nil {
			t.Errorf("%q: %v", tt.glob, err)
			continue
		}
		for _, path := range strings.Fields(tt.yes) {
			if !re.MatchString(path) {
				t.Errorf("%q does not match %q", tt.glob, path)
			}
		}
		for _, path := range strings.Fields(tt.no) {
			if re.MatchString(path) {
				t.Errorf("%q matches %q", tt.glob, path)
			}
		}
	}
}

func TestFDPolicyPath(t *testing.T) {
	if name, ok := FDPolicyPath("file:/etc/p.yaml"); !ok || name != "/etc/p.yaml" {
		t.Errorf("got %q, %v", name, ok)
	}
	if _, ok := FDPolicyPath("type: file"); ok {
		t.Error("rules are taken for a path")
	}
}

func FuzzParseFDPolicy(f *testing.F) {
	f.Add([]byte("type: file\npath: **/*.log\naction: reopen\nwarn: false\n---\n- type: socket\n  family: ip\n  remotePort: 1\n  action: close"))
	f.Add([]byte(`[{"type":"filedescriptor","regex":"a.*","value":3,"action":"ignore"},{"type":"socket","localPath":"[!a-c]{d,e}","action":"error"}]`))
	f.Add([]byte("type: 'pi''pe'\naction: \"err\\u006fr\" # x"))
	f.Fuzz(func(t *testing.T, data []byte) {
		p, err := ParseFDPolicy(data)
		if err != nil {
			if len(p.Rules) > 0 {
				t.Fatalf("rules beside error %v", err)
			}
			return
		}
		if len(p.Rules) == 0 || len(p.Rules) > maxFDRules {
			t.Fatalf("%d rules", len(p.Rules))
		}
		// What was understood is written as JSON, which says the same again.
		var again []map[string]any
		for _, r := range p.Rules {
			p.Match(FD{Type: r.Type, Path: "/a/b.log", LocalPath: "x", RemotePath: "y", Description: "d", Number: 3, Local: addr("[::1]:1"), Remote: addr("1.2.3.4:5")})
			m := map[string]any{"type": r.Type, "action": r.Action, "warn": r.Warn}
			for _, f := range r.fields() {
				if f.value != "" {
					m[f.key] = f.value
				}
			}
			again = append(again, m)
		}
		text, err := json.Marshal(again)
		if err != nil || len(text) > MaxFDPolicy {
			return
		}
		q, err := ParseFDPolicy(text)
		if err != nil {
			if !strings.Contains(string(text), `\ufffd`) { // what is no UTF-8 does not survive JSON
				t.Fatalf("%s: %v", text, err)
			}
			return
		}
		for i := range p.Rules {
			a, b := plain(p)[i], plain(q)[i]
			a.Line, b.Line = 0, 0
			if !reflect.DeepEqual(a, b) && !strings.Contains(string(text), `\ufffd`) {
				t.Fatalf("%+v became %+v", a, b)
			}
		}
	})
}
