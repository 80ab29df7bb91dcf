// Command participant is a workload that is told of its checkpoints in every way
// there is, and that answers well or badly, as its flags say:
//
//	participant [-via socket|http|signal|none] [-event E] [-mode M] [-n N] [-child] [-apart] [-uid U] [-state FILE]
//	participant hook [-event E] [-mode M]     an argv adapter
//	participant ask OP                        one request to control.sock; prints the answer
//	participant self                          asks for its own checkpoint, and waits for its end
//
// It counts on its standard output ("tick 17"), and writes there what it is told:
// "told NAME EVENT JSON". Modes: ack, veto, timeout, crash, silent, garbage.
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// message is what is read of a notification.
type message struct {
	Event string `json:"event"`
}

var (
	via   = flag.String("via", "socket", "how it is told")
	event = flag.String("event", "before-checkpoint", "the event that the mode is for; others are acknowledged")
	mode  = flag.String("mode", "ack", "how it answers")
	count = flag.Int("n", 1, "the number of participants; the mode is the first one's")
	child = flag.Bool("child", false, "a child process listens")
	apart = flag.Bool("apart", false, "a child process is the first participant")
	uid   = flag.Uint("uid", 0, "the child's user and group")
	state = flag.String("state", "", "a file for what is in memory, too: written before a checkpoint, compared after a restore")
	quiet = flag.Bool("quiet", false, "do not count")
)

var dir = os.Getenv("CRAC_DIR")

func main() {
	command := "serve"
	if len(os.Args) > 1 && !strings.HasPrefix(os.Args[1], "-") {
		command = os.Args[1]
		os.Args = append(os.Args[:1], os.Args[2:]...)
	}
	flag.Parse()
	var err error
	switch command {
	case "serve":
		err = serve()
	case "hook":
		err = hook()
	case "ask":
		var answer string
		answer, err = ask(`{"v":1,"op":"` + flag.Arg(0) + `"}`)
		fmt.Print(answer)
	case "self":
		err = self()
	default:
		err = fmt.Errorf("unknown command %q", command)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func serve() error {
	if *child || *apart {
		n := *count
		if *apart {
			n = 1
		}
		args := []string{"-quiet", "-via", *via, "-event", *event, "-mode", *mode, "-n", fmt.Sprint(n)}
		cmd := exec.Command("/proc/self/exe", args...)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		if *uid != 0 {
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(*uid), Gid: uint32(*uid)}}
		}
		if err := cmd.Start(); err != nil {
			return err
		}
		go func() { _ = cmd.Wait() }()
	}
	if !*child {
		switch *via {
		case "socket":
			for i := range *count {
				if i == 0 && *apart {
					continue
				}
				if err := listen(i); err != nil {
					return err
				}
			}
		case "http":
			l, err := net.Listen("tcp", "127.0.0.1:9000")
			if err != nil {
				return err
			}
			go func() { _ = http.Serve(l, http.HandlerFunc(serveHTTP)) }()
		case "signal":
			signals := make(chan os.Signal, 8)
			signal.Notify(signals, syscall.SIGUSR2)
			go func() {
				for range signals {
					onSignal()
				}
			}()
		}
	}
	for i := 1; ; i++ {
		if !*quiet {
			fmt.Println("tick", i)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// modeFor is how to answer this message.
func modeFor(line string, first bool) string {
	var m message
	if err := json.Unmarshal([]byte(line), &m); err != nil {
		fmt.Println("told garbage", line)
		return "veto"
	}
	if m.Event != *event || !first {
		return "ack"
	}
	return *mode
}

var printing sync.Mutex

func told(name, line string) {
	var m message
	_ = json.Unmarshal([]byte(line), &m)
	printing.Lock()
	defer printing.Unlock()
	fmt.Println("told", name, m.Event, strings.TrimSpace(line))
}

func listen(i int) error {
	name := fmt.Sprintf("p%02d.sock", i)
	l, err := net.Listen("unix", filepath.Join(dir, name))
	if err != nil {
		return err
	}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				fmt.Println("accept:", err)
				return
			}
			answer(conn, name, i == 0)
		}
	}()
	return nil
}

func answer(conn net.Conn, name string, first bool) {
	defer conn.Close()
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return
	}
	told(name, line)
	if *state != "" {
		remember(line)
	}
	switch modeFor(line, first) {
	case "ack":
		fmt.Fprintln(conn, `{"ok":true}`)
	case "veto":
		fmt.Fprintln(conn, `{"ok":false,"error":"pool busy"}`)
	case "garbage":
		fmt.Fprint(conn, "\x00\xff{{{ no JSON at all\n")
	case "crash":
		fmt.Fprint(conn, `{"ok":`)
		os.Exit(3)
	case "timeout":
		// Whoever asked goes away in the end.
		_, _ = io.Copy(io.Discard, conn)
	}
}

