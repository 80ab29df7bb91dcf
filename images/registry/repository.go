package registry

import (
	"context"
	"fmt"
	"net/http"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	orasregistry "oras.land/oras-go/v2/registry"
	"oras.land/oras-go/v2/registry/remote"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// Repository is the repository of an image's name, for what refers to images there
// (signatures): containerd's client cannot push that where a registry has no API for
// it. Hosts and credentials are those of a push.
func (c Config) Repository(ctx context.Context, ref string) (*remote.Repository, error) {
	spec, err := reference.Parse(ref)
	if err != nil {
		return nil, fmt.Errorf("image name %s: %w", ref, err)
	}
	r, err := orasregistry.ParseReference(spec.Locator)
	if err != nil {
		return nil, fmt.Errorf("image name %s: %w", ref, err)
	}
	hosts, err := c.hosts(ctx)(r.Registry)
	if err != nil {
		return nil, fmt.Errorf("find the registry of %s: %w", ref, err)
	}
	for _, h := range hosts {
		if !h.Capabilities.Has(docker.HostCapabilityPush) {
			continue
		}
		if h.Path != "/v2" {
			return nil, fmt.Errorf("the registry of %s has its API at %s (override_path in a hosts.toml), where signatures cannot be sent to", ref, h.Path)
		}
		plain, err := c.isPlain(ctx, h)
		if err != nil {
			return nil, fmt.Errorf("find the registry of %s: %w", ref, err)
		}
		r.Registry = h.Host
		return &remote.Repository{
			Reference: r,
			PlainHTTP: plain,
			Client: &auth.Client{Client: h.Client, Cache: auth.NewCache(), Credential: func(_ context.Context, host string) (auth.Credential, error) {
				user, secret, err := c.credentials(host)
				if user == "" {
					return auth.Credential{RefreshToken: secret}, err
				}
				return auth.Credential{Username: user, Password: secret}, err
			}},
			// The index that takes the place of the API stays when a newer one comes:
			// many registries do not let clients delete.
			SkipReferrersGC: true,
		}, nil
	}
	return nil, fmt.Errorf("no host of the registry of %s can be pushed to", ref)
}

// isPlain tells whether a host speaks plain http. At a loopback address, and where plain
// http will do, containerd's client finds that out with each request, and falls back by itself.
func (c Config) isPlain(ctx context.Context, h docker.RegistryHost) (bool, error) {
	if h.Scheme == "http" {
		return true, nil
	}
	if local, err := docker.MatchLocalhost(h.Host); err != nil || !local && !c.Insecure {
		return false, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodHead, "https://"+h.Host+"/v2/", http.NoBody)
	if err != nil {
		return false, err
	}
	resp, err := h.Client.Do(req)
	if err != nil {
		return false, err
	}
	return resp.Request.URL.Scheme == "http", resp.Body.Close()
}
