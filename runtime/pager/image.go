package pager

import (
	"errors"
	"fmt"
	"math"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/crac-shim/crac/oci/criuimage"
)

// Flags of an entry of a page map (criu/include/pagemap.h).
const (
	entryParent  = 1 << iota // the pages are in the parent's dump
	entryLazy                // CRIU leaves them to the pager
	entryPresent             // the pages are in this dump's file of pages
)

// What a madvise(2) value is as a bit of vma_entry.madv.
const madvWipeOnFork = 1 << unix.MADV_WIPEONFORK

// Kinds of areas that are never lazy (criu/include/image.h).
const areaSpecial = vmaVsyscall | vmaVDSO | vmaVVAR

const (
	vmaVsyscall = 1 << 2
	vmaVDSO     = 1 << 3
	vmaVVAR     = 1 << 12
)

const (
	mapTypeMask  = 0x0f
	mapDroppable = 0x08
)

// errImage is an image file that is not what CRIU writes.
var errImage = errors.New("not a valid CRIU image")

// entry is a run of pages in a page map. Addresses and lengths are in bytes.
type entry struct {
	addr, len uint64
	flags     uint32
}

func (e entry) end() uint64 { return e.addr + e.len }

// area is a virtual memory area at the time of the dump.
type area struct {
	start, end uint64
	flags      uint32 // of mmap(2)
	status     uint32 // VMA_*
	madv       uint64 // one bit for each madvise(2) value
}

// lazy tells whether CRIU registers an area with userfaultfd
// (vma_entry_can_be_lazy in its sources).
func (a area) lazy() bool {
	return a.flags&mapTypeMask == unix.MAP_PRIVATE && a.flags&unix.MAP_ANONYMOUS != 0 &&
		a.flags&(unix.MAP_LOCKED|unix.MAP_HUGETLB) == 0 && a.status&areaSpecial == 0
}

// wiped tells whether an area holds what two processes must not share: a clone
// finds it empty.
func (a area) wiped() bool {
	return a.madv&madvWipeOnFork != 0 || a.flags&mapTypeMask == mapDroppable
}

// messages calls each for every message of an image file.
func messages(image []byte, kind criuimage.Kind, each func(message []byte) error) error {
	for message, err := range criuimage.Messages(image, kind) {
		if err != nil {
			return fmt.Errorf("%w: %w", errImage, err)
		}
		if err := each(message); err != nil {
			return err
		}
	}
	return nil
}

// fields calls each for every field of a message: with a value for numbers, with
// bytes for embedded messages.
func fields(message []byte, each func(number protowire.Number, value uint64, bytes []byte) error) error {
	for len(message) > 0 {
		number, typ, n := protowire.ConsumeTag(message)
		if n < 0 {
			return fmt.Errorf("%w: %w", errImage, protowire.ParseError(n))
		}
		message = message[n:]
		var value uint64
		var bytes []byte
		switch typ {
		case protowire.VarintType:
			value, n = protowire.ConsumeVarint(message)
		case protowire.BytesType:
			bytes, n = protowire.ConsumeBytes(message)
		default:
			n = protowire.ConsumeFieldValue(number, typ, message)
		}
		if n < 0 {
			return fmt.Errorf("%w: %w", errImage, protowire.ParseError(n))
		}
		message = message[n:]
		if err := each(number, value, bytes); err != nil {
			return err
		}
	}
	return nil
}

// parsePagemap reads a pagemap-*.img: which file has the pages, and the runs of
// pages, sorted by address and without overlap.
func parsePagemap(image []byte, pageSize uint64) (pagesID uint32, entries []entry, err error) {
	head := true
	err = messages(image, criuimage.Pagemap, func(message []byte) error {
		if head {
			head = false
			return fields(message, func(number protowire.Number, value uint64, _ []byte) error {
				if number == 1 {
					pagesID = uint32(value)
				}
				return nil
			})
		}
		e, err := parseEntry(message, pageSize)
		if err != nil {
			return err
		}
		if n := len(entries); n > 0 && e.addr < entries[n-1].end() {
			return fmt.Errorf("%w: the runs of pages are not sorted", errImage)
		}
		if e.len > 0 {
			entries = append(entries, e)
		}
		return nil
	})
	if err == nil && head {
		err = fmt.Errorf("%w: no head", errImage)
	}
	return pagesID, entries, err
}

// parseEntry reads a pagemap_entry (images/pagemap.proto in CRIU's sources).
func parseEntry(message []byte, pageSize uint64) (entry, error) {
	var e entry
	var pages, compatPages uint64
	var inParent, hasFlags, hasPages bool
	err := fields(message, func(number protowire.Number, value uint64, _ []byte) error {
		switch number {
		case 1:
			e.addr = value
		case 2:
			compatPages = value
		case 3:
			inParent = value != 0
		case 4:
			e.flags, hasFlags = uint32(value), true
		case 5:
			pages, hasPages = value, true
		}
		return nil
	})
	if err != nil {
		return e, err
	}
	// What older CRIUs wrote.
	switch {
	case inParent:
		e.flags |= entryParent
	case !hasFlags:
		e.flags = entryPresent
	}
	if !hasPages {
		pages = compatPages
	}
	if e.addr%pageSize != 0 || pages > (math.MaxInt64-e.addr%math.MaxInt64)/pageSize || e.addr > math.MaxInt64 {
		return e, fmt.Errorf("%w: %d pages at %#x", errImage, pages, e.addr)
	}
	e.len = pages * pageSize
	return e, nil
}

// parseMM reads the areas from an mm-*.img, sorted by address and without
// overlap.
func parseMM(image []byte, pageSize uint64) ([]area, error) {
	var areas []area
	err := messages(image, criuimage.MM, func(message []byte) error {
		return fields(message, func(number protowire.Number, _ uint64, vma []byte) error {
			if number != 14 {
				return nil
			}
			a, err := parseArea(vma)
			if err != nil {
				return err
			}
			if a.start%pageSize != 0 || a.end%pageSize != 0 || a.start >= a.end {
				return fmt.Errorf("%w: area %#x-%#x", errImage, a.start, a.end)
			}
			areas = append(areas, a)
			return nil
		})
	})
	if err != nil {
		return nil, err
	}
	return ordinaryAreas(areas)
}

// parseArea reads a vma_entry (images/vma.proto in CRIU's sources).
func parseArea(message []byte) (area, error) {
	var a area
	err := fields(message, func(number protowire.Number, value uint64, _ []byte) error {
		switch number {
		case 1:
			a.start = value
		case 2:
			a.end = value
		case 6:
			a.flags = uint32(value)
		case 7:
			a.status = uint32(value)
		case 9:
			a.madv = value
		}
		return nil
	})
	return a, err
}

// vmaGuard marks entries that CRIU puts after the areas: ranges of theirs under
// MADV_GUARD_INSTALL.
const vmaGuard = 1 << 16

// ordinaryAreas leaves out what is no area of its own and checks the order.
func ordinaryAreas(all []area) ([]area, error) {
	var areas []area
	for _, a := range all {
		if a.status&vmaGuard != 0 {
			continue
		}
		if n := len(areas); n > 0 && a.start < areas[n-1].end {
			return nil, fmt.Errorf("%w: the areas are not sorted", errImage)
		}
		areas = append(areas, a)
	}
	return areas, nil
}
