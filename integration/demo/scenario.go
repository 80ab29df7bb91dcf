package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/crac-shim/crac/integration/harness"
	"github.com/crac-shim/crac/oci"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	crac = oci.RuntimeName
	runc = "io.containerd.runc.v2"

	app  = "tomcat"
	port = 8080
	// pagePath is the application's page with its state. Tomcat has to compile it before it can
	// answer the first request.
	pagePath  = "/examples/crac.jsp"
	stateFile = "/var/lib/crac-demo/state.txt"

	warmUp = 300 // requests
	// patience is for one start on a slow machine; a start that takes longer has failed.
	patience = 5 * time.Minute
)

// samples are pages of Tomcat's own examples: with them the warm-up goes through more of the
// server than one page.
var samples = []string{
	"/examples/jsp/dates/date.jsp",
	"/examples/jsp/snp/snoop.jsp",
	"/examples/jsp/jsp2/el/basic-arithmetic.jsp",
	"/examples/servlets/servlet/HelloWorldExample",
}

// scenario is one run of the demo and what it has found so far.
type scenario struct {
	d        *harness.Daemon
	network  *harness.Network
	registry *harness.RegistryServer
	progress *progress
	report   *Report

	browser    *browser
	original   *container
	checkpoint string // the checkpoint image's name
	warmed     page   // the page's last answer before the checkpoint
	file       string // the file's content then
}

// container is one that ctr started.
type container struct {
	id, runtime, image string
	annotations        []string
	env                []string
	browser            *browser
	path               string // of the page that it is asked for; empty: pagePath

	address string
	first   page          // its first answer
	took    time.Duration // from the start of the command to then
}

func (c *container) url(path string) string {
	return fmt.Sprintf("http://%s:%d%s", c.address, port, path)
}

func (s *scenario) play(ctx context.Context) error {
	for _, act := range []func(context.Context) error{
		s.cold, s.warmItUp, s.makeCheckpoint, s.throughTheRegistry, s.warm, s.clones, s.underRunc,
		s.databaseStory,
	} {
		if err := act(ctx); err != nil {
			return err
		}
	}
	return nil
}

// cold is step a.
func (s *scenario) cold(ctx context.Context) (err error) {
	if s.browser, err = newBrowser(); err != nil {
		return err
	}
	s.checkpoint = s.registry.Host + "/demo/" + app + ":warm"
	err = s.progress.do(ctx, "import and unpack the application's image", func(ctx context.Context) error {
		archive, err := s.d.Tools.Image(app)
		if err != nil {
			return err
		}
		if _, err = s.d.Ctr(ctx, "images", "import", archive); err != nil {
			return err
		}
		img, err := s.d.Client.GetImage(s.d.Context(ctx), harness.ImageRef(app))
		if err != nil {
			return err
		}
		s.report.BaseImageBytes, err = img.Size(s.d.Context(ctx))
		return err
	})
	if err != nil {
		return err
	}
	s.original = &container{
		id: app, runtime: crac, image: harness.ImageRef(app), browser: s.browser,
		// With this annotation a stock client's checkpoint becomes an image.
		annotations: []string{oci.AnnotationPrefix + "checkpoint.image=" + s.checkpoint},
	}
	if err := s.step(ctx, "cold start: ctr run to first 200", s.original); err != nil {
		return err
	}
	s.report.ColdMS = milliseconds(s.original.took)
	return nil
}

// warmItUp is step b.
func (s *scenario) warmItUp(ctx context.Context) error {
	return s.progress.do(ctx, fmt.Sprintf("warm it up with %d requests", warmUp), func(ctx context.Context) error {
		for i := range warmUp {
			s.progress.say("%d of %d", i, warmUp)
			if _, err := s.browser.get(ctx, s.original.url(samples[i%len(samples)])); err != nil {
				return err
			}
			var err error
			if s.warmed, err = s.browser.keyed(ctx, s.original.url(pagePath)); err != nil {
				return err
			}
		}
		var err error
		s.file, err = s.exec(ctx, s.original, "cat", stateFile)
		s.file = strings.TrimSpace(s.file)
		if err == nil && s.file != s.warmed["file"] {
			err = fmt.Errorf("%s holds %q, the application says %q", stateFile, s.file, s.warmed["file"])
		}
		return err
	})
}

