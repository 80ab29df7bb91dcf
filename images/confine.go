package images

import (
	"errors"
	"fmt"
	"math"
	"os"
	"slices"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/crac-shim/crac/oci/criuimage"
)

// Confinement is what a restored workload is held to whatever its dump says. CRIU
// takes filters and limits from the dump alone, so the dump that it reads is made
// to say so.
type Confinement struct {
	// Seccomp is a filter for every thread, besides those that the dump has: the
	// kernel takes the strictest answer of all. nil adds none.
	Seccomp *SeccompFilter
	// Replace: the dumped container was started under such a filter, too. That is
	// the oldest of each process, and Seccomp takes its place. If a dump lies
	// about this, only its own processes' filters get lost.
	Replace bool
	// Profile is the AppArmor profile or SELinux context of every thread; for
	// AppArmor it may be Unconfined. Empty leaves them theirs.
	Profile string
	// NoNewPrivileges: no thread may gain any (prctl(2), PR_SET_NO_NEW_PRIVS).
	NoNewPrivileges bool
	// Limits are resource limits by their numbers (RLIMIT_CPU is 0).
	Limits []Limit
}

// Unconfined is AppArmor's name for no profile.
const Unconfined = "unconfined"

// SeccompFilter is a filter as the kernel takes it (seccomp(2)).
type SeccompFilter struct {
	Program []byte // of struct sock_filter, one after the other
	Flags   uint32 // SECCOMP_FILTER_FLAG_*
}

// Limit is a resource limit (getrlimit(2)). Infinity is the largest number.
type Limit struct {
	Soft, Hard uint64
	// Asked: the request names it, and it is what processes get. Otherwise it
	// only bounds what they had.
	Asked bool
}

// Images makes the image files that a restore of the dump must read instead of those
// of the same names; none if the dump says all this already. Errors wrap ErrDamaged.
func (c Confinement) Images(d *Dump) (map[string][]byte, error) {
	if c.Seccomp == nil && !c.ofThreads() && len(c.Limits) == 0 {
		return nil, nil
	}
	r := confiner{Dump: d, want: c, cores: map[uint32]*threadImage{}, added: map[filterEntry]uint32{}}
	if err := r.run(); err != nil {
		return nil, damaged(d.path, err)
	}
	return r.images(), nil
}

// ofThreads tells whether there is something that each thread has for itself.
func (c Confinement) ofThreads() bool { return c.Profile != "" || c.NoNewPrivileges }

// confiner changes the images of a dump.
type confiner struct {
	*Dump
	want  Confinement
	cores map[uint32]*threadImage

	filters  []filterEntry
	replaced bool
	added    map[filterEntry]uint32
	init     []rlimit // of the first process, as dumped
}

// threadImage is the core image of one thread, and what it says of seccomp.
type threadImage struct {
	message []byte
	changed bool

	mode            uint32
	filter          *uint32 // the first one of its chain
	lsm             string
	noNewPrivileges bool
}

// filterEntry is one seccomp filter of the dump. CRIU installs the chain of a
// thread in the order of its links: the oldest first.
type filterEntry struct {
	program string
	next    int // the filter to install after this one; -1: none
	flags   uint32
}

type rlimit struct{ soft, hard uint64 }

func (r *confiner) run() error {
	if r.want.Seccomp != nil {
		if err := r.readFilters(); err != nil {
			return fmt.Errorf("seccomp.img: %w", err)
		}
	}
	tree, err := r.read("pstree.img", criuimage.Pstree)
	if err != nil {
		return fmt.Errorf("pstree.img: %w", err)
	}
	if len(tree) == 0 {
		return errors.New("pstree.img holds no process")
	}
	for _, entry := range tree {
		f, err := parse(entry)
		if err != nil {
			return fmt.Errorf("pstree.img: %w", err)
		}
		pid, err := f.number(1)
		if err != nil {
			return fmt.Errorf("pstree.img: %w", err)
		}
		threads, err := f.numbers(5)
		if err != nil {
			return fmt.Errorf("pstree.img: %w", err)
		}
		if err := r.process(pid, threads); err != nil {
			return fmt.Errorf("process %d: %w", pid, err)
		}
	}
	return nil
}

