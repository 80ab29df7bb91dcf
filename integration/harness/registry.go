package harness

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"
)

// loopback is where registries listen, unless other nodes have to reach them.
const loopback = "127.0.0.1"

// RegistryServer is a private image registry.
type RegistryServer struct {
	Host string // host:port, the first part of a reference
	Dir  string
	proc *process
}

// StartRegistry starts a registry whose data lie in dir/registry. containerd's clients talk
// plain http to the loopback address by themselves.
func (d *Daemon) StartRegistry(ctx context.Context) (*RegistryServer, error) {
	return d.startRegistry(ctx, Registry, loopback, Registry.Name)
}

// StartRegistryOf is StartRegistry with another program. Its data lie in a directory of its name.
func (d *Daemon) StartRegistryOf(ctx context.Context, tool Tool) (*RegistryServer, error) {
	return d.startRegistry(ctx, tool, loopback, tool.Name)
}

// StartRegistryAt is StartRegistry at another of the host's addresses. Clients have to be told
// that it talks plain http: see PlainHTTP.
func (d *Daemon) StartRegistryAt(ctx context.Context, address string) (*RegistryServer, error) {
	return d.startRegistry(ctx, Registry, address, filepath.Join(Registry.Name, address))
}

// PlainHTTP lets what pushes and pulls on behalf of the daemon talk plain http to a registry.
func (d *Daemon) PlainHTTP(host string) error {
	dir := d.path(filepath.Join("certs.d", host))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, "hosts.toml"), fmt.Appendf(nil, "server = %q\n", "http://"+host), 0o600)
}

func (d *Daemon) startRegistry(ctx context.Context, tool Tool, address, name string) (*RegistryServer, error) {
	bin, err := d.Tools.path(tool)
	if err != nil {
		return nil, err
	}
	dir := d.path(name)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	// The registry cannot tell which port it was given, so a free one is chosen here; another
	// program may take it in between, hence the attempts.
	for range 5 {
		var l net.Listener
		if l, err = net.Listen("tcp", net.JoinHostPort(address, "0")); err != nil {
			return nil, err
		}
		r := &RegistryServer{Host: l.Addr().String(), Dir: dir}
		_ = l.Close()
		conf := fmt.Sprintf(`version: 0.1
log: {level: warn}
storage: {filesystem: {rootdirectory: %q}, delete: {enabled: true}, maintenance: {uploadpurging: {enabled: false}}}
http: {addr: %q}
`, filepath.Join(dir, "data"), r.Host)
		file := filepath.Join(dir, "config.yml")
		if err := os.WriteFile(file, []byte(conf), 0o600); err != nil {
			return nil, err
		}
		cmd := d.Command(context.Background(), bin, "serve", file)
		// Tracing is on unless it is told otherwise, and would look for a collector.
		cmd.Env = append(cmd.Env, "OTEL_TRACES_EXPORTER=none")
		if r.proc, err = startProcess(cmd, d.path(name+".log")); err != nil {
			return nil, err
		}
		wait, cancel := context.WithTimeout(ctx, WaitLimit)
		err = r.proc.waitFor(wait, func(ctx context.Context) error {
			resp, err := get(ctx, "http://"+r.Host+"/v2/")
			if err != nil {
				return err
			}
			_ = resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				return fmt.Errorf("status %s", resp.Status)
			}
			return nil
		})
		cancel()
		if err == nil {
			d.registries = append(d.registries, r)
			return r, nil
		}
		_ = r.proc.stop(time.Second)
		if ctx.Err() != nil {
			break
		}
	}
	return nil, fmt.Errorf("start the registry: %w (its log: %s)", err, tail(d.readLog(name+".log"), 2000))
}