// makeCheckpoint and throughTheRegistry are step c.
func (s *scenario) makeCheckpoint(ctx context.Context) error {
	err := s.progress.do(ctx, "ctr tasks checkpoint --exit: dump and image", func(ctx context.Context) error {
		_, err := s.d.Ctr(ctx, "tasks", "checkpoint", "--exit", s.original.id)
		return err
	})
	if err != nil {
		return err
	}
	s.reported("(of it the container stood still)", s.original.id, "frozen_ms")
	names, err := s.images(ctx)
	if err != nil {
		return err
	}
	if !slices.Contains(names, s.checkpoint) {
		return fmt.Errorf("the checkpoint made no image %s; there are %s", s.checkpoint, strings.Join(names, ", "))
	}
	return nil
}

func (s *scenario) throughTheRegistry(ctx context.Context) error {
	err := s.progress.do(ctx, "push the checkpoint image", func(ctx context.Context) error {
		_, err := s.d.Ctr(ctx, "images", "push", "--plain-http", s.checkpoint)
		return err
	})
	if err == nil {
		err = s.progress.do(ctx, "remove container, images and content", s.removeAll)
	}
	if err == nil {
		err = s.sizes(ctx)
	}
	if err != nil {
		return err
	}
	return s.progress.do(ctx, "pull and unpack the checkpoint image", func(ctx context.Context) error {
		_, err := s.d.Ctr(ctx, "images", "pull", "--plain-http", s.checkpoint)
		return err
	})
}

// removeAll leaves a node that has never seen the application.
func (s *scenario) removeAll(ctx context.Context) error {
	if _, err := s.d.Ctr(ctx, "tasks", "delete", s.original.id); err != nil {
		return err
	}
	if _, err := s.d.Ctr(ctx, "containers", "delete", s.original.id); err != nil {
		return err
	}
	if err := s.network.Release(ctx, s.original.id); err != nil {
		return err
	}
	names, err := s.images(ctx)
	if err != nil {
		return err
	}
	if _, err := s.d.Ctr(ctx, append([]string{"images", "delete", "--sync"}, names...)...); err != nil {
		return err
	}
	// What is left would make the pull a lie.
	for _, list := range [][]string{{"content", "ls", "-q"}, {"snapshots", "ls"}} {
		out, err := s.d.Ctr(ctx, list...)
		if err != nil {
			return err
		}
		if lines := strings.Split(strings.TrimSpace(out), "\n"); len(lines) > 1 || (list[0] == "content" && lines[0] != "") {
			return fmt.Errorf("all images are deleted, but `ctr %s` shows:\n%s", strings.Join(list, " "), out)
		}
	}
	return nil
}

// warm is step d.
func (s *scenario) warm(ctx context.Context) error {
	c := s.clone(1)
	if err := s.step(ctx, "warm start: ctr run to first 200", c); err != nil {
		return err
	}
	s.reported("(of it the runtime restored the processes)", c.id, "ms")
	s.report.WarmMS = milliseconds(c.took)
	if c.took > 0 {
		s.report.Ratio = s.report.ColdMS / s.report.WarmMS
	}
	s.report.StateOK = s.hasState(c)
	// The page says what the file held before the request wrote to it.
	if s.report.FileOK = c.first["file_before"] == s.file; !s.report.FileOK {
		s.report.problem("%s of %s held %q, and %q at the checkpoint", stateFile, c.id, c.first["file_before"], s.file)
	}
	return s.progress.do(ctx, "look for the dump inside the clone", func(ctx context.Context) error {
		root, err := s.exec(ctx, c, "ls", "-A", "/")
		if err != nil {
			return err
		}
		names := strings.Fields(root)
		s.report.DumpHiddenOK = slices.Contains(names, "etc") && !slices.Contains(names, oci.Root)
		if !s.report.DumpHiddenOK {
			s.report.problem("/ of %s holds %s", c.id, strings.Join(names, " "))
		}
		return nil
	})
}

