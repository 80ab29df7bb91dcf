package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"text/template"
	"time"

	"github.com/spf13/cobra"

	"github.com/crac-shim/crac/cmd/cracctl/plain"
)

const (
	formatTable = "table"
	formatJSON  = "json"
)

const formatHelp = "table, json, or a Go template such as '{{json .}}' over the fields of the JSON, by their Go names"

// formatFlag adds --format, as nerdctl and docker have it.
func formatFlag(cmd *cobra.Command) *string {
	format := cmd.Flags().String("format", formatTable, formatHelp)
	completions(cmd, "format", formatTable, formatJSON)
	return format
}

// checkFormat refuses a format before anything is done for it.
func checkFormat(format string) error {
	switch {
	case format == formatTable, format == formatJSON:
		return nil
	case !strings.Contains(format, "{{"):
		return fmt.Errorf("unknown format %q; known are table, json, and Go templates, which hold {{", format)
	}
	_, err := parseTemplate(format)
	return err
}

func parseTemplate(format string) (*template.Template, error) {
	t, err := template.New("format").Funcs(template.FuncMap{
		"json": func(v any) (string, error) {
			data, err := json.Marshal(v)
			return string(data), err
		},
		"join": strings.Join,
		"size": size,
	}).Parse(format)
	if err != nil {
		return nil, fmt.Errorf("the format is no Go template: %w", err)
	}
	return t, nil
}

// show writes one thing.
func show[T any](out io.Writer, format string, v T, table func(io.Writer, T) error) error {
	switch format {
	case formatTable:
		return table(out, v)
	case formatJSON:
		enc := json.NewEncoder(out)
		enc.SetIndent("", "  ")
		enc.SetEscapeHTML(false)
		return enc.Encode(v)
	}
	return showTemplate(out, format, v)
}

func showTemplate(out io.Writer, format string, v any) error {
	t, err := parseTemplate(format)
	if err != nil {
		return err
	}
	if err := t.Execute(out, v); err != nil {
		return err
	}
	_, err = fmt.Fprintln(out)
	return err
}

// showList writes many things: a table, a line of JSON for each, or the template
// for each.
func showList[T any](out io.Writer, format string, list []T, head []string, row func(T) []string) error {
	if format == formatTable {
		w := tabwriter.NewWriter(out, 0, 8, 3, ' ', 0)
		fmt.Fprintln(w, strings.Join(head, "\t"))
		for _, v := range list {
			cells := row(v)
			for i := range cells {
				cells[i] = plain.Line(cells[i])
			}
			fmt.Fprintln(w, strings.Join(cells, "\t"))
		}
		return w.Flush()
	}
	enc := json.NewEncoder(out)
	enc.SetEscapeHTML(false)
	for _, v := range list {
		var err error
		if format == formatJSON {
			err = enc.Encode(v)
		} else {
			err = showTemplate(out, format, v)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// ago writes a time as people ask for it.
func ago(t time.Time) string {
	d := time.Since(t)
	for _, u := range []struct {
		unit time.Duration
		name string
	}{{365 * 24 * time.Hour, "year"}, {30 * 24 * time.Hour, "month"}, {24 * time.Hour, "day"}, {time.Hour, "hour"}, {time.Minute, "minute"}, {time.Second, "second"}} {
		if n := int(d / u.unit); n > 1 {
			return fmt.Sprintf("%d %ss ago", n, u.name)
		} else if n == 1 {
			return fmt.Sprintf("1 %s ago", u.name)
		}
	}
	return "now"
}

// short is how digests are told apart by people.
func short(digest string) string {
	_, hex, ok := strings.Cut(digest, ":")
	if !ok || len(hex) < 12 {
		return digest
	}
	return hex[:12]
}
