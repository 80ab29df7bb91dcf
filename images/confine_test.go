package images

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	criucore "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pstree"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/seccomp"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/crac-shim/crac/oci/criuimage"
)

// Programs: one instruction each, which is all that tells them apart here.
const (
	ours, theirs, other = "ours....", "theirs..", "other..."
)

// tree is a dump of some processes, by hand: the filters, and of each process the
// seccomp of its threads.
type tree struct {
	filters   []filterEntry
	processes []process
}

type process struct {
	pid     uint32
	state   uint64
	threads []threadSpec // the first is the leader's
	limits  []rlimit
	bare    bool // without any limits
}

type threadSpec struct {
	mode    uint64
	chain   int // -1: none said
	profile string
}

func (d tree) write(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	var all message
	for _, f := range d.filters {
		entry := message{}.str(1, f.program)
		if f.next >= 0 {
			entry = entry.num(2, uint64(f.next))
		}
		all = all.msg(1, entry.num(3, uint64(f.flags)))
	}
	files := map[string]string{"seccomp.img": image(criuimage.Seccomp, all)}
	var entries []message
	for _, p := range d.processes {
		entry := message{}.num(1, uint64(p.pid)).num(2, 0).num(3, 0).num(4, 0)
		for i, s := range p.threads {
			tid := p.pid + uint32(i)
			entry = entry.num(5, uint64(tid))
			creds := message{}.num(12, 1)
			if s.profile != "" {
				creds = creds.str(15, s.profile)
			}
			th := thread(creds).num(2, 0)
			if s.mode != 0 {
				th = th.num(11, s.mode)
			}
			if s.chain >= 0 {
				th = th.num(12, uint64(s.chain))
			}
			core := message{}.num(1, 1)
			if i == 0 {
				state := p.state
				if state == 0 {
					state = 1
				}
				tc := leader(state).num(2, 0).num(3, 0).num(4, 0).num(5, 0)
				if !p.bare {
					var list message
					for _, l := range p.limits {
						list = list.msg(1, message{}.num(1, l.soft).num(2, l.hard))
					}
					tc = tc.msg(8, list)
				}
				core = core.msg(3, tc)
			}
			files[fmt.Sprintf("core-%d.img", tid)] = coreImage(core.msg(5, th))
		}
		entries = append(entries, entry)
	}
	files["pstree.img"] = image(criuimage.Pstree, entries...)
	for name, data := range files {
		write(t, filepath.Join(dir, name), data)
	}
	return dir
}