// clones is step e.
func (s *scenario) clones(ctx context.Context) error {
	two := []*container{s.clone(2), s.clone(3)}
	start := func(ctx context.Context) (time.Duration, error) {
		begin := time.Now()
		errs := make([]error, len(two))
		var wg sync.WaitGroup
		for i, c := range two {
			wg.Go(func() { errs[i] = s.start(ctx, c) })
		}
		wg.Wait()
		return time.Since(begin), errors.Join(errs...)
	}
	if _, err := s.progress.timed(ctx, "two more clones at the same time to first 200 of both", start); err != nil {
		return err
	}
	before := len(s.report.Problems)
	seen := map[string]string{}
	for _, c := range two {
		s.report.ClonesMS = append(s.report.ClonesMS, milliseconds(c.took))
		s.hasState(c)
		if c.first["hostname"] != c.id {
			s.report.problem("the application in %s sees the hostname %q", c.id, c.first["hostname"])
		}
		netns, err := s.exec(ctx, c, "readlink", "/proc/self/ns/net")
		if err != nil {
			return err
		}
		for _, own := range []string{"address " + c.address, "network namespace " + netns} {
			if other, taken := seen[own]; taken {
				s.report.problem("%s and %s have the same %s", other, c.id, own)
			}
			seen[own] = c.id
		}
	}
	// What one is told, the other must not know.
	for i, c := range two {
		var got page
		for range i + 1 {
			var err error
			if got, err = c.browser.keyed(ctx, c.url(pagePath)); err != nil {
				return err
			}
		}
		if want := c.first.int("hits") + i + 1; got.int("hits") != want {
			s.report.problem("%s counts %d requests, want %d", c.id, got.int("hits"), want)
		}
	}
	s.report.ClonesOK = len(s.report.Problems) == before
	return nil
}

// underRunc is step f.
func (s *scenario) underRunc(ctx context.Context) error {
	b, err := newBrowser()
	if err != nil {
		return err
	}
	c := &container{id: "under-runc", runtime: runc, image: s.checkpoint, browser: b}
	if err := s.step(ctx, "the same image under runc: ctr run to first 200", c); err != nil {
		return err
	}
	s.report.ColdUnderRuncMS = milliseconds(c.took)
	cold := c.first.int("hits") == 1 && c.first["session_new"] == "true" && c.first["instance"] != s.warmed["instance"]
	if s.report.ColdUnderRuncOK = cold && c.first["file_before"] == s.file; !s.report.ColdUnderRuncOK {
		s.report.problem("under runc the first answer is %v, want a cold start with the file's content %q", c.first, s.file)
	}
	return nil
}

func (s *scenario) clone(n int) *container {
	b, err := newBrowser()
	if err != nil {
		panic(err) // cookiejar.New has no way to fail without options
	}
	b.session = s.browser.session
	return &container{
		id: fmt.Sprintf("clone-%d", n), runtime: crac, image: s.checkpoint, browser: b,
		// A warm start that became a cold one is an error here, not a slow success.
		annotations: []string{oci.AnnotationPrefix + "restore=" + string(oci.RestoreRequire)},
	}
}

// hasState tells whether a clone goes on from where the original was checkpointed: the same
// instance of the program, its counters one further, the browser's session known.
func (s *scenario) hasState(c *container) bool {
	ok := true
	for _, counter := range []string{"hits", "session_hits"} {
		if got, want := c.first.int(counter), s.warmed.int(counter)+1; got != want || want <= warmUp {
			s.report.problem("%s: counter %q is %d at the first request, want %d", c.id, counter, got, want)
			ok = false
		}
	}
	for key, want := range map[string]string{"instance": s.warmed["instance"], "session": s.warmed["session"], "session_new": "false"} {
		if got := c.first[key]; got != want || got == "" {
			s.report.problem("%s: %s is %q, want %q", c.id, key, got, want)
			ok = false
		}
	}
	return ok
}

// step starts a container as a step of its own.
func (s *scenario) step(ctx context.Context, name string, c *container) error {
	_, err := s.progress.timed(ctx, name, func(ctx context.Context) (time.Duration, error) {
		err := s.start(ctx, c)
		return c.took, err
	})
	return err
}

