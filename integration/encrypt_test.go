package integration

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"github.com/crac-shim/crac/integration/harness"
)

// keyPair writes a key of its own below the daemon's directory.
func keyPair(t *harness.T) (private, public string) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKIXPublicKey(&key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	private, public = filepath.Join(dir, "key.pem"), filepath.Join(dir, "pub.pem")
	for name, block := range map[string]*pem.Block{
		private: {Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}, public: {Type: "PUBLIC KEY", Bytes: der},
	} {
		if err := os.WriteFile(name, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return private, public
}

// filesWith lists the files below dir that hold a text, as they are or unpacked.
func filesWith(t *harness.T, dir, text string) (found []string) {
	t.Helper()
	holds := func(path string) bool {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		plain := data
		if z, err := gzip.NewReader(bytes.NewReader(data)); err == nil {
			plain, _ = io.ReadAll(z)
		} else if z, err := zstd.NewReader(bytes.NewReader(data)); err == nil {
			plain, _ = io.ReadAll(z)
			z.Close()
		}
		return bytes.Contains(data, []byte(text)) || bytes.Contains(plain, []byte(text))
	}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && holds(path) {
			found = append(found, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// A registry that stores an encrypted checkpoint never sees a workload's memory or files; a node
// with the key starts it warm, one without does not get it, and says so.
func TestEncryptedCheckpoint(tb *testing.T) {
	onlyCrac(tb)
	t := setup(tb)
	if _, err := harness.FindTools(harness.CtdDecoder); err != nil {
		t.Fatal(err)
	}
	registry, err := t.StartRegistry(t.Ctx)
	if err != nil {
		t.Fatal(err)
	}
	key, public := keyPair(t)
	image := registry.Host + "/secret/app"

	// The one secret is in memory only, the other in a file. The shell must not have the first in
	// its arguments, which the dump's manifest has.
	const inMemory, inFile = "kept-in-memory-4711", "kept-in-a-file-4712"
	program := `secret=kept-in-memory-$((4000+711)); echo kept-in-a-file-$((4000+712)) >/token; ` + tick
	args := []string{"sh", "-c", program}
	b := start(t, how{args: args, flags: []string{option("checkpoint.image", image+":option"), option("checkpoint.encrypt-to", "jwe:"+public)}})
	b.waitTicks(3)

	// The search finds them where they are not encrypted.
	t.CracctlOK("checkpoint", "--push", "--encrypt-to", "none", b.id, image+":plain")
	for _, secret := range []string{inMemory, inFile} {
		if len(filesWith(t, registry.Dir, secret)) == 0 {
			t.Fatalf("%q is not even in the image that anybody may read", secret)
		}
	}
	t.CracctlOK("encrypt", image+":plain", image+":later", "--to", "jwe:"+public)
	if v := fromJSON[verified](t, "verify", "--key", key, image+":later"); !v.OK {
		t.Errorf("encrypted later: %+v", v)
	}
	if err := os.RemoveAll(filepath.Join(registry.Dir, "data")); err != nil {
		t.Fatal(err)
	}

	b.checkpoint() // by the option
	b.waitTicks(3)
	t.CracctlOK("checkpoint", "--push", "--exit", "--encrypt-to", "jwe:"+public, "--parent", image+":option", "--key", key, b.id, image+":1")
	last := b.lastTick()
	b.remove()
	for _, secret := range []string{inMemory, inFile} {
		if found := filesWith(t, registry.Dir, secret); len(found) > 0 {
			t.Errorf("the registry can read %q in %v", secret, found)
		}
	}

	// What reads images here wants the key, and says for whom the image is.
	for _, command := range [][]string{{"inspect", image + ":1"}, {"verify", image + ":1"}, {"diff", image + ":option", image + ":1"}, {"flatten", image + ":1", image + ":flat", "--encrypt-to", "jwe:" + public}} {
		_, err := t.Cracctl(t.Ctx, command...)
		if err == nil || !strings.Contains(err.Error(), "encrypted for [jwe]") || !strings.Contains(err.Error(), "--key") {
			t.Errorf("%s without the key: %v", command[0], err)
		}
		t.CracctlOK(append(command, "--key", key)...)
	}
	if _, err := t.Cracctl(t.Ctx, "flatten", "--key", key, image+":1", image+":open"); err == nil || !strings.Contains(err.Error(), "--encrypt-to") {
		t.Errorf("flattened in the open: %v", err)
	}

	// Another tool that knows ocicrypt reads it.
	dir, err := t.Path(newID(t))
	if err != nil {
		t.Fatal(err)
	}
	decrypted := filepath.Join(dir, "decrypted.tar")
	skopeo := func(name string, args ...string) error {
		args = append(args, "--src-tls-verify=false", "docker://"+image+":1", "oci-archive:"+filepath.Join(dir, name)+":"+image+":decrypted")
		_, err := harness.Run(t.Ctx, t.Command(t.Ctx, "skopeo", append([]string{"copy"}, args...)...))
		return err
	}
	if err := skopeo("decrypted.tar", "--decryption-key", key); err != nil {
		t.Fatal(err)
	}
	other, _ := keyPair(t)
	if err := skopeo("none.tar", "--decryption-key", other); err == nil {
		t.Error("skopeo decrypts it with another key")
	}
	t.CtrOK("images", "import", decrypted)
	if v := fromJSON[verified](t, "verify", image+":decrypted"); !v.OK {
		t.Errorf("decrypted by skopeo: %+v", v)
	}
	open := start(t, how{image: image + ":decrypted", args: args, flags: []string{option("restore", "require")}})
	open.goesOnFrom(last)
	open.remove() // the encrypted image would find its layers unpacked
	t.CtrOK("images", "delete", "--sync", image+":decrypted")

	// A node without the key does not get it, and nothing of it starts.
	for _, tag := range []string{":option", ":later", ":1", ":flat", ":plain"} {
		t.CtrOK("images", "delete", "--sync", image+tag)
	}
	// containerd notices either that its decoder failed or that nothing came out of it.
	out, err := t.Nerdctl(t.Ctx, "pull", "--quiet", image+":1")
	if err == nil || !strings.Contains(err.Error(), "decrypt") && !strings.Contains(err.Error(), "wrong diff id") {
		t.Errorf("pulled without the key: %q, %v", out, err)
	}
	if c, err := tryStart(t, how{image: image + ":1", args: args}); err == nil {
		t.Errorf("%s starts without the key", c.id)
	}

	// With the key it is like any other.
	data, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	own := filepath.Join(t.KeyDir(), "key.pem")
	if err := os.WriteFile(own, data, 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(own) })
	t.NerdctlOK("pull", "--quiet", image+":1")
	clone := start(t, how{image: image + ":1", args: args, flags: []string{option("restore", "require")}})
	clone.goesOnFrom(last)
	if got := clone.exec("cat", "/token"); got != inFile {
		t.Errorf("/token has %q", got)
	}

	// What came from an encrypted image does not get into an open one by oversight.
	_, err = t.Cracctl(t.Ctx, "checkpoint", clone.id, ref(t))
	if err == nil || !strings.Contains(err.Error(), "--encrypt-to") {
		t.Errorf("a clone's checkpoint in the open: %v", err)
	}
	clone.waitTicks(3)
	clone.inOrder()
}
