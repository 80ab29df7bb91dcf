package oci

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
)

// DefaultPolicyPath is where a node's policy is, unless PolicyEnv names another place.
const (
	DefaultPolicyPath = "/etc/crac/policy.json"
	PolicyEnv         = "CRAC_POLICY"
)

// SignatureRule says whether a checkpoint must be signed to be restored.
type SignatureRule string

// The rules. There is no default: a file that says nothing is a mistake.
const (
	SignatureRequire  SignatureRule = "require"
	SignatureOptional SignatureRule = "optional"
)

// Policy is what a node asks of a checkpoint before it restores it. Whose signatures
// count is not said here, but in the Notary Project's own files.
type Policy struct {
	Version   string        `json:"version"`
	Signature SignatureRule `json:"signature"`
	// Notation is the directory with trustpolicy.json and truststore/; empty: where
	// the policy is.
	Notation string `json:"notation,omitempty"`
}

// PolicyVersion is the version of the policy's format.
const PolicyVersion = "1"

// maxPolicy bounds the size of a policy file.
const maxPolicy = 1 << 16

// DecodePolicy reads a policy. What it does not know is an error: a rule that is
// passed over would let pass what it was written to stop.
func DecodePolicy(r io.Reader) (*Policy, error) {
	d := json.NewDecoder(io.LimitReader(r, maxPolicy))
	d.DisallowUnknownFields()
	p := new(Policy)
	if err := d.Decode(p); err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("policy: something follows its end, or it is longer than %d bytes", maxPolicy)
	}
	if p.Version != PolicyVersion {
		return nil, fmt.Errorf("policy: version %.40q is not known; this one knows %s", p.Version, PolicyVersion)
	}
	if err := known("signature", string(p.Signature), string(SignatureRequire), string(SignatureOptional)); err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	if p.Notation != "" && !filepath.IsAbs(p.Notation) {
		return nil, fmt.Errorf("policy: notation %.200q is not an absolute path", p.Notation)
	}
	return p, nil
}
