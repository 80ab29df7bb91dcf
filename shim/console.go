package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"sync"

	"github.com/containerd/console"
	"golang.org/x/sys/unix"
)

// consoles waits for input on all terminals of this shim with one epoll. It
// starts with the first terminal: most containers have none.
var consoles = sync.OnceValues(func() (*console.Epoller, error) {
	e, err := console.NewEpoller()
	if err != nil {
		return nil, err
	}
	go func() { _ = e.Wait() }()
	return e, nil
})

// openConsole makes the socket that the terminal is to come through, anew if there is
// one: what a start that has failed has sent through it is no terminal of the next.
func (p *processIO) openConsole() error {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socketpair", err)
	}
	if p.console != nil {
		p.console.Close()
	}
	if p.child.Console != nil {
		p.child.Console.Close()
	}
	p.console = os.NewFile(uintptr(fds[0]), "console-parent")
	p.child.Console = os.NewFile(uintptr(fds[1]), "console-child")
	return nil
}

// attachConsole receives the terminal's master, which the process's start has
// sent, and copies between it and the client.
func (p *processIO) attachConsole(ctx context.Context, owner stdioOwner) error {
	master, err := receiveFile(p.console)
	if err != nil {
		return fmt.Errorf("receive the terminal: %w", err)
	}
	raw, err := console.ConsoleFromFile(master)
	if err != nil {
		master.Close()
		return fmt.Errorf("terminal: %w", err)
	}
	epoller, err := consoles()
	if err != nil {
		master.Close()
		return fmt.Errorf("epoll for terminals: %w", err)
	}
	cons, err := epoller.Add(raw)
	if err != nil {
		master.Close()
		return fmt.Errorf("epoll for terminals: %w", err)
	}
	p.mu.Lock()
	p.master = cons
	p.mu.Unlock()
	if p.config.Stdin != "" {
		in, err := p.openInput(p.config.Stdin)
		if err != nil {
			return err
		}
		go func() { _ = copyAll(cons, in) }()
	}
	sink, err := p.consoleSink(ctx, owner)
	if err != nil {
		return err
	}
	if sink == nil {
		sink = nopCloser{io.Discard}
	}
	p.closers = append(p.closers, sink)
	p.copyOut(sink, cons)
	return nil
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// consoleSink opens where a terminal's output goes.
func (p *processIO) consoleSink(ctx context.Context, owner stdioOwner) (io.WriteCloser, error) {
	if p.config.Stdout == "" {
		return nil, nil
	}
	u, err := url.Parse(p.config.Stdout)
	if err != nil {
		return nil, fmt.Errorf("stdout %q: %w", p.config.Stdout, err)
	}
	switch u.Scheme {
	case "", "fifo":
		ctx, cancel := context.WithTimeout(ctx, openTimeout)
		defer cancel()
		return openOutput(ctx, p.config.Stdout)
	case "file":
		return os.OpenFile(u.Path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o644)
	case "binary", "binary-v2":
		r, w, err := os.Pipe()
		if err != nil {
			return nil, err
		}
		defer r.Close()
		// A terminal has no second stream; the program gets one that has ended.
		er, ew, err := os.Pipe()
		if err != nil {
			w.Close()
			return nil, err
		}
		ew.Close()
		defer er.Close()
		if p.logger, err = runLogger(u, owner, r, er); err != nil {
			w.Close()
			return nil, err
		}
		return w, nil
	}
	return nil, fmt.Errorf("stdout %q: unknown scheme %q; known are fifo, file, binary and binary-v2", p.config.Stdout, u.Scheme)
}

// terminal is the master of the process's terminal; nil while there is none.
func (p *processIO) terminal() console.Console {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.master
}

// hangUp ends the copying of a terminal whose process has ended: other
// processes may hold it open.
func (p *processIO) hangUp() {
	if c, ok := p.terminal().(*console.EpollConsole); ok {
		if epoller, err := consoles(); err == nil {
			_ = c.Shutdown(epoller.CloseConsole)
		}
	}
}

// resize sets the terminal's size. Without a terminal there is nothing to do.
func (p *processIO) resize(width, height uint16) error {
	master := p.terminal()
	if master == nil {
		return nil
	}
	return master.Resize(console.WinSize{Width: width, Height: height})
}

// receiveFile receives one open file over a unix socket (unix(7), SCM_RIGHTS).
func receiveFile(socket *os.File) (*os.File, error) {
	name := make([]byte, 4096)
	oob := make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := unix.Recvmsg(int(socket.Fd()), name, oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("recvmsg", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err == nil && len(fds) > 0 {
			return os.NewFile(uintptr(fds[0]), string(name[:n])), nil
		}
	}
	return nil, errors.New("no file came with the message")
}
