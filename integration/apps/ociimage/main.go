// Command ociimage turns directories into OCI image archives: a layer is what one
// directory tree has over another, an image is layers and a configuration.
//
//	ociimage layer -root DIR [-base DIR] -out FILE      FILE and FILE.json
//	ociimage pack -name REF -config FILE -layer FILE... -out FILE
//
// The same input gives the same bytes: entries are sorted, times are clamped to
// SOURCE_DATE_EPOCH, and names of users and of the builder's machine are left out.
package main

import (
	_ "crypto/sha256" // go-digest asks for it by name
	"errors"
	"flag"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "ociimage:", err)
		os.Exit(1)
	}
}

type list []string

func (l *list) String() string     { return strings.Join(*l, " ") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

func run(args []string) error {
	if len(args) == 0 {
		return errors.New("say what to do: layer or pack")
	}
	epoch, err := sourceDate()
	if err != nil {
		return err
	}
	verb, args := args[0], args[1:]
	flags := flag.NewFlagSet(verb, flag.ContinueOnError)
	out := flags.String("out", "", "the `file` to write")
	switch verb {
	case "layer":
		root := flags.String("root", "", "the `directory` to pack")
		base := flags.String("base", "", "the `directory` whose content the layers below already have")
		if err := flags.Parse(args); err != nil {
			return err
		}
		if *root == "" || *out == "" {
			return errors.New("layer: -root and -out are needed")
		}
		return writeLayer(*base, *root, *out, epoch)
	case "pack":
		name := flags.String("name", "", "the image's `reference`")
		config := flags.String("config", "", "a JSON `file` with the image's Config")
		var layers list
		flags.Var(&layers, "layer", "a layer `file`, lowest first (repeat)")
		if err := flags.Parse(args); err != nil {
			return err
		}
		if *name == "" || *config == "" || len(layers) == 0 || *out == "" {
			return errors.New("pack: -name, -config, -layer and -out are needed")
		}
		return writeImage(*name, *config, layers, *out, epoch)
	}
	return fmt.Errorf("unknown verb %q: say layer or pack", verb)
}

func sourceDate() (time.Time, error) {
	s := os.Getenv("SOURCE_DATE_EPOCH")
	if s == "" {
		return time.Time{}, errors.New("SOURCE_DATE_EPOCH is not set: set it to seconds since 1970, so that equal input gives equal images")
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil {
		return time.Time{}, fmt.Errorf("SOURCE_DATE_EPOCH %q is no number of seconds: %w", s, err)
	}
	return time.Unix(n, 0).UTC(), nil
}
