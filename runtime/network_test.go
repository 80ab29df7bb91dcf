package runtime

import (
	"errors"
	"net"
	"os"
	"testing"
)

// Nothing is connected to by way of a pid that may be another process's by now.
func TestDialOfAnEndedContainer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ended := make(chan struct{})
	close(ended)
	for name, init := range map[string]*Process{
		"no init":                     nil,
		"its pid is another's by now": {pid: os.Getpid(), done: ended},
	} {
		c := &Container{cfg: Config{ID: "c"}, init: init}
		conn, err := c.Dial(t.Context(), "tcp", l.Addr().String())
		if !errors.Is(err, ErrNotRunning) {
			t.Errorf("%s: %v", name, err)
		}
		if conn != nil {
			conn.Close()
		}
	}
}