// decode reads an image with CRIU's own messages, from what replaces it if anything does.
func decode(dir string, own map[string][]byte, name string, to func() proto.Message) error {
	data, ok := own[name]
	if !ok {
		var err error
		if data, err = os.ReadFile(filepath.Join(dir, name)); errors.Is(err, os.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
	}
	for data = data[8:]; len(data) > 0; {
		n := int(data[0]) | int(data[1])<<8 | int(data[2])<<16
		if err := (proto.UnmarshalOptions{AllowPartial: true}).Unmarshal(data[4:4+n], to()); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		data = data[4+n:]
	}
	return nil
}

// restored plays CRIU's restore (criu/seccomp.c, criu/pie/restorer.c) and the kernel: the
// filters that each thread ends with, the oldest first.
func restored(dir string, own map[string][]byte) (map[uint32]string, error) {
	var filters seccomp.SeccompEntry
	if err := decode(dir, own, "seccomp.img", func() proto.Message { return &filters }); err != nil {
		return nil, err
	}
	var processes []*pstree.PstreeEntry
	if err := decode(dir, nil, "pstree.img", func() proto.Message {
		processes = append(processes, &pstree.PstreeEntry{})
		return processes[len(processes)-1]
	}); err != nil {
		return nil, err
	}
	install := func(tid uint32) (chain string, tsync, dead bool, err error) {
		var core criucore.CoreEntry
		if err := decode(dir, own, fmt.Sprintf("core-%d.img", tid), func() proto.Message { return &core }); err != nil {
			return "", false, false, err
		}
		if state := core.GetTc().GetTaskState(); state == taskZombie || state == taskDead {
			return "", false, true, nil
		}
		switch core.GetThreadCore().GetSeccompMode() {
		case criucore.SeccompMode_strict:
			return "strict", false, false, nil
		case criucore.SeccompMode_disabled:
			return "", false, false, nil
		}
		for f := filters.GetSeccompFilters()[core.GetThreadCore().GetSeccompFilter()]; ; f = filters.GetSeccompFilters()[f.GetPrev()] {
			chain += strings.Trim(string(f.GetFilter()), ".") + " "
			tsync = tsync || f.GetFlags()&unix.SECCOMP_FILTER_FLAG_TSYNC != 0
			if f.Prev == nil {
				return strings.TrimSpace(chain), tsync, false, nil
			}
		}
	}
	chains := map[uint32]string{}
	for _, p := range processes {
		lead, tsync, dead, err := install(p.GetPid())
		if err != nil || dead {
			if err != nil {
				return nil, err
			}
			continue
		}
		chains[p.GetPid()] = lead
		for _, tid := range p.GetThreads() {
			if tid == p.GetPid() {
				continue
			}
			chain, _, dead, err := install(tid)
			switch {
			case err != nil:
				return nil, err
			case dead:
				continue
			case chain != "" && tsync:
				// seccomp(2): the first thread gets none then, and CRIU takes that for success.
				chains[p.GetPid()] = "FAILED"
			case chain == "" && tsync:
				chain = lead
			}
			chains[tid] = chain
		}
	}
	return chains, nil
}

func TestConfineSeccomp(t *testing.T) {
	const tsync, log = unix.SECCOMP_FILTER_FLAG_TSYNC, unix.SECCOMP_FILTER_FLAG_LOG
	plain := threadSpec{mode: 0, chain: -1}
	filter := func(n int) threadSpec { return threadSpec{mode: 2, chain: n} }
	one := func(threads ...threadSpec) []process { return []process{{pid: 1, threads: threads}} }
	for name, tt := range map[string]struct {
		dump    tree
		replace bool
		want    string // of each thread
		changed string // names of files
		err     string
	}{
		"none":                         {tree{nil, one(plain)}, false, "1:ours", "core-1.img seccomp.img", ""},
		"none, threads":                {tree{nil, one(plain, plain, plain)}, false, "1:ours 2:ours 3:ours", "core-1.img seccomp.img", ""},
		"the same":                     {tree{[]filterEntry{{ours, -1, 0}}, one(filter(0))}, false, "1:ours", "", ""},
		"the same, synced":             {tree{[]filterEntry{{ours, -1, tsync | log}}, one(filter(0), plain)}, false, "1:ours 2:ours", "", ""},
		"another":                      {tree{[]filterEntry{{theirs, -1, 0}}, one(filter(0))}, false, "1:ours theirs", "core-1.img seccomp.img", ""},
		"another, synced":              {tree{[]filterEntry{{theirs, -1, tsync}}, one(filter(0), plain)}, false, "1:ours theirs 2:ours theirs", "core-1.img seccomp.img", ""},
		"a chain":                      {tree{[]filterEntry{{other, -1, tsync}, {theirs, 0, tsync}}, one(filter(1), plain)}, false, "1:ours theirs other 2:ours theirs other", "core-1.img seccomp.img", ""},
		"in a chain":                   {tree{[]filterEntry{{other, -1, tsync}, {ours, 0, tsync}}, one(filter(1), plain)}, false, "1:ours other 2:ours other", "", ""},
		"each its own":                 {tree{[]filterEntry{{theirs, -1, 0}, {other, -1, 0}}, one(filter(0), filter(1), plain)}, false, "1:ours theirs 2:ours other 3:ours", "core-1.img core-2.img core-3.img seccomp.img", ""},
		"only the first":               {tree{[]filterEntry{{ours, -1, 0}}, one(filter(0), plain)}, false, "1:ours 2:ours", "core-2.img seccomp.img", ""},
		"only another":                 {tree{[]filterEntry{{theirs, -1, 0}}, one(plain, filter(0))}, false, "1:ours 2:ours theirs", "core-1.img core-2.img seccomp.img", ""},
		"strict":                       {tree{nil, one(threadSpec{mode: 1, chain: -1})}, false, "1:strict", "", ""},
		"strict thread":                {tree{nil, one(plain, threadSpec{mode: 1, chain: -1})}, false, "1:ours 2:strict", "core-1.img seccomp.img", ""},
		"strict first":                 {tree{nil, one(threadSpec{mode: 1, chain: -1}, plain)}, false, "1:strict 2:ours", "core-2.img seccomp.img", ""},
		"zombie":                       {tree{nil, []process{{pid: 1, threads: []threadSpec{plain}}, {pid: 5, state: taskZombie, threads: []threadSpec{plain}}}}, false, "1:ours", "core-1.img seccomp.img", ""},
		"processes":                    {tree{[]filterEntry{{ours, -1, tsync}}, []process{{pid: 1, threads: []threadSpec{plain}}, {pid: 5, threads: []threadSpec{filter(0)}}, {pid: 7, threads: []threadSpec{plain, plain}}}}, false, "1:ours 5:ours 7:ours 8:ours", "core-1.img core-7.img seccomp.img", ""},
		"replaced":                     {tree{[]filterEntry{{theirs, -1, 0}}, one(filter(0))}, true, "1:ours", "seccomp.img", ""},
		"replaced by the same":         {tree{[]filterEntry{{ours, -1, 0}}, one(filter(0))}, true, "1:ours", "", ""},
		"replaced, synced":             {tree{[]filterEntry{{theirs, -1, tsync}}, one(filter(0), plain)}, true, "1:ours 2:ours", "seccomp.img", ""},
		"replaced below its own":       {tree{[]filterEntry{{other, -1, tsync}, {theirs, 0, tsync}}, one(filter(1), plain)}, true, "1:ours other 2:ours other", "seccomp.img", ""},
		"replaced, each its own":       {tree{[]filterEntry{{theirs, -1, 0}, {other, -1, 0}, {theirs, 1, 0}}, one(filter(0), filter(2), plain)}, true, "1:ours 2:ours other 3:ours", "core-3.img seccomp.img", ""},
		"replaced, and there was none": {tree{[]filterEntry{{theirs, -1, 0}}, []process{{pid: 1, threads: []threadSpec{plain}}, {pid: 5, threads: []threadSpec{filter(0)}}}}, true, "1:ours 5:ours", "core-1.img seccomp.img", ""},
		"nothing to replace":           {tree{[]filterEntry{{theirs, -1, 0}}, one(filter(1))}, true, "", "", "not there"},
		"sync that fails":              {tree{[]filterEntry{{theirs, -1, tsync}, {other, -1, 0}}, one(filter(0), filter(1))}, false, "", "", "of their own"},
		"half a sync":                  {tree{[]filterEntry{{other, -1, 0}, {theirs, 0, tsync}}, one(filter(1), plain)}, false, "", "", "of their own"},
		"no such filter":               {tree{[]filterEntry{{theirs, -1, 0}}, one(filter(1))}, false, "", "", "not there"},
		"filter not said":              {tree{[]filterEntry{{theirs, -1, 0}}, one(threadSpec{mode: 2, chain: -1})}, false, "", "", "without a number"},
		"unknown mode":                 {tree{nil, one(threadSpec{mode: 3, chain: -1})}, false, "", "", "mode 3"},
		"endless chain":                {tree{[]filterEntry{{theirs, 0, 0}}, one(filter(0))}, false, "", "", "comes later"},
		"chain upwards":                {tree{[]filterEntry{{theirs, 1, 0}, {other, -1, 0}}, one(filter(0))}, false, "", "", "comes later"},
		"no program":                   {tree{[]filterEntry{{"short", -1, 0}}, one(filter(0))}, false, "", "", "no program"},
		"a thread of two":              {tree{nil, []process{{pid: 1, threads: []threadSpec{plain, plain}}, {pid: 2, threads: []threadSpec{plain}}}}, false, "", "", "twice"},
		"no process at all":            {tree{}, false, "", "", "no process"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := tt.dump.write(t)
			own, err := Confinement{Seccomp: &SeccompFilter{Program: []byte(ours), Flags: log | tsync}, Replace: tt.replace}.Images(openedDump(t, dir))
			if tt.err != "" {
				if !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("error %v, want %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			chains, err := restored(dir, own)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, tid := range slices.Sorted(maps.Keys(chains)) {
				got = append(got, fmt.Sprintf("%d:%s", tid, chains[tid]))
			}
			if s := strings.Join(got, " "); s != tt.want {
				t.Errorf("filters %q, want %q", s, tt.want)
			}
			if s := strings.Join(slices.Sorted(maps.Keys(own)), " "); s != tt.changed {
				t.Errorf("changed %q, want %q", s, tt.changed)
			}
		})
	}
}

// What a request's filter is besides its program goes with it.
func TestConfineKeepsFlags(t *testing.T) {
	dir := tree{nil, []process{{pid: 1, threads: []threadSpec{{mode: 0, chain: -1}}}}}.write(t)
	own, err := Confinement{Seccomp: &SeccompFilter{Program: []byte(ours), Flags: unix.SECCOMP_FILTER_FLAG_LOG}}.Images(openedDump(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	var filters seccomp.SeccompEntry
	if err := decode(dir, own, "seccomp.img", func() proto.Message { return &filters }); err != nil {
		t.Fatal(err)
	}
	if f := filters.GetSeccompFilters(); len(f) != 1 || f[0].GetFlags() != unix.SECCOMP_FILTER_FLAG_LOG|unix.SECCOMP_FILTER_FLAG_TSYNC {
		t.Errorf("filters %v", f)
	}
}

// Every thread gets the profile, and keeps all else.
func TestConfineProfile(t *testing.T) {
	for name, tt := range map[string]struct {
		had, asked, want string
		changed          int
	}{
		"none asked":     {"old", "", "old", 0},
		"the same":       {"app", "app", "app", 0},
		"another":        {"old", "app", "app", 3},
		"had none":       {"", "app", "app", 3},
		"unconfined":     {"old", Unconfined, "", 3},
		"was unconfined": {"", Unconfined, "", 0},
	} {
		t.Run(name, func(t *testing.T) {
			s := threadSpec{chain: -1, profile: tt.had}
			dir := tree{nil, []process{{pid: 1, threads: []threadSpec{s, s}}, {pid: 5, threads: []threadSpec{s}}, {pid: 7, state: taskZombie, threads: []threadSpec{s}}}}.write(t)
			own, err := Confinement{Profile: tt.asked}.Images(openedDump(t, dir))
			if err != nil || len(own) != tt.changed {
				t.Fatalf("%d files, %v; want %d", len(own), err, tt.changed)
			}
			for _, tid := range []int{1, 2, 5} {
				var core criucore.CoreEntry
				if err := decode(dir, own, fmt.Sprintf("core-%d.img", tid), func() proto.Message { return &core }); err != nil {
					t.Fatal(err)
				}
				creds := core.GetThreadCore().GetCreds()
				if creds.GetLsmProfile() != tt.want || len(creds.GetCapBnd()) != 1 || (tid != 2) != (core.GetTc().GetComm() == "app") {
					t.Errorf("thread %d: %v", tid, &core)
				}
			}
		})
	}
}

// No thread may gain privileges, whatever the dump says of it.
func TestConfineNewPrivileges(t *testing.T) {
	dir := tree{nil, []process{{pid: 1, threads: []threadSpec{{chain: -1}, {chain: -1}}}}}.write(t)
	write(t, filepath.Join(dir, "core-2.img"), coreImage(message{}.num(1, 1).msg(5, thread(message{}.num(12, 1).num(18, 1)))))
	own, err := Confinement{NoNewPrivileges: true, Profile: "app"}.Images(openedDump(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	for name, data := range own {
		messages, err := criuimage.Split(data, criuimage.Core, maxMessages)
		if err != nil {
			t.Fatal(err)
		}
		if th, err := parseCore(messages[0]); err != nil || !th.noNewPrivileges || th.lsm != "app" || th.capabilities != 1 {
			t.Errorf("%s: %+v, %v", name, th, err)
		}
	}
	if len(own) != 2 {
		t.Errorf("changed %d files", len(own))
	}
	if own, err := (Confinement{NoNewPrivileges: true}).Images(openedDump(t, dir)); err != nil || len(own) != 1 {
		t.Errorf("changed %d files of one that needs it, %v", len(own), err)
	}
}

func TestConfineLimits(t *testing.T) {
	const inf = math.MaxUint64
	asked := func(soft, hard uint64) Limit { return Limit{soft, hard, true} }
	bound := func(hard uint64) Limit { return Limit{hard, hard, false} }
	for name, tt := range map[string]struct {
		want       Limit
		init       rlimit
		child      rlimit
		nowInit    rlimit
		nowChild   rlimit
		unchanging bool
	}{
		"the same":             {want: asked(10, 20), init: rlimit{10, 20}, child: rlimit{10, 20}, nowInit: rlimit{10, 20}, nowChild: rlimit{10, 20}, unchanging: true},
		"more":                 {want: asked(100, 200), init: rlimit{10, 20}, child: rlimit{10, 20}, nowInit: rlimit{100, 200}, nowChild: rlimit{100, 200}},
		"less":                 {want: asked(1, 2), init: rlimit{10, 20}, child: rlimit{10, 20}, nowInit: rlimit{1, 2}, nowChild: rlimit{1, 2}},
		"infinite":             {want: asked(inf, inf), init: rlimit{10, 10}, child: rlimit{10, 10}, nowInit: rlimit{inf, inf}, nowChild: rlimit{inf, inf}},
		"no longer infinite":   {want: asked(5, 10), init: rlimit{inf, inf}, child: rlimit{inf, inf}, nowInit: rlimit{10, 10}, nowChild: rlimit{10, 10}},
		"raised by the child":  {want: asked(10, 40), init: rlimit{10, 20}, child: rlimit{20, 20}, nowInit: rlimit{10, 40}, nowChild: rlimit{40, 40}},
		"raised by the first":  {want: asked(10, 20), init: rlimit{20, 20}, child: rlimit{20, 20}, nowInit: rlimit{20, 20}, nowChild: rlimit{20, 20}, unchanging: true},
		"lowered by the child": {want: asked(100, 200), init: rlimit{10, 20}, child: rlimit{3, 5}, nowInit: rlimit{100, 200}, nowChild: rlimit{3, 5}},
		"child above":          {want: asked(10, 20), init: rlimit{10, 20}, child: rlimit{30, 90}, nowInit: rlimit{10, 20}, nowChild: rlimit{20, 20}},
		"not asked":            {want: bound(100), init: rlimit{10, 20}, child: rlimit{5, 20}, nowInit: rlimit{10, 20}, nowChild: rlimit{5, 20}, unchanging: true},
		"not asked, bounded":   {want: bound(15), init: rlimit{10, 20}, child: rlimit{20, 20}, nowInit: rlimit{10, 15}, nowChild: rlimit{15, 15}},
		"soft above hard":      {want: asked(10, 20), init: rlimit{30, 20}, child: rlimit{30, 20}, nowInit: rlimit{20, 20}, nowChild: rlimit{20, 20}},
	} {
		t.Run(name, func(t *testing.T) {
			// Another limit before it, and none behind: the dump has one limit less.
			dir := tree{nil, []process{
				{pid: 1, threads: []threadSpec{{mode: 0, chain: -1}}, limits: []rlimit{{7, 7}, tt.init}},
				{pid: 9, threads: []threadSpec{{mode: 0, chain: -1}}, limits: []rlimit{{7, 7}, tt.child}},
			}}.write(t)
			own, err := Confinement{Limits: []Limit{bound(inf), tt.want}}.Images(openedDump(t, dir))
			if err != nil {
				t.Fatal(err)
			}
			if tt.unchanging != (len(own) == 0) {
				t.Errorf("changed %d files", len(own))
			}
			for pid, want := range map[int]rlimit{1: tt.nowInit, 9: tt.nowChild} {
				var core criucore.CoreEntry
				if err := decode(dir, own, fmt.Sprintf("core-%d.img", pid), func() proto.Message { return &core }); err != nil {
					t.Fatal(err)
				}
				l := core.GetTc().GetRlimits().GetRlimits()
				if len(l) != 2 || l[0].GetCur() != 7 || l[1].GetCur() != want.soft || l[1].GetMax() != want.hard {
					t.Errorf("process %d has %v, want %v", pid, l, want)
				}
				if core.GetTc().GetComm() != "app" || core.GetThreadCore().GetCreds() == nil {
					t.Errorf("process %d has lost something: %v", pid, &core)
				}
			}
		})
	}

	short := tree{nil, []process{{pid: 1, threads: []threadSpec{{mode: 0, chain: -1}}}}}.write(t)
	own, err := Confinement{Limits: []Limit{asked(1, 2)}}.Images(openedDump(t, short))
	if err != nil || len(own) != 1 {
		t.Errorf("a dump without this limit: %v, %d files", err, len(own))
	}
	bare := tree{nil, []process{{pid: 1, threads: []threadSpec{{mode: 0, chain: -1}}, bare: true}}}.write(t)
	if _, err := (Confinement{Limits: []Limit{asked(1, 2)}}).Images(openedDump(t, bare)); !errors.Is(err, ErrDamaged) {
		t.Errorf("a dump without any limit: %v", err)
	}
}

func TestConfineNothing(t *testing.T) {
	if own, err := (Confinement{}).Images(nil); err != nil || own != nil {
		t.Errorf("%v, %v", own, err)
	}
	want := Confinement{Seccomp: &SeccompFilter{Program: []byte(ours)}}
	if _, err := want.Images(openedDump(t, t.TempDir())); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "pstree.img") {
		t.Errorf("an empty dump: %v", err)
	}
	cut := tree{nil, []process{{pid: 1, threads: []threadSpec{{mode: 0, chain: -1}}}}}.write(t)
	if err := os.Remove(filepath.Join(cut, "core-1.img")); err != nil {
		t.Fatal(err)
	}
	if _, err := want.Images(openedDump(t, cut)); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "core-1.img") {
		t.Errorf("a dump without a thread: %v", err)
	}
}

// FuzzConfine: whatever a dump says of its filters, it is damaged, or every thread that is not
// strict gets ours.
func FuzzConfine(f *testing.F) {
	seeds := tree{[]filterEntry{{theirs, -1, 1}, {other, 0, 1}}, []process{{pid: 1, threads: []threadSpec{{mode: 2, chain: 1}, {chain: -1}}}}}.write(f)
	read := func(name string) []byte {
		data, err := os.ReadFile(filepath.Join(seeds, name))
		if err != nil {
			f.Fatal(err)
		}
		return data
	}
	f.Add(read("seccomp.img"), read("pstree.img"), read("core-1.img"), read("core-2.img"), true)
	f.Fuzz(func(t *testing.T, filters, tree, core1, core2 []byte, replace bool) {
		dir := t.TempDir()
		for name, data := range map[string][]byte{"seccomp.img": filters, "pstree.img": tree, "core-1.img": core1, "core-2.img": core2} {
			write(t, filepath.Join(dir, name), string(data))
		}
		own, err := Confinement{Seccomp: &SeccompFilter{Program: []byte(ours)}, Replace: replace, Profile: "app", Limits: []Limit{{5, 10, true}}}.Images(openedDump(t, dir))
		if err != nil {
			if !errors.Is(err, ErrDamaged) {
				t.Errorf("%v is not ErrDamaged", err)
			}
			return
		}
		chains, err := restored(dir, own)
		if err != nil {
			return // CRIU will not read it either
		}
		for tid, chain := range chains {
			if chain != "strict" && !strings.Contains(chain+" ", strings.Trim(ours, ".")+" ") {
				t.Errorf("thread %d ends with %q", tid, chain)
			}
		}
	})
}
