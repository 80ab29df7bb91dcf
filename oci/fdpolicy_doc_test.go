package oci

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// The documentation's example is one.
func TestFDPolicyDocumentation(t *testing.T) {
	doc, err := os.ReadFile("../docs/fd-policy.md")
	if err != nil {
		t.Fatal(err)
	}
	block := regexp.MustCompile(`(?s)\n\n((?:    [^\n]*\n)+)`).FindSubmatch(doc)
	if block == nil {
		t.Fatal("no example")
	}
	p, err := ParseFDPolicy(block[1])
	if err != nil || len(p.Rules) != 3 {
		t.Fatalf("%d rules, %v", len(p.Rules), err)
	}
	for _, key := range fdKeys("") {
		if !strings.Contains(string(doc), "`"+key+"`") {
			t.Errorf("%s is not documented", key)
		}
	}
}
