// Command goserver is a workload for checkpoints: a static Go HTTP server whose
// state is only in memory, spread over what a Go program is made of: goroutines
// on several threads, epoll, a timer, a channel, and a pipe.
//
// The image sets GODEBUG=multipathtcp=0: since Go 1.24 listeners speak Multipath TCP,
// which CRIU cannot dump.
//
//	GET /        ok
//	GET /count   count=N, one more each time, with pid, ticks and echoes
package main

import (
	"bufio"
	"fmt"
	"log"
	"net/http"
	"os"
	"sync/atomic"
	"time"
)

func main() {
	addr := ":8080"
	if len(os.Args) > 1 {
		addr = os.Args[1]
	}

	// One goroutine owns the counter; handlers ask it over a channel.
	counts := make(chan int)
	go func() {
		for n := 1; ; n++ {
			counts <- n
		}
	}()

	// A timer must keep firing after a restore.
	var ticks atomic.Int64
	go func() {
		for range time.Tick(100 * time.Millisecond) {
			ticks.Add(1)
		}
	}()

	// Every count goes through a kernel pipe and back.
	r, w, err := os.Pipe()
	if err != nil {
		log.Fatal(err)
	}
	echoes := make(chan string)
	go func() {
		lines := bufio.NewScanner(r)
		for lines.Scan() {
			echoes <- lines.Text()
		}
	}()
	turn := make(chan struct{}, 1)

	http.HandleFunc("/count", func(resp http.ResponseWriter, _ *http.Request) {
		turn <- struct{}{}
		n := <-counts
		fmt.Fprintln(w, n)
		echo := <-echoes
		<-turn
		fmt.Fprintf(resp, "count=%d\necho=%s\nticks=%d\npid=%d\n", n, echo, ticks.Load(), os.Getpid())
	})
	http.HandleFunc("/", func(resp http.ResponseWriter, req *http.Request) {
		if req.URL.Path != "/" {
			http.NotFound(resp, req)
			return
		}
		fmt.Fprintf(resp, "ok\npid=%d\n", os.Getpid())
	})
	fmt.Printf("goserver: listening on %s\n", addr)
	log.Fatal(http.ListenAndServe(addr, nil))
}
