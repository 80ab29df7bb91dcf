package fdpolicy

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/crac-shim/crac/runtime/inspect"
)

func TestPlan(t *testing.T) {
	end := netip.MustParseAddrPort
	fds := map[string]inspect.FD{
		"established": {Kind: inspect.Socket, Socket: &inspect.SocketInfo{Family: "ipv4", Protocol: "tcp", State: "established", Local: end("10.0.0.2:1"), Peer: end("10.0.0.9:5432")}},
		"connecting":  {Kind: inspect.Socket, Socket: &inspect.SocketInfo{Family: "ipv4", Protocol: "tcp", State: "syn-sent", Local: end("10.0.0.2:1"), Peer: end("10.0.0.9:5432")}},
		"closed":      {Kind: inspect.Socket, Socket: &inspect.SocketInfo{Family: "ipv4", Protocol: "tcp", State: "close"}},
		"listener":    {Kind: inspect.Socket, Socket: &inspect.SocketInfo{Family: "ipv6", Protocol: "tcp", State: "listen", Local: end("[::]:80")}},
		"mptcp":       {Kind: inspect.Socket, Socket: &inspect.SocketInfo{Family: "ipv4", Protocol: "mptcp", State: "established", Local: end("10.0.0.2:1"), Peer: end("10.0.0.9:2")}},
		"udp":         {Kind: inspect.Socket, Socket: &inspect.SocketInfo{Family: "ipv4", Protocol: "udp", Local: end("10.0.0.2:1"), Peer: end("10.0.0.9:53")}},
		"udp bound":   {Kind: inspect.Socket, Socket: &inspect.SocketInfo{Family: "ipv4", Protocol: "udp", Local: end("0.0.0.0:53")}},
		"unix":        {Kind: inspect.Socket, Socket: &inspect.SocketInfo{Family: "unix", Type: "stream", State: "established", PeerInode: 7}},
		"netlink":     {Kind: inspect.Socket, Socket: &inspect.SocketInfo{Family: "netlink", Type: "raw"}},
		"file":        {Kind: inspect.File, Path: "/x"},
		"pipe":        {Kind: inspect.Pipe},
		"eventfd":     {Kind: inspect.Eventfd},
		"stream":      {Kind: inspect.Pipe, Stdio: true},
	}
	for _, tt := range []struct {
		fd, rule string
		want     string // "close", a part of the note, or "refused: " and a part of it; empty: nothing
	}{
		{"established", "type: socket\naction: close", "close"},
		{"connecting", "type: socket\naction: close", "close"},
		{"udp", "type: socket\naction: close", "close"},
		{"closed", "type: socket\naction: close", "left as it is"},
		{"udp bound", "type: socket\naction: close", "left as it is"},
		{"listener", "type: socket\naction: close", "refused: make the action reopen or ignore"},
		{"mptcp", "type: socket\naction: close", "refused: before-checkpoint"},
		{"unix", "type: socket\naction: close", "refused: before-checkpoint"},
		{"netlink", "type: socket\naction: close", "refused: such a socket cannot be closed from outside"},
		{"file", "type: file\naction: close", "refused: a file cannot be closed from outside"},
		{"pipe", "type: pipe\naction: close", "refused: a pipe cannot be closed"},
		{"eventfd", "type: filedescriptor\naction: close", "refused: a eventfd cannot be closed"},

		{"listener", "type: socket\naction: reopen", "CRIU opens it again"},
		{"udp bound", "type: socket\naction: reopen", "CRIU opens it again"},
		{"file", "type: file\naction: reopen", "CRIU opens it again"},
		{"established", "type: socket\naction: reopen", "refused: a connection cannot be made again"},
		{"unix", "type: socket\naction: reopen", "refused: a connection cannot be made again"},

		{"established", "type: socket\naction: error", "refused: forbidden"},
		{"pipe", "type: pipe\naction: error", "refused: forbidden"},
		{"established", "type: socket\naction: ignore", "left to CRIU"},
		{"file", "type: file\naction: ignore", "left to CRIU"},

		{"file", "type: pipe\naction: error", ""},
		{"stream", "type: pipe\naction: error", ""},
		{"stream", "type: filedescriptor\nvalue: 0\naction: error", "refused: forbidden"},
	} {
		fd := fds[tt.fd]
		c := &inspect.Container{Processes: []inspect.Process{{PID: 7, FDs: []inspect.FD{fd}}, {PID: 8, Outside: true, FDs: []inspect.FD{fd}}}}
		actions, refused := Plan(policy(t, tt.rule), c)
		got := ""
		switch {
		case len(actions)+len(refused) > 1:
			t.Errorf("%s, %q: actions %v, refused %v", tt.fd, tt.rule, actions, refused)
		case len(refused) == 1:
			got = "refused: " + refused[0].Note
		case len(actions) == 1 && actions[0].Close:
			got = "close"
		case len(actions) == 1:
			got = actions[0].Note
		}
		kind, part, more := strings.Cut(tt.want, ": ")
		if !more {
			kind, part = "", tt.want
		}
		if !strings.HasPrefix(got, kind) || !strings.Contains(got, part) || (tt.want == "") != (got == "") {
			t.Errorf("%s, %q: %q, want %q", tt.fd, tt.rule, got, tt.want)
		}
	}
}

func TestRefusedErrorIsBounded(t *testing.T) {
	c := &inspect.Container{}
	for pid := range 1000 {
		c.Processes = append(c.Processes, inspect.Process{PID: pid, FDs: []inspect.FD{{Kind: inspect.Pipe}}})
	}
	_, err := Enforce(policy(t, "type: pipe\naction: error"), c)
	if err == nil || len(err.Error()) > 2000 || !strings.Contains(err.Error(), "and 995 more") {
		t.Errorf("got %v", err)
	}
}
