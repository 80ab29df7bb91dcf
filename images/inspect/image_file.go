package inspect

import (
	"encoding/binary"
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/crac-shim/crac/images"
)

// CRIU's image files (image.c): two magic numbers, the inventory's only one, then
// messages with their sizes before them.
const (
	magicCommon = 0x54564319
	maxMessages = 1 << 20
)

// messages takes an image file apart. Which kind it is, its name has said.
func messages(data []byte) ([][]byte, error) {
	if len(data) < 8 || binary.LittleEndian.Uint32(data) != magicCommon {
		return nil, errors.New("is no image file of CRIU's")
	}
	return images.SplitMessages(data[8:], maxMessages)
}

// dump is the files of a dump.
type dump map[string][]byte

// one reads a file that holds one message. It says whether the file is there.
func (d dump) one(name string, m proto.Message) (bool, error) {
	data, ok := d[name]
	if !ok {
		return false, nil
	}
	all, err := messages(data)
	if err == nil && len(all) != 1 {
		err = fmt.Errorf("holds %d messages instead of one", len(all))
	}
	if err == nil {
		err = proto.Unmarshal(all[0], m)
	}
	if err != nil {
		return true, damaged(fmt.Errorf("%s: %w", name, err))
	}
	return true, nil
}

// must is one for a file that has to be there.
func (d dump) must(name string, m proto.Message) error {
	ok, err := d.one(name, m)
	if err == nil && !ok {
		err = damaged(fmt.Errorf("%s is missing", name))
	}
	return err
}

// each reads a file of many messages, if it is there.
func each[M any, P interface {
	*M
	proto.Message
}](d dump, name string) ([]P, error) {
	data, ok := d[name]
	if !ok {
		return nil, nil
	}
	parts, err := messages(data)
	if err != nil {
		return nil, damaged(fmt.Errorf("%s: %w", name, err))
	}
	all := make([]P, len(parts))
	for i, part := range parts {
		all[i] = new(M)
		if err := proto.Unmarshal(part, all[i]); err != nil {
			return nil, damaged(fmt.Errorf("%s: %w", name, err))
		}
	}
	return all, nil
}
