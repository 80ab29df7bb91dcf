package shim

import (
	"errors"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crac-shim/crac/images"
	"github.com/crac-shim/crac/oci"
	"github.com/crac-shim/crac/runtime"
)

func TestLimitsOf(t *testing.T) {
	limits, err := limitsOf(&specs.Process{Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 5, Hard: 7}}})
	if err != nil {
		t.Fatal(err)
	}
	if len(limits) != len(oci.Rlimits) {
		t.Errorf("%d limits of %d", len(limits), len(oci.Rlimits))
	}
	for number, l := range limits {
		var own unix.Rlimit
		if err := unix.Getrlimit(number, &own); err != nil {
			t.Fatal(err)
		}
		want := images.Limit{Soft: own.Max, Hard: own.Max}
		if number == unix.RLIMIT_NOFILE {
			want = images.Limit{Soft: 5, Hard: 7, Asked: true}
		}
		if l != want {
			t.Errorf("limit %d is %+v, want %+v", number, l, want)
		}
	}
	if _, err := limitsOf(&specs.Process{Rlimits: []specs.POSIXRlimit{{Type: "RLIMIT_LUCK"}}}); err == nil || !strings.Contains(err.Error(), "RLIMIT_LUCK") {
		t.Errorf("an unknown limit: %v", err)
	}
}

// What cannot be given to a clone is a reason to start cold.
func TestConfineRefuses(t *testing.T) {
	s := &service{reaper: reaper(t)}
	listens := &specs.Spec{Process: &specs.Process{}, Linux: &specs.Linux{Seccomp: &specs.LinuxSeccomp{DefaultAction: specs.ActAllow, ListenerPath: "/run/l"}}}
	dump, err := images.OpenDump(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dump.Close()
	_, err = s.confine(&restore{dump: dump}, listens)
	if why := reasonOf(err, false); !errors.Is(err, runtime.ErrSeccompListener) || why.code != images.CodePrivileges {
		t.Errorf("a filter with a listener: %v, code %q", err, why.code)
	}
	_, err = s.confine(&restore{dump: dump}, &specs.Spec{Process: &specs.Process{}})
	if why := reasonOf(err, false); why.code != "damaged" {
		t.Errorf("a dump of nothing: %v, code %q", err, why.code)
	}
}
