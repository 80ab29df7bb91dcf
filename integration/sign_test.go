package integration

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/crac-shim/crac/integration/harness"
)

// signer has a key, and a certificate by an authority of its own.
type signer struct{ key, cert, authority string }

func newSigner(t *harness.T, name string) signer {
	t.Helper()
	dir, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	s := signer{filepath.Join(dir, "key.pem"), filepath.Join(dir, "chain.pem"), filepath.Join(dir, "ca.pem")}
	template := func(cn string, usage x509.KeyUsage) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: cn, Organization: []string{"shop"}, Country: []string{"AQ"}, Province: []string{"Ross"}},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: usage, BasicConstraintsValid: true,
		}
	}
	newKey := func() *ecdsa.PrivateKey {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	caKey, key := newKey(), newKey()
	ca, leaf := template(name+" authority", x509.KeyUsageCertSign), template(name, x509.KeyUsageDigitalSignature)
	ca.IsCA = true
	leaf.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}
	sign := func(c *x509.Certificate, public *ecdsa.PublicKey) []byte {
		der, err := x509.CreateCertificate(rand.Reader, c, ca, public, caKey)
		if err != nil {
			t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	}
	caPEM, leafPEM := sign(ca, &caKey.PublicKey), sign(leaf, &key.PublicKey)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, data := range map[string][]byte{s.key: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), s.cert: append(leafPEM, caPEM...), s.authority: caPEM} {
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// trusts makes a node require signatures, by one authority.
func trusts(t *harness.T, s signer) {
	t.Helper()
	dir, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	store := filepath.Join(dir, "truststore", "x509", "ca", "shop")
	if err := os.MkdirAll(store, 0o700); err != nil {
		t.Fatal(err)
	}
	authority, err := os.ReadFile(s.authority)
	if err != nil {
		t.Fatal(err)
	}
	for file, text := range map[string]string{
		filepath.Join(store, "ca.pem"): string(authority),
		filepath.Join(dir, "trustpolicy.json"): `{"version": "1.0", "trustPolicies": [{"name": "all", "registryScopes": ["*"],
			"signatureVerification": {"level": "strict"}, "trustStores": ["ca:shop"], "trustedIdentities": ["*"]}]}`,
		t.PolicyPath(): fmt.Sprintf(`{"version": "1", "signature": "require", "notation": %q}`, dir),
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { _ = os.Remove(t.PolicyPath()) })
}

// A node with a policy restores what somebody that it trusts has signed, and nothing else.
func TestSignedCheckpoint(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	host, err := registryHost()
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := newSigner(t, "our builds"), newSigner(t, "somebody")
	image, other := host+"/signed/app:warm", host+"/signed/app:other"
	b := start(t, ticker())
	b.waitTicks(3)
	t.CracctlOK("checkpoint", b.id, other)
	b.waitTicks(3)
	t.CracctlOK("checkpoint", "--push", "--exit", b.id, image)
	last := b.lastTick()
	b.remove()

	// Without a policy a signature is nobody's business.
	start(t, warm(image)).goesOnFrom(last)

	trusts(t, ours)
	asked := func() int { return strings.Count(t.Daemon.Log(), "the node's policy allows it") }
	refused := func(what, image string, want ...string) {
		t.Helper()
		c, err := tryStart(t, warm(image))
		if err == nil {
			t.Errorf("%s: %s is restored", what, c.id)
			return
		}
		for _, w := range append(want, "policy") {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %v, want %q", what, err, w)
			}
		}
	}
	allowed := func(image string) *box {
		t.Helper()
		b := start(t, warm(image))
		b.goesOnFrom(last)
		return b
	}

	refused("unsigned", image, "no signature is associated", "cracctl sign")
	// Whoever asks before is told the same, though only containerd's environment names the policy.
	verify := t.Command(t.Ctx, "cracctl", "verify", image)
	verify.Env = slices.DeleteFunc(verify.Env, func(v string) bool { return strings.HasPrefix(v, "CRAC_POLICY=") })
	v, err := harness.Run(t.Ctx, verify)
	if err == nil || !strings.Contains(v, "the node's policy refuses it: no signature of "+image) {
		t.Errorf("verify says %q, %v", v, err)
	}
	t.CracctlOK("sign", "--key", theirs.key, "--cert", theirs.cert, image)
	refused("signed by somebody", image, "does not contain any trusted certificate")

	// Where a restore is not required, the start is cold and says why.
	cold := watch(t, "/crac/cold-start")
	c := start(t, how{image: image, args: ticker().args})
	if f := cold.of(c.id); f["code"] != "policy" || !strings.Contains(fmt.Sprint(f["reason"]), "the node's policy refuses it") {
		t.Errorf("the event says: %v", f)
	}
	c.goesOnFrom(0)

	// Ours beside theirs; the second start needs no second verdict.
	t.CracctlOK("sign", "--push", "--key", ours.key, "--cert", ours.cert, image)
	before := asked()
	allowed(image)
	t.Eventually("the log tells that the policy was asked", func() bool { return asked() == before+1 })
	allowed(image).remove() // what its shim had to log has arrived
	if n := asked() - before; n != 1 {
		t.Errorf("the policy was asked %d times for two starts", n)
	}
	if v := t.CracctlOK("verify", image); !strings.Contains(v, "the node's policy allows it: signed by CN=our builds") {
		t.Errorf("verify says %q", v)
	}

	// On a node that has just pulled it the signature comes from the registry.
	t.CtrOK("images", "delete", "--sync", image)
	t.CtrOK("images", "pull", "--plain-http", image)
	allowed(image)

	// A name that was moved to a signed image makes nothing else of the container.
	moved := newBox(t, newID(t))
	t.CtrOK(append([]string{"containers", "create", "--runtime", testRuntime, option("restore", "require"), other, moved.id}, ticker().args...)...)
	t.CtrOK("images", "tag", "--force", image, other)
	if _, err := t.Ctr(t.Ctx, "tasks", "start", "--detach", moved.id); err == nil || !strings.Contains(err.Error(), "means") || !strings.Contains(err.Error(), "policy refuses") {
		t.Errorf("a name that was moved: %v", err)
	}

	// Whom a node trusts counts at the next start.
	trusts(t, theirs)
	allowed(image)
	trusts(t, newSigner(t, "nobody"))
	refused("another policy", image, "trusted certificate")
	if err := os.Chmod(t.PolicyPath(), 0o666); err != nil { //nolint:gosec // what is tested
		t.Fatal(err)
	}
	refused("a policy that anybody can write", image, "written by others")
}
