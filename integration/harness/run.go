package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"
)

// CommandError is a command that did not end with code 0.
type CommandError struct {
	Args           []string
	Code           int // -1 when it did not exit by itself
	Stdout, Stderr string
	Err            error
}

func (e *CommandError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %v", strings.Join(e.Args, " "), e.Err)
	for _, o := range []string{e.Stderr, e.Stdout} {
		if o = strings.TrimSpace(o); o != "" {
			fmt.Fprintf(&b, "\n%s", tail(o, 4000))
		}
	}
	return b.String()
}

func (e *CommandError) Unwrap() error { return e.Err }

// ExitCode returns the exit code that err carries, 0 for nil and -1 for any other error.
func ExitCode(err error) int {
	if err == nil {
		return 0
	}
	var c *CommandError
	if errors.As(err, &c) {
		return c.Code
	}
	return -1
}

// Run runs a command and returns what it wrote to stdout. The error holds what it wrote to both.
func Run(ctx context.Context, cmd *exec.Cmd) (string, error) {
	return run(ctx, cmd, (*exec.Cmd).Start)
}

func run(ctx context.Context, cmd *exec.Cmd, start func(*exec.Cmd) error) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	// A child that outlives the command may hold the pipes open: do not wait for it for ever.
	cmd.WaitDelay = 5 * time.Second
	err := start(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	if err == nil {
		return stdout.String(), nil
	}
	if ctx.Err() != nil {
		err = fmt.Errorf("%w (%w)", err, context.Cause(ctx))
	}
	code := -1
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		code = exit.ExitCode()
	}
	return stdout.String(), &CommandError{cmd.Args, code, stdout.String(), stderr.String(), err}
}

// env is the environment of everything that the daemon or a client of it runs in.
func (d *Daemon) env(more ...string) []string {
	own := map[string]string{
		"PATH":                 d.searchPath(),
		"TMPDIR":               d.path("tmp"),
		markerEnv:              d.Dir,
		"CONTAINERD_ADDRESS":   d.Address,
		"CONTAINERD_NAMESPACE": d.Namespace,
		"NERDCTL_TOML":         d.path("nerdctl.toml"),
		"CNI_PATH":             d.Tools.CNI,
		"NETCONFPATH":          d.path("cni/net.d"),
		"CRAC_POLICY":          d.PolicyPath(),
	}
	var env []string
	for _, kv := range os.Environ() {
		k, _, _ := strings.Cut(kv, "=")
		if _, ok := own[k]; !ok {
			env = append(env, kv)
		}
	}
	for k, v := range own {
		env = append(env, k+"="+v)
	}
	return append(env, more...)
}

func (d *Daemon) searchPath() string {
	p := d.Tools.searchPath()
	if d.opts.OwnShims {
		p = d.path("bin") + ":" + p
	}
	return p
}

// Command prepares a command in the environment of the daemon: PATH with the project's tools,
// TMPDIR inside the daemon's directory, address and namespace for the clients.
func (d *Daemon) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	// exec.Command looks names up in our own PATH, not in the one of cmd.Env.
	for _, dir := range strings.Split(d.searchPath(), ":") {
		if p := dir + "/" + name; !strings.Contains(name, "/") && executable(p) {
			name = p
			break
		}
	}
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = d.env()
	cmd.Dir = d.Dir
	return cmd
}

// Ctr runs stock ctr and returns its stdout. It sees the daemon's network configuration where ctr
// looks for it (see inView), so `ctr run --cni` works without touching the host's /etc.
func (d *Daemon) Ctr(ctx context.Context, args ...string) (string, error) {
	return run(ctx, d.CtrCommand(ctx, args...), d.Start)
}

// CtrCommand prepares stock ctr. Start it with Daemon.Start when it needs the network.
func (d *Daemon) CtrCommand(ctx context.Context, args ...string) *exec.Cmd {
	return d.Command(ctx, "ctr", withFIFODir(args, d.path("fifo"))...)
}

// withFIFODir keeps ctr's FIFOs in the daemon's directory: a detached ctr leaves them behind.
func withFIFODir(args []string, dir string) []string {
	var at int
	switch {
	case len(args) > 0 && args[0] == "run":
		at = 1
	case len(args) > 1 && (args[0] == "tasks" || args[0] == "task" || args[0] == "t") && (args[1] == "start" || args[1] == "exec"):
		at = 2
	default:
		return args
	}
	for _, a := range args {
		if strings.HasPrefix(a, "--log-uri") { // ctr refuses both together
			return args
		}
	}
	out := append([]string{}, args[:at]...)
	return append(append(out, "--fifo-dir", dir), args[at:]...)
}

// Nerdctl runs stock nerdctl and returns its stdout. It reads the daemon's nerdctl.toml, and so do
// the hooks through which it makes a container's network.
func (d *Daemon) Nerdctl(ctx context.Context, args ...string) (string, error) {
	return Run(ctx, d.Command(ctx, "nerdctl", args...))
}

// Cracctl runs our own cracctl and returns its stdout.
func (d *Daemon) Cracctl(ctx context.Context, args ...string) (string, error) {
	return Run(ctx, d.Command(ctx, "cracctl", args...))
}

func tail(s string, n int) string {
	if len(s) <= n {
		return s
	}
	return "…" + s[len(s)-n:]
}
