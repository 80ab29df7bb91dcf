package main

import (
	"bufio"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// page fetches one page. HTTP/1.0, so that the server closes the connection.
func page(ctx context.Context, n *network, port int, path string) (string, error) {
	answer, err := exchange(ctx, n, port, "GET "+path+" HTTP/1.0\r\nHost: bench\r\n\r\n")
	if err != nil {
		return "", err
	}
	resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(answer)), nil)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", path, resp.Status)
	}
	return strings.TrimSpace(string(body)), err
}

func fetch(port int, path string) func(context.Context, *network) (string, error) {
	return func(ctx context.Context, n *network) (string, error) { return page(ctx, n, port, path) }
}

// valueOf finds a line that begins with a key.
func valueOf(text, key string) (string, error) {
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), key); ok && v != "" {
			return v, nil
		}
	}
	return "", fmt.Errorf("no %s in %.300q", key, text)
}

// tomcat is the application of `make demo`.
func tomcat() *workload {
	const port = 8080
	ask := func(ctx context.Context, n *network) (string, error) {
		body, err := page(ctx, n, port, "/examples/crac.jsp")
		if err != nil {
			return "", err
		}
		return valueOf(body, "instance=")
	}
	return &workload{
		name: "tomcat", image: "tomcat", takes: 200, java: true, writes: true, port: port, ask: ask,
		settle: 3 * time.Second,
		prepare: func(ctx context.Context, n *network) error {
			// As the demo does: a server that has never been asked is slow in the clones too.
			for range 20 {
				if _, err := ask(ctx, n); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

//go:embed testdata/Heap.java
var heapSource []byte

// javaHeap is a service whose heap holds 200 MiB, compiled by the machine's JDK into dir.
func javaHeap(dir string) *workload {
	const port = 8080
	return &workload{
		name: "jvm-200m", image: "tomcat", takes: 300, java: true, writes: true, port: port,
		command: []string{"java", "-Xms256m", "-Xmx256m", "-XX:+UseSerialGC", "-cp", "/bench/heap.jar", "Heap", "200"},
		env:     []string{"PATH=/usr/lib/jvm/default-java/bin:/usr/bin:/bin"},
		mounts:  []bind{{dir, "/bench"}},
		settle:  time.Second,
		make:    func(ctx context.Context) error { return compileHeap(ctx, dir) },
		ask:     fetch(port, "/id"), digest: fetch(port, "/sum"),
	}
}

// compileHeap makes the class that javaHeap runs.
func compileHeap(ctx context.Context, dir string) error {
	source := filepath.Join(dir, "Heap.java")
	if err := os.WriteFile(source, heapSource, 0o600); err != nil {
		return err
	}
	// Packed: a JVM makes no archive of classes that lie in a directory.
	for _, args := range [][]string{
		{"javac", "--release", "17", "-d", dir, source},
		{"jar", "--create", "--file", filepath.Join(dir, "heap.jar"), "-C", dir, "Heap.class"},
	} {
		if out, err := exec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: run integration/tools/install.sh jdk\n%s", args[0], err, out)
		}
	}
	return nil
}

// redisMiB is what the Redis workload holds.
const redisMiB = 500

func redis() *workload {
	const port = 6379
	say := func(command string) func(context.Context, *network) (string, error) {
		return func(ctx context.Context, n *network) (string, error) {
			return exchange(ctx, n, port, command+"\r\nQUIT\r\n")
		}
	}
	info, digest := say("INFO server"), say("DEBUG DIGEST")
	return &workload{
		name: "redis-500m", image: "redis", takes: 550, port: port,
		command: []string{
			"/usr/bin/redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--dir", "/var/lib/redis",
			"--save", "", "--enable-debug-command", "yes",
		},
		ask: func(ctx context.Context, n *network) (string, error) {
			text, err := info(ctx, n)
			if err != nil {
				return "", err
			}
			return valueOf(text, "run_id:")
		},
		digest: func(ctx context.Context, n *network) (string, error) {
			text, err := digest(ctx, n)
			if err != nil {
				return "", err
			}
			return valueOf(text, "+")
		},
		prepare: fillRedis,
	}
}

// fillRedis sends random values of a mebibyte, which do not compress.
func fillRedis(ctx context.Context, n *network) error {
	c, err := n.dial(ctx, 6379)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	var seed [32]byte
	random, value := rand.NewChaCha8(seed), make([]byte, 1<<20)
	in := bufio.NewReader(c)
	for i := range redisMiB {
		_, _ = random.Read(value) // it does not fail
		key := fmt.Sprintf("key:%d", i)
		if _, err := fmt.Fprintf(c, "*3\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n", len(key), key, len(value), value); err != nil {
			return err
		}
		if line, err := in.ReadString('\n'); err != nil || strings.TrimSpace(line) != "+OK" {
			return errors.Join(fmt.Errorf("SET: %q", line), err)
		}
	}
	if _, err := io.WriteString(c, "QUIT\r\n"); err != nil {
		return err
	}
	_, err = io.ReadAll(in)
	return err
}

//go:embed testdata/service.py
var pythonSource string

// python is a service that keeps 50 MiB in many objects.
func python() *workload {
	const port = 8080
	return &workload{
		name: "python-50m", image: "python", takes: 80, port: port,
		command: []string{"/usr/bin/python3", "-c", pythonSource},
		ask:     fetch(port, "/id"), digest: fetch(port, "/sum"),
	}
}
