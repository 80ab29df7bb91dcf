// Package registry pushes images to where their names say, with the settings that
// containerd's own clients have: host directories and Docker's credentials.
package registry

import (
	"context"
	"crypto/tls"
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
	// Insecure takes any certificate, and plain http where a registry speaks no https.
	Insecure bool
}

// Settings are those of nerdctl.toml that are about more than nerdctl. Empty ones are not
// said.
type Settings struct {
	Address          string   `toml:"address"`
	Namespace        string   `toml:"namespace"`
	Snapshotter      string   `toml:"snapshotter"`
	HostsDir         []string `toml:"hosts_dir"`
	InsecureRegistry bool     `toml:"insecure_registry"`
}

// ReadSettings reads nerdctl's configuration (NERDCTL_TOML), if there is one.
func ReadSettings() (s Settings, err error) {
	file := os.Getenv("NERDCTL_TOML")
	if file == "" {
		etc := configDir(os.Geteuid())
		if etc == "" {
			return s, nil
		}
		file = filepath.Join(etc, "nerdctl", "nerdctl.toml")
	}
	data, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return s, nil
	}
	if err != nil {
		return s, fmt.Errorf("read nerdctl's settings: %w", err)
	}
	if err := toml.Unmarshal(data, &s); err != nil {
		return Settings{}, fmt.Errorf("read nerdctl's settings in %s: %w; correct them, or name others in NERDCTL_TOML", file, err)
	}
	return s, nil
}

// configDir is where a user's settings are; empty for one who has no home.
func configDir(user int) string {
	if user == 0 {
		return "/etc"
	}
	dir, err := os.UserConfigDir()
	if err != nil {
		return ""
	}
	return dir
}

// DefaultConfig is what nerdctl would use in this environment: the host
// directories that its configuration (NERDCTL_TOML) names, else containerd's and
// Docker's; credentials from DOCKER_CONFIG, else ~/.docker.
func DefaultConfig() (Config, error) {
	c := Config{DockerConfig: dockerconfig.Dir()}
	if etc := configDir(os.Geteuid()); etc != "" {
		c.HostDirs = []string{filepath.Join(etc, "containerd", "certs.d"), filepath.Join(etc, "docker", "certs.d")}
	}
	s, err := ReadSettings()
	if err != nil {
		return c, err
	}
	if s.HostsDir != nil {
		c.HostDirs = s.HostsDir
	}
	c.Insecure = s.InsecureRegistry
	return c, nil
}

// resolver speaks to registries. Plain http is for the loopback addresses and for
// what a hosts.toml says.
func (c Config) resolver(ctx context.Context, tracker docker.StatusTracker) remotes.Resolver {
	return docker.NewResolver(docker.ResolverOptions{
		Tracker: tracker,
		Hosts:   c.hosts(ctx),
	})
}

func (c Config) hosts(ctx context.Context) docker.RegistryHosts {
	o := hostsconfig.HostOptions{HostDir: c.hostDir, Credentials: c.credentials}
	if c.Insecure {
		// With both it tries https, and falls back.
		o.DefaultScheme, o.DefaultTLS = "http", &tls.Config{InsecureSkipVerify: true} //nolint:gosec // as asked
	}
	return hostsconfig.ConfigureHosts(ctx, o)
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
