// Command conformance uses all of the Go SDK, as sdk/conformance_test.go asks for.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	crac "github.com/crac-shim/crac/sdk/go"
)

var failing sync.Map

// hook is what each hook does.
func hook(event, name string) error {
	fmt.Println(event, name)
	if _, fail := failing.Load(event + " " + name); fail {
		return fmt.Errorf("%s says no", name)
	}
	return nil
}

func main() {
	for _, name := range []string{"one", "two", "three"} {
		crac.Register(crac.Hooks{
			Check:            func(context.Context) error { return hook("check", name) },
			BeforeCheckpoint: func(context.Context) error { return hook("before-checkpoint", name) },
			AfterResume:      func(context.Context, crac.Outcome) error { return hook("after-resume", name) },
			AfterRestore:     func(context.Context, crac.Restore) error { return hook("after-restore", name) },
		})
	}
	defer crac.Stop()
	fmt.Println("ready")
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		command, args, _ := strings.Cut(lines.Text(), " ")
		text, err := do(command, args)
		if err != nil {
			text = command + " error: " + err.Error()
		}
		fmt.Println(text)
	}
}

func do(command, args string) (string, error) {
	switch command {
	case "fail":
		failing.Store(args, true)
		return "failing", nil
	case "status":
		info, err := crac.Status(context.Background())
		return "status " + info.Start, err
	case "checkpoint":
		result, err := crac.Checkpoint(context.Background())
		return "checkpoint " + string(result), err
	case "env":
		return strings.TrimSpace("env " + os.Getenv(args)), nil
	case "restore":
		r, ok := crac.LastRestore()
		if !ok {
			return "", errors.New("never restored")
		}
		return strings.TrimSpace(fmt.Sprintln("restore", r.Generation, r.Container, r.Hostname, r.Frozen.Nanoseconds(), strings.Join(r.Args, " "))), nil
	}
	return "", errors.New("what?")
}