// remembered is the last checkpoint's id, which is in the file as well.
var remembered string

// remember writes what is in memory into a file before a checkpoint, and says after a restore what
// both have: "state MEMORY FILE".
func remember(line string) {
	var m struct {
		Event string `json:"event"`
		ID    string `json:"id"`
	}
	_ = json.Unmarshal([]byte(line), &m)
	switch m.Event {
	case "before-checkpoint":
		remembered = m.ID
		if err := os.WriteFile(*state, []byte(m.ID), 0o644); err != nil {
			fmt.Println(err)
		}
	case "after-restore":
		file, err := os.ReadFile(*state)
		if err != nil {
			fmt.Println(err)
		}
		fmt.Println("state", remembered, string(file))
	}
}

func serveHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil || r.Method != http.MethodPost {
		http.Error(w, "POST a message", http.StatusMethodNotAllowed)
		return
	}
	if len(body) == 0 {
		return // somebody looks whether it listens
	}
	told("http", string(body))
	switch modeFor(string(body), true) {
	case "veto":
		http.Error(w, "pool busy", http.StatusServiceUnavailable)
	case "timeout":
		<-r.Context().Done()
	case "crash":
		os.Exit(3)
	case "silent", "garbage":
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		if *mode == "garbage" {
			fmt.Fprint(conn, "\x00\xff{{{ no HTTP at all\n")
		}
		conn.Close()
	}
}

func onSignal() {
	files, _ := filepath.Glob(filepath.Join(dir, "*.json"))
	for _, f := range files {
		line, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		ack := strings.TrimSuffix(f, ".json") + ".ack"
		if _, err := os.Stat(ack); err == nil {
			continue // of an earlier event
		}
		told("signal", string(line))
		var text string
		switch modeFor(string(line), true) {
		case "veto":
			text = `{"ok":false,"error":"pool busy"}`
		case "garbage":
			text = "\x00\xff{{{ no JSON at all\n"
		case "timeout", "silent":
			continue
		case "crash":
			os.Exit(3)
		}
		if err := os.WriteFile(ack+".new", []byte(text), 0o644); err != nil {
			fmt.Println(err)
		}
		if err := os.Rename(ack+".new", ack); err != nil {
			fmt.Println(err)
		}
	}
}

// hook is an argv adapter. It has no output of the container's, so it writes what
// it is told into a file.
func hook() error {
	line, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	f, err := os.OpenFile("/told", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	fmt.Fprintln(f, "told exec", os.Getenv("CRAC_EVENT"), strings.TrimSpace(string(line)))
	f.Close()
	switch modeFor(string(line), true) {
	case "veto":
		return errors.New("pool busy")
	case "timeout":
		time.Sleep(time.Hour)
	case "crash":
		_ = syscall.Kill(os.Getpid(), syscall.SIGSEGV)
		time.Sleep(time.Second)
	case "silent":
		os.Exit(3)
	case "garbage":
		fmt.Fprint(os.Stderr, "\x00\xff\x1b[31m{{{ nothing to read\n")
		os.Exit(4)
	}
	return nil
}

func ask(request string) (string, error) {
	conn, err := net.DialTimeout("unix", filepath.Join(dir, "control.sock"), 5*time.Second)
	if err != nil {
		return "", err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := fmt.Fprintln(conn, request); err != nil {
		return "", err
	}
	return bufio.NewReader(conn).ReadString('\n')
}

// self asks for a checkpoint as a shell would: no participant, only requests.
func self() error {
	line, err := ask(`{"v":1,"op":"checkpoint"}`)
	if err != nil {
		return err
	}
	var got struct {
		OK    bool   `json:"ok"`
		ID    string `json:"id"`
		Error string `json:"error"`
	}
	if err := json.Unmarshal([]byte(line), &got); err != nil {
		return err
	}
	if !got.OK {
		return errors.New(got.Error)
	}
	for {
		var o struct {
			OK      bool   `json:"ok"`
			Outcome string `json:"outcome"`
			Error   string `json:"error"`
		}
		line, err := ask(`{"v":1,"op":"outcome","id":"` + got.ID + `","wait_ms":2000}`)
		if err != nil || json.Unmarshal([]byte(line), &o) != nil {
			time.Sleep(20 * time.Millisecond) // during the dump there is no socket
			continue
		}
		if o.Outcome != "pending" {
			fmt.Println("outcome", o.Outcome, o.Error)
			return nil
		}
	}
}
