package runtime

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"

	criurpc "github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

// Stages at which CRIU asks whether to go on with a restore (criu(8),
// --action-script). Others need no answer but yes.
const (
	// stageNamespaces: the first process is there, in its namespaces, with
	// nothing in them.
	stageNamespaces = "setup-namespaces"
	// stageRestored: every process has its memory, files and mounts, and none has
	// its credentials or has run.
	stageRestored = "post-restore"
	// stageTerminal: the master of a terminal that lost its other end comes
	// with the message.
	stageTerminal = "orphan-pts-master"
)

// maxMessage bounds what CRIU sends, in bytes: numbers, names, and one message
// for people.
const maxMessage = 16 << 10

// swrk is CRIU as a service of one process for one request: `criu swrk`. It is
// not safe for concurrent use.
type swrk struct {
	cmd    *exec.Cmd
	socket *os.File
	ended  chan struct{} // closed when it has, with:
	status error
}

// startSwrk starts CRIU from PATH. The stdio and extra files are what a restore
// may hand on to processes: extra[i] is descriptor swrkExtra+i there. close must
// be called.
func startSwrk(reaper *Subreaper, stdio [3]*os.File, extra []*os.File) (*swrk, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socketpair", err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "criu"), os.NewFile(uintptr(fds[1]), "criu-swrk")
	defer theirs.Close() // or the end of CRIU would not be seen
	cmd := exec.Command("criu", "swrk", "3")
	for i, to := range []func(*os.File){
		func(f *os.File) { cmd.Stdin = f }, func(f *os.File) { cmd.Stdout = f }, func(f *os.File) { cmd.Stderr = f },
	} {
		if stdio[i] != nil { // a nil *os.File would not be a nil interface
			to(stdio[i])
		}
	}
	cmd.ExtraFiles = append([]*os.File{theirs}, extra...)
	wait, err := reaper.Start(cmd)
	if err != nil {
		ours.Close()
		return nil, fmt.Errorf("start CRIU: %w", err)
	}
	s := &swrk{cmd: cmd, socket: ours, ended: make(chan struct{})}
	go func() {
		s.status = wait()
		close(s.ended)
		s.hangUp()
	}()
	return s, nil
}

// hangUp ends the conversation with a CRIU that has ended: what it was restoring is of its
// making, and keeps its end of the socket open. What it has said before can still be read.
func (s *swrk) hangUp() {
	conn, err := s.socket.SyscallConn()
	if err != nil {
		return // it was closed
	}
	_ = conn.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_RDWR) })
}

// swrkExtra is the descriptor of CRIU's first extra file.
const swrkExtra = 4

func (s *swrk) pid() int { return s.cmd.Process.Pid }

// call has CRIU do what is asked. notify is told of every stage, with the pid of
// the first restored process and a file, where the stage has them; the file is
// closed afterwards. An error of notify makes CRIU undo what it has done, and is
// what call returns.
func (s *swrk) call(req *criurpc.CriuReq, notify func(stage string, pid int, file *os.File) error) error {
	var refused error
	for next := req; ; {
		if err := s.send(next); err != nil {
			return errors.Join(refused, s.gone(err))
		}
		resp, file, err := s.receive()
		if err != nil {
			return errors.Join(refused, s.gone(err))
		}
		if resp.GetType() != criurpc.CriuReqType_NOTIFY {
			switch {
			case refused != nil:
				return refused
			case !resp.GetSuccess():
				return fmt.Errorf("criu failed: %s (error %d)", resp.GetCrErrmsg(), resp.GetCrErrno())
			case resp.GetType() != req.GetType():
				return fmt.Errorf("criu answers %s to %s", resp.GetType(), req.GetType())
			}
			if err := s.end(); resp.GetType() != criurpc.CriuReqType_PRE_DUMP {
				return err
			}
			return nil // it was ready for more, and calls the end of that an error
		}
		if refused == nil {
			refused = notify(resp.GetNotify().GetScript(), int(resp.GetNotify().GetPid()), file)
		}
		if file != nil {
			file.Close()
		}
		next = &criurpc.CriuReq{Type: resp.Type, NotifySuccess: proto.Bool(refused == nil)}
	}
}

// gone says how CRIU has ended, if that is why it could not be talked to.
func (s *swrk) gone(err error) error {
	if !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, unix.EPIPE) && !errors.Is(err, unix.ECONNRESET) {
		return err
	}
	if err := s.end(); err != nil {
		return fmt.Errorf("criu ended without an answer: %w", err)
	}
	return errors.New("criu ended without an answer")
}

func (s *swrk) send(req *criurpc.CriuReq) error {
	data, err := proto.Marshal(req)
	if err != nil {
		return err
	}
	return os.NewSyscallError("send", unix.Send(int(s.socket.Fd()), data, unix.MSG_NOSIGNAL))
}

func (s *swrk) receive() (*criurpc.CriuResp, *os.File, error) {
	data, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4))
	n, oobn, flags, _, err := unix.Recvmsg(int(s.socket.Fd()), data, oob, unix.MSG_CMSG_CLOEXEC)
	switch {
	case err != nil:
		return nil, nil, os.NewSyscallError("recvmsg", err)
	case n == 0:
		return nil, nil, io.ErrUnexpectedEOF
	case flags&unix.MSG_TRUNC != 0:
		return nil, nil, fmt.Errorf("criu sent a message of more than %d bytes", maxMessage)
	}
	resp := new(criurpc.CriuResp)
	file, err := receivedFile(oob[:oobn])
	if err == nil {
		err = proto.Unmarshal(data[:n], resp)
	}
	if err != nil && file != nil {
		file.Close()
	}
	return resp, file, err
}

// receivedFile is the file that came with a message; nil if none did.
func receivedFile(oob []byte) (*os.File, error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			return nil, err
		}
		if len(fds) > 0 { // there is room for one
			return os.NewFile(uintptr(fds[0]), stageTerminal), nil
		}
	}
	return nil, nil
}

// end waits for a CRIU that has done what it was asked.
func (s *swrk) end() error {
	s.socket.Close()
	<-s.ended
	return s.status
}

// close ends CRIU, unless it has ended. What it was doing fails.
func (s *swrk) close() {
	_ = s.end() // it ends when it finds the socket closed
}
