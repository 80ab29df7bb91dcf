package inspect

import (
	"fmt"

	"google.golang.org/protobuf/proto"

	"github.com/crac-shim/crac/oci/criuimage"
)

// maxMessages bounds what an image file holds.
const maxMessages = 1 << 20

// Messages takes an image file apart of which all messages are needed together.
func Messages(file []byte, kind criuimage.Kind) ([][]byte, error) {
	return criuimage.Split(file, kind, maxMessages)
}

// Unmarshal makes messages of an image file's parts.
func Unmarshal[M any, P interface {
	*M
	proto.Message
}](parts [][]byte) ([]P, error) {
	all := make([]P, len(parts))
	for i, part := range parts {
		all[i] = new(M)
		if err := proto.Unmarshal(part, all[i]); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// dump is the files of a dump.
type dump map[string][]byte

// one reads a file that holds one message. It says whether the file is there.
func (d dump) one(name string, kind criuimage.Kind, m proto.Message) (bool, error) {
	data, ok := d[name]
	if !ok {
		return false, nil
	}
	message, err := criuimage.One(data, kind)
	if err == nil {
		err = proto.Unmarshal(message, m)
	}
	if err != nil {
		return true, damaged(fmt.Errorf("%s: %w", name, err))
	}
	return true, nil
}

// must is one for a file that has to be there.
func (d dump) must(name string, kind criuimage.Kind, m proto.Message) error {
	ok, err := d.one(name, kind, m)
	if err == nil && !ok {
		err = damaged(fmt.Errorf("%s is missing", name))
	}
	return err
}

// each reads a file of many messages, if it is there.
func each[M any, P interface {
	*M
	proto.Message
}](d dump, name string, kind criuimage.Kind) ([]P, error) {
	data, ok := d[name]
	if !ok {
		return nil, nil
	}
	var all []P
	parts, err := Messages(data, kind)
	if err == nil {
		all, err = Unmarshal[M, P](parts)
	}
	if err != nil {
		return nil, damaged(fmt.Errorf("%s: %w", name, err))
	}
	return all, nil
}
