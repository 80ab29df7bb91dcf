package hook

import (
	"encoding/json"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

// FuzzAnswer: of whatever a participant says, only {"ok":true} agrees, and nothing
// that is told on can harm who reads it.
func FuzzAnswer(f *testing.F) {
	for _, seed := range []string{
		ack, `{"ok":false,"error":"pool busy"}`, `{"ok":false}`, `{"ok":null}`, `{"OK":true}`, `null`, "", "\xff\x00", "{\"ok\":false,\"error\":\"\\n\\u001b[2J\u2028\"}",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if line, err := readLine(strings.NewReader(string(data))); err == nil && len(line) > maxAnswer {
			t.Errorf("a line of %d bytes", len(line))
		}
		for name, err := range map[string]error{"answer": parseAnswer(data), "ack": parseAck(data)} {
			if err == nil {
				var a struct{ OK bool }
				if text := strings.TrimSpace(string(data)); (name != "ack" || text != "") && (json.Unmarshal(data, &a) != nil || !a.OK) {
					t.Errorf("%s %q agrees", name, data)
				}
				continue
			}
			text := err.Error()
			if text == "" || len(text) > 12*maxText || !utf8.ValidString(text) || strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
				t.Errorf("%s %q: error %q", name, data, text)
			}
		}
	})
}

func TestLastLine(t *testing.T) {
	for text, want := range map[string]string{
		"":               "",
		"\n\n":           "",
		"one":            "one",
		"one\ntwo\n\n":   "two",
		"one\r\ntwo\r\n": "two",
		strings.Repeat("x\n", maxAnswer) + "last": "last",
		strings.Repeat("x", 3*maxAnswer):          strings.Repeat("x", maxText) + "…",
	} {
		if got := lastLine([]byte(text)); got != want {
			t.Errorf("%.20q: %.20q, want %.20q", text, got, want)
		}
	}
}
