// Command cracctl is the operator's tool: it tells what a host can do, and makes
// checkpoint images.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/defaults"
	"github.com/containerd/log"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/cmd/cracctl/plain"
	"github.com/crac-shim/crac/images/inspect"
	"github.com/crac-shim/crac/images/registry"
)

func main() {
	// What containerd's client says at the level info is for a daemon's log.
	_ = log.SetLevel("warn")
	ctx, stop := untilSignal()
	err := newCommand().ExecuteContext(ctx)
	stop()
	if err != nil {
		if !errors.Is(err, errReported) {
			printError(os.Stderr, err)
		}
		var own statusError
		if errors.As(err, &own) {
			os.Exit(own.status)
		}
		os.Exit(1)
	}
}

func printError(w io.Writer, err error) { fmt.Fprintln(plain.Writer(w), "cracctl:", err) }

// untilSignal gives a context that ends with a signal which asks for that: then what was
// begun is cleaned up, with a second one it is not. Signals that are ignored (nohup) stay so.
func untilSignal() (ctx context.Context, stop func()) {
	var ends []os.Signal
	for _, s := range []os.Signal{unix.SIGINT, unix.SIGTERM, unix.SIGHUP} {
		if !signal.Ignored(s) {
			ends = append(ends, s)
		}
	}
	if len(ends) == 0 { // would be all
		return context.WithCancel(context.Background())
	}
	ctx, stop = signal.NotifyContext(context.Background(), ends...)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}

// errReported ends a command that has already said what is wrong.
var errReported = errors.New("reported")

// target is which containerd, and which of its namespaces.
type target struct {
	address   string
	namespace string
	// snapshotter is for what has to be unpacked; empty: containerd's default.
	snapshotter string
	// unset is why nerdctl's settings are not known, as far as they would count.
	unset error
	dial  func(ctx context.Context, address string) (*containerd.Client, error)
}

const (
	addressEnv     = "CONTAINERD_ADDRESS"
	namespaceEnv   = "CONTAINERD_NAMESPACE"
	snapshotterEnv = "CONTAINERD_SNAPSHOTTER"
)

func newCommand() *cobra.Command { return commandFor(connect) }

// commandFor makes the command, for containerd as dial reaches it.
func commandFor(dial func(ctx context.Context, address string) (*containerd.Client, error)) *cobra.Command {
	t := target{dial: dial}
	settings, err := registry.ReadSettings()
	t.unset = err
	t.snapshotter = env(snapshotterEnv, settings.Snapshotter)
	root := &cobra.Command{
		Use:   "cracctl",
		Short: "Checkpoint containers into images that start warm",
		Long: `cracctl makes checkpoint images of containers that run under the containerd
runtime io.containerd.crac.v2, and tells what a host can and cannot do.`,
		SilenceUsage:  true,
		SilenceErrors: true,
		// With something to run, a mistyped command is an error, not a help text.
		Args: knownCommand,
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
		PersistentPreRun: func(cmd *cobra.Command, _ []string) {
			if !cmd.Hidden { // else it speaks to a program, which has a pipe
				cmd.SetOut(plain.Writer(cmd.OutOrStdout()))
			}
			said := func(flag, variable string) bool { return cmd.Flags().Changed(flag) || os.Getenv(variable) != "" }
			if said("address", addressEnv) && said("namespace", namespaceEnv) {
				t.unset = nil
			}
		},
	}
	// The names, variables and defaults are ctr's, and nerdctl's settings.
	root.PersistentFlags().StringVarP(&t.address, "address", "a", env(addressEnv, cmp.Or(settings.Address, defaults.DefaultAddress)),
		"address of containerd's socket ("+addressEnv+", else nerdctl.toml)")
	root.PersistentFlags().StringVarP(&t.namespace, "namespace", "n", env(namespaceEnv, cmp.Or(settings.Namespace, "default")),
		"namespace of containers and images ("+namespaceEnv+", else nerdctl.toml)")
	root.AddCommand(
		newDoctor(&t),
		newCheck(&t),
		newCheckpoint(&t),
		newPush(&t),
		newInspect(&t),
		newVerify(&t),
		newList(&t),
		newHistory(&t),
		newDiff(&t),
		newFlatten(&t),
		newEncrypt(&t),
		newImport(&t),
		newExport(&t),
		newSign(&t),
		newRemove(&t),
		newEvents(&t),
		newTrace(&t),
		newTune(&t),
		newBuildImage(&t),
		newJudge(&t),
		newVersion(),
		newMan(),
	)
	for _, cmd := range root.Commands() {
		cmd.Args, cmd.RunE = withUsage(cmd.Args), withWayOut(cmd.RunE)
	}
	return root
}

// knownCommand refuses what is left of a command line without a command: a mistyped one.
func knownCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	cmd.SuggestionsMinimumDistance = 2
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		return fmt.Errorf("unknown command %q; did you mean %s?", args[0], strings.Join(near, " or "))
	}
	return fmt.Errorf("unknown command %q; see %s --help", args[0], cmd.CommandPath())
}

// withUsage says which arguments a command takes where cobra only counts them.
func withUsage(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return fmt.Errorf("%w; usage: %s", err, cmd.UseLine())
		}
		return nil
	}
}

// withWayOut adds what to do about an error that a library gives without.
func withWayOut(run func(*cobra.Command, []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		err := run(cmd, args)
		if errors.Is(err, inspect.ErrNoCheckpoint) {
			return fmt.Errorf("%w; cracctl ls lists the images that have one, and cracctl checkpoint makes one of a container", err)
		}
		return err
	}
}

// completions offers a flag's values to the shell.
func completions(cmd *cobra.Command, flag string, values ...string) {
	_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp))
}

func env(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}
