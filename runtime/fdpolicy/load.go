package fdpolicy

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/oci"
)

// Load reads the policy that an fd-policy option means: its own text, or that of
// a file below the container's root file system. An empty option is an empty
// policy.
func Load(option, rootfs string) (oci.FDPolicy, error) {
	if option == "" {
		return oci.FDPolicy{}, nil
	}
	name, ok := oci.FDPolicyPath(option)
	if !ok {
		return oci.ParseFDPolicy([]byte(option))
	}
	data, err := readInside(rootfs, name)
	if err != nil {
		return oci.FDPolicy{}, fmt.Errorf("descriptor policy %s of the image: %w", name, err)
	}
	p, err := oci.ParseFDPolicy(data)
	if err != nil {
		return oci.FDPolicy{}, fmt.Errorf("descriptor policy %s of the image: %w", name, err)
	}
	return p, nil
}

// readInside reads a file that the container may have put there: links lead
// nowhere outside the root, and nothing is opened but a regular file, because to
// open a device or a FIFO does something, or blocks.
func readInside(rootfs, name string) ([]byte, error) {
	root, err := os.Open(rootfs)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	path, err := unix.Openat2(int(root.Fd()), name, &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(path)
	var st unix.Stat_t
	if err := unix.Fstat(path, &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, fmt.Errorf("%s is no regular file", name)
	}
	// O_NONBLOCK, because a lease that the container holds on it would make us wait
	// (fcntl(2), F_SETLEASE).
	f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", path), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, unix.EAGAIN) {
		return nil, fmt.Errorf("somebody in the container holds a lease on it: %w", err)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, oci.MaxFDPolicy+1)) // one more than is read as a policy
}
