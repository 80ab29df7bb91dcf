package shim

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

// maxBootstrap bounds what containerd sends on standard input, in bytes.
const maxBootstrap = 10 << 20

// LegacyStart serves `start` for containerd before 2.3, which sends no bootstrap
// message but flags, an environment, and the runtime's options, and wants its
// answer in JSON. containerd's own shim package knows only the message. It
// returns false when the call is not of that kind; standard input is then as it
// was.
func LegacyStart(ctx context.Context, args []string) (bool, error) {
	if !slices.Contains(args, "start") {
		return false, nil
	}
	flags := flag.NewFlagSet("start", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	var p bootapi.BootstrapParams
	debug := flags.Bool("debug", false, "")
	flags.StringVar(&p.InstanceID, "id", "", "")
	flags.StringVar(&p.Namespace, "namespace", "", "")
	flags.StringVar(&p.ContainerdGrpcAddress, "address", "", "")
	for _, ignored := range []string{"publish-binary", "bundle", "socket", "debug-socket"} {
		flags.String(ignored, "", "")
	}
	if flags.Parse(args) != nil || flags.Arg(0) != "start" || p.InstanceID == "" {
		return false, nil
	}
	input, err := io.ReadAll(io.LimitReader(os.Stdin, maxBootstrap))
	if err != nil {
		return true, fmt.Errorf("read standard input: %w", err)
	}
	if isBootstrap(input, p.InstanceID, p.Namespace) {
		return false, replaceStdin(input)
	}
	p.LogLevel = bootapi.LogLevel_LOG_LEVEL_INFO
	if *debug {
		p.LogLevel = bootapi.LogLevel_LOG_LEVEL_DEBUG
	}
	if len(input) > 0 {
		var options anypb.Any
		if err := proto.Unmarshal(input, &options); err != nil {
			return true, fmt.Errorf("runtime options on standard input: %w", err)
		}
		o, err := runtimeOptions(&options)
		if err != nil {
			return true, err
		}
		if err := p.AddExtension(o); err != nil {
			return true, err
		}
	}
	result, err := Manager{}.Start(namespaces.WithNamespace(ctx, p.Namespace), &p)
	if err != nil {
		return true, err
	}
	return true, json.NewEncoder(os.Stdout).Encode(struct {
		Version  int32  `json:"version"`
		Address  string `json:"address"`
		Protocol string `json:"protocol"`
	}{result.Version, result.Address, result.Protocol})
}

// isBootstrap tells the bootstrap message from options that parse as one: it
// repeats what the flags say.
func isBootstrap(input []byte, id, namespace string) bool {
	var p bootapi.BootstrapParams
	return len(input) > 0 && proto.Unmarshal(input, &p) == nil && p.InstanceID == id && p.Namespace == namespace
}

// replaceStdin makes input readable once more.
func replaceStdin(input []byte) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	go func() {
		_, _ = io.Copy(w, bytes.NewReader(input))
		w.Close()
	}()
	os.Stdin = r
	return nil
}
