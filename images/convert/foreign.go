package convert

import (
	"context"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/mnt"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/images/blob"
	"github.com/crac-shim/crac/images/build"
)

// engineFiles are files that engines bind into a container, made anew for every
// container. A clone has those of its own request, or none.
var engineFiles = []string{"/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/run/.containerenv", "/dev/termination-log"}

const (
	hooksMount  = "/run/crac" // our shim's
	shmMount    = "/dev/shm"
	cgroupMount = "/sys/fs/cgroup"
)

// adapt changes a foreign dump, and its spec, so that a plain request fits it. A dump
// leaves many mounts to whoever restores it, under the names of their places: an
// engine knows its own, another would have to offer each of them.
//
//	the engine's own files   are left out, if nothing is open in them
//	cgroup file systems      likewise
//	/dev/shm                 becomes the dump's own, with the files that the archive has of it
//	anything else            stays: a request must have a mount there
//
// keep names mounts that stay in any case.
func (s *source) adapt(ctx context.Context, keep []string, emit func(build.Event)) error {
	all, err := s.dump.readMounts()
	if err != nil {
		return err
	}
	kept := func(e *mnt.MntEntry) bool {
		return slices.ContainsFunc(keep, func(k string) bool { return within(e.GetMountpoint(), path.Clean(k)) })
	}
	var dropped, needed []string
	// The deepest first: a mount with another in it is in use.
	entries := slices.SortedStableFunc(slices.Values(all.entries), func(a, b *mnt.MntEntry) int {
		return len(b.GetMountpoint()) - len(a.GetMountpoint())
	})
	for _, e := range entries {
		place := e.GetMountpoint()
		switch {
		case kept(e), place == "/":
		case place == shmMount && external(e) && e.GetRoot() == "/":
			if err := s.ownShm(ctx, all, e, emit); err != nil {
				return err
			}
			continue
		case slices.Contains(engineFiles, place) && external(e), within(place, cgroupMount):
			if !all.inUse(e) {
				if err := all.drop(e); err != nil {
					return err
				}
				dropped = append(dropped, place)
				continue
			}
		}
		if external(e) {
			needed = append(needed, place)
		}
	}
	s.spec.Mounts = slices.DeleteFunc(s.spec.Mounts, func(m specs.Mount) bool {
		return slices.Contains(dropped, path.Clean(m.Destination))
	})
	slices.Sort(needed)
	if len(dropped) > 0 {
		var shown []string
		for _, p := range dropped {
			if !within(path.Dir(p), cgroupMount) {
				shown = append(shown, p)
			}
		}
		slices.Sort(shown)
		s.report.leave("mounts that a clone has from its own request, or not at all: %s", strings.Join(shown, ", "))
	}
	if len(needed) > 0 {
		s.report.leave("the sources of mounts: a clone's request must have a mount at %s", strings.Join(needed, ", "))
	}
	full, err := s.dump.network(true)
	if err != nil {
		return err
	}
	if full {
		s.report.leave("its network: a clone has the interfaces and addresses of its own request")
	}
	if err := s.dump.forgetRootMode(); err != nil {
		return err
	}
	return all.save()
}

// ownShm makes /dev/shm the dump's own.
func (s *source) ownShm(ctx context.Context, all *mounts, e *mnt.MntEntry, emit func(build.Event)) error {
	var tarball io.Reader
	if s.shm != "" {
		f, err := os.Open(s.shm)
		if err != nil {
			return err
		}
		defer f.Close()
		tell := build.Telling(build.Event{Event: images.EventReading, Name: shmMount}, emit)
		tarball = &blob.Reader{Ctx: ctx, R: f, Tell: tell} // its size counted when it was unpacked
		s.report.take("the files of %s", shmMount)
	}
	if err := all.own(e, tarball); err != nil {
		return fmt.Errorf("%s: %w", shmMount, err)
	}
	for i := range s.spec.Mounts {
		if path.Clean(s.spec.Mounts[i].Destination) == shmMount {
			s.spec.Mounts[i] = specs.Mount{
				Destination: shmMount, Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", e.GetOptions()},
			}
		}
	}
	return nil
}

func within(p, dir string) bool {
	return p == dir || strings.HasPrefix(p, strings.TrimSuffix(dir, "/")+"/")
}
