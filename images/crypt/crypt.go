// Package crypt encrypts layers for recipients and decrypts them, with ocicrypt: in
// the form that containerd's stream processors and other clients' tools read.
//
// It is cracctl's. ocicrypt registers its key wrappers at program start, and the shim
// never sees an encrypted layer: containerd decrypts what it unpacks.
package crypt

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containers/ocicrypt"
	"github.com/containers/ocicrypt/blockcipher"
	"github.com/containers/ocicrypt/config"
	"github.com/containers/ocicrypt/helpers"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/crac-shim/crac/oci"
)

// ErrEncrypted is wrapped by errors about a layer that none of the given keys opens.
var ErrEncrypted = errors.New("encrypted")

const (
	suffix = "+encrypted"
	// pubOpts is ocicrypt's annotation with what is public about the cipher.
	pubOpts = "org.opencontainers.image.enc.pubopts"
)

// IsEncrypted knows an encrypted layer by its media type.
func IsEncrypted(mediaType string) bool { return strings.HasSuffix(mediaType, suffix) }

// EncryptedType is the media type of a layer once it is encrypted, PlainType the
// reverse.
func EncryptedType(mediaType string) string { return mediaType + suffix }

// PlainType is the media type of what is inside an encrypted layer.
func PlainType(mediaType string) string { return strings.TrimSuffix(mediaType, suffix) }

// Recipients are whom a layer is encrypted for: any of them can decrypt it.
type Recipients struct {
	config  *config.EncryptConfig
	schemes []string // of ocicrypt's key wrappers
}

// ParseRecipients reads ocicrypt's forms: see oci.CheckRecipients. Key files are read
// now.
func ParseRecipients(list []string) (*Recipients, error) {
	if err := oci.CheckRecipients(list); err != nil {
		return nil, err
	}
	r := new(Recipients)
	for _, one := range list {
		scheme, value, _ := strings.Cut(one, ":")
		if scheme == "provider" {
			name, _, _ := strings.Cut(value, ":")
			scheme += "." + name
		}
		if ocicrypt.GetKeyWrapper(scheme) == nil {
			return nil, fmt.Errorf("recipient %s: no such key provider; name it in the file that OCICRYPT_KEYPROVIDER_CONFIG names", one)
		}
		cc, err := helpers.CreateCryptoConfig([]string{one}, nil)
		if err != nil {
			return nil, fmt.Errorf("recipient %s: %w", one, err)
		}
		// Without GnuPG the library passes over such a recipient.
		if cc.EncryptConfig == nil || len(cc.EncryptConfig.Parameters) == 0 {
			return nil, fmt.Errorf("recipient %s: cannot be used here; pgp needs gpg and its keyring with the recipient's key", one)
		}
		if r.config == nil {
			r.config = cc.EncryptConfig
		} else {
			all := config.CombineCryptoConfigs([]config.CryptoConfig{{EncryptConfig: r.config}, cc})
			r.config = all.EncryptConfig
		}
		if !slices.Contains(r.schemes, scheme) {
			r.schemes = append(r.schemes, scheme)
		}
	}
	return r, nil
}

// Writer encrypts what is written to it. It has to be closed, also after an error.
type Writer struct {
	recipients *Recipients
	in         *io.PipeWriter
	done       chan error
	plain      digest.Digester
	finish     blockcipher.Finalizer
}

// Encrypt gives a writer that encrypts into w, in one pass, with a key of its own.
func (r *Recipients) Encrypt(w io.Writer) (*Writer, error) {
	handler, err := blockcipher.NewLayerBlockCipherHandler()
	if err != nil {
		return nil, err
	}
	// The library's cipher is a reader of the plain text.
	pr, pw := io.Pipe()
	cipher, finish, err := handler.Encrypt(pr, blockcipher.AES256CTR)
	if err != nil {
		return nil, err
	}
	e := &Writer{recipients: r, in: pw, done: make(chan error, 1), plain: digest.SHA256.Digester(), finish: finish}
	go func() {
		_, err := io.Copy(w, cipher)
		_ = pr.CloseWithError(err)
		e.done <- err
	}()
	return e, nil
}

func (e *Writer) Write(p []byte) (int, error) {
	n, err := e.in.Write(p)
	e.plain.Hash().Write(p[:n])
	return n, err
}

// Close waits until all is written. A second call does nothing.
func (e *Writer) Close() error {
	if e.done == nil {
		return nil
	}
	_ = e.in.Close() // cannot fail
	err := <-e.done
	e.done = nil
	return err
}

