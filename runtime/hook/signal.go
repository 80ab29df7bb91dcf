package hook

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"

	"github.com/moby/sys/signal"
	"golang.org/x/sys/unix"
)

// signalAdapter signals the container's init, which finds the message in
// EVENT.json and answers by making EVENT.ack.
type signalAdapter struct {
	name string // as it is written
	sig  unix.Signal
}

func parseSignal(name string) (Adapter, error) {
	name = strings.ToUpper(strings.TrimSpace(name))
	sig, err := signal.ParseSignal(name)
	if err != nil || sig < 1 || sig > 64 {
		return nil, fmt.Errorf("the hook's signal %q is not known: signal:SIGUSR2 is an example", clean(name))
	}
	if sig == unix.SIGKILL || sig == unix.SIGSTOP {
		return nil, fmt.Errorf("the hook's signal %s cannot be handled by a program: signal:SIGUSR2 can", name)
	}
	if _, err := strconv.Atoi(name); err != nil && !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	return signalAdapter{name, sig}, nil
}

func (a signalAdapter) String() string { return "signal:" + a.name }

func (a signalAdapter) tell(ctx context.Context, n *Notifier, m Message, line []byte) error {
	switch {
	case n.Container == nil:
		return errNoContainer
	case n.Dir == "":
		return errors.New("there is no /run/crac for the acknowledgement")
	}
	dir, err := openDirectory(n.Dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	message, ack := string(m.Event)+".json", string(m.Event)+".ack"
	if err := dir.remove(ack); err != nil {
		return err
	}
	// It holds the init's environment, which is no other user's business.
	uid, gid, err := n.Container.User()
	if err == nil {
		err = dir.write(message, line, uid, gid)
	}
	if err != nil {
		return fmt.Errorf("leave the message: %w", err)
	}
	// Neither is for a dump, nor for the next time.
	defer func() {
		_ = dir.remove(message)
		_ = dir.remove(ack)
	}()
	if err := n.Container.Signal(a.sig); err != nil {
		return fmt.Errorf("send %s: %w", a.name, err)
	}
	answer, err := dir.await(ctx, n.Container.Done(), ack)
	if err != nil {
		return err
	}
	return parseAck(answer)
}

// await waits until there is a file of that name and reads it. When its author has
// ended, it waits no longer.
func (d directory) await(ctx context.Context, ended <-chan struct{}, name string) ([]byte, error) {
	for {
		var last bool
		select {
		case <-ended:
			last = true
		default:
		}
		data, err := d.read(name, maxAnswer)
		switch {
		case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.EAGAIN):
			return data, err
		case last:
			return nil, errors.New("the container's init has ended without an answer")
		}
		if err := sleep(ctx, pollEvery); err != nil {
			return nil, err
		}
	}
}

// parseAck reads an acknowledgement file: an empty one agrees, and others are an
// answer or the reason against.
func parseAck(data []byte) error {
	text := strings.TrimSpace(string(data))
	switch {
	case text == "":
		return nil
	case strings.HasPrefix(text, "{"):
		return parseAnswer([]byte(text))
	}
	return refusal(text)
}