// start runs a container with stock ctr and measures, on the host, how long it takes from the
// start of the command to the first 200 of the page.
func (s *scenario) start(ctx context.Context, c *container) error {
	args := []string{
		"run", "--detach", "--cni", "--hostname", c.id, "--runtime", c.runtime,
		"--log-uri", "file://" + s.containerLog(c.id),
	}
	for _, a := range c.annotations {
		args = append(args, "--annotation", a)
	}
	for _, e := range c.env {
		args = append(args, "--env", e)
	}
	args = append(args, c.image, c.id)
	path := c.path
	if path == "" {
		path = pagePath
	}

	ctx, cancel := context.WithTimeoutCause(ctx, patience, fmt.Errorf("%s did not answer within %v", c.id, patience))
	defer cancel()
	poll, failed := context.WithCancelCause(ctx)
	defer failed(nil)
	var ran error
	done := make(chan struct{})
	begin := time.Now()
	go func() {
		defer close(done)
		if _, ran = s.d.Ctr(ctx, args...); ran != nil {
			failed(ran)
		}
	}()
	var err error
	if c.address, err = address(poll, s.d, c.id); err == nil {
		c.first, err = until(poll, func() (page, error) { return c.browser.knock(poll, c.url(path)) })
	}
	c.took = time.Since(begin)
	if err != nil {
		cancel()
		<-done
		return fmt.Errorf("start %s: %w", c.id, err)
	}
	<-done
	return ran
}

// exec runs a command in a container and returns what it writes.
func (s *scenario) exec(ctx context.Context, c *container, args ...string) (string, error) {
	return s.d.Ctr(ctx, append([]string{"tasks", "exec", "--exec-id", fmt.Sprintf("x%d", time.Now().UnixNano()), c.id}, args...)...)
}

func (s *scenario) images(ctx context.Context) ([]string, error) {
	out, err := s.d.Ctr(ctx, "images", "ls", "-q")
	return strings.Fields(out), err
}

// sizes asks the registry what it has got: that is what another node would fetch.
func (s *scenario) sizes(ctx context.Context) error {
	repository, tag, _ := strings.Cut(strings.TrimPrefix(s.checkpoint, s.registry.Host+"/"), ":")
	req, err := http.NewRequestWithContext(ctx, http.MethodGet,
		fmt.Sprintf("http://%s/v2/%s/manifests/%s", s.registry.Host, repository, tag), nil)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", ocispec.MediaTypeImageManifest)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the registry does not have the manifest of %s: %s", s.checkpoint, resp.Status)
	}
	var m ocispec.Manifest
	if err := json.NewDecoder(resp.Body).Decode(&m); err != nil {
		return fmt.Errorf("the registry's manifest of %s: %w", s.checkpoint, err)
	}
	return s.report.measure(m)
}

// reported adds what the runtime says in containerd's log about a step.
func (s *scenario) reported(name, id, key string) {
	if ms, ok := reported(s.d.Log(), id, key); ok {
		s.progress.steps = append(s.progress.steps, Step{name, ms})
	}
}

// reported finds the last line about a container that has the key with a number.
func reported(log, id, key string) (value float64, ok bool) {
	for line := range strings.Lines(log) {
		fields := strings.Fields(line)
		if !slices.Contains(fields, "id="+id) {
			continue
		}
		for _, f := range fields {
			text, is := strings.CutPrefix(f, key+"=")
			if n, err := strconv.ParseFloat(text, 64); is && err == nil {
				value, ok = n, true
			}
		}
	}
	return value, ok
}

func (s *scenario) containerLog(id string) string {
	return filepath.Join(s.d.Dir, "x", id+".log")
}

// saveLog keeps what explains a failure before the directory goes.
func (s *scenario) saveLog(file string) error {
	var b strings.Builder
	fmt.Fprintf(&b, "==== containerd and the shims\n%s", s.d.Log())
	logs, err := filepath.Glob(s.containerLog("*"))
	if err != nil {
		return err
	}
	for _, l := range logs {
		data, err := os.ReadFile(l)
		if err != nil {
			return err
		}
		fmt.Fprintf(&b, "\n==== %s\n%s", filepath.Base(l), data)
	}
	return os.WriteFile(file, []byte(b.String()), 0o644)
}
