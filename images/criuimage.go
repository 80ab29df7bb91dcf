package images

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/crac-shim/crac/oci/criuimage"
)

// Limits of image files. CRIU's largest of the files read here are a few kilobytes
// per process and mount.
const (
	maxImage    = 16 << 20
	maxImages   = 1 << 20
	maxMessages = 1 << 16
)

// dumpDir is an open directory with a dump, which is hostile.
type dumpDir struct{ dir *os.File }

func openDump(dir string) (dumpDir, error) {
	f, err := os.OpenFile(dir, unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	return dumpDir{f}, err
}

// listDump opens a dump and reads the names of its files, sorted.
func listDump(dir string) (d dumpDir, names []string, err error) {
	if d, err = openDump(dir); err != nil {
		return d, nil, err
	}
	names, err = d.dir.Readdirnames(maxImages)
	switch {
	case err != nil && !errors.Is(err, io.EOF):
	case len(names) == maxImages:
		err = fmt.Errorf("%s holds more than %d files", dir, maxImages)
	default:
		slices.Sort(names)
		return d, names, nil
	}
	d.close()
	return d, nil, err
}

func (d dumpDir) close() { _ = d.dir.Close() }

// one reads an image that holds one message.
func (d dumpDir) one(name string, kind criuimage.Kind) ([]byte, error) {
	data, err := d.file(name)
	if err != nil {
		return nil, err
	}
	return criuimage.One(data, kind)
}

func (d dumpDir) read(name string, kind criuimage.Kind) ([][]byte, error) {
	data, err := d.file(name)
	if err != nil {
		return nil, err
	}
	return criuimage.Split(data, kind, maxMessages)
}

func (d dumpDir) file(name string) ([]byte, error) {
	f, err := openBeneath(int(d.dir.Fd()), name)
	if err != nil {
		var p *os.PathError
		if errors.As(err, &p) {
			err = p.Err // the name is said once
		}
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxImage+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxImage {
		return nil, fmt.Errorf("has more than %d bytes", maxImage)
	}
	return data, nil
}

// fields are a protobuf message's, by their numbers. Readers differ about a
// field that is there twice, and about numbers that are too large: the accessors
// refuse what CRIU does not write, so that it cannot see anything else than we.
type fields map[protowire.Number][]field

type field struct {
	number uint64 // of a varint
	bytes  []byte // of anything with a length
	kind   protowire.Type
}

func parse(data []byte) (fields, error) {
	f := fields{}
	for len(data) > 0 {
		num, kind, n := protowire.ConsumeTag(data)
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		data = data[n:]
		v := field{kind: kind}
		switch kind {
		case protowire.VarintType:
			v.number, n = protowire.ConsumeVarint(data)
		case protowire.BytesType:
			v.bytes, n = protowire.ConsumeBytes(data)
		case protowire.Fixed32Type, protowire.Fixed64Type:
			n = protowire.ConsumeFieldValue(num, kind, data)
		default:
			return nil, fmt.Errorf("field %d has the wire type %d", num, kind)
		}
		if n < 0 {
			return nil, protowire.ParseError(n)
		}
		data = data[n:]
		f[num] = append(f[num], v)
	}
	return f, nil
}

func (f fields) has(num protowire.Number) bool { return len(f[num]) > 0 }

// single returns a field that may be there once; nil if it is not.
func (f fields) single(num protowire.Number, kind protowire.Type) (*field, error) {
	switch v := f[num]; {
	case len(v) == 0:
		return nil, nil
	case len(v) > 1:
		return nil, fmt.Errorf("field %d is there %d times", num, len(v))
	case v[0].kind != kind:
		return nil, fmt.Errorf("field %d has the wire type %d", num, v[0].kind)
	default:
		return &v[0], nil
	}
}

// number returns 0 for a field that is not there.
func (f fields) number(num protowire.Number) (uint32, error) {
	v, err := f.single(num, protowire.VarintType)
	if err != nil || v == nil {
		return 0, err
	}
	return word(num, v.number)
}

func word(num protowire.Number, v uint64) (uint32, error) {
	if v > 1<<32-1 {
		return 0, fmt.Errorf("field %d has the value %d", num, v)
	}
	return uint32(v), nil
}

func (f fields) text(num protowire.Number) (string, error) {
	v, err := f.single(num, protowire.BytesType)
	if err != nil || v == nil {
		return "", err
	}
	if slices.Contains(v.bytes, 0) {
		return "", fmt.Errorf("field %d holds a zero byte", num) // where C's string ends
	}
	return string(v.bytes), nil
}

// message returns nil for a message that is not there.
func (f fields) message(num protowire.Number) (fields, error) {
	v, err := f.single(num, protowire.BytesType)
	if err != nil || v == nil {
		return nil, err
	}
	return parse(v.bytes)
}

// numbers returns a repeated field's, packed or not.
func (f fields) numbers(num protowire.Number) (words []uint32, err error) {
	add := func(v uint64) error {
		w, err := word(num, v)
		words = append(words, w)
		return err
	}
	for _, v := range f[num] {
		switch v.kind {
		case protowire.VarintType:
			if err := add(v.number); err != nil {
				return nil, err
			}
		case protowire.BytesType:
			for data := v.bytes; len(data) > 0; {
				number, n := protowire.ConsumeVarint(data)
				if n < 0 {
					return nil, protowire.ParseError(n)
				}
				data = data[n:]
				if err := add(number); err != nil {
					return nil, err
				}
			}
		default:
			return nil, fmt.Errorf("field %d has the wire type %d", num, v.kind)
		}
	}
	return words, nil
}
