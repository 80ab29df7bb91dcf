// Package plain shows text that somebody else wrote: names in images, archives and
// containers are chosen by whoever made them, and a terminal obeys what it is sent.
package plain

import (
	"fmt"
	"io"
	"strconv"
	"strings"
	"unicode/utf16"
	"unicode/utf8"
)

// Line gives text that stays one line and one column, and does nothing to a terminal: what
// is not printable is written out, as Go and JSON write it.
func Line(s string) string { return escape(s, "") }

// Writer writes the same, but for the ends of lines and tabs. JSON stays the same JSON.
func Writer(w io.Writer) io.Writer { return writer{w} }

type writer struct{ w io.Writer }

func (w writer) Write(p []byte) (int, error) {
	if _, err := io.WriteString(w.w, escape(string(p), "\n\t")); err != nil {
		return 0, err
	}
	return len(p), nil
}

func escape(s, keep string) string {
	clean := func(r rune) bool { return strconv.IsPrint(r) || strings.ContainsRune(keep, r) }
	var b strings.Builder
	for len(s) > 0 {
		r, n := utf8.DecodeRuneInString(s)
		raw := s[:n]
		s = s[n:]
		switch {
		case r == utf8.RuneError && n == 1:
			fmt.Fprintf(&b, `\x%02x`, raw[0])
		case clean(r):
			b.WriteString(raw)
		case r == '\n':
			b.WriteString(`\n`)
		case r == '\t':
			b.WriteString(`\t`)
		case r > 0xffff: // what JSON has for them
			high, low := utf16.EncodeRune(r)
			fmt.Fprintf(&b, `\u%04x\u%04x`, high, low)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	return b.String()
}