func (r *confiner) process(pid uint32, threads []uint32) error {
	leader, err := r.core(pid)
	if err != nil {
		return err
	}
	if leader == nil {
		return nil // a zombie needs no holding
	}
	if len(r.want.Limits) > 0 {
		if err := r.limit(leader); err != nil {
			return err
		}
	}
	if r.want.Seccomp == nil && !r.want.ofThreads() {
		return nil
	}
	all := []*threadImage{leader}
	for _, tid := range threads {
		if tid == pid {
			continue
		}
		t, err := r.core(tid)
		if err != nil {
			return fmt.Errorf("thread %d: %w", tid, err)
		}
		if t != nil {
			all = append(all, t)
		}
	}
	for _, t := range all {
		if err := r.credentials(t); err != nil {
			return err
		}
	}
	if r.want.Seccomp == nil {
		return nil
	}
	return r.filter(all)
}

// core reads the image of a thread; nil for that of a zombie.
func (r *confiner) core(tid uint32) (*threadImage, error) {
	if r.cores[tid] != nil {
		return nil, errors.New("is there twice")
	}
	name := coreName(tid)
	t, err := r.Dump.core(name)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if t.dead {
		return nil, nil
	}
	c := &threadImage{message: t.message, mode: t.seccompMode, filter: t.seccompFilter, lsm: t.lsm, noNewPrivileges: t.noNewPrivileges}
	r.cores[tid] = c
	return c, nil
}

func coreName(tid uint32) string { return fmt.Sprintf("core-%d.img", tid) }

// Fields of the messages, by their numbers in CRIU's images/*.proto.
const (
	coreTask, coreThread       = 3, 5
	taskLimits                 = 8
	threadSeccomp, threadChain = 11, 12
	threadCreds                = 10
	credsProfile, credsNoNew   = 15, 18
)

// Modes of seccomp and the flag that makes the kernel give a filter to all
// threads of the process (linux/seccomp.h).
const (
	seccompOff    = 0
	seccompStrict = 1
	seccompFilter = 2

	flagTsync = unix.SECCOMP_FILTER_FLAG_TSYNC
)

func (r *confiner) readFilters() error {
	messages, err := r.read("seccomp.img", criuimage.Seccomp)
	if errors.Is(err, os.ErrNotExist) || (err == nil && len(messages) == 0) {
		return nil // the dump has no filter
	}
	if err != nil {
		return err
	}
	if len(messages) > 1 {
		return fmt.Errorf("holds %d messages instead of one", len(messages))
	}
	f, err := parse(messages[0])
	if err != nil {
		return err
	}
	i := 0
	for v := range f.all(1) {
		if v.kind != protowire.BytesType {
			return fmt.Errorf("field 1 has the wire type %d", v.kind)
		}
		entry, err := parseFilter(v.bytes)
		if err != nil {
			return fmt.Errorf("filter %d: %w", i, err)
		}
		if entry.next >= i {
			return fmt.Errorf("filter %d is followed by %d, which comes later", i, entry.next)
		}
		r.filters = append(r.filters, entry)
		i++
	}
	return nil
}

func parseFilter(data []byte) (e filterEntry, err error) {
	f, err := parse(data)
	if err != nil {
		return e, err
	}
	program, _, err := f.single(1, protowire.BytesType)
	if err != nil {
		return e, err
	}
	if len(program.bytes) == 0 || len(program.bytes)%8 != 0 {
		return e, errors.New("is no program")
	}
	e.program, e.next = string(program.bytes), -1
	if f.has(2) {
		next, err := f.number(2)
		if err != nil {
			return e, err
		}
		e.next = int(next)
	}
	e.flags, err = f.number(3)
	return e, err
}

// filter gives the threads of a process the filter.
//
// Where all threads have the same filters, CRIU notes them for the first one
// alone, with a flag that makes the kernel give them to the others; there the new
// one goes the same way. The kernel does so only if the others have no filters of
// their own, and CRIU does not notice if it does not: then each thread gets it
// for itself.
func (r *confiner) filter(all []*threadImage) error {
	leader, others := all[0], all[1:]
	for _, t := range all {
		if r.want.Replace && t.mode == seccompFilter {
			if err := r.replace(t); err != nil {
				return err
			}
		}
	}
	together := !slices.ContainsFunc(others, func(t *threadImage) bool { return t.mode != seccompOff })
	switch leader.mode {
	case seccompStrict:
		together = together && len(others) == 0
	case seccompFilter:
		flags, err := r.chainFlags(leader)
		if err != nil {
			return err
		}
		together = together && (len(others) == 0 || flags.all&flagTsync != 0)
	}
	if together {
		return r.add(leader, flagTsync)
	}
	for _, t := range all {
		if t.mode == seccompFilter {
			if flags, err := r.chainFlags(t); err != nil {
				return err
			} else if flags.any&flagTsync != 0 {
				return errors.New("some of its threads have seccomp filters of their own and others are to get theirs from the first")
			}
		}
		if err := r.add(t, 0); err != nil {
			return err
		}
	}
	return nil
}

