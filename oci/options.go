package oci

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// RestoreMode says what a start does with a checkpoint.
type RestoreMode string

// MemoryMode says how a restored workload gets its memory.
type MemoryMode string

// TCPMode says what happens to established TCP connections.
type TCPMode string

// Compression is how layers are stored.
type Compression string

// PreDumpMode says when memory is copied ahead of the freeze.
type PreDumpMode string

// HooksMode says whether participants are told, and whether there must be one.
type HooksMode string

// JavaMode says how a JVM gets the Java library.
type JavaMode string

// The options' values. The zero value of each type behaves as its default.
const (
	RestoreAuto    RestoreMode = "auto"    // warm if possible, else cold with a reason; the default
	RestoreRequire RestoreMode = "require" // warm or an error
	RestoreNever   RestoreMode = "never"   // cold

	MemoryAuto  MemoryMode = "auto" // the default
	MemoryLazy  MemoryMode = "lazy"
	MemoryEager MemoryMode = "eager"

	// TCPClose leaves established connections out of the dump. It is the
	// default: the original keeps them, and a clone, which is another process
	// at another address, finds them closed, as after any network failure.
	TCPClose TCPMode = "close"
	// TCPEstablished keeps them, for a clone that takes the original's place
	// and address.
	TCPEstablished TCPMode = "established"
	// TCPError refuses to dump while there are any.
	TCPError TCPMode = "error"

	CompressionZstd Compression = "zstd" // the default
	CompressionGzip Compression = "gzip" // for readers that know no other

	PreDumpAuto    PreDumpMode = "auto"    // when there is much, and the kernel can tell what changes; the default
	PreDumpRequire PreDumpMode = "require" // or there is no checkpoint
	PreDumpOff     PreDumpMode = "off"

	HooksOptional HooksMode = "optional" // the default
	HooksOff      HooksMode = "off"
	HooksRequired HooksMode = "required"

	JavaOff  JavaMode = "off"  // the default: it does not, or the image sees to it
	JavaAuto JavaMode = "auto" // by options after the program's name, if that is java
	JavaEnv  JavaMode = "env"  // by JDK_JAVA_OPTIONS, for a JVM that a script starts

	CheckpointAllowNone     = "none" // the default
	CheckpointAllowWorkload = "workload"

	CheckpointWhenAsked = "asked" // the default: by a client, or by the workload if it may
	CheckpointWhenReady = "ready" // also once, after a cold start, when the probe succeeds
)

// DefaultHookTimeout is how long one notification may take.
const DefaultHookTimeout = 10 * time.Second

// Options is what a container's annotations and environment ask of the runtime.
type Options struct {
	Restore         RestoreMode
	Memory          MemoryMode
	TCP             TCPMode
	CheckpointImage string
	CheckpointExit  bool
	// CheckpointPush sends a new checkpoint image to the registry in its name.
	CheckpointPush bool
	// CheckpointIndex puts a new checkpoint image into an index, beside the images
	// of other platforms.
	CheckpointIndex bool
	// CheckpointPreDump is when memory is copied ahead of the freeze: see the PreDump
	// constants.
	CheckpointPreDump PreDumpMode
	// CheckpointCompression of the layers of a checkpoint image; empty: zstd, or gzip
	// for encrypted ones.
	CheckpointCompression Compression
	// CheckpointEncryptTo are whom the new layers are encrypted for: see
	// CheckRecipients.
	CheckpointEncryptTo []string
	Hooks               HooksMode
	HookTimeout         time.Duration

	HookBeforeCheckpoint string
	HookAfterRestore     string
	HookAfterResume      string

	CheckpointAllow string
	Java            JavaMode

	// FDPolicy is a policy's text (ParseFDPolicy), or where in the image one is
	// (FDPolicyPath); empty: none.
	FDPolicy string

	// CheckpointWhen asks for a checkpoint without anybody's call: see the
	// CheckpointWhen constants. CheckpointProbe tells that the workload is ready:
	// a URL or a command. CheckpointWarmup is how often the probe is repeated
	// then, before the checkpoint.
	CheckpointWhen   string
	CheckpointProbe  string
	CheckpointWarmup int
}

