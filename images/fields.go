package images

import (
	"fmt"
	"iter"
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
)

// fields is a protobuf message of which every field can be read. Readers differ about a
// field that is there twice, and about numbers that are too large: the accessors
// refuse what CRIU does not write, so that it cannot see anything else than we.
//
// Each looks through the message anew: they are short, and nothing is copied of those
// that are not.
type fields []byte

type field struct {
	number uint64 // of a varint
	bytes  []byte // of anything with a length
	kind   protowire.Type
}

// parse checks a message. What it returns is never nil.
func parse(data []byte) (fields, error) {
	f := fields(data)
	for len(data) > 0 {
		_, _, n, err := next(data)
		if err != nil {
			return nil, err
		}
		data = data[n:]
	}
	if f == nil {
		f = fields{}
	}
	return f, nil
}

// next reads the first field of a message, which has so many bytes.
func next(data []byte) (num protowire.Number, v field, size int, err error) {
	num, kind, n := protowire.ConsumeTag(data)
	if n < 0 {
		return 0, v, 0, protowire.ParseError(n)
	}
	size, data, v.kind = n, data[n:], kind
	switch kind {
	case protowire.VarintType:
		v.number, n = protowire.ConsumeVarint(data)
	case protowire.BytesType:
		v.bytes, n = protowire.ConsumeBytes(data)
	case protowire.Fixed32Type, protowire.Fixed64Type:
		n = protowire.ConsumeFieldValue(num, kind, data)
	default:
		return 0, v, 0, fmt.Errorf("field %d has the wire type %d", num, kind)
	}
	if n < 0 {
		return 0, v, 0, protowire.ParseError(n)
	}
	return num, v, size + n, nil
}

// all are the fields of this number, in order.
func (f fields) all(num protowire.Number) iter.Seq[field] {
	return func(yield func(field) bool) {
		for data := f; len(data) > 0; {
			its, v, n, err := next(data)
			if err != nil || its == num && !yield(v) { // parse has seen that there is no error
				return
			}
			data = data[n:]
		}
	}
}

func (f fields) has(num protowire.Number) bool {
	for range f.all(num) {
		return true
	}
	return false
}

// single returns a field that may be there once.
func (f fields) single(num protowire.Number, kind protowire.Type) (v field, there bool, err error) {
	n := 0
	for v = range f.all(num) {
		n++
	}
	switch {
	case n > 1:
		return field{}, false, fmt.Errorf("field %d is there %d times", num, n)
	case n == 1 && v.kind != kind:
		return field{}, false, fmt.Errorf("field %d has the wire type %d", num, v.kind)
	}
	return v, n == 1, nil
}

// number returns 0 for a field that is not there.
func (f fields) number(num protowire.Number) (uint32, error) {
	v, there, err := f.single(num, protowire.VarintType)
	if err != nil || !there {
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
	v, there, err := f.single(num, protowire.BytesType)
	if err != nil || !there {
		return "", err
	}
	if slices.Contains(v.bytes, 0) {
		return "", fmt.Errorf("field %d holds a zero byte", num) // where C's string ends
	}
	return string(v.bytes), nil
}

// message returns nil for a message that is not there.
func (f fields) message(num protowire.Number) (fields, error) {
	v, there, err := f.single(num, protowire.BytesType)
	if err != nil || !there {
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
	for v := range f.all(num) {
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
