// Package registry pushes images to where their names say, with the settings that
// containerd's own clients have: host directories and Docker's credentials.
package registry

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	hostsconfig "github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	dockerconfig "github.com/docker/cli/cli/config"
	"github.com/pelletier/go-toml/v2"
)

// Config is where the settings of registries are. The zero value knows none:
// https, without credentials.
type Config struct {
	// HostDirs hold one directory for each registry, with a hosts.toml or
	// certificates, as containerd's config_path does. The first that has one counts.
	HostDirs []string
	// DockerConfig is the directory of Docker's config.json.
	DockerConfig string
}

// DefaultConfig is what nerdctl would use in this environment: the host
// directories that its configuration (NERDCTL_TOML) names, else containerd's and
// Docker's; credentials from DOCKER_CONFIG, else ~/.docker.
func DefaultConfig() (Config, error) {
	c := Config{DockerConfig: dockerconfig.Dir()}
	etc, config := "/etc", "/etc/nerdctl/nerdctl.toml"
	if os.Geteuid() != 0 {
		dir, err := os.UserConfigDir()
		if err != nil {
			return c, fmt.Errorf("find the settings of registries: %w", err)
		}
		etc, config = dir, filepath.Join(dir, "nerdctl", "nerdctl.toml")
	}
	c.HostDirs = []string{filepath.Join(etc, "containerd", "certs.d"), filepath.Join(etc, "docker", "certs.d")}

	if named := os.Getenv("NERDCTL_TOML"); named != "" {
		config = named
	}
	data, err := os.ReadFile(config)
	if errors.Is(err, os.ErrNotExist) {
		return c, nil
	}
	if err != nil {
		return c, fmt.Errorf("read nerdctl's settings: %w", err)
	}
	var nerdctl struct {
		HostsDir []string `toml:"hosts_dir"`
	}
	if err := toml.Unmarshal(data, &nerdctl); err != nil {
		return c, fmt.Errorf("read nerdctl's settings in %s: %w; correct them, or name others in NERDCTL_TOML", config, err)
	}
	if nerdctl.HostsDir != nil {
		c.HostDirs = nerdctl.HostsDir
	}
	return c, nil
}

// resolver speaks to registries. Plain http is for the loopback addresses and for
// what a hosts.toml says.
func (c Config) resolver(ctx context.Context, tracker docker.StatusTracker) remotes.Resolver {
	return docker.NewResolver(docker.ResolverOptions{
		Tracker: tracker,
		Hosts: hostsconfig.ConfigureHosts(ctx, hostsconfig.HostOptions{
			HostDir:     c.hostDir,
			Credentials: c.credentials,
		}),
	})
}

func (c Config) hostDir(host string) (string, error) {
	for _, dir := range c.HostDirs {
		found, err := hostsconfig.HostDirFromRoot(dir)(host)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return "", err
		}
		return found, checkHosts(filepath.Join(found, "hosts.toml"))
	}
	return "", nil
}

// checkHosts refuses a file that containerd's client would pass over in silence,
// to go to another host than the one that was meant.
func checkHosts(file string) error {
	data, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil // certificates alone
	}
	if err != nil {
		return err
	}
	var any map[string]any
	if err := toml.Unmarshal(data, &any); err != nil {
		return fmt.Errorf("%s is not what it should be: %w", file, err)
	}
	return nil
}

// credentials of a registry, for containerd's client: a user and a password, or no
// user and a token.
func (c Config) credentials(host string) (user, secret string, err error) {
	if c.DockerConfig == "" {
		return "", "", nil
	}
	config, err := dockerconfig.Load(c.DockerConfig)
	if err != nil {
		return "", "", fmt.Errorf("credentials for %s: %w", host, err)
	}
	key := host
	switch host {
	case "docker.io", "index.docker.io", "registry-1.docker.io":
		key = "https://index.docker.io/v1/" // its name in every client
	}
	auth, err := config.GetAuthConfig(key)
	if err != nil {
		return "", "", fmt.Errorf("credentials for %s, from %s: %w", host, config.Filename, err)
	}
	if auth.IdentityToken != "" {
		return "", auth.IdentityToken, nil
	}
	return auth.Username, auth.Password, nil
}

// hostOf is the part of an image's name that says where it is pushed.
func hostOf(ref string) string {
	host, _, _ := strings.Cut(ref, "/")
	return host
}
