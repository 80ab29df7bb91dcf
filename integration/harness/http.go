package harness

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"
)

// client opens a connection for each request: a kept-alive connection to a container that is
// being checkpointed would be part of the dump. A connect may not last: a SYN that is lost while
// the network is being made is sent again only after a second, and a server that is there
// answers at once.
var client = &http.Client{Transport: &http.Transport{
	DisableKeepAlives: true,
	DialContext:       (&net.Dialer{Timeout: 250 * time.Millisecond}).DialContext,
}}

func get(ctx context.Context, url string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	return client.Do(req)
}

// Get returns the body of a page that answers 200.
func Get(ctx context.Context, url string) (string, error) {
	resp, err := get(ctx, url)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", fmt.Errorf("GET %s: %w", url, err)
	}
	if resp.StatusCode != http.StatusOK {
		return string(body), fmt.Errorf("GET %s: %s: %s", url, resp.Status, tail(strings.TrimSpace(string(body)), 500))
	}
	return string(body), nil
}

// WaitHTTP asks for a page every millisecond or so until it answers 200, and returns its body
// and how long that took.
func WaitHTTP(ctx context.Context, url string) (string, time.Duration, error) {
	start := time.Now()
	for {
		body, err := Get(ctx, url)
		if err == nil {
			return body, time.Since(start), nil
		}
		select {
		case <-ctx.Done():
			return "", time.Since(start), fmt.Errorf("no 200 from %s within %v: %w", url, time.Since(start).Round(time.Millisecond), err)
		case <-time.After(time.Millisecond):
		}
	}
}
