package shim

import (
	"bytes"
	"errors"
	"fmt"
	"os"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/typeurl/v2"
	"github.com/pelletier/go-toml/v2"
	"google.golang.org/protobuf/types/known/anypb"
)

// runtimeOptions reads the options of a create request. Clients know this
// runtime as one like runc's and send runc's options; containerd's CRI knows it
// as a foreign one and sends its generic options, whose body has the same keys
// in TOML. No options are the zero options.
func runtimeOptions(opts *anypb.Any) (*runcoptions.Options, error) {
	if len(opts.GetValue()) == 0 {
		return &runcoptions.Options{}, nil // `ctr containers restore` sends an empty Any
	}
	v, err := typeurl.UnmarshalAny(opts)
	if err != nil {
		return nil, fmt.Errorf("options of type %q are not known to this runtime; it takes runc's or containerd's runtime options: %w", opts.GetTypeUrl(), errdefs.ErrInvalidArgument)
	}
	var o *runcoptions.Options
	switch v := v.(type) {
	case *runcoptions.Options:
		o = v
	case *runtimeoptions.Options:
		if o, err = tomlOptions(v); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("options of type %q are not this runtime's; it takes runc's or containerd's runtime options: %w", opts.GetTypeUrl(), errdefs.ErrInvalidArgument)
	}
	if o.BinaryName != "" {
		return nil, fmt.Errorf("option BinaryName=%q has no meaning for this runtime, which runs containers itself; remove it: %w", o.BinaryName, errdefs.ErrInvalidArgument)
	}
	return o, nil
}

// tomlKeys are runc's options as an administrator writes them in containerd's
// configuration, together with the keys of the envelope that they come in.
type tomlKeys struct {
	TypeUrl    string
	ConfigPath string
	ConfigBody string

	NoPivotRoot   bool
	NoNewKeyring  bool
	ShimCgroup    string
	IoUid         uint32
	IoGid         uint32
	BinaryName    string
	Root          string
	SystemdCgroup bool
	CriuImagePath string
	CriuWorkPath  string
}

func tomlOptions(o *runtimeoptions.Options) (*runcoptions.Options, error) {
	body, from := o.ConfigBody, "runtime options"
	if len(body) == 0 && o.ConfigPath != "" {
		var err error
		if body, err = os.ReadFile(o.ConfigPath); err != nil {
			return nil, fmt.Errorf("runtime options (ConfigPath): %w", err)
		}
		from = o.ConfigPath
	}
	var keys tomlKeys
	if err := toml.NewDecoder(bytes.NewReader(body)).DisallowUnknownFields().Decode(&keys); err != nil {
		var strict *toml.StrictMissingError
		if errors.As(err, &strict) {
			return nil, fmt.Errorf("%s have keys that are not known (the known ones are runc's: NoPivotRoot, NoNewKeyring, ShimCgroup, IoUid, IoGid, Root, SystemdCgroup, CriuImagePath, CriuWorkPath):\n%s: %w", from, strict.String(), errdefs.ErrInvalidArgument)
		}
		return nil, fmt.Errorf("%s: %w: %w", from, err, errdefs.ErrInvalidArgument)
	}
	return &runcoptions.Options{
		NoPivotRoot:   keys.NoPivotRoot,
		NoNewKeyring:  keys.NoNewKeyring,
		ShimCgroup:    keys.ShimCgroup,
		IoUid:         keys.IoUid,
		IoGid:         keys.IoGid,
		BinaryName:    keys.BinaryName,
		Root:          keys.Root,
		SystemdCgroup: keys.SystemdCgroup,
		CriuImagePath: keys.CriuImagePath,
		CriuWorkPath:  keys.CriuWorkPath,
	}, nil
}
