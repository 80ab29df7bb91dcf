// Package load tells how many threads want to run on this machine.
package load

import "os"

// Open opens what Runnable reads, again and again.
func Open() (*os.File, error) { return os.Open("/proc/loadavg") }

// Runnable is how many threads want to run at this moment, with those that do; 0 if
// nobody knows.
func Runnable(f *os.File) int {
	if f == nil {
		return 0
	}
	var line [64]byte
	n, _ := f.ReadAt(line[:], 0)
	return parse(line[:n])
}

// parse reads their number from /proc/loadavg: "0.20 0.18 0.12 1/80 11206" has one.
func parse(loadavg []byte) int {
	spaces, n := 0, 0
	for _, c := range loadavg {
		switch {
		case c == ' ':
			spaces++
		case spaces == 3 && c >= '0' && c <= '9':
			n = 10*n + int(c-'0')
		case spaces == 3:
			return n
		}
	}
	return 0
}
