package images

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/oci"
)

// CodePolicy is the code of a start that the node's policy does not allow to be warm.
const CodePolicy = "policy"

// Policy is a node's policy as its files are now.
type Policy struct {
	oci.Policy
	Path string
	// digest is of all the files: a verdict is good for these and no others.
	digest string
}

// Digest is of the policy's files, and of those that it refers to.
func (p *Policy) Digest() string { return p.digest }

// PolicyPath is where the policy of this node is.
func PolicyPath() string {
	if path := os.Getenv(oci.PolicyEnv); path != "" {
		return path
	}
	return oci.DefaultPolicyPath
}

// LoadPolicy reads a policy and the files that it refers to; nil if there is none.
func LoadPolicy(path string) (*Policy, error) {
	// A link to nowhere is not no policy.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case errors.Is(err, unix.ELOOP):
		return nil, fmt.Errorf("the node's policy: %w", onlyOwn(path))
	case err != nil:
		return nil, fmt.Errorf("read the node's policy: %w", err)
	}
	defer f.Close()
	p := &Policy{Path: path}
	h := sha256.New()
	rule, err := oci.DecodePolicy(io.TeeReader(f, h))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	p.Policy = *rule
	if p.Notation == "" {
		p.Notation = filepath.Dir(path)
	}
	for _, own := range []string{path, filepath.Dir(path), p.Notation} {
		if err := onlyOwn(own); err != nil {
			return nil, fmt.Errorf("the node's policy: %w", err)
		}
	}
	if p.Signature == oci.SignatureRequire {
		if err := addTrust(h, p.Notation); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	p.digest = hex.EncodeToString(h.Sum(nil))
	return p, nil
}

// TrustPolicyName and TrustStoreName are the Notary Project's names for its files.
const (
	TrustPolicyName = "trustpolicy.json"
	TrustStoreName  = "truststore"
)

// addTrust adds all files to the sum that say whose signatures count, by their names and
// contents. A missing one is left to whoever verifies.
func addTrust(h hash.Hash, dir string) error {
	for _, name := range []string{TrustPolicyName, TrustStoreName} {
		err := filepath.WalkDir(filepath.Join(dir, name), func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			if err := onlyOwn(path); err != nil {
				return err
			}
			fmt.Fprintf(h, "%q %v\n", path, d.Type())
			if d.IsDir() {
				return nil
			}
			data, err := os.ReadFile(path)
			fmt.Fprintf(h, "%d\n", len(data))
			h.Write(data)
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// onlyOwn refuses what others than root and this user can write, and what is no file or
// directory: who can write the target of a link is not seen here.
func onlyOwn(path string) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return &os.PathError{Op: "stat", Path: path, Err: err}
	}
	if kind := st.Mode & unix.S_IFMT; kind != unix.S_IFREG && kind != unix.S_IFDIR {
		return fmt.Errorf("%s is a link or no file at all, so it decides nothing; put the file or directory itself there", path)
	}
	if st.Mode&0o022 != 0 || st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s can be written by others than root, so it decides nothing; chown root and chmod go-w it", path)
	}
	return nil
}

// PolicyRequest is what a policy is asked about: one line of JSON on the standard
// input of `cracctl judge`.
type PolicyRequest struct {
	Address   string `json:"address"`
	Namespace string `json:"namespace"`
	Container string `json:"container"`
	// Policy is the policy's path, PolicyDigest of its files as the asker has read them:
	// a verdict on others would be remembered for these.
	Policy       string `json:"policy"`
	PolicyDigest string `json:"policyDigest"`
	// Manifest is the digest of the checkpoint's manifest.json, Layers what Layers
	// says of the root file system.
	Manifest string   `json:"manifest"`
	Layers   []string `json:"layers"`
}

// Verdict is what a policy says of a checkpoint: one line of JSON on the standard
// output of `cracctl judge`.
type Verdict struct {
	Allowed bool `json:"allowed"`
	// Reason is for people: who has signed, or why it is refused, and the way out.
	Reason string `json:"reason"`
	Image  string `json:"image,omitempty"`
	Digest string `json:"digest,omitempty"`
	// Until is when it has to be asked again.
	Until time.Time `json:"until,omitzero"`
}

// Layers are the directories that a root file system is put together from, without
// the container's own, in order.
func Layers(mounts []Mount) ([]string, error) {
	var all []string
	for _, m := range mounts {
		if m.Type != "overlay" {
			all = append(all, m.Source)
			continue
		}
		o, err := parseOverlay(m.Options)
		if err != nil {
			return nil, err
		}
		for _, l := range o.lower {
			all = append(all, l.path)
		}
	}
	return all, nil
}

// ManifestDigest is that of manifest.json.
func (c *Checkpoint) ManifestDigest() string { return c.digest }

// Verdicts remembers what was allowed, in a directory that only root can look into.
// An empty one remembers nothing.
type Verdicts string

// Key names a verdict: for this policy, this checkpoint, and the very directories
// that it is restored with. A snapshot that is made anew, even under the same name, has
// another key.
func (p *Policy) Key(c *Checkpoint, layers []string) (string, error) {
	h := sha256.New()
	fmt.Fprintf(h, "%s %s\n", p.digest, c.digest)
	for _, dir := range layers {
		var st unix.Statx_t
		if err := unix.Statx(unix.AT_FDCWD, dir, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st); err != nil {
			return "", &os.PathError{Op: "stat", Path: dir, Err: err}
		}
		fmt.Fprintf(h, "%q %d:%d %d %d.%d\n", dir, st.Dev_major, st.Dev_minor, st.Ino, st.Btime.Sec, st.Btime.Nsec)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// Recall gives a verdict that is remembered and still good; nil if there is none.
func (v Verdicts) Recall(key string, now time.Time) *Verdict {
	if v == "" || v.check() != nil {
		return nil
	}
	f, err := os.OpenFile(v.path(key), os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil
	}
	defer f.Close()
	var verdict Verdict
	if err := json.NewDecoder(io.LimitReader(f, 1<<16)).Decode(&verdict); err != nil || !verdict.Allowed || !now.Before(verdict.Until) {
		return nil
	}
	return &verdict
}

// Remember keeps a verdict that allows. Others are asked for again, so that a new
// signature counts at once.
func (v Verdicts) Remember(key string, verdict *Verdict) error {
	if v == "" || !verdict.Allowed {
		return nil
	}
	if err := os.Mkdir(string(v), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := v.check(); err != nil {
		return err
	}
	data, err := json.Marshal(verdict)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(string(v), ".new-")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), v.path(key))
	}
	if err != nil {
		_ = os.Remove(f.Name())
	}
	return err
}

func (v Verdicts) path(key string) string { return filepath.Join(string(v), key+".json") }

// check refuses a directory that somebody else could have put there, or can write to.
func (v Verdicts) check() error {
	var st unix.Stat_t
	if err := unix.Lstat(string(v), &st); err != nil {
		return &os.PathError{Op: "stat", Path: string(v), Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0 {
		return fmt.Errorf("%s is not a directory of this user's alone: remove it", v)
	}
	return nil
}

// Words are a verdict's for people.
func (v *Verdict) Words() string {
	if v.Allowed {
		return "the node's policy allows it: " + v.Reason
	}
	return "the node's policy refuses it: " + strings.TrimSpace(v.Reason)
}
