package crypt

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// keyPair writes a key of its own and returns the names of its files.
func keyPair(t *testing.T) (private, public string) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name, kind string, der []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	return write("key.pem", "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(key)), write("pub.pem", "PUBLIC KEY", der)
}

func seal(t *testing.T, plain []byte, to ...string) ([]byte, ocispec.Descriptor) {
	t.Helper()
	r, err := ParseRecipients(to)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	w, err := r.Encrypt(&out)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(w, bytes.NewReader(plain)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	annotations, err := w.Annotations()
	if err != nil {
		t.Fatal(err)
	}
	return out.Bytes(), ocispec.Descriptor{MediaType: EncryptedType(ocispec.MediaTypeImageLayerGzip), Annotations: annotations}
}

func open(t *testing.T, sealed []byte, desc ocispec.Descriptor, keys ...string) ([]byte, error) {
	t.Helper()
	k, err := ParseKeys(keys)
	if err != nil {
		t.Fatal(err)
	}
	r, err := k.Decrypt(bytes.NewReader(sealed), desc)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(r)
}

func TestEachRecipientReads(t *testing.T) {
	first, firstPublic := keyPair(t)
	second, secondPublic := keyPair(t)
	other, _ := keyPair(t)
	plain := bytes.Repeat([]byte("the password is hunter2\n"), 10000)
	sealed, desc := seal(t, plain, "jwe:"+firstPublic, "jwe:"+secondPublic)
	if bytes.Contains(sealed, []byte("hunter2")) {
		t.Error("it is not encrypted")
	}
	for _, key := range []string{first, second} {
		if got, err := open(t, sealed, desc, key); err != nil || !bytes.Equal(got, plain) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	}
	for name, keys := range map[string][]string{"another key": {other}, "no key": nil} {
		_, err := open(t, sealed, desc, keys...)
		if !errors.Is(err, ErrEncrypted) || !strings.Contains(err.Error(), "[jwe]") {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Each layer has a key of its own.
	if again, _ := seal(t, plain, "jwe:"+firstPublic); bytes.Equal(again, sealed) {
		t.Error("the same bytes twice")
	}
	sealed[len(sealed)/2] ^= 1
	if _, err := open(t, sealed, desc, first); err == nil {
		t.Error("a changed layer is decrypted without a word")
	}
}

// A layer is passed on as it is: those who get it read it, and those who had it are not named
// any more.
func TestPass(t *testing.T) {
	first, firstPublic := keyPair(t)
	second, secondPublic := keyPair(t)
	third, thirdPublic := keyPair(t)
	plain := []byte("the password is hunter2\n")
	sealed, desc := seal(t, plain, "jwe:"+firstPublic)
	to, err := ParseRecipients([]string{"jwe:" + secondPublic, "jwe:" + thirdPublic})
	if err != nil {
		t.Fatal(err)
	}
	for name, keys := range map[string][]string{"another key": {second}, "no key": nil} {
		k, err := ParseKeys(keys)
		if err != nil {
			t.Fatal(err)
		}
		if err := k.Fit(desc); !errors.Is(err, ErrEncrypted) {
			t.Errorf("%s fits: %v", name, err)
		}
		if _, err := k.Pass(desc, to); !errors.Is(err, ErrEncrypted) {
			t.Errorf("%s passes it on: %v", name, err)
		}
	}
	k, err := ParseKeys([]string{second, first})
	if err != nil {
		t.Fatal(err)
	}
	if err := k.Fit(desc); err != nil {
		t.Error(err)
	}
	if desc.Annotations, err = k.Pass(desc, to); err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{second, third} {
		if got, err := open(t, sealed, desc, key); err != nil || !bytes.Equal(got, plain) {
			t.Errorf("%q, %v", got, err)
		}
	}
	if _, err := open(t, sealed, desc, first); !errors.Is(err, ErrEncrypted) {
		t.Errorf("the first still reads it: %v", err)
	}
}

func TestKeysIn(t *testing.T) {
	private, public := keyPair(t)
	sealed, desc := seal(t, []byte("x"), "jwe:"+public)
	dir := filepath.Dir(private) // has the public key as well
	if err := os.WriteFile(filepath.Join(dir, "README"), []byte("keys"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "old"), 0o700); err != nil {
		t.Fatal(err)
	}
	k := KeysIn(dir)
	if r, err := k.Decrypt(bytes.NewReader(sealed), desc); err != nil {
		t.Error(err)
	} else if got, err := io.ReadAll(r); err != nil || string(got) != "x" {
		t.Errorf("%q, %v", got, err)
	}
	other, _ := keyPair(t)
	for in, want := range map[string]string{
		t.TempDir(): "--key", filepath.Join(dir, "none"): "--key", filepath.Dir(other): "none of those in " + filepath.Dir(other), private: "cannot be read",
	} {
		_, err := KeysIn(in).Decrypt(bytes.NewReader(sealed), desc)
		if !errors.Is(err, ErrEncrypted) || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), "--key") {
			t.Errorf("%s: %v, want %q", in, err, want)
		}
		if err := KeysIn(in).Fit(desc); !errors.Is(err, ErrEncrypted) {
			t.Errorf("%s fits: %v", in, err)
		}
	}
}

// Whoever may not read the keys of a node has none of them, and is told so.
func TestKeysOfOthers(t *testing.T) {
	key, public := keyPair(t)
	_, desc := seal(t, []byte("x"), "jwe:"+public)
	// Where somebody else gets to.
	dir, err := os.MkdirTemp("", "crypt-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	private := filepath.Join(dir, "key.pem")
	if data, err := os.ReadFile(key); err != nil {
		t.Fatal(err)
	} else if err := os.WriteFile(private, data, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, closed := range []string{dir, private} {
		if err := os.Chmod(closed, 0); err != nil {
			t.Fatal(err)
		}
		err := asSomebody(t, func() error { return KeysIn(dir).Fit(desc) })
		if !errors.Is(err, ErrEncrypted) || !errors.Is(err, os.ErrPermission) || !strings.Contains(err.Error(), closed) {
			t.Errorf("%s: %v", closed, err)
		}
		if err := os.Chmod(closed, 0o755); err != nil { //nolint:gosec // for somebody else
			t.Fatal(err)
		}
	}
}

// asSomebody does something without root's privileges, on files.
func asSomebody(t *testing.T, do func() error) (err error) {
	t.Helper()
	if os.Geteuid() != 0 {
		return do()
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		goruntime.LockOSThread() // and no unlock: the thread ends with this
		if _, err = unix.SetfsuidRetUid(65534); err == nil {
			err = do()
		}
	}()
	<-done
	return err
}

func TestWriterPassesErrorsOn(t *testing.T) {
	_, public := keyPair(t)
	r, err := ParseRecipients([]string{"jwe:" + public})
	if err != nil {
		t.Fatal(err)
	}
	full := errors.New("disk full")
	w, err := r.Encrypt(failing{full})
	if err != nil {
		t.Fatal(err)
	}
	_, werr := w.Write(make([]byte, 1<<20))
	if cerr := w.Close(); !errors.Is(werr, full) || !errors.Is(cerr, full) {
		t.Errorf("write: %v, close: %v", werr, cerr)
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }

func TestKeysAndRecipientsThatAreNone(t *testing.T) {
	private, public := keyPair(t)
	text := filepath.Join(t.TempDir(), "text")
	if err := os.WriteFile(text, []byte("hello"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", t.TempDir()) // no gpg
	for one, want := range map[string]string{
		"pub.pem": "possible: jwe:", "jwe:": "possible: jwe:", "rot13:" + public: "possible: jwe:",
		"jwe:" + text: "not a public key", "jwe:" + private + ".gone": "no such file", "pkcs7:" + public: "not an x509 cert",
		"pgp:somebody@example.org": "needs gpg", "provider:vault:key": "OCICRYPT_KEYPROVIDER_CONFIG",
	} {
		if _, err := ParseRecipients([]string{one}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("recipient %s: %v, want %q", one, err, want)
		}
	}
	for one, want := range map[string]string{
		private + ":fd=7": "fd=", private + ":pass=a:secret": "colon",
		text: "no private key", text + ".gone:pass=secret": "no such file", public + ":pass=secret": "no private key",
	} {
		if _, err := ParseKeys([]string{one}); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("key %s: %v, want %q", one, err, want)
		}
	}
}

// The kinds of keys that docs/security.md says were tried.
func TestKindsOfKeys(t *testing.T) {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ecKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "node"}, NotAfter: time.Now().Add(time.Hour)}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, &rsaKey.PublicKey, rsaKey)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := func(name, kind string, der []byte, err error) string {
		t.Helper()
		if kind != "" {
			der = pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
		}
		path := filepath.Join(dir, name)
		if err := errors.Join(err, os.WriteFile(path, der, 0o600)); err != nil {
			t.Fatal(err)
		}
		return path
	}
	public := func(name, kind string, key any) string {
		der, err := x509.MarshalPKIXPublicKey(key)
		return file(name, kind, der, err)
	}
	private := func(name, kind string, key any) string {
		der, err := x509.MarshalPKCS8PrivateKey(key)
		return file(name, kind, der, err)
	}
	jwk := func(name string, key any, algorithm string) string {
		data, err := jose.JSONWebKey{Key: key, Algorithm: algorithm}.MarshalJSON()
		return file(name, "", data, err)
	}
	for name, tt := range map[string]struct {
		recipient string
		keys      []string
	}{
		"RSA, PEM":      {"jwe:" + public("rsa.pem", "PUBLIC KEY", &rsaKey.PublicKey), []string{private("rsa.key", "PRIVATE KEY", rsaKey)}},
		"elliptic":      {"jwe:" + public("ec.pem", "PUBLIC KEY", &ecKey.PublicKey), []string{private("ec.key", "PRIVATE KEY", ecKey)}},
		"RSA, DER":      {"jwe:" + public("rsa.der", "", &rsaKey.PublicKey), []string{private("rsa.key.der", "", rsaKey)}},
		"RSA, JWK":      {"jwe:" + jwk("rsa.jwk", &rsaKey.PublicKey, ""), []string{jwk("rsa.key.jwk", rsaKey, "")}},
		"elliptic, JWK": {"jwe:" + jwk("ec.jwk", &ecKey.PublicKey, "ECDH-ES+A256KW"), []string{jwk("ec.key.jwk", ecKey, "ECDH-ES+A256KW")}},
		"certificate":   {"pkcs7:" + file("cert.pem", "CERTIFICATE", certificate, nil), []string{private("cert.key", "PRIVATE KEY", rsaKey), filepath.Join(dir, "cert.pem")}},
	} {
		sealed, desc := seal(t, []byte("layer"), tt.recipient)
		if got, err := open(t, sealed, desc, tt.keys...); err != nil || string(got) != "layer" {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

// A key of gpg's: the recipient by its name in the key ring, the key as gpg exports it.
func TestPGP(t *testing.T) {
	gpg, err := exec.LookPath("gpg")
	if err != nil {
		t.Skip("no gpg on this host, which ocicrypt asks for public keys")
	}
	// Its socket has to have a short name.
	home, err := os.MkdirTemp("", "gpg")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = exec.Command("gpgconf", "--homedir", home, "--kill", "all").Run()
		_ = os.RemoveAll(home)
	})
	t.Setenv("GNUPGHOME", home)
	run := func(args ...string) []byte {
		t.Helper()
		out, err := exec.Command(gpg, append([]string{"--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""}, args...)...).Output()
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	run("--quick-generate-key", "node@example.org", "rsa2048", "encr")
	ring := filepath.Join(home, "exported.gpg")
	if err := os.WriteFile(ring, run("--export-secret-keys", "node@example.org"), 0o600); err != nil {
		t.Fatal(err)
	}
	sealed, desc := seal(t, []byte("layer"), "pgp:node@example.org")
	if got, err := open(t, sealed, desc, ring); err != nil || string(got) != "layer" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := open(t, sealed, desc); !errors.Is(err, ErrEncrypted) {
		t.Errorf("without the key: %v", err)
	}
}

// A key with a password reads what was encrypted for it, named from wherever: the builder of
// a checkpoint works in another directory.
func TestKeyWithPassword(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	block, err := x509.EncryptPEMBlock(rand.Reader, "RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(key), []byte("secret"), x509.PEMCipherAES256) //nolint:staticcheck // what ocicrypt reads
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{
		"key.pem": pem.EncodeToMemory(block), "pub.pem": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: public}), "password": []byte("secret"),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	sealed, desc := seal(t, []byte("layer"), "jwe:"+filepath.Join(dir, "pub.pem"))
	other, _ := keyPair(t)
	for _, list := range [][]string{{"key.pem:file=password"}, {"key.pem:pass=secret"}, {other, filepath.Join(dir, "key.pem") + ":file=password"}} {
		t.Chdir(dir)
		located, err := AbsoluteKeys(list)
		if err != nil {
			t.Fatal(err)
		}
		t.Chdir("/")
		if got, err := open(t, sealed, desc, located...); err != nil || string(got) != "layer" {
			t.Errorf("%v as %v: %q, %v", list, located, got, err)
		}
	}
	if located, err := AbsoluteKeys([]string{"provider:vault"}); err != nil || located[0] != "provider:vault" {
		t.Errorf("%v, %v", located, err)
	}
	if _, err := AbsoluteKeys([]string{"key.pem:fd=3"}); err == nil {
		t.Error("a descriptor is taken")
	}
}

// What is in a layer's descriptor comes from the registry.
func FuzzDescriptor(f *testing.F) {
	f.Add("e30=", "e30=", []byte("x"))
	f.Add("", "eyJjaXBoZXIiOiJBRVNfMjU2X0NUUl9ITUFDX1NIQTI1NiJ9", []byte{})
	f.Add("eyJwcm90ZWN0ZWQiOiJlIn0=,x", "", []byte("layer"))
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		f.Fatal(err)
	}
	path := filepath.Join(f.TempDir(), "key.pem")
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}), 0o600); err != nil {
		f.Fatal(err)
	}
	keys, err := ParseKeys([]string{path})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, wrapped, public string, data []byte) {
		desc := ocispec.Descriptor{Annotations: map[string]string{
			"org.opencontainers.image.enc.keys.jwe": wrapped, "org.opencontainers.image.enc.keys.pgp": wrapped,
			"org.opencontainers.image.enc.keys.pkcs7": wrapped, pubOpts: public,
		}}
		if For(desc) == "" {
			t.Error("it is for nobody")
		}
		if r, err := keys.Decrypt(bytes.NewReader(data), desc); err == nil {
			if _, err := io.ReadAll(r); err == nil {
				t.Error("somebody knew the key")
			}
		}
	})
}
