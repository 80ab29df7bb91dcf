package hook

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// conduct is how a workload behaves, whatever it is told by.
type conduct string

const (
	acks         conduct = "ack"
	vetoes       conduct = "veto"
	timesOut     conduct = "time-out"
	crashes      conduct = "crash while answering"
	doesntAnswer conduct = "no answer"
	talksRubbish conduct = "garbage"
)

// reachable is a workload that is told in one of the four ways. It makes what is
// needed and adds it to the notifier.
var ways = map[string]func(t *testing.T, n *Notifier, c conduct){
	"socket": func(t *testing.T, n *Notifier, c conduct) {
		participant(t, n.Dir, "main", map[conduct]behaviour{
			acks:         answer(ack),
			vetoes:       answer(`{"ok":false,"error":"pool busy"}` + "\n"),
			timesOut:     silent,
			crashes:      answer(`{"ok":`),
			doesntAnswer: answer(""),
			talksRubbish: answer("hello?\n"),
		}[c])
	},
	"http": func(t *testing.T, n *Notifier, c conduct) {
		done := make(chan struct{})
		server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			switch c {
			case vetoes:
				http.Error(w, "pool busy\nmore", http.StatusServiceUnavailable)
			case timesOut:
				<-done
			case acks:
				w.WriteHeader(http.StatusNoContent)
			default:
				conn, _, err := w.(http.Hijacker).Hijack()
				if err != nil {
					t.Error(err)
					return
				}
				_, _ = io.WriteString(conn, map[conduct]string{crashes: "HTTP/1.1 20", doesntAnswer: "", talksRubbish: "hello?\r\n\r\n"}[c])
				conn.Close()
			}
		}))
		t.Cleanup(func() { close(done); server.Close() })
		n.Adapters = map[Event]Adapter{BeforeCheckpoint: adapter(t, server.URL+"/hook")}
		n.Container = &fakeContainer{}
	},
	"exec": func(t *testing.T, n *Notifier, c conduct) {
		n.Adapters = map[Event]Adapter{BeforeCheckpoint: adapter(t, "/bin/hook now")}
		n.Container = &fakeContainer{exec: func(ctx context.Context, _, _ []string, _ []byte) ([]byte, int, error) {
			switch c {
			case vetoes:
				return []byte("starting\npool busy\n"), 1, nil
			case timesOut:
				<-ctx.Done()
				return nil, 137, nil // as it may look when its end was ours
			case crashes:
				return []byte("starting\npanic: runtime err"), 139, nil
			case doesntAnswer:
				return nil, 2, nil
			case talksRubbish:
				return nil, 0, errors.New(`exec: "/bin/hook": not found`)
			}
			return []byte("a warning\n"), 0, nil
		}}
	},
	"signal": func(t *testing.T, n *Notifier, c conduct) {
		n.Adapters = map[Event]Adapter{BeforeCheckpoint: adapter(t, "signal:SIGUSR2")}
		n.Container = &fakeContainer{signal: func(sig unix.Signal) error {
			if sig != unix.SIGUSR2 {
				t.Errorf("got %v", sig)
			}
			text, answers := map[conduct]string{
				acks: "", vetoes: "pool busy\n", crashes: `{"ok":`, talksRubbish: `{"hello":1}`,
			}[c]
			if answers {
				draft := filepath.Join(n.Dir, "draft")
				mustWrite(t, draft, text)
				if err := os.Rename(draft, filepath.Join(n.Dir, "before-checkpoint.ack")); err != nil {
					t.Error(err)
				}
			}
			return nil
		}}
	},
}

// TestMatrix: each conduct over each way, alone and beside ten participants that
// agree; all of those are told.
func TestMatrix(t *testing.T) {
	want := map[string]map[conduct]string{
		"socket": {
			vetoes: "participant main: pool busy", timesOut: "participant main: no answer within 1s",
			crashes: `participant main: answered "{\"ok\":", which is neither`, doesntAnswer: "participant main: closed the connection without an answer",
			talksRubbish: `participant main: answered "hello?", which is neither`,
		},
		"http": {
			vetoes: "/hook: pool busy (HTTP status 503 Service Unavailable)", timesOut: "/hook: no answer within 1s",
			crashes: "/hook: answered what is not HTTP", doesntAnswer: "/hook: closed the connection without an answer",
			talksRubbish: "/hook: answered what is not HTTP: malformed HTTP",
		},
		"exec": {
			vetoes: `adapter ["/bin/hook","now"]: pool busy (exit status 1)`, timesOut: `adapter ["/bin/hook","now"]: no answer within 1s`,
			crashes: "panic: runtime err (exit status 139)", doesntAnswer: "exit status 2, and nothing on stderr",
			talksRubbish: `exec: "/bin/hook": not found`,
		},
		"signal": {
			vetoes: "adapter signal:SIGUSR2: pool busy", timesOut: "adapter signal:SIGUSR2: no answer within 1s",
			crashes: `adapter signal:SIGUSR2: answered "{\"ok\":", which is neither`, doesntAnswer: "adapter signal:SIGUSR2: no answer within 1s",
			talksRubbish: `adapter signal:SIGUSR2: answered "{\"hello\":1}"`,
		},
	}
	for way, add := range ways {
		for _, c := range []conduct{acks, vetoes, timesOut, crashes, doesntAnswer, talksRubbish} {
			for _, others := range []int{0, 10} {
				t.Run(fmt.Sprintf("%s/%s/%d", way, c, others), func(t *testing.T) {
					noLeaks(t)
					var told recorder
					n := Notifier{Dir: t.TempDir(), Timeout: long}
					if text := want[way][c]; bytes.Contains([]byte(text), []byte("no answer within")) {
						n.Timeout = common
					}
					add(t, &n, c)
					for i := range others {
						name := fmt.Sprintf("other-%d", i)
						participant(t, n.Dir, name, told.as(name))
					}
					r := n.Notify(t.Context(), Message{Event: BeforeCheckpoint})
					wantErr(t, r.Err(), want[way][c])
					if r.Told() != others+1 || len(told.all()) != others {
						t.Errorf("told %v, report %+v", told.all(), r)
					}
					for _, result := range r.Results {
						if result.Err != nil && len(result.Name) > 5 && result.Name[:5] == "other" {
							t.Errorf("%s: %v", result.Name, result.Err)
						}
					}
				})
			}
		}
	}
}
