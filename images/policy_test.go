package images

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func writeFile(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const signaturesRequired = `{"version":"1","signature":"require"}`

// A verdict is good for the very files that it was given for: any that says whose signatures count
// changes the policy's digest.
func TestPolicyDigest(t *testing.T) {
	dir := t.TempDir()
	path := writeFile(t, filepath.Join(dir, "policy.json"), signaturesRequired)
	digest := func() string {
		t.Helper()
		p, err := LoadPolicy(path)
		if err != nil || p == nil {
			t.Fatalf("%v, %v", p, err)
		}
		return p.Digest()
	}
	cert := filepath.Join(dir, TrustStoreName, "x509", "ca", "shop", "ca.pem")
	seen := map[string]string{digest(): "the first"}
	for _, step := range []struct {
		what string
		do   func()
	}{
		{"a trust policy", func() { writeFile(t, filepath.Join(dir, TrustPolicyName), "{}") }},
		{"another trust policy", func() { writeFile(t, filepath.Join(dir, TrustPolicyName), "{ }") }},
		{"a certificate", func() { writeFile(t, cert, "one") }},
		{"another certificate", func() { writeFile(t, cert, "two") }},
		{"a certificate in another store", func() {
			if err := os.Rename(filepath.Join(dir, TrustStoreName, "x509", "ca", "shop"), filepath.Join(dir, TrustStoreName, "x509", "ca", "other")); err != nil {
				t.Fatal(err)
			}
		}},
		{"other words", func() { writeFile(t, path, signaturesRequired+"\n") }},
	} {
		step.do()
		d := digest()
		if before := seen[d]; before != "" {
			t.Errorf("after %s the policy is still %s", step.what, before)
		}
		if d != digest() {
			t.Errorf("after %s the policy is another one each time", step.what)
		}
		seen[d] = step.what
	}
}

func TestPolicyThatDecidesNothing(t *testing.T) {
	if p, err := LoadPolicy(filepath.Join(t.TempDir(), "policy.json")); p != nil || err != nil {
		t.Errorf("no policy: %v, %v", p, err)
	}
	for name, tt := range map[string]struct {
		text, want string
		spoil      func(dir string) error
	}{
		"mistyped":     {text: `{"version":"1","signature":"required"}`, want: "known are require, optional"},
		"anybody's":    {text: signaturesRequired, want: "chmod go-w", spoil: func(dir string) error { return os.Chmod(filepath.Join(dir, "policy.json"), 0o666) }},
		"in anybody's": {text: signaturesRequired, want: "chmod go-w", spoil: func(dir string) error { return os.Chmod(dir, 0o777) }},
		"a link":       {text: signaturesRequired, want: "policy.json is a link", spoil: func(dir string) error { return behindLink(filepath.Join(dir, "policy.json")) }},
		"a link to nowhere": {text: signaturesRequired, want: "policy.json is a link", spoil: func(dir string) error {
			path := filepath.Join(dir, "policy.json")
			return errors.Join(os.Remove(path), os.Symlink(path+".gone", path))
		}},
		"trust by a link": {text: signaturesRequired, want: TrustPolicyName + " is a link", spoil: func(dir string) error { return behindLink(filepath.Join(dir, TrustPolicyName)) }},
		"a linked store":  {text: signaturesRequired, want: TrustStoreName + " is a link", spoil: func(dir string) error { return behindLink(filepath.Join(dir, TrustStoreName)) }},
		"a linked certificate": {text: signaturesRequired, want: "ca.pem is a link", spoil: func(dir string) error {
			return behindLink(filepath.Join(dir, TrustStoreName, "x509", "ca", "shop", "ca.pem"))
		}},
		"a linked directory": {text: `{"version":"1","signature":"require","notation":"/none"}`, want: "notation is a link", spoil: func(dir string) error {
			path := filepath.Join(dir, "notation")
			if err := os.Mkdir(path, 0o700); err != nil {
				return err
			}
			data := strings.Replace(signaturesRequired, "}", fmt.Sprintf(`,"notation":%q}`, path), 1)
			return errors.Join(behindLink(path), os.WriteFile(filepath.Join(dir, "policy.json"), []byte(data), 0o600))
		}},
		"anybody's trust": {text: signaturesRequired, want: TrustPolicyName + " can be written", spoil: func(dir string) error { return os.Chmod(filepath.Join(dir, TrustPolicyName), 0o622) }},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := writeFile(t, filepath.Join(dir, "policy.json"), tt.text)
			writeFile(t, filepath.Join(dir, TrustPolicyName), "{}")
			writeFile(t, filepath.Join(dir, TrustStoreName, "x509", "ca", "shop", "ca.pem"), "one")
			if tt.spoil != nil {
				if err := tt.spoil(dir); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := LoadPolicy(path); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}

// behindLink puts a link in a file's place, to where anybody could write it.
func behindLink(path string) error {
	target := path + ".elsewhere"
	return errors.Join(os.Rename(path, target), os.Symlink(target, path))
}

func TestVerdicts(t *testing.T) {
	layer := t.TempDir()
	p := &Policy{digest: "p"}
	key := func(p *Policy, manifest string, layers ...string) string {
		t.Helper()
		k, err := p.Key(&Checkpoint{digest: manifest}, layers)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	first := key(p, "m", layer)
	if first != key(p, "m", layer) {
		t.Error("another key for the same")
	}
	for what, k := range map[string]string{
		"policy": key(&Policy{digest: "q"}, "m", layer), "checkpoint": key(p, "n", layer), "layers": key(p, "m", layer, layer),
		"directory": func() string {
			// As when a snapshot was removed and another one has its place.
			if err := os.Rename(layer, layer+".old"); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(layer, 0o700); err != nil {
				t.Fatal(err)
			}
			return key(p, "m", layer)
		}(),
	} {
		if k == first {
			t.Errorf("the same key for another %s", what)
		}
	}
	if _, err := p.Key(&Checkpoint{digest: "m"}, []string{layer + ".gone"}); err == nil {
		t.Error("a layer that is gone has a key")
	}

	now := time.Now()
	v := Verdicts(filepath.Join(t.TempDir(), "verdicts"))
	good := &Verdict{Allowed: true, Reason: "signed", Until: now.Add(time.Hour)}
	if v.Recall(first, now) != nil {
		t.Error("a verdict out of nothing")
	}
	for _, verdict := range []*Verdict{good, {Reason: "unsigned", Until: now.Add(time.Hour)}} {
		if err := v.Remember(map[bool]string{true: first, false: "no"}[verdict.Allowed], verdict); err != nil {
			t.Fatal(err)
		}
	}
	if got := v.Recall(first, now); got == nil || got.Reason != "signed" {
		t.Errorf("recalled %+v", got)
	}
	if v.Recall("no", now) != nil {
		t.Error("a refusal is remembered")
	}
	if v.Recall(first, now.Add(2*time.Hour)) != nil {
		t.Error("it is good for ever")
	}
	if st, err := os.Stat(string(v)); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", st, err)
	}
	// What somebody else can write is not believed.
	if err := os.Chmod(string(v), 0o777); err != nil {
		t.Fatal(err)
	}
	if v.Recall(first, now) != nil {
		t.Error("a directory that anybody can write is believed")
	}
	if err := v.Remember(first, good); err == nil || !strings.Contains(err.Error(), "remove it") {
		t.Errorf("remembered there: %v", err)
	}
	if Verdicts("").Recall(first, now) != nil || Verdicts("").Remember(first, good) != nil {
		t.Error("nowhere is somewhere")
	}
}

func TestLayers(t *testing.T) {
	got, err := Layers([]Mount{
		{Type: "overlay", Options: []string{"workdir=/w", "upperdir=/u", "lowerdir=/b\\:1:/a"}}, {Type: "bind", Source: "/c"},
	})
	if err != nil || strings.Join(got, " ") != "/b:1 /a /c" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := Layers([]Mount{{Type: "overlay"}}); err == nil {
		t.Error("an overlay of nothing")
	}
}

// A node without a policy pays for one look.
func BenchmarkNoPolicy(b *testing.B) {
	path := filepath.Join(b.TempDir(), "policy.json")
	for b.Loop() {
		if p, err := LoadPolicy(path); p != nil || err != nil {
			b.Fatal(p, err)
		}
	}
}