// BringsJava tells whether the runtime brings a container the Java library, which
// has nothing to talk to without hooks.
func (o Options) BringsJava() bool {
	return (o.Java == JavaAuto || o.Java == JavaEnv) && o.Hooks != HooksOff
}

// option is one known key: how its value is read.
type option struct {
	key    string
	values string // for messages
	set    func(*Options, string) error
	// annotationOnly options are the operator's alone: the environment comes
	// from the image, which may be hostile.
	annotationOnly bool
}

// knownOptions is a function, not a variable, to keep program start free of it.
func knownOptions() []option {
	return []option{
		enum("restore", func(o *Options) *RestoreMode { return &o.Restore }, RestoreAuto, RestoreRequire, RestoreNever),
		enum("memory", func(o *Options) *MemoryMode { return &o.Memory }, MemoryAuto, MemoryLazy, MemoryEager),
		enum("tcp", func(o *Options) *TCPMode { return &o.TCP }, TCPClose, TCPEstablished, TCPError),
		// An image that chose the name could replace another image.
		{key: "checkpoint.image", values: "an image name", annotationOnly: true, set: func(o *Options, v string) error {
			o.CheckpointImage = v
			return CheckRef(v)
		}},
		boolean("checkpoint.exit", func(o *Options) *bool { return &o.CheckpointExit }),
		// An image that chose to be pushed would send its memory where it likes.
		annotationOnly(boolean("checkpoint.push", func(o *Options) *bool { return &o.CheckpointPush })),
		boolean("checkpoint.index", func(o *Options) *bool { return &o.CheckpointIndex }),
		enum("checkpoint.pre-dump", func(o *Options) *PreDumpMode { return &o.CheckpointPreDump }, PreDumpAuto, PreDumpRequire, PreDumpOff),
		enum("checkpoint.compression", func(o *Options) *Compression { return &o.CheckpointCompression }, CompressionZstd, CompressionGzip),
		// Names of files on the host.
		{key: "checkpoint.encrypt-to", values: RecipientForms + "; several with commas between", annotationOnly: true, set: func(o *Options, v string) (err error) {
			o.CheckpointEncryptTo, err = ParseRecipients(v)
			return err
		}},
		enum("hooks", func(o *Options) *HooksMode { return &o.Hooks }, HooksOptional, HooksOff, HooksRequired),
		{key: "hook.timeout", values: "a duration such as 10s, longer than 0", set: func(o *Options, v string) error {
			d, err := time.ParseDuration(v)
			if err == nil && d <= 0 {
				err = fmt.Errorf("not longer than 0")
			}
			if err == nil {
				o.HookTimeout = d
			}
			return err
		}},
		text("hook.before-checkpoint", hookValues, func(o *Options) *string { return &o.HookBeforeCheckpoint }),
		text("hook.after-restore", hookValues, func(o *Options) *string { return &o.HookAfterRestore }),
		text("hook.after-resume", hookValues, func(o *Options) *string { return &o.HookAfterResume }),
		annotationOnly(enum("checkpoint.allow", func(o *Options) *string { return &o.CheckpointAllow }, CheckpointAllowNone, CheckpointAllowWorkload)),
		annotationOnly(enum("checkpoint.when", func(o *Options) *string { return &o.CheckpointWhen }, CheckpointWhenAsked, CheckpointWhenReady)),
		text("checkpoint.probe", "an http URL in the container or a command", func(o *Options) *string { return &o.CheckpointProbe }),
		{key: "checkpoint.warmup", values: "a number of requests, 0 to 1000000", set: func(o *Options, v string) error {
			n, err := strconv.Atoi(v)
			if err == nil && (n < 0 || n > 1000000) {
				err = fmt.Errorf("out of range")
			}
			if err == nil {
				o.CheckpointWarmup = n
			}
			return err
		}},
		enum("java", func(o *Options) *JavaMode { return &o.Java }, JavaOff, JavaAuto, JavaEnv),
		{key: "fd-policy", values: "rules (docs/fd-policy.md), or file:/path/in/the/image", set: func(o *Options, v string) error {
			o.FDPolicy = v
			return checkFDPolicy(v)
		}},
	}
}

