package plain

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
)

func TestPlain(t *testing.T) {
	for in, want := range map[string][2]string{ // by Line, by Writer
		"":                          {"", ""},
		"plain, ä 日本 👍 …":           {"plain, ä 日本 👍 …", "plain, ä 日本 👍 …"},
		"a\nb\tc":                   {`a\nb\tc`, "a\nb\tc"},
		"\x1b]0;title\a":            {`\u001b]0;title\u0007`, `\u001b]0;title\u0007`},
		"\r\x7f\u009b2J":            {`\u000d\u007f\u009b2J`, `\u000d\u007f\u009b2J`},
		"\x9b2J\xff":                {`\x9b2J\xff`, `\x9b2J\xff`},
		"\u202eright to left\u2028": {`\u202eright to left\u2028`, `\u202eright to left\u2028`},
		"\U000e0041":                {`\udb40\udc41`, `\udb40\udc41`},
	} {
		if got := Line(in); got != want[0] {
			t.Errorf("%q: the line %q, want %q", in, got, want[0])
		}
		var out bytes.Buffer
		if n, err := Writer(&out).Write([]byte(in)); n != len(in) || err != nil || out.String() != want[1] {
			t.Errorf("%q: wrote %q (%d, %v), want %q", in, out.String(), n, err, want[1])
		}
	}
}

// JSON says the same as before.
func TestPlainJSON(t *testing.T) {
	const text = "a\x1b\u009b\u202e\U000e0041\x7f\n\"\\"
	var out bytes.Buffer
	if err := json.NewEncoder(Writer(&out)).Encode(text); err != nil {
		t.Fatal(err)
	}
	var got string
	if err := json.Unmarshal(out.Bytes(), &got); err != nil || got != text {
		t.Errorf("%s is %q, %v", out.String(), got, err)
	}
	if strings.ContainsAny(out.String(), "\x1b\u009b\u202e\x7f") {
		t.Errorf("%q", out.String())
	}
}
