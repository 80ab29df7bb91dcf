package oci

import (
	"strings"
	"testing"
)

func TestDecodePolicy(t *testing.T) {
	for text, want := range map[string]string{
		`{"version":"1","signature":"require"}`:                              "",
		`{"version":"1","signature":"optional","notation":"/etc/notation"}`:  "",
		`{"version":"1","signature":"require","notation":"notation"}`:        "absolute",
		`{"version":"2","signature":"require"}`:                              `version "2"`,
		`{"signature":"require"}`:                                            `version ""`,
		`{"version":"1"}`:                                                    "known are require, optional",
		`{"version":"1","signature":"requires"}`:                             "known are require, optional",
		`{"version":"1","signature":"require","except":["evil"]}`:            "except",
		`{"version":"1","signature":"require"}{}`:                            "follows",
		`{"version":"1","signature":"require"}` + strings.Repeat(" ", 1<<16): "",
		strings.Repeat(" ", 1<<16) + `{"version":"1","signature":"require"}`: "EOF",
		"":   "EOF",
		"[]": "policy",
	} {
		p, err := DecodePolicy(strings.NewReader(text))
		if (want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), want) || err == nil && p == nil {
			t.Errorf("%.60s: %v, want %q", text, err, want)
		}
	}
}

func FuzzDecodePolicy(f *testing.F) {
	f.Add(`{"version":"1","signature":"require","notation":"/etc/notation"}`)
	f.Fuzz(func(t *testing.T, text string) {
		p, err := DecodePolicy(strings.NewReader(text))
		if err == nil && (p.Version != PolicyVersion || p.Signature != SignatureRequire && p.Signature != SignatureOptional) {
			t.Errorf("%q is taken for %+v", text, p)
		}
	})
}