func boolean(key string, field func(*Options) *bool) option {
	return option{key: key, values: "true, false", set: func(o *Options, v string) (err error) {
		*field(o), err = strconv.ParseBool(v)
		return err
	}}
}

func enum[T ~string](key string, field func(*Options) *T, values ...T) option {
	names := make([]string, len(values))
	for i, v := range values {
		names[i] = string(v)
	}
	o := option{key: key, values: strings.Join(names, ", "), set: func(o *Options, v string) error {
		if !slices.Contains(values, T(v)) {
			return fmt.Errorf("unknown value")
		}
		*field(o) = T(v)
		return nil
	}}
	return o
}

const hookValues = "a command, an http URL in the container, signal:NAME"

// text is an option whose value is read by whoever honours it.
func text(key, values string, field func(*Options) *string) option {
	return option{key: key, values: values, set: func(o *Options, v string) error {
		if strings.TrimSpace(v) == "" {
			return fmt.Errorf("empty")
		}
		*field(o) = v
		return nil
	}}
}

// envName is the environment variable that carries an option:
// hook.before-checkpoint → CRAC_HOOK_BEFORE_CHECKPOINT.
func envName(key string) string {
	return "CRAC_" + strings.ToUpper(strings.NewReplacer(".", "_", "-", "_").Replace(key))
}

// ParseOptions reads the options of a container: its annotations, and the
// CRAC_* variables of its environment for what the annotations do not say.
//
// An annotation below AnnotationPrefix that is neither an option nor reserved
// is an error: a mistyped option must not pass for a default. An unknown CRAC_*
// variable is not, because a workload may use the prefix for itself. Some options
// of checkpoints are annotations only.
func ParseOptions(annotations map[string]string, env []string) (Options, error) {
	o := Options{
		Restore: RestoreAuto, Memory: MemoryAuto, TCP: TCPClose, CheckpointPreDump: PreDumpAuto,
		Hooks: HooksOptional, HookTimeout: DefaultHookTimeout,
		CheckpointAllow: CheckpointAllowNone, CheckpointWhen: CheckpointWhenAsked, Java: JavaOff,
	}
	known := knownOptions()

	for _, key := range slices.Sorted(maps.Keys(annotations)) {
		name, ours := strings.CutPrefix(key, AnnotationPrefix)
		if !ours || key == LayerAnnotation || strings.HasPrefix(key, ImagePrefix) {
			continue
		}
		if !slices.ContainsFunc(known, func(k option) bool { return k.key == name }) {
			keys := make([]string, len(known))
			for i, k := range known {
				keys[i] = AnnotationPrefix + k.key
			}
			return Options{}, fmt.Errorf("annotation %q is no option of this runtime; known are %s", key, strings.Join(keys, ", "))
		}
	}

	for _, k := range known {
		source := "annotation " + AnnotationPrefix + k.key
		value, ok := annotations[AnnotationPrefix+k.key]
		if !ok && !k.annotationOnly {
			source = "environment variable " + envName(k.key)
			value, ok = lookup(env, envName(k.key))
		}
		if !ok {
			continue
		}
		if err := k.set(&o, value); err != nil {
			return Options{}, fmt.Errorf("%s has the value %.200q (%w); possible: %s", source, value, err, k.values)
		}
	}
	if o.CheckpointWhen == CheckpointWhenReady && (o.CheckpointProbe == "" || o.CheckpointImage == "") {
		return Options{}, fmt.Errorf("annotation %[1]scheckpoint.when=ready needs %[1]scheckpoint.probe, which tells when that is, and %[1]scheckpoint.image, which says into what", AnnotationPrefix)
	}
	return o, nil
}

func annotationOnly(o option) option {
	o.annotationOnly = true
	return o
}

// lookup finds a variable as a process would: the last one counts.
func lookup(env []string, name string) (string, bool) {
	for _, e := range slices.Backward(env) {
		if v, ok := strings.CutPrefix(e, name+"="); ok {
			return v, true
		}
	}
	return "", false
}
