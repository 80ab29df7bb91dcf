package criuimage

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
)

const (
	coreMarks      = "\x19\x43\x56\x54\x47\x38\x05\x55"
	inventoryMarks = "\x16\x31\x31\x58"
)

func TestFiles(t *testing.T) {
	for name, tt := range map[string]struct {
		file     string
		kind     Kind
		messages []string
		err      error
	}{
		"nothing":               {"", Core, nil, ErrKind},
		"half a mark":           {coreMarks[:2], Core, nil, ErrKind},
		"one mark of two":       {coreMarks[:4], Core, nil, ErrKind},
		"a mark and a half":     {coreMarks[:7], Core, nil, ErrKind},
		"marks alone":           {coreMarks, Core, nil, nil},
		"another kind":          {coreMarks, Files, nil, ErrKind},
		"marks of another file": {"\x89PNG\r\n\x1a\n", Core, nil, ErrKind},
		"inventory":             {inventoryMarks + "\x01\x00\x00\x00x", Inventory, []string{"x"}, nil},
		"inventory, both marks": {"\x19\x43\x56\x54" + inventoryMarks, Inventory, nil, ErrKind},
		"core as an inventory":  {"\x47\x38\x05\x55", Core, nil, ErrKind},
		"an empty message":      {coreMarks + "\x00\x00\x00\x00", Core, []string{""}, nil},
		"two":                   {coreMarks + "\x02\x00\x00\x00ab\x01\x00\x00\x00c", Core, []string{"ab", "c"}, nil},
		"half a length":         {coreMarks + "\x02\x00", Core, nil, ErrCutOff},
		"no message":            {coreMarks + "\x02\x00\x00\x00", Core, nil, ErrCutOff},
		"half a message":        {coreMarks + "\x02\x00\x00\x00a", Core, nil, ErrCutOff},
		"half a second":         {coreMarks + "\x01\x00\x00\x00a\x02\x00\x00\x00b", Core, []string{"a"}, ErrCutOff},
		"the largest length":    {coreMarks + "\xff\xff\xff\xffab", Core, nil, ErrCutOff},
		"more than two of them": {coreMarks + strings.Repeat("\x00\x00\x00\x00", 3), Core, []string{"", "", ""}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			file := []byte(tt.file)
			var got []string
			var last error
			for message, err := range Messages(file, tt.kind) {
				if last != nil {
					t.Fatal("it goes on after an error")
				}
				if last = err; err == nil {
					got = append(got, string(message))
				}
			}
			if !slices.Equal(got, tt.messages) || !errors.Is(last, tt.err) {
				t.Fatalf("%q, %v", got, last)
			}
			all, err := Split(file, tt.kind, 3)
			if !errors.Is(err, tt.err) || err == nil && len(all) != len(tt.messages) {
				t.Errorf("split into %q, %v", all, err)
			}
			one, err := One(file, tt.kind)
			if tt.err != nil && !errors.Is(err, tt.err) || (err == nil) != (tt.err == nil && len(tt.messages) == 1) {
				t.Errorf("one of them: %q, %v", one, err)
			}
			if tt.err == nil && string(New(tt.kind, all...)) != tt.file {
				t.Errorf("written as %q", New(tt.kind, all...))
			}
		})
	}
}

func TestSplitIsBounded(t *testing.T) {
	file := New(Files, nil, nil, nil)
	if _, err := Split(file, Files, 2); err == nil || err.Error() != "holds more than 2 messages" {
		t.Error(err)
	}
	if all, err := Split(file, Files, 3); err != nil || len(all) != 3 {
		t.Errorf("%q, %v", all, err)
	}
	if _, err := One(file, Files); err == nil || err.Error() != "holds 3 messages instead of one" {
		t.Error(err)
	}
}

