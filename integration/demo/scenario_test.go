package main

import "testing"

func TestReported(t *testing.T) {
	const log = `time="…" level=info msg=checkpointed checkpoint="r:1" frozen_ms=423 id=tomcat runtime=io.containerd.crac.v2
time="…" level=info msg="restored from checkpoint" id=clone-1 ms=68 runtime=io.containerd.crac.v2
time="…" level=info msg="restored from checkpoint" id=clone-10 ms=99
`
	for _, c := range []struct {
		id, key string
		want    float64
		ok      bool
	}{
		{"tomcat", "frozen_ms", 423, true},
		{"clone-1", "ms", 68, true},
		{"clone-1", "frozen_ms", 0, false},
		{"clone", "ms", 0, false},
	} {
		if got, ok := reported(log, c.id, c.key); got != c.want || ok != c.ok {
			t.Errorf("%s of %s: %v, %v, want %v, %v", c.key, c.id, got, ok, c.want, c.ok)
		}
	}
}
