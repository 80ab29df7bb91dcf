// Command draw draws random numbers of every kind when asked to: for
// integration/random_test.go.
//
// usage: draw [sdk]
package main

import (
	"context"
	"crypto/ed25519"
	crand "crypto/rand"
	"fmt"
	"log"
	"math/rand"
	randv2 "math/rand/v2"
	"os"
	"runtime"
	"strings"
	"time"

	crac "github.com/crac-shim/crac/sdk/go"
)

func draw(kind string, one func() string) {
	for range 64 {
		fmt.Println("drew", kind, one())
	}
}

func drawAll(sdk bool) {
	draw("crypto/rand", func() string {
		var b [16]byte
		if _, err := crand.Read(b[:]); err != nil {
			log.Fatal(err)
		}
		return fmt.Sprintf("%x", b)
	})
	draw("key", func() string {
		key, _, err := ed25519.GenerateKey(nil)
		if err != nil {
			log.Fatal(err)
		}
		return fmt.Sprintf("%x", key)
	})
	draw("math/rand", func() string { return fmt.Sprint(rand.Int63()) })
	draw("math/rand/v2", func() string { return fmt.Sprint(randv2.Uint64()) })
	if sdk {
		draw("crac.Rand", func() string { return fmt.Sprint(crac.Rand().Uint64()) })
	}
}

func main() {
	runtime.LockOSThread() // each thread has a generator of its own for math/rand
	sdk := len(os.Args) > 1 && os.Args[1] == "sdk"
	if sdk {
		if err := crac.Start(); err != nil {
			log.Fatal(err)
		}
	}
	drawAll(sdk) // every generator has a state by now
	fmt.Println("ready")
	for range time.Tick(50 * time.Millisecond) {
		if err := os.Rename("/ask", "/asked"); err != nil {
			continue
		}
		command, err := os.ReadFile("/asked")
		if err != nil {
			log.Fatal(err)
		}
		switch strings.TrimSpace(string(command)) {
		case "draw":
			drawAll(sdk)
		case "env":
			fmt.Println("env", os.Getenv("CRAC_TEST_CLONE"))
		case "checkpoint":
			outcome, err := crac.Checkpoint(context.Background())
			if err != nil {
				fmt.Println("error", err)
			} else {
				fmt.Println("outcome", outcome)
			}
		}
		fmt.Println("done")
	}
}
