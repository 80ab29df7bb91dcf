package shim

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/log"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/oci"
)

// judgeTimeout bounds how long a start waits for a verdict; a registry may be asked
// for signatures.
const judgeTimeout = 30 * time.Second

// allowed asks the node's policy whether a checkpoint of an image may be restored.
// layers are those of the root file system. Without a policy it costs a look for its
// file.
//
// Signatures are verified by a program of its own, as images are packed by one: a
// shim that could would be several times as large. What it has allowed once is
// remembered for as long as policy, checkpoint and the directories stay the same.
func (s *service) allowed(c *container, ck *images.Checkpoint, layers []string) error {
	policy, err := images.LoadPolicy(images.PolicyPath())
	if err != nil {
		return &coldReason{code: images.CodePolicy, err: err}
	}
	if policy == nil || policy.Signature != oci.SignatureRequire {
		return nil
	}
	key, err := policy.Key(ck, layers)
	if err != nil {
		return &coldReason{code: images.CodePolicy, err: err}
	}
	verdicts := verdictsOf(c.bundle)
	if verdicts.Recall(key, time.Now()) != nil {
		return nil
	}
	verdict, err := s.judge(images.PolicyRequest{
		Address: s.containerd, Namespace: s.namespace, Container: c.id,
		Policy: policy.Path, PolicyDigest: policy.Digest(), Manifest: ck.ManifestDigest(), Layers: layers,
	})
	if err != nil {
		return &coldReason{code: images.CodePolicy, err: fmt.Errorf("ask the node's policy %s: %w", policy.Path, err)}
	}
	if !verdict.Allowed {
		return &coldReason{code: images.CodePolicy, err: errors.New(verdict.Words())}
	}
	if err := verdicts.Remember(key, verdict); err != nil {
		log.G(s.ctx).WithError(err).WithField("id", c.id).Warn("the policy's verdict is not remembered")
	}
	log.G(s.ctx).WithFields(log.Fields{"id": c.id, "image": verdict.Image, "digest": verdict.Digest}).Info(verdict.Words())
	return nil
}

// allowedPath is allowed for a dump that is in no image: nobody can have signed it.
func allowedPath() error {
	policy, err := images.LoadPolicy(images.PolicyPath())
	if err == nil && policy != nil && policy.Signature == oci.SignatureRequire {
		err = fmt.Errorf("the node's policy %s wants a signature, which a directory cannot have; make a checkpoint image, sign it (cracctl sign) and run that", policy.Path)
	}
	if err != nil {
		return &coldReason{code: images.CodePolicy, err: err}
	}
	return nil
}

// verdictsOf is in containerd's state directory, which is gone with a reboot, as the
// directories are that a verdict is about when containerd's root is made anew.
func verdictsOf(bundle string) images.Verdicts {
	// STATE/io.containerd.runtime.v2.task/NAMESPACE/ID
	tasks := filepath.Dir(filepath.Dir(bundle))
	if filepath.Base(tasks) != "io.containerd.runtime.v2.task" {
		return ""
	}
	return images.Verdicts(filepath.Join(filepath.Dir(tasks), "crac-verdicts"))
}

// judge runs `cracctl judge`.
func (s *service) judge(r images.PolicyRequest) (*images.Verdict, error) {
	path, err := findBuilder()
	if err != nil {
		return nil, err
	}
	request, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(s.ctx, judgeTimeout)
	defer cancel()
	var out, words bytes.Buffer
	cmd := exec.CommandContext(ctx, path, "judge")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(append(request, '\n')), &out, &words
	wait, err := s.reaper.Start(cmd)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", path, err)
	}
	if err := wait(); err != nil {
		if said := strings.TrimSpace(words.String()); said != "" {
			err = errors.New(said)
		}
		return nil, fmt.Errorf("%s judge: %w", path, err)
	}
	verdict := new(images.Verdict)
	if err := json.Unmarshal(out.Bytes(), verdict); err != nil {
		return nil, fmt.Errorf("%s judge said %.200q: %w", path, out.String(), err)
	}
	return verdict, nil
}
