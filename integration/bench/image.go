package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/remotes/docker"
)

// registryTrips sends checkpoint images through a registry on this machine: to it, back into a store
// that has no more than the base image, and into a snapshot.
func registryTrips(ctx context.Context, b *bench, w *workload, entries []*entry) error {
	var some []*entry
	for _, e := range entries {
		if _, ok := e.contender.(*fromImage); ok && e.saved != nil {
			some = append(some, e)
		}
	}
	if len(some) == 0 {
		return nil
	}
	if b.registry == nil {
		var err error
		if b.registry, err = b.d.StartRegistry(ctx); err != nil {
			return err
		}
	}
	b.rounds(ctx, w, "image", some, b.config.saves, func(e *entry, count bool) error {
		s, ok := e.saved.(*remembered).saved.(*checkpointImage)
		if !ok {
			return errors.New("what is saved is no image")
		}
		return b.trip(ctx, w, e, s, count)
	})
	return context.Cause(ctx)
}

func (b *bench) trip(ctx context.Context, w *workload, e *entry, s *checkpointImage, count bool) error {
	client, registry := b.d.Client, b.registry
	// What the registry has it is not sent again.
	if err := os.RemoveAll(filepath.Join(registry.Dir, "data")); err != nil {
		return err
	}
	resolver := docker.NewResolver(docker.ResolverOptions{
		Hosts: docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchLocalhost)),
	})
	ref, digest := registry.Host+"/bench/"+w.name+":warm", s.img.Target().Digest
	size, err := s.size(ctx)
	if err != nil {
		return err
	}
	begin := time.Now()
	if err := client.Push(ctx, ref, s.img.Target(), containerd.WithResolver(resolver)); err != nil {
		return fmt.Errorf("push: %w", err)
	}
	pushed := time.Since(begin)
	if err := s.remove(ctx); err != nil {
		return err
	}
	begin = time.Now()
	record, err := client.Fetch(ctx, ref, containerd.WithResolver(resolver))
	if err != nil {
		return fmt.Errorf("pull: %w", err)
	}
	pulled := time.Since(begin)
	s.img = containerd.NewImage(client, record)
	begin = time.Now()
	if err := s.img.Unpack(ctx, ""); err != nil {
		return fmt.Errorf("unpack: %w", err)
	}
	unpacked := time.Since(begin)
	if got := s.img.Target().Digest; got != digest {
		return fmt.Errorf("pushed was %s, pulled %s", digest, got)
	}
	if count {
		b.add(w, e, "image.size", "MiB", mebibytes(size))
		b.add(w, e, "image.push", "ms", milliseconds(pushed))
		b.add(w, e, "image.pull", "ms", milliseconds(pulled))
		b.add(w, e, "image.unpack", "ms", milliseconds(unpacked))
		return nil
	}
	// Once is enough to see that what went through the registry can still be brought back.
	return b.restoreOne(ctx, w, e, false)
}
