package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/crac-shim/crac/integration/harness"
	"github.com/crac-shim/crac/oci"
)

const (
	database     = "postgres"
	databasePort = "5432"
	poolPath     = "/pool.jsp"
	// poolBase is the directory of Tomcat's second instance in the image, the one with a database.
	poolBase = "/var/lib/tomcat10-pool"
	// poolQueries is one for each connection of the pool.
	poolQueries = 4
)

// databaseStory is a second act, which takes no part in the first one's times: what becomes of a
// pool of connections to a real database, with a participant that closes and opens it again, and
// without.
func (s *scenario) databaseStory(ctx context.Context) error {
	var db *container
	err := s.progress.do(ctx, "start a database beside it: PostgreSQL under runc", func(ctx context.Context) (err error) {
		for _, name := range []string{app, database} {
			archive, err := s.d.Tools.Image(name)
			if err != nil {
				return err
			}
			if _, err := s.d.Ctr(ctx, "images", "import", archive); err != nil {
				return err
			}
		}
		db, err = s.startDatabase(ctx)
		return err
	})
	if err != nil {
		return err
	}
	url := fmt.Sprintf("jdbc:postgresql://%s/postgres", net.JoinHostPort(db.address, databasePort))
	for _, hook := range []bool{false, true} {
		failed, err := s.throughACheckpoint(ctx, url, hook)
		if err != nil {
			return err
		}
		switch {
		case hook:
			s.report.PoolOKWithHook = len(failed) == 0
			if len(failed) > 0 {
				s.report.problem("with its participant the clone's pool fails: %s", strings.Join(failed, "; "))
			}
		default:
			s.report.PoolFailsWithoutHook = len(failed) > 0
			if len(failed) == 0 {
				s.report.problem("without a participant the clone's pool does not fail: the database shows nothing")
			}
		}
	}
	return nil
}

func (s *scenario) startDatabase(ctx context.Context) (*container, error) {
	c := &container{id: database, runtime: runc, image: harness.ImageRef(database)}
	_, err := s.d.Ctr(ctx, "run", "--detach", "--cni", "--hostname", c.id, "--runtime", c.runtime, "--log-uri", "file://"+s.containerLog(c.id), c.image, c.id)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("%s did not answer within %v", c.id, patience))
	defer cancel()
	if c.address, err = address(ctx, s.d, c.id); err != nil {
		return nil, err
	}
	_, err = until(ctx, func() (string, error) {
		return s.exec(ctx, c, "psql", "--no-align", "--tuples-only", "--command", "select 1")
	})
	return c, err
}

// throughACheckpoint starts the application on the database, checkpoints it with its pool full,
// and starts a clone. It returns what the clone's connections fail with.
func (s *scenario) throughACheckpoint(ctx context.Context, url string, hook bool) (failed []string, err error) {
	name, java := "pool", oci.JavaOff
	with := "without a participant"
	if hook {
		name, java, with = "pool-hook", oci.JavaEnv, "with a participant"
	}
	b, err := newBrowser()
	if err != nil {
		return nil, err
	}
	image := s.registry.Host + "/demo/" + name + ":warm"
	original := &container{
		id: name, runtime: crac, image: harness.ImageRef(app), browser: b, path: poolPath,
		annotations: []string{
			oci.AnnotationPrefix + "java=" + string(java),
			oci.AnnotationPrefix + "checkpoint.image=" + image,
		},
		env: []string{"CATALINA_BASE=" + poolBase, "JDK_JAVA_OPTIONS=-Ddemo.database=" + url},
	}
	if err := s.step(ctx, "a pool of connections, "+with+": cold start", original); err != nil {
		return nil, err
	}
	err = s.progress.do(ctx, "checkpoint it with the pool full", func(ctx context.Context) error {
		if failed, err := s.query(ctx, original); err != nil || len(failed) > 0 {
			return errors.Join(err, fmt.Errorf("before the checkpoint: %s", strings.Join(failed, "; ")))
		}
		if _, err := s.d.Ctr(ctx, "tasks", "checkpoint", original.id); err != nil {
			return err
		}
		// The original goes on, with its old connections or with new ones.
		failed, err := s.query(ctx, original)
		if err == nil && len(failed) > 0 {
			err = fmt.Errorf("the original's pool fails after the checkpoint: %s", strings.Join(failed, "; "))
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	clone := &container{
		id: name + "-clone", runtime: crac, image: image, browser: b, path: poolPath, env: original.env,
		annotations: []string{oci.AnnotationPrefix + "restore=" + string(oci.RestoreRequire)},
	}
	if err := s.step(ctx, "clone "+with+": ctr run to first 200", clone); err != nil {
		return nil, err
	}
	err = s.progress.do(ctx, "ask the database by each connection of the clone", func(ctx context.Context) (err error) {
		if clone.first["instance"] != original.first["instance"] {
			return fmt.Errorf("%s is no clone: its program is %s, the original's was %s", clone.id, clone.first["instance"], original.first["instance"])
		}
		// A pool that is whole proves nothing if its participant did nothing.
		want := "0"
		if hook {
			want = "1"
		}
		for _, what := range []string{"closed", "reopened"} {
			if got := clone.first[what]; got != want {
				s.report.problem("%s: its connector was %s %s times, want %s", clone.id, what, got, want)
			}
		}
		failed, err = s.query(ctx, clone)
		if clone.first["error"] != "" {
			failed = append([]string{clone.first["error"]}, failed...)
		}
		return err
	})
	return failed, err
}

// query asks as often as the pool has connections, and returns what failed.
func (s *scenario) query(ctx context.Context, c *container) (failed []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for range poolQueries {
		answer, err := c.browser.keyed(ctx, c.url(poolPath))
		if err != nil {
			return failed, err
		}
		switch {
		case answer["error"] != "":
			failed = append(failed, answer["error"])
		case answer.int("backend") <= 0:
			return failed, fmt.Errorf("%s answers %v", c.id, answer)
		}
	}
	return failed, nil
}
