// Package criuimage takes CRIU's image files apart and puts them together: the marks at
// the start, and the messages behind them. What a message says is its reader's business.
//
//	file    = marks { length message }
//	marks   = common kind    or kind alone, in the inventory, which tells the form of the others
//	length  = 4 bytes        of the message, which is a protobuf's; all numbers are little endian
//
// CRIU's own word on it is in its sources: criu/include/magic.h, criu/image.c and
// lib/py/images/images.py; the messages are in images/*.proto. Files that have raw data
// between or behind messages (pages, ghost files, queues of sockets, archives) are not of
// this form.
//
// A file may be hostile. Reading one copies nothing: messages are parts of the bytes that
// were given, whatever lengths the file tells.
package criuimage

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"

	"google.golang.org/protobuf/encoding/protowire"
)

// Kind is the mark by which a kind of file is known (criu/include/magic.h).
type Kind uint32

// Kinds that we read or write.
const (
	Core        Kind = 0x55053847
	Files       Kind = 0x56303138
	Fdinfo      Kind = 0x56213732
	FS          Kind = 0x51403912
	IDs         Kind = 0x54432030
	Inventory   Kind = 0x58313116
	MM          Kind = 0x57492820
	Mountpoints Kind = 0x55563928
	Netns       Kind = 0x55933752
	Pagemap     Kind = 0x56084025
	Pstree      Kind = 0x50273030
	Seccomp     Kind = 0x64413049
	UTSNS       Kind = 0x54473203
)

// common is the first mark of most files: IMG_COMMON_MAGIC.
const common Kind = 0x54564319

// What is wrong with a file, to be said behind its name.
var (
	ErrKind   = errors.New("is not what its name says")
	ErrCutOff = errors.New("is cut off")
)

// Messages are those of a file of this kind, in order. An error is the last that there is.
func Messages(file []byte, kind Kind) iter.Seq2[[]byte, error] {
	return func(yield func([]byte, error) bool) {
		rest, err := unmarked(file, kind)
		for err == nil && len(rest) > 0 {
			var message []byte
			if message, rest, err = cut(rest); err == nil && !yield(message, nil) {
				return
			}
		}
		if err != nil {
			yield(nil, err)
		}
	}
}

// Split is Messages for a file of which all are needed together, at most so many.
func Split(file []byte, kind Kind, most int) (all [][]byte, err error) {
	for message, err := range Messages(file, kind) {
		if err != nil {
			return nil, err
		}
		if all = append(all, message); len(all) > most {
			return nil, fmt.Errorf("holds more than %d messages", most)
		}
	}
	return all, nil
}

// One is the message of a file that has to hold one and no more.
func One(file []byte, kind Kind) ([]byte, error) {
	var one []byte
	n := 0
	for message, err := range Messages(file, kind) {
		if err != nil {
			return nil, err
		}
		one = message
		n++
	}
	if n != 1 {
		return nil, fmt.Errorf("holds %d messages instead of one", n)
	}
	return one, nil
}

// New makes a file.
func New(kind Kind, messages ...[]byte) []byte {
	size := 8
	for _, m := range messages {
		size += 4 + len(m)
	}
	file := make([]byte, 0, size)
	for _, mark := range marks(kind) {
		file = binary.LittleEndian.AppendUint32(file, uint32(mark))
	}
	return Append(file, messages...)
}

// Append adds messages to a file.
func Append(file []byte, messages ...[]byte) []byte {
	for _, m := range messages {
		file = append(binary.LittleEndian.AppendUint32(file, uint32(len(m))), m...)
	}
	return file
}

func marks(kind Kind) []Kind {
	if kind == Inventory {
		return []Kind{kind}
	}
	return []Kind{common, kind}
}

// unmarked takes the marks off a file of this kind.
func unmarked(file []byte, kind Kind) ([]byte, error) {
	for _, mark := range marks(kind) {
		if len(file) < 4 || Kind(binary.LittleEndian.Uint32(file)) != mark {
			return nil, ErrKind
		}
		file = file[4:]
	}
	return file, nil
}

// cut takes the first message off what is behind the marks.
func cut(data []byte) (message, rest []byte, err error) {
	if len(data) < 4 {
		return nil, nil, ErrCutOff
	}
	size := uint64(binary.LittleEndian.Uint32(data))
	if data = data[4:]; size > uint64(len(data)) {
		return nil, nil, ErrCutOff
	}
	return data[:size:size], data[size:], nil
}

// Fields gives each field of a message its turn: encoded, as it came.
func Fields(message []byte, turn func(num protowire.Number, kind protowire.Type, value []byte) error) error {
	for len(message) > 0 {
		num, kind, tag := protowire.ConsumeTag(message)
		if tag < 0 {
			return protowire.ParseError(tag)
		}
		size := protowire.ConsumeFieldValue(num, kind, message[tag:])
		if size < 0 {
			return protowire.ParseError(size)
		}
		if err := turn(num, kind, message[tag:tag+size]); err != nil {
			return err
		}
		message = message[tag+size:]
	}
	return nil
}

// Edit copies a message with the value that edit gives each field: see Fields; nil leaves
// the field out.
func Edit(message []byte, edit func(num protowire.Number, kind protowire.Type, value []byte) ([]byte, error)) ([]byte, error) {
	edited := make([]byte, 0, len(message)+32)
	err := Fields(message, func(num protowire.Number, kind protowire.Type, value []byte) error {
		value, err := edit(num, kind, value)
		if value != nil {
			edited = append(protowire.AppendTag(edited, num, kind), value...)
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return edited, nil
}
