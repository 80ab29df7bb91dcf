package pager

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// restoreFinished is what CRIU sends instead of a process's number when all
// processes are there, right before they run (criu/uffd.c).
const restoreFinished = 0x52535446

// accept takes the one connection of CRIU and what comes over it.
func (s *Server) accept() {
	conn, err := s.cfg.Listener.AcceptUnix()
	s.cfg.Listener.Close()
	if err != nil {
		select {
		case <-s.failing:
		default:
			s.finish(fmt.Errorf("wait for criu: %w", err), false)
		}
		return
	}
	s.mu.Lock()
	s.stats.Connected = time.Now()
	s.mu.Unlock()
	go func() { // the connection ends with the server
		<-s.failing
		conn.Close()
	}()
	if err := s.receive(conn); err != nil {
		// CRIU has died or given up before it said that the restore is complete.
		// Until it says so every process waits inside CRIU's code, and none of
		// the workload's has run or ever will: there is nobody to see zeroes, and
		// whoever started CRIU clears up.
		s.finish(fmt.Errorf("the restore has failed: %w", err), false)
		return
	}
	s.mu.Lock()
	s.stats.Restored = time.Since(s.stats.Connected)
	s.mu.Unlock()
	s.pace.begin()
	close(s.restored)
}

// receive takes the processes until all are there.
func (s *Server) receive(conn *net.UnixConn) error {
	for {
		number, err := receiveNumber(conn)
		switch {
		case err != nil:
			return err
		case number == restoreFinished:
			return nil
		case number < 0:
			continue // a zombie, which has no memory
		}
		fd, err := receiveFD(conn)
		if err != nil {
			return err
		}
		task, ok := s.dump.tasks[int(number)]
		if !ok {
			unix.Close(fd)
			return fmt.Errorf("criu restores process %d, of which the dump has no memory", number)
		}
		sp := &space{pid: task.pid, fd: uffd(fd), layout: newLayout(task)}
		if err := s.add(sp); err != nil {
			return err
		}
	}
}

func receiveNumber(conn *net.UnixConn) (int32, error) {
	var number [4]byte
	if _, err := io.ReadFull(conn, number[:]); err != nil {
		return 0, fmt.Errorf("criu has closed the connection: %w", err)
	}
	return int32(binary.NativeEndian.Uint32(number[:])), nil
}

// receiveFD receives a file descriptor, which comes with one byte.
func receiveFD(conn *net.UnixConn) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := conn.ReadMsgUnix(make([]byte, 1), oob)
	if err != nil {
		return -1, fmt.Errorf("receive a userfaultfd: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		return -1, errors.New("criu has sent no userfaultfd")
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return -1, fmt.Errorf("receive a userfaultfd: %w", os.NewSyscallError("SCM_RIGHTS", err))
	}
	return fds[0], nil
}
