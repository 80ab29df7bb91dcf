package hook

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"unicode"
)

const (
	// maxAnswer is the longest line that is read of anyone in a container.
	maxAnswer = 64 << 10
	// maxText bounds what is told on of a workload's words, in runes.
	maxText = 500
)

var (
	errNoAnswer = errors.New("closed the connection without an answer")
	errTooLong  = fmt.Errorf("answered with more than %d bytes", maxAnswer)
)

// readLine reads one line of at most maxAnswer bytes and gives it without its end.
// A last line may lack the newline: JSON that was cut off is none.
func readLine(r io.Reader) ([]byte, error) {
	line, err := bufio.NewReader(io.LimitReader(r, maxAnswer+1)).ReadBytes('\n')
	line = bytes.TrimRight(line, "\r\n")
	switch {
	case len(line) > maxAnswer:
		return nil, errTooLong
	case errors.Is(err, io.EOF) && len(line) > 0:
		return line, nil
	}
	return line, err
}

// parseAnswer reads a participant's answer: nil if it agrees, else why not.
func parseAnswer(line []byte) error {
	var answer struct {
		OK    *bool  `json:"ok"`
		Error string `json:"error"`
	}
	if err := json.Unmarshal(line, &answer); err != nil || answer.OK == nil {
		return fmt.Errorf(`answered %q, which is neither {"ok":true} nor {"ok":false,"error":"why"}`, clean(string(line)))
	}
	if *answer.OK {
		return nil
	}
	return refusal(answer.Error)
}

// refusal is the error of a workload that does not agree, in its own words.
func refusal(text string) error {
	if text = clean(text); text != "" {
		return errors.New(text)
	}
	return errors.New("refused, and gave no reason")
}

// clean makes a workload's text fit for a log and an error: one line of printable
// text, of bounded length.
func clean(text string) string {
	if len(text) > 4*maxText+1 {
		text = text[:4*maxText+1] // a rune has at most 4 bytes; one more, to see that there was more
	}
	text = strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, strings.ToValidUTF8(text, "\uFFFD"))
	runes := []rune(strings.TrimSpace(text))
	if len(runes) > maxText {
		runes = append(runes[:maxText], '…')
	}
	return string(runes)
}