// Annotations are for the layer's descriptor: the layer's key, encrypted for each
// recipient. Only after Close.
//
// ocicrypt.EncryptLayer would want the digest of the plain layer before the first
// byte, which a single pass does not have; what it does at the end is done here.
func (e *Writer) Annotations() (map[string]string, error) {
	opts, err := e.finish()
	if err != nil {
		return nil, err
	}
	opts.Private.Digest = e.plain.Digest()
	private, err := json.Marshal(opts.Private)
	if err != nil {
		return nil, err
	}
	public, err := json.Marshal(opts.Public)
	if err != nil {
		return nil, err
	}
	annotations := map[string]string{pubOpts: base64.StdEncoding.EncodeToString(public)}
	for _, scheme := range e.recipients.schemes {
		wrapper := ocicrypt.GetKeyWrapper(scheme)
		wrapped, err := wrapper.WrapKeys(e.recipients.config, private)
		if err != nil {
			return nil, fmt.Errorf("encrypt the layer's key (%s): %w", scheme, err)
		}
		if len(wrapped) == 0 {
			return nil, fmt.Errorf("encrypt the layer's key: %s took no recipient", scheme)
		}
		annotations[wrapper.GetAnnotationID()] = base64.StdEncoding.EncodeToString(wrapped)
	}
	return annotations, nil
}

// Keys decrypt. nil has none.
type Keys struct {
	config *config.DecryptConfig // nil: none
	dir    string                // whose keys these are; empty: they were named
	read   sync.Once
	unread error // why some in dir are not among them
}

// ParseKeys reads private keys in ocicrypt's forms: FILE, FILE:pass=PASSWORD,
// FILE:file=PASSWORD-FILE, provider:NAME; for pkcs7 also the certificate's file. Not
// FILE:fd=N: who reads a descriptor takes it from those who read the key after him.
func ParseKeys(list []string) (*Keys, error) {
	if len(list) == 0 {
		return nil, nil
	}
	var all []config.CryptoConfig
	for _, one := range list {
		if _, _, err := splitKey(one); err != nil {
			return nil, err
		}
		cc, err := helpers.CreateDecryptCryptoConfig([]string{one}, nil)
		if err != nil {
			return nil, fmt.Errorf("key %s: %w", nameOf(one), err)
		}
		// The library passes over what it does not know, for directories of keys.
		if cc.DecryptConfig == nil || len(cc.DecryptConfig.Parameters) == 0 {
			return nil, fmt.Errorf("key %s is no private key that can be read (PEM, DER, JWK, a PGP key ring); a password goes behind it: FILE:file=PASSWORD-FILE", nameOf(one))
		}
		all = append(all, cc)
	}
	return &Keys{config: config.CombineCryptoConfigs(all).DecryptConfig}, nil
}

// AbsoluteKeys makes the names of files in keys absolute, for a process that works in
// another directory.
func AbsoluteKeys(list []string) ([]string, error) {
	located := make([]string, len(list))
	for i, one := range list {
		if strings.HasPrefix(one, provider) {
			located[i] = one
			continue
		}
		file, password, err := splitKey(one)
		if err != nil {
			return nil, err
		}
		if located[i], err = filepath.Abs(file); err != nil {
			return nil, fmt.Errorf("key %s: %w", file, err)
		}
		if name, ok := strings.CutPrefix(password, passwordFile); ok {
			if name, err = filepath.Abs(name); err != nil {
				return nil, fmt.Errorf("key %s: %w", file, err)
			}
			password = passwordFile + name
		}
		if password != "" {
			located[i] += ":" + password
		}
	}
	return located, nil
}

const (
	provider     = "provider:"
	passwordFile = "file="
)

// splitKey takes a key of the form FILE:PASSWORD apart. The library splits at every colon, and
// passes over a password if there are several.
func splitKey(key string) (file, password string, err error) {
	if strings.HasPrefix(key, provider) {
		return key, "", nil
	}
	file, password, _ = strings.Cut(key, ":")
	switch {
	case strings.HasPrefix(password, "fd="):
		return "", "", fmt.Errorf("key %s: a password cannot come from a descriptor (fd=); write it to a file that only you can read, and say %[1]s:%s", file, passwordFile+"PASSWORD-FILE")
	case strings.Contains(password, ":"):
		return "", "", fmt.Errorf("key %s: there is a colon behind that of the password; write the password to a file, and say %[1]s:%s", file, passwordFile+"PASSWORD-FILE")
	}
	return file, password, nil
}

// NodeKeyDir is where containerd, as it is configured by default, has its keys.
const NodeKeyDir = "/etc/containerd/ocicrypt/keys"

// KeysIn are the private keys in a directory, as containerd's decoder takes them: what is none
// is passed over, and those with a password. There may be none, and no directory. They are
// read when the first layer is to be decrypted: without one nobody need be allowed to.
func KeysIn(dir string) *Keys { return &Keys{dir: dir} }

// open gives what decrypts; nil if there is nothing.
func (k *Keys) open() *config.DecryptConfig {
	if k == nil {
		return nil
	}
	if k.dir != "" {
		k.read.Do(k.readDir)
	}
	return k.config
}