// A message is a part of the file, and what is appended to it does not run into the next.
func TestMessagesAreParts(t *testing.T) {
	file := New(Files, []byte("one"), []byte("two"))
	all, err := Split(file, Files, 2)
	if err != nil {
		t.Fatal(err)
	}
	_ = append(all[0], "more"...)
	if string(all[1]) != "two" || &all[1][0] != &file[len(file)-3] {
		t.Errorf("%q", file)
	}
	if n := testing.AllocsPerRun(10, func() {
		for _, err := range Messages(file, Files) {
			if err != nil {
				t.Error(err)
			}
		}
		_, _ = One(New(Files)[:4], Files)
	}); n > 1 {
		t.Errorf("%v allocations", n)
	}
}

// What CRIU has written is written again as it was.
func TestRealDumps(t *testing.T) {
	for pattern, kind := range map[string]Kind{"core-*.img": Core, "ids-*.img": IDs, "inventory.img": Inventory, "mountpoints-*.img": Mountpoints} {
		names, err := filepath.Glob(filepath.Join("..", "..", "images", "testdata", "dumps", "*", pattern))
		if err != nil || len(names) == 0 {
			t.Fatalf("%s: %q, %v", pattern, names, err)
		}
		for _, name := range names {
			file, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			all, err := Split(file, kind, 100)
			if err != nil || len(all) == 0 || !bytes.Equal(New(kind, all...), file) {
				t.Errorf("%s: %d messages, %v", name, len(all), err)
			}
		}
	}
}

// FuzzMessages: whatever a file is, it is refused or the same when it is put together again.
func FuzzMessages(f *testing.F) {
	f.Add([]byte(coreMarks+"\x02\x00\x00\x00ab\x01\x00\x00\x00c"), uint32(Core))
	f.Add([]byte(inventoryMarks+"\x00\x00\x00\x00"), uint32(Inventory))
	f.Add([]byte(coreMarks+"\xff\xff\xff\xff"), uint32(Core))
	f.Fuzz(func(t *testing.T, file []byte, kind uint32) {
		const most = 1 << 10
		all, err := Split(file, Kind(kind), most)
		one, oneErr := One(file, Kind(kind))
		if (oneErr == nil) != (err == nil && len(all) == 1) || oneErr == nil && !bytes.Equal(one, all[0]) {
			t.Fatalf("%q, %v, and of %d messages, %v", one, oneErr, len(all), err)
		}
		if err != nil {
			return
		}
		if len(all) > most || !bytes.Equal(New(Kind(kind), all...), file) {
			t.Fatalf("%d messages are written as %q", len(all), New(Kind(kind), all...))
		}
	})
}

func TestEdit(t *testing.T) {
	text := func(to []byte, num protowire.Number, s string) []byte {
		return protowire.AppendString(protowire.AppendTag(to, num, protowire.BytesType), s)
	}
	message := text(text(protowire.AppendVarint(protowire.AppendTag(nil, 1, protowire.VarintType), 7), 2, "two"), 3, "")
	as := func(_ protowire.Number, _ protowire.Type, value []byte) ([]byte, error) { return value, nil }
	if got, err := Edit(message, as); err != nil || !bytes.Equal(got, message) {
		t.Errorf("% x, %v; want % x", got, err, message)
	}
	got, err := Edit(message, func(num protowire.Number, _ protowire.Type, value []byte) ([]byte, error) {
		switch num {
		case 1:
			return nil, nil
		case 2:
			return protowire.AppendString(nil, "another"), nil
		}
		return value, nil
	})
	if want := text(text(nil, 2, "another"), 3, ""); err != nil || !bytes.Equal(got, want) {
		t.Errorf("% x, %v; want % x", got, err, want)
	}
	for i := 1; i < len(message); i++ {
		if got, err := Edit(message[:i], as); err == nil && !bytes.Equal(got, message[:i]) {
			t.Errorf("cut off after %d bytes: % x", i, got)
		}
	}
	refused := errors.New("refused")
	if _, err := Edit(message, func(protowire.Number, protowire.Type, []byte) ([]byte, error) { return nil, refused }); !errors.Is(err, refused) {
		t.Errorf("%v, want what edit says", err)
	}
}