// chain lists a thread's filters.
func (r *confiner) chain(t *threadImage) (chain []filterEntry, err error) {
	if t.filter == nil {
		return nil, errors.New("has a seccomp filter without a number")
	}
	for i := int(*t.filter); i >= 0; i = r.filters[i].next { // they go down: see readFilters
		if i >= len(r.filters) {
			return nil, fmt.Errorf("has the seccomp filter %d, which is not there", i)
		}
		chain = append(chain, r.filters[i])
	}
	return chain, nil
}

func (r *confiner) chainFlags(t *threadImage) (flags struct{ all, any uint32 }, err error) {
	chain, err := r.chain(t)
	flags.all = math.MaxUint32
	for _, f := range chain {
		flags.all &= f.flags
		flags.any |= f.flags
	}
	return flags, err
}

// replace puts the filter in the place of a thread's oldest.
func (r *confiner) replace(t *threadImage) error {
	if _, err := r.chain(t); err != nil {
		return err
	}
	f := &r.filters[*t.filter]
	if want := string(r.want.Seccomp.Program); f.program != want {
		f.program, f.flags, r.replaced = want, r.want.Seccomp.Flags&^flagTsync|f.flags&flagTsync, true
	}
	return nil
}

// add puts the filter before those of a thread, unless it is among them.
func (r *confiner) add(t *threadImage, tsync uint32) error {
	entry := filterEntry{program: string(r.want.Seccomp.Program), next: -1, flags: r.want.Seccomp.Flags&^flagTsync | tsync}
	switch t.mode {
	case seccompOff:
	case seccompStrict:
		return nil // it may do nothing but read, write and end
	case seccompFilter:
		chain, err := r.chain(t)
		if err != nil || slices.ContainsFunc(chain, func(f filterEntry) bool { return f.program == entry.program }) {
			return err
		}
		entry.next = int(*t.filter)
	default:
		return fmt.Errorf("has the seccomp mode %d", t.mode)
	}
	index, ok := r.added[entry]
	if !ok {
		index = uint32(len(r.filters))
		r.filters = append(r.filters, entry)
		r.added[entry] = index
	}
	return t.edit(coreThread, func(thread []byte) ([]byte, error) {
		thread, err := without(thread, threadSeccomp, threadChain)
		thread = protowire.AppendVarint(protowire.AppendTag(thread, threadSeccomp, protowire.VarintType), seccompFilter)
		return protowire.AppendVarint(protowire.AppendTag(thread, threadChain, protowire.VarintType), uint64(index)), err
	})
}

// credentials changes those of a thread. CRIU's own --lsm-profile does so only for
// threads that had a profile.
func (r *confiner) credentials(t *threadImage) error {
	change := func(field protowire.Number, value []byte) error {
		return t.edit(coreThread, func(thread []byte) ([]byte, error) {
			return edited(thread, threadCreds, func(creds []byte) ([]byte, error) {
				creds, err := without(creds, field)
				return append(creds, value...), err
			})
		})
	}
	if r.want.NoNewPrivileges && !t.noNewPrivileges {
		if err := change(credsNoNew, protowire.AppendVarint(protowire.AppendTag(nil, credsNoNew, protowire.VarintType), 1)); err != nil {
			return err
		}
	}
	switch want := r.want.Profile; {
	case want == "" || want == t.lsm:
		return nil
	case want != Unconfined:
		return change(credsProfile, protowire.AppendString(protowire.AppendTag(nil, credsProfile, protowire.BytesType), want))
	case t.lsm != "":
		return change(credsProfile, nil) // is what CRIU notes then
	}
	return nil
}

// limit sets the resource limits of a process.
func (r *confiner) limit(leader *threadImage) error {
	had, err := limitsOf(leader.message)
	if err != nil {
		return err
	}
	if r.init == nil {
		r.init = had
	}
	// A limit that the dump has no word of is what CRIU's own is.
	for i := len(had); i < len(r.want.Limits); i++ {
		had = append(had, rlimit{math.MaxUint64, math.MaxUint64})
	}
	now := slices.Clone(had)
	for i, want := range r.want.Limits {
		var init *rlimit
		if i < len(r.init) {
			init = &r.init[i]
		}
		now[i] = want.apply(had[i], init)
	}
	if slices.Equal(now, had) {
		return nil
	}
	var list []byte
	for _, l := range now {
		var entry []byte
		entry = protowire.AppendVarint(protowire.AppendTag(entry, 1, protowire.VarintType), l.soft)
		entry = protowire.AppendVarint(protowire.AppendTag(entry, 2, protowire.VarintType), l.hard)
		list = protowire.AppendBytes(protowire.AppendTag(list, 1, protowire.BytesType), entry)
	}
	return leader.edit(coreTask, func(task []byte) ([]byte, error) {
		task, err := without(task, taskLimits)
		return protowire.AppendBytes(protowire.AppendTag(task, taskLimits, protowire.BytesType), list), err
	})
}

