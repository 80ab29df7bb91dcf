package harness

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"time"
)

// hostFile is a file of the host as it was before somebody changed it.
type hostFile struct {
	path    string
	missing bool
	data    []byte
	mode    fs.FileMode
	changed time.Time
}

// KeepHostFile notes how a file of the host is that is about to be changed, a sysctl for instance.
// RestoreHostFile makes it so again, and Stop does for those that were forgotten.
func (d *Daemon) KeepHostFile(path string) error {
	f := hostFile{path: path}
	st, err := os.Stat(path)
	if err == nil {
		f.mode, f.changed = st.Mode().Perm(), st.ModTime()
		f.data, err = os.ReadFile(path)
	}
	if f.missing = errors.Is(err, fs.ErrNotExist); err != nil && !f.missing {
		return err
	}
	d.hostFilesMu.Lock()
	defer d.hostFilesMu.Unlock()
	d.hostFiles = append(d.hostFiles, f)
	return nil
}

// RestoreHostFile undoes what was done to a file since KeepHostFile. It may be called again.
func (d *Daemon) RestoreHostFile(path string) error {
	return d.restoreHostFiles(func(f hostFile) bool { return f.path == path })
}

// restoreHostFiles restores those that which says yes to, the last first.
func (d *Daemon) restoreHostFiles(which func(hostFile) bool) error {
	d.hostFilesMu.Lock()
	defer d.hostFilesMu.Unlock()
	var errs []error
	var others []hostFile
	for i := len(d.hostFiles) - 1; i >= 0; i-- {
		if f := d.hostFiles[i]; which(f) {
			errs = append(errs, f.restore())
		} else {
			others = append([]hostFile{f}, others...)
		}
	}
	d.hostFiles = others
	return errors.Join(errs...)
}

func (f hostFile) restore() error {
	if f.missing {
		if err := os.Remove(f.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return nil
	}
	if err := os.WriteFile(f.path, f.data, f.mode); err != nil {
		return err
	}
	if strings.HasPrefix(f.path, "/proc/") {
		return nil // no file with a time of its own
	}
	return errors.Join(os.Chmod(f.path, f.mode), os.Chtimes(f.path, f.changed, f.changed))
}
