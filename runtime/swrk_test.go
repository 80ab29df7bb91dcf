package runtime

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	criurpc "github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// fakeEnv holds the name of the script that this program plays as CRIU.
const fakeEnv = "CRAC_TEST_CRIU"

func TestMain(m *testing.M) {
	if script := os.Getenv(fakeEnv); script != "" && filepath.Base(os.Args[0]) == "criu" {
		os.Exit(fakeScripts[script](fakeCRIU{3}))
	}
	os.Exit(m.Run())
}

// fakeCRIU is the other end of the protocol.
type fakeCRIU struct{ socket int }

func (f fakeCRIU) read() *criurpc.CriuReq {
	data := make([]byte, maxMessage)
	n, err := unix.Read(f.socket, data)
	req := new(criurpc.CriuReq)
	if err != nil || n == 0 || proto.Unmarshal(data[:n], req) != nil {
		os.Exit(3)
	}
	return req
}

func (f fakeCRIU) write(resp *criurpc.CriuResp, fds ...int) {
	data, err := proto.Marshal(resp)
	if err == nil {
		var oob []byte
		if len(fds) > 0 {
			oob = unix.UnixRights(fds...)
		}
		err = unix.Sendmsg(f.socket, data, oob, nil, 0)
	}
	if err != nil {
		os.Exit(4)
	}
}

// ask notifies of a stage and returns the answer.
func (f fakeCRIU) ask(stage string, pid int32, fds ...int) bool {
	notify := &criurpc.CriuNotify{Script: &stage}
	if pid != 0 {
		notify.Pid = &pid
	}
	f.write(&criurpc.CriuResp{Type: criurpc.CriuReqType_NOTIFY.Enum(), Success: proto.Bool(true), Notify: notify}, fds...)
	return f.read().GetNotifySuccess()
}

func (f fakeCRIU) answer(success bool, message string) {
	f.write(&criurpc.CriuResp{Type: criurpc.CriuReqType_RESTORE.Enum(), Success: &success, CrErrmsg: &message, CrErrno: proto.Int32(17)})
}

var fakeScripts = map[string]func(fakeCRIU) int{
	"works": func(f fakeCRIU) int {
		// What it was started with arrives, and where.
		in, err := io.ReadAll(os.NewFile(swrkExtra, "extra"))
		if err != nil || f.read().GetOpts().GetLogFile() != "log" {
			return 5
		}
		fmt.Printf("stdout and %s", in)
		if !f.ask("pre-restore", 0) || !f.ask(stageNamespaces, 42) || !f.ask(stageTerminal, 0, 0) || !f.ask(stageRestored, 42) {
			return 6
		}
		f.answer(true, "")
		return 0
	},
	"refused": func(f fakeCRIU) int {
		f.read()
		if f.ask(stageRestored, 42) {
			f.answer(true, "")
			return 0
		}
		// It goes on to clean up, and says so.
		if f.ask("network-unlock", 0) {
			return 7
		}
		f.answer(false, "a script failed")
		return 1
	},
	"fails": func(f fakeCRIU) int { f.read(); f.answer(false, "no memory"); return 1 },
	"dies":  func(f fakeCRIU) int { f.read(); return 1 },
	"dies, and what it restores lives": func(f fakeCRIU) int {
		f.read()
		child := exec.Command("/bin/sleep", "1000")
		child.ExtraFiles = []*os.File{os.NewFile(uintptr(f.socket), "socket")}
		if child.Start() != nil || !f.ask(stageNamespaces, int32(child.Process.Pid)) {
			return 9
		}
		return 1
	},
	"fails at end": func(f fakeCRIU) int { f.read(); f.answer(true, ""); return 1 },
	"talks rubbish": func(f fakeCRIU) int {
		f.read()
		if _, err := unix.Write(f.socket, []byte("hello")); err != nil {
			return 8
		}
		unix.Read(f.socket, make([]byte, 1)) //nolint:errcheck // waits for the end
		return 0
	},
	"talks too much": func(f fakeCRIU) int {
		f.read()
		f.answer(false, strings.Repeat("x", maxMessage))
		unix.Read(f.socket, make([]byte, 1)) //nolint:errcheck // waits for the end
		return 0
	},
	"answers something else": func(f fakeCRIU) int {
		f.read()
		f.write(&criurpc.CriuResp{Type: criurpc.CriuReqType_DUMP.Enum(), Success: proto.Bool(true)})
		return 0
	},
}

func TestSwrk(t *testing.T) {
	dir := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(dir, "criu")); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	refusal := errors.New("this mount cannot be made")
	for script, tt := range map[string]struct {
		refuse bool
		err    string // part of it; empty: none
		stages string
	}{
		"works":                            {stages: "pre-restore/0 setup-namespaces/42 orphan-pts-master/0+file post-restore/42"},
		"refused":                          {refuse: true, err: refusal.Error(), stages: "post-restore/42"},
		"fails":                            {err: "no memory"},
		"dies":                             {err: "ended without an answer"},
		"dies, and what it restores lives": {err: "ended without an answer", stages: "setup-namespaces/child"},
		"fails at end":                     {err: "exit status 1"},
		"talks rubbish":                    {err: "proto"},
		"talks too much":                   {err: "more than"},
		"answers something else":           {err: "answers DUMP to RESTORE"},
	} {
		t.Run(script, func(t *testing.T) {
			t.Setenv(fakeEnv, script)
			out, err := os.CreateTemp(t.TempDir(), "")
			if err != nil {
				t.Fatal(err)
			}
			defer out.Close()
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if _, err := w.WriteString("extra"); err != nil {
				t.Fatal(err)
			}
			w.Close()
			s, err := startSwrk(reaper(t), [3]*os.File{nil, out, os.Stderr}, []*os.File{r})
			if err != nil {
				t.Fatal(err)
			}
			defer s.close()
			var stages []string
			req := &criurpc.CriuReq{Type: criurpc.CriuReqType_RESTORE.Enum(), Opts: &criurpc.CriuOpts{ImagesDirFd: proto.Int32(0), LogFile: proto.String("log")}}
			err = s.call(req, func(stage string, pid int, file *os.File) error {
				seen := fmt.Sprintf("%s/%d", stage, pid)
				if strings.HasPrefix(script, "dies, ") {
					seen = stage + "/child"
					t.Cleanup(func() { _ = unix.Kill(pid, unix.SIGKILL) })
				}
				if file != nil {
					if _, err := file.Stat(); err != nil {
						t.Errorf("the file that came at %s: %v", stage, err)
					}
					seen += "+file"
				}
				stages = append(stages, seen)
				if tt.refuse {
					return refusal
				}
				return nil
			})
			if (err == nil) != (tt.err == "") || (err != nil && !strings.Contains(err.Error(), tt.err)) {
				t.Errorf("error %v, want %q", err, tt.err)
			}
			if tt.refuse && !errors.Is(err, refusal) {
				t.Errorf("%v is not the refusal", err)
			}
			if got := strings.Join(stages, " "); got != tt.stages {
				t.Errorf("stages %q, want %q", got, tt.stages)
			}
			if got, err := os.ReadFile(out.Name()); err != nil || (script == "works" && string(got) != "stdout and extra") {
				t.Errorf("CRIU wrote %q, %v", got, err)
			}
		})
	}
}

func TestSwrkWithoutCRIU(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if s, err := startSwrk(reaper(t), [3]*os.File{}, nil); err == nil {
		s.close()
		t.Error("CRIU was started from nowhere")
	}
}
