package hook

import "errors"

// MakeDir makes the directory that a container sees as /run/crac: a tmpfs of its
// own, which everyone may write, bounded in bytes and names. It needs
// CAP_SYS_ADMIN.
func MakeDir(path string) error { return errors.ErrUnsupported }

// RemoveDir unmounts and removes what MakeDir made. What is not there, or not
// mounted, is fine.
func RemoveDir(path string) error { return errors.ErrUnsupported }
