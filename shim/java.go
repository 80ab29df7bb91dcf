package shim

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	securejoin "github.com/cyphar/filepath-securejoin/pathrs-lite"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/oci"
)

const (
	// jarDir and jarName are where a container has the Java library.
	jarDir  = "usr/lib/crac"
	jarName = "crac.jar"
	// maxJar bounds what is compared and written, in bytes.
	maxJar = 8 << 20

	javaOptionsEnv = "JDK_JAVA_OPTIONS"
)

// javaOptions make a JVM load the library when, and only when, the program or
// org.crac asks for it. A -javaagent would do more and cost more: it forbids
// archives of classes, and takes 50 ms of each start.
var javaOptions = []string{
	"-Xbootclasspath/a:/" + jarDir + "/" + jarName,
	"-Dorg.crac.Core.Compat=io.github.cracshim",
}

// adaptJava gives a container that is about to start cold the Java library, if
// the option java asks for that. A clone has in its memory, and in its files,
// what the dump had: it is left alone.
//
// What the request asked to run stays what the container's manifests tell
// (container.args).
func (s *service) adaptJava(c *container) error {
	spec := c.rt.Spec()
	if !c.options.BringsJava() || spec.Process == nil || len(spec.Process.Args) == 0 {
		return nil
	}
	p := javaProcess(c.options.Java, spec.Process)
	if p == nil {
		log.G(s.ctx).WithField("id", c.id).Infof("java=auto does nothing: the container runs %s; for a JVM that a script starts there is java=env", spec.Process.Args[0])
		return nil
	}
	if err := addJar(c, spec); err != nil {
		return fmt.Errorf("option %sjava=%s: %w", oci.AnnotationPrefix, c.options.Java, err)
	}
	c.args = spec.Process.Args
	spec.Process = p
	return nil
}

// javaProcess is a process with the options that load the library; nil if there
// is no place for them.
func javaProcess(mode oci.JavaMode, of *specs.Process) *specs.Process {
	p := *of
	switch {
	case mode == oci.JavaEnv:
		p.Env = withJavaOptions(p.Env)
	case path.Base(p.Args[0]) == "java":
		p.Args = slices.Insert(slices.Clone(p.Args), 1, javaOptions...)
	default:
		return nil
	}
	return &p
}

// withJavaOptions sets the variable from which the java launcher, since JDK 9,
// takes options before those of its command line.
func withJavaOptions(env []string) []string {
	options, out := strings.Join(javaOptions, " "), make([]string, 0, len(env)+1)
	value := options
	for _, e := range env {
		if v, ok := strings.CutPrefix(e, javaOptionsEnv+"="); ok {
			value = strings.TrimSpace(options + " " + v) // the last one counts
			continue
		}
		out = append(out, e)
	}
	return append(out, javaOptionsEnv+"="+value)
}

// addJar puts the library into a container's root file system, unless the same
// is there.
func addJar(c *container, spec *specs.Spec) error {
	jar, err := readJar()
	if err != nil {
		return err
	}
	rootfs := c.rootfs
	if rootfs == "" && spec.Root != nil {
		rootfs = spec.Root.Path
		if !filepath.IsAbs(rootfs) {
			rootfs = filepath.Join(c.bundle, rootfs)
		}
	}
	if err := putFile(rootfs, jarDir, jarName, jar); err != nil {
		if errors.Is(err, unix.EROFS) {
			return fmt.Errorf("cannot put the library into the root file system, which is read-only: put %s into the image (%w)", "/"+jarDir+"/"+jarName, err)
		}
		return fmt.Errorf("cannot put the library into the root file system: %w", err)
	}
	return nil
}

// readJar reads the library from where make install, or make build, puts it.
func readJar() ([]byte, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	return readFirst(images.JavaLibraryPaths(exe)...)
}

func readFirst(names ...string) ([]byte, error) {
	for _, name := range names {
		data, err := os.ReadFile(name)
		if !errors.Is(err, os.ErrNotExist) {
			return data, err
		}
	}
	return nil, fmt.Errorf("the Java library is in none of %s: make install puts it there, if there was a JDK to build it: %w", strings.Join(names, ", "), errdefs.ErrFailedPrecondition)
}

// putFile makes root/dir/name a file with this content that everybody can read.
// The links in root are an image's, and followed inside of it only.
func putFile(root, dir, name string, content []byte) error {
	top, err := os.OpenFile(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer top.Close()
	if there, err := securejoin.OpenatInRoot(top, dir); err == nil {
		same := hasFile(there, name, content)
		_ = there.Close()
		if same {
			return nil
		}
	}
	into, err := securejoin.MkdirAllHandle(top, dir, 0o755)
	if err != nil {
		return err
	}
	defer into.Close()
	at, tmp := int(into.Fd()), "."+name+".new"
	if err := unix.Unlinkat(at, tmp, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return &os.PathError{Op: "unlink", Path: path.Join("/", dir, tmp), Err: err}
	}
	fd, err := unix.Openat(at, tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return &os.PathError{Op: "create", Path: path.Join("/", dir, tmp), Err: err}
	}
	f := os.NewFile(uintptr(fd), tmp)
	_, err = f.Write(content)
	err = errors.Join(err, f.Chmod(0o644), f.Close())
	if err == nil {
		err = unix.Renameat(at, tmp, at, name)
	}
	if err != nil {
		_ = unix.Unlinkat(at, tmp, 0)
		return fmt.Errorf("write %s: %w", path.Join("/", dir, name), err)
	}
	return nil
}

// hasFile tells whether a directory has a readable file of this content.
func hasFile(dir *os.File, name string, content []byte) bool {
	// dir is a handle without the right to read; through it, and not past a link.
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() || st.Mode().Perm()&0o444 != 0o444 || st.Size() != int64(len(content)) {
		return false
	}
	have, err := io.ReadAll(io.LimitReader(f, maxJar))
	return err == nil && bytes.Equal(have, content)
}
