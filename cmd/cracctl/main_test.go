package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// stopping makes the test's program one that says when it is ready and when it was asked
// to stop, and then does not: its value is "nohup" to start with SIGHUP ignored.
const stopping = "CRACCTL_TEST_STOPPING"

func TestMain(m *testing.M) {
	if how, ok := os.LookupEnv(stopping); ok {
		if how == "nohup" {
			signal.Ignore(unix.SIGHUP)
		}
		ctx, stop := untilSignal()
		defer stop()
		fmt.Println("ready")
		<-ctx.Done()
		fmt.Println("stopping")
		select {}
	}
	os.Exit(m.Run())
}

// A signal ends what is being done, in order; a second one ends it at once.
func TestSignals(t *testing.T) {
	for _, tt := range []struct {
		how           string
		first, second unix.Signal
	}{
		{"", unix.SIGINT, unix.SIGINT},
		{"", unix.SIGTERM, unix.SIGINT},
		{"", unix.SIGHUP, unix.SIGTERM},
		{"nohup", unix.SIGTERM, unix.SIGTERM},
	} {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), stopping+"="+tt.how)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill() })
		lines := bufio.NewScanner(out)
		say := func(want string) {
			t.Helper()
			if lines.Scan(); lines.Text() != want {
				t.Errorf("%+v: it says %q (%v), want %q", tt, lines.Text(), lines.Err(), want)
			}
		}
		send := func(s unix.Signal) {
			t.Helper()
			if err := cmd.Process.Signal(s); err != nil {
				t.Error(err)
			}
		}
		say("ready")
		if tt.how == "nohup" {
			send(unix.SIGHUP) // changes nothing
		}
		send(tt.first)
		say("stopping")
		// Signals are caught until a moment after the context has ended: the second is sent
		// until one is not.
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		for done := false; !done; {
			_ = cmd.Process.Signal(tt.second) // fails once it has ended
			select {
			case err = <-ended:
				done = true
			case <-time.After(10 * time.Millisecond):
			}
		}
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != tt.second {
			t.Errorf("%+v: it ended with %v", tt, err)
		}
	}
}
