package main

import (
	"reflect"
	"strings"
	"testing"
)

func TestParse(t *testing.T) {
	conf, err := parse(strings.Fields("-workloads mem-1g,mem-10m -contenders copy,crac -runs 7 -clones 2 -parts restore,cold"))
	if err != nil {
		t.Fatal(err)
	}
	names := conf.workloads
	if conf.runs != 7 || !reflect.DeepEqual(names, []string{"mem-1g", "mem-10m"}) || !reflect.DeepEqual(conf.clones, []int{2}) ||
		!reflect.DeepEqual(conf.contenders, []string{"copy", "crac"}) || !reflect.DeepEqual(conf.parts, []string{"restore", "cold"}) {
		t.Errorf("got %+v", conf)
	}
	if conf, err = parse(nil); err != nil || len(conf.workloads) != len(workloads("")) || conf.contenders != nil || conf.parts != nil {
		t.Errorf("without options: %+v, %v", conf, err)
	}
	all := conf.runs
	if conf, err = parse([]string{"-quick"}); err != nil || conf.runs >= all || len(conf.workloads) >= len(workloads("")) {
		t.Errorf("-quick: %+v, %v", conf, err)
	}
	for args, want := range map[string]string{
		"-workloads mem-3g": "mem-3g",
		"-parts sleep":      "sleep",
		"-runs 0":           "once",
		"-clones 0":         "-clones",
		"mem-10m":           "mem-10m",
	} {
		if _, err := parse(strings.Fields(args)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want an error that says %q", args, err, want)
		}
	}
}

func TestChosen(t *testing.T) {
	b := &bench{}
	seen := map[string]bool{}
	for _, c := range b.contenders() {
		if seen[c.name()] {
			t.Errorf("two contenders are called %s", c.name())
		}
		seen[c.name()] = true
	}
	b.config.contenders = []string{"copy", "crac"}
	some, err := b.chosen()
	if err != nil || len(some) != 2 || some[0].name() != "copy" || some[1].name() != "crac" {
		t.Errorf("chosen are %v, %v", some, err)
	}
	b.config.contenders = []string{"docker"}
	if _, err := b.chosen(); err == nil || !strings.Contains(err.Error(), "docker") {
		t.Errorf("an unknown contender: %v", err)
	}
}

// The aims speak of 16 clones of 100 MiB; 16 of the largest would not fit into the machine.
func TestFits(t *testing.T) {
	for _, w := range workloads("") {
		if w.takes <= 0 {
			t.Errorf("nobody knows what %s takes", w.name)
		}
		if !w.fits(1) {
			t.Errorf("not even one clone of %s is measured", w.name)
		}
		if got, want := w.fits(16), w.takes <= 256; got != want {
			t.Errorf("16 clones of %s, %d MiB each: %v, want %v", w.name, w.takes, got, want)
		}
	}
}
