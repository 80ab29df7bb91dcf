package runtime

import (
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Prefetch has the kernel read the memory of dumps from disk, so that it is in the
// page cache, or on its way there, when the restore gets to it. What it cannot read
// the restore will complain of.
func Prefetch(dirs ...string) {
	for _, dir := range dirs {
		files, _ := filepath.Glob(filepath.Join(dir, "pages-*.img"))
		for _, path := range files {
			prefetch(path)
		}
	}
}

// prefetchPart is how much to ask for at once, in bytes: what has to be read from
// disk keeps the caller waiting while the disk's queue is full.
const prefetchPart = 4 << 20

func prefetch(path string) {
	f, err := os.Open(path)
	if err != nil {
		return
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || !st.Mode().IsRegular() {
		return
	}
	for at := int64(0); at < st.Size(); at += prefetchPart {
		part := min(prefetchPart, st.Size()-at)
		// Most dumps are in the cache, and then there is nothing to do.
		var there unix.Cachestat_t
		err := unix.Cachestat(uint(f.Fd()), &unix.CachestatRange{Off: uint64(at), Len: uint64(part)}, &there, 0)
		if err == nil && int64(there.Cache)*int64(os.Getpagesize()) >= part {
			continue
		}
		if err := unix.Fadvise(int(f.Fd()), at, part, unix.FADV_WILLNEED); err != nil {
			return
		}
	}
}
