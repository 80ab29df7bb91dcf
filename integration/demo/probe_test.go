package main

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"testing"
)

func TestParsePage(t *testing.T) {
	p := parsePage("hits=41\n session = 7 \nno value\nfile=a=b\n\n")
	if p.int("hits") != 41 || p.int("session") != 7 || p["file"] != "a=b" || len(p) != 3 {
		t.Errorf("got %v", p)
	}
	if n := p.int("missing"); n != -1 {
		t.Errorf("a counter that is not there reads %d, want -1", n)
	}
}

func TestParseAddress(t *testing.T) {
	got, err := parseAddress([]byte(`{"kind":"cniCacheV1","result":{"ips":[{"address":"10.1.2.3/24","gateway":"10.1.2.1"}]}}`))
	if err != nil || got != "10.1.2.3" {
		t.Errorf("got %q, %v", got, err)
	}
	for _, bad := range []string{``, `{`, `{"result":{}}`, `{"result":{"ips":[{"address":"x"}]}}`} {
		if got, err := parseAddress([]byte(bad)); err == nil {
			t.Errorf("%q gave %q and no error", bad, got)
		}
	}
}

func TestBrowserKeepsItsSessionAcrossAddresses(t *testing.T) {
	app := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if c, err := r.Cookie(sessionCookie); err == nil {
			_, _ = w.Write([]byte("session=" + c.Value + "\n"))
			return
		}
		http.SetCookie(w, &http.Cookie{Name: sessionCookie, Value: "s1"})
	})
	first, second := httptest.NewServer(app), httptest.NewServer(app)
	defer first.Close()
	defer second.Close()

	b, err := newBrowser()
	if err != nil {
		t.Fatal(err)
	}
	for _, url := range []string{first.URL, first.URL, second.URL} {
		p, err := b.keyed(context.Background(), url)
		if err != nil {
			t.Fatal(err)
		}
		if want := map[bool]string{true: "s1", false: ""}[url != first.URL || len(p) > 0]; p["session"] != want {
			t.Errorf("%s saw session %q, want %q", url, p["session"], want)
		}
	}
}

func TestBrowserTakesOnly200(t *testing.T) {
	srv := httptest.NewServer(http.NotFoundHandler())
	defer srv.Close()
	b, err := newBrowser()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.get(context.Background(), srv.URL); err == nil {
		t.Error("a 404 passed for the page")
	}
}

func TestUntil(t *testing.T) {
	n := 0
	got, err := until(context.Background(), func() (int, error) {
		if n++; n < 3 {
			return 0, errors.New("not yet")
		}
		return n, nil
	})
	if err != nil || got != 3 {
		t.Errorf("got %d, %v", got, err)
	}
	why := errors.New("interrupted")
	ctx, cancel := context.WithCancelCause(context.Background())
	cancel(why)
	last := errors.New("connection refused")
	if _, err := until(ctx, func() (int, error) { return 0, last }); !errors.Is(err, why) || !errors.Is(err, last) {
		t.Errorf("got %v, want the cause and the last try", err)
	}
}
