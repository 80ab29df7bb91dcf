package runtime

import (
	"testing"
	"time"
)

func TestBootTime(t *testing.T) {
	for stat, want := range map[string]int64{
		"cpu  1 2 3\nbtime 1700000000\nprocesses 7\n": 1700000000,
		"cpu  1 2 3\n":      0,
		"btime yesterday\n": 0,
	} {
		got, err := bootTime(stat)
		if (err == nil) != (want != 0) || err == nil && !got.Equal(time.Unix(want, 0)) {
			t.Errorf("%q: %v, %v", stat, got, err)
		}
	}
}