func (k *Keys) readDir() {
	entries, err := os.ReadDir(k.dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		k.unread = err
	}
	var list []string
	for _, e := range entries {
		path := filepath.Join(k.dir, e.Name())
		if strings.Contains(path, ":") {
			continue // it would be taken for what comes before a password
		}
		switch _, err := ParseKeys([]string{path}); {
		case err == nil:
			list = append(list, path)
		case errors.Is(err, os.ErrPermission):
			k.unread = err
		}
	}
	all, err := ParseKeys(list)
	if err != nil {
		k.unread = err
	}
	if all != nil {
		k.config = all.config
	}
}

// nameOf leaves a password out.
func nameOf(key string) string {
	if strings.HasPrefix(key, provider) {
		return key
	}
	name, _, _ := strings.Cut(key, ":")
	return name
}

// Decrypt gives what is inside an encrypted layer. Its end is an error if the layer
// was changed: what was read until then must not be relied on before.
func (k *Keys) Decrypt(r io.Reader, desc ocispec.Descriptor) (io.Reader, error) {
	own := k.open()
	if own == nil {
		return nil, k.missing(desc)
	}
	plain, _, err := ocicrypt.DecryptLayer(own, r, desc, false)
	if err != nil {
		return nil, k.unfit(desc, err)
	}
	return plain, nil
}

// Fit tells whether a layer can be decrypted, without reading it.
func (k *Keys) Fit(desc ocispec.Descriptor) error {
	own := k.open()
	if own == nil {
		return k.missing(desc)
	}
	if _, _, err := ocicrypt.DecryptLayer(own, nil, desc, true); err != nil {
		return k.unfit(desc, err)
	}
	return nil
}

// Pass gives the annotations of an encrypted layer for other recipients: the layer stays
// the same bytes, and its key is encrypted for those instead.
func (k *Keys) Pass(desc ocispec.Descriptor, to *Recipients) (map[string]string, error) {
	if err := k.Fit(desc); err != nil {
		return nil, err
	}
	// The library adds to whom there is.
	_, finish, err := ocicrypt.EncryptLayer(&config.EncryptConfig{Parameters: to.config.Parameters, DecryptConfig: *k.open()}, nil, desc)
	if err != nil {
		return nil, err
	}
	all, err := finish()
	if err != nil {
		return nil, fmt.Errorf("encrypt the layer's key: %w", err)
	}
	annotations := map[string]string{pubOpts: all[pubOpts]}
	for _, scheme := range to.schemes {
		id := ocicrypt.GetKeyWrapper(scheme).GetAnnotationID()
		annotations[id] = strings.TrimPrefix(all[id], desc.Annotations[id]+",")
		if annotations[id] == "" || annotations[id] == desc.Annotations[id] {
			return nil, fmt.Errorf("encrypt the layer's key: %s took no recipient", scheme)
		}
	}
	return annotations, nil
}

// missing says that there is no key at all.
func (k *Keys) missing(desc ocispec.Descriptor) error {
	err := fmt.Errorf("it is %w for %s; give the private key with --key", ErrEncrypted, For(desc))
	if k != nil && k.unread != nil {
		err = fmt.Errorf("%w (those of this node cannot be read: %w)", err, k.unread)
	}
	return err
}

// unfit says why none of the keys opens a layer.
func (k *Keys) unfit(desc ocispec.Descriptor, err error) error {
	why := strings.Join(strings.Fields(err.Error()), " ")
	if k.dir == "" {
		return fmt.Errorf("it is %w for %s, and no key that was given fits: %s", ErrEncrypted, For(desc), why)
	}
	return fmt.Errorf("%w; none of those in %s fits: %s", k.missing(desc), k.dir, why)
}

// For names whom a layer is encrypted for, as far as the layer tells: pgp alone names
// the keys, the others their kind.
func For(desc ocispec.Descriptor) string {
	var all []string
	wrapped := ocicrypt.GetWrappedKeysMap(desc)
	for _, scheme := range slices.Sorted(maps.Keys(wrapped)) {
		recipients, err := ocicrypt.GetKeyWrapper(scheme).GetRecipients(wrapped[scheme])
		if err != nil || len(recipients) == 0 {
			recipients = []string{"[" + scheme + "]"}
		}
		all = append(all, recipients...)
	}
	if len(all) == 0 {
		return "nobody that this version knows"
	}
	return strings.Join(all, ", ")
}

// IsAnnotation tells whether a layer is decrypted by an annotation of this name.
func IsAnnotation(key string) bool { return strings.HasPrefix(key, "org.opencontainers.image.enc.") }

// Annotations are those of a layer that it is decrypted by.
func Annotations(all map[string]string) map[string]string {
	own := maps.Clone(all)
	maps.DeleteFunc(own, func(k, _ string) bool { return !IsAnnotation(k) })
	return own
}