// apply gives what becomes of a process's limit. init is what the first process
// had, which is what others have that never changed theirs; nil if unknown.
//
// Where the request names a limit, that takes its place. Processes that have
// lowered theirs keep it, and those that have raised the soft limit as far as
// they could still have it there: what they did, they would have done again.
func (l Limit) apply(had rlimit, init *rlimit) (now rlimit) {
	now.hard = min(had.hard, l.Hard)
	if l.Asked && init != nil && had.hard == init.hard {
		now.hard = l.Hard
	}
	switch {
	case had.soft >= had.hard:
		now.soft = now.hard
	case l.Asked && init != nil && had.soft == init.soft:
		now.soft = min(l.Soft, now.hard)
	default:
		now.soft = min(had.soft, now.hard)
	}
	return now
}

func limitsOf(core []byte) (limits []rlimit, err error) {
	f, err := parse(core)
	if err != nil {
		return nil, err
	}
	task, err := f.message(coreTask)
	if err != nil {
		return nil, err
	}
	list, err := task.message(taskLimits)
	if err != nil {
		return nil, err
	}
	if list == nil {
		return nil, errors.New("keeps its resource limits in a way that CRIU has not used for long")
	}
	for v := range list.all(1) {
		if v.kind != protowire.BytesType {
			return nil, fmt.Errorf("a limit has the wire type %d", v.kind)
		}
		entry, err := parse(v.bytes)
		if err != nil {
			return nil, err
		}
		soft, hasSoft, err := entry.single(1, protowire.VarintType)
		if err != nil {
			return nil, err
		}
		hard, hasHard, err := entry.single(2, protowire.VarintType)
		if err != nil {
			return nil, err
		}
		if !hasSoft || !hasHard {
			return nil, errors.New("has a limit without a value")
		}
		limits = append(limits, rlimit{soft.number, hard.number})
	}
	return limits, nil
}

// edit changes a message that the core image holds.
func (t *threadImage) edit(field protowire.Number, change func([]byte) ([]byte, error)) (err error) {
	t.message, err = edited(t.message, field, change)
	t.changed = true
	return err
}

// edited copies a message in which another one has changed.
func edited(message []byte, field protowire.Number, change func([]byte) ([]byte, error)) ([]byte, error) {
	f, err := parse(message)
	if err != nil {
		return nil, err
	}
	old, there, err := f.single(field, protowire.BytesType)
	if err != nil {
		return nil, err
	}
	if !there {
		return nil, fmt.Errorf("field %d is not there", field)
	}
	inner, err := change(old.bytes)
	if err != nil {
		return nil, err
	}
	rest, err := without(message, field)
	return protowire.AppendBytes(protowire.AppendTag(rest, field, protowire.BytesType), inner), err
}

// without copies a message but for some of its fields.
func without(data []byte, fields ...protowire.Number) ([]byte, error) {
	return criuimage.Edit(data, func(num protowire.Number, _ protowire.Type, value []byte) ([]byte, error) {
		if slices.Contains(fields, num) {
			return nil, nil
		}
		return value, nil
	})
}

// images encodes what has changed.
func (r *confiner) images() map[string][]byte {
	changed := make(map[string][]byte)
	for tid, c := range r.cores {
		if c.changed {
			changed[coreName(tid)] = criuimage.New(criuimage.Core, c.message)
		}
	}
	if len(r.added) == 0 && !r.replaced {
		return changed
	}
	var all []byte
	for _, f := range r.filters {
		var entry []byte
		entry = protowire.AppendString(protowire.AppendTag(entry, 1, protowire.BytesType), f.program)
		if f.next >= 0 {
			entry = protowire.AppendVarint(protowire.AppendTag(entry, 2, protowire.VarintType), uint64(f.next))
		}
		entry = protowire.AppendVarint(protowire.AppendTag(entry, 3, protowire.VarintType), uint64(f.flags))
		all = protowire.AppendBytes(protowire.AppendTag(all, 1, protowire.BytesType), entry)
	}
	changed["seccomp.img"] = criuimage.New(criuimage.Seccomp, all)
	return changed
}
