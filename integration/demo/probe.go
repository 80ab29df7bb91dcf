package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/cookiejar"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/crac-shim/crac/integration/harness"
)

// browser is a user of the application: it keeps its session cookie, also when the application
// moves to another address, as behind a load balancer.
type browser struct {
	jar     http.CookieJar
	session *http.Cookie
}

const sessionCookie = "JSESSIONID"

func newBrowser() (*browser, error) {
	jar, err := cookiejar.New(nil)
	if err != nil {
		return nil, err
	}
	return &browser{jar: jar}, nil
}

// client makes one that connects within a time. No keep-alive: an open connection would be part of
// the dump.
func (b *browser) client(connect time.Duration) *http.Client {
	dial := (&net.Dialer{Timeout: connect}).DialContext
	return &http.Client{
		Jar:       b.jar,
		Timeout:   time.Minute,
		Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true, Proxy: nil},
	}
}

const (
	// connectWait is for a server that runs, on a busy machine.
	connectWait = 10 * time.Second
	// knockWait is for one that may not run yet, and is asked again: while CRIU keeps the network
	// locked a SYN is dropped, and the kernel would send the next one only after a second.
	knockWait = 50 * time.Millisecond
)

// page is what the application's own page says, as key=value lines.
type page map[string]string

func (p page) int(key string) int {
	n, err := strconv.Atoi(p[key])
	if err != nil {
		return -1
	}
	return n
}

// get fetches a page that answers 200.
func (b *browser) get(ctx context.Context, url string) (string, error) {
	return b.fetch(ctx, url, connectWait)
}

// fetch remembers the session that it was given.
func (b *browser) fetch(ctx context.Context, url string, connect time.Duration) (string, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return "", err
	}
	if b.session != nil && len(b.jar.Cookies(req.URL)) == 0 {
		req.AddCookie(b.session)
	}
	resp, err := b.client(connect).Do(req)
	if err != nil {
		return "", err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return "", fmt.Errorf("GET %s: %w", url, err)
	}
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("GET %s: %s", url, resp.Status)
	}
	for _, c := range resp.Cookies() {
		if c.Name == sessionCookie {
			b.session = &http.Cookie{Name: c.Name, Value: c.Value}
		}
	}
	return string(body), nil
}

// keyed fetches the application's own page.
func (b *browser) keyed(ctx context.Context, url string) (page, error) {
	body, err := b.get(ctx, url)
	return parsePage(body), err
}

// knock fetches it from a server that may not be there yet.
func (b *browser) knock(ctx context.Context, url string) (page, error) {
	body, err := b.fetch(ctx, url, knockWait)
	return parsePage(body), err
}

func parsePage(body string) page {
	p := page{}
	for line := range strings.Lines(body) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			p[strings.TrimSpace(k)] = strings.TrimSpace(v)
		}
	}
	return p
}

// until asks every millisecond until get succeeds.
func until[T any](ctx context.Context, get func() (T, error)) (T, error) {
	for {
		v, err := get()
		if err == nil {
			return v, nil
		}
		select {
		case <-ctx.Done():
			return v, fmt.Errorf("%w (the last try: %w)", context.Cause(ctx), err)
		case <-time.After(time.Millisecond):
		}
	}
}

// address waits for the address that CNI gives a container of `ctr run --cni`. It is read from
// CNI's own record, which appears when the interface is up: asking an address earlier would
// leave the host with an unanswered ARP request, which it repeats only after a second.
func address(ctx context.Context, d *harness.Daemon, id string) (string, error) {
	record := filepath.Join(d.Dir, "cni/lib/results", "*-"+d.Namespace+"-"+id+"-eth0")
	return until(ctx, func() (string, error) {
		files, err := filepath.Glob(record)
		if err != nil || len(files) == 0 {
			return "", errors.Join(errors.New("CNI gave the container no address"), err)
		}
		data, err := os.ReadFile(files[0])
		if err != nil {
			return "", err
		}
		return parseAddress(data)
	})
}

func parseAddress(record []byte) (string, error) {
	var r struct {
		Result struct {
			IPs []struct {
				Address string `json:"address"`
			} `json:"ips"`
		} `json:"result"`
	}
	if err := json.Unmarshal(record, &r); err != nil {
		return "", err
	}
	if len(r.Result.IPs) == 0 {
		return "", errors.New("CNI's record holds no address")
	}
	addr, _, err := net.ParseCIDR(r.Result.IPs[0].Address)
	if err != nil {
		return "", err
	}
	return addr.String(), nil
}
