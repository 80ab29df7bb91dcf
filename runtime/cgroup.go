package runtime

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	ccgroups "github.com/containerd/cgroups/v3"
	"github.com/containerd/cgroups/v3/cgroup1"
	"github.com/containerd/cgroups/v3/cgroup2"
	"github.com/opencontainers/cgroups"
	_ "github.com/opencontainers/cgroups/devices" // lets cgroup managers set device rules
	"github.com/opencontainers/runtime-spec/specs-go"
)

// Stats reads the cgroup's counters: *stats.Metrics of containerd's cgroup1 or
// cgroup2 package, whichever the host has. The cgroup is the container's, wherever
// its processes have moved to since.
func (c *Container) Stats() (any, error) {
	lc, _, _ := c.now()
	state, err := lc.State()
	if err != nil {
		return nil, err
	}
	if ccgroups.Mode() == ccgroups.Unified {
		path := strings.TrimPrefix(state.CgroupPaths[""], cgroupRoot)
		cg, err := cgroup2.Load(path)
		if err != nil {
			return nil, fmt.Errorf("load cgroup %s: %w", path, err)
		}
		return cg.Stat()
	}
	cg, err := cgroup1.Load(func(name cgroup1.Name) (string, error) {
		path := state.CgroupPaths[string(name)]
		if path == "" {
			return "", cgroup1.ErrControllerNotActive
		}
		// The first element is the hierarchy, under whatever name: several
		// controllers may share one (cpu,cpuacct).
		_, below, _ := strings.Cut(strings.TrimPrefix(path, cgroupRoot+"/"), "/")
		return "/" + below, nil
	})
	if err != nil {
		return nil, fmt.Errorf("load the cgroups of container %s: %w", c.cfg.ID, err)
	}
	return cg.Stat(cgroup1.IgnoreNotExist)
}

// cgroupRoot is where cgroups are mounted (cgroups(7)).
const cgroupRoot = "/sys/fs/cgroup"

// OOM returns a channel that gets a value whenever the kernel kills a process
// of the container for want of memory, and is closed with the cgroup.
func (c *Container) OOM() (<-chan struct{}, error) {
	lc, _, _ := c.now()
	return lc.NotifyOOM()
}

// OOMKilled tells whether the kernel has killed a process of the container for
// want of memory. On cgroup v2 the channel of OOM can miss the last kill: the
// kernel puts off a notice that follows closely on another (cgroup-v2.rst,
// memory.events; cgroup_file_notify), and the notice that the cgroup is empty,
// which ends the watch, overtakes it. On v1 it cannot, and this is false.
func (c *Container) OOMKilled() bool {
	if ccgroups.Mode() != ccgroups.Unified {
		return false
	}
	lc, _, _ := c.now()
	state, err := lc.State()
	if err != nil {
		return false
	}
	data, err := os.ReadFile(filepath.Join(state.CgroupPaths[""], "memory.events"))
	if err != nil {
		return false // the cgroup has no memory controller
	}
	for line := range strings.Lines(string(data)) {
		if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
			return strings.TrimSpace(n) != "0"
		}
	}
	return false
}

// Update changes the container's resources. What r leaves out stays as it is,
// but for cpusets, CPU burst and idle, the pids limit and Unified: they follow
// r, as with `runc update`.
func (c *Container) Update(r *specs.LinuxResources) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refresh()
	if c.machine.state == Stopped {
		return fmt.Errorf("update container %s: %w", c.cfg.ID, ErrNotRunning)
	}
	// libcontainer puts the old configuration back when the new one fails, so
	// the old one must not be changed: copy what this changes.
	config := c.lc.Config()
	cg, res := *config.Cgroups, *config.Cgroups.Resources
	config.Cgroups, cg.Resources = &cg, &res
	apply(&res, r)
	// Devices are not part of an update, and other hands (a GPU's toolkit) may
	// have changed them.
	res.SkipDevices = true
	if err := c.lc.Set(config); err != nil {
		return fmt.Errorf("update container %s: %w", c.cfg.ID, err)
	}
	// Only the update skipped devices; libcontainer refuses to start anything
	// in a container that still says so.
	res.SkipDevices = false
	return nil
}

func set[T any](to *T, from *T) {
	if from != nil {
		*to = *from
	}
}

// apply puts what r asks for into res, with the corrections that runc makes.
func apply(res *cgroups.Resources, r *specs.LinuxResources) {
	if b := r.BlockIO; b != nil {
		applyBlockIO(res, b)
	}
	if cpu := r.CPU; cpu != nil {
		applyCPU(res, *cpu)
	}
	if m := r.Memory; m != nil {
		swap := m.Swap
		if m.Limit != nil && *m.Limit == -1 && swap == nil {
			// A swap limit without a memory limit is an error.
			swap = new(int64)
		}
		set(&res.Memory, m.Limit)
		set(&res.MemoryReservation, m.Reservation)
		set(&res.MemorySwap, swap)
		set(&res.MemoryCheckBeforeUpdate, m.CheckBeforeUpdate)
	}
	res.PidsLimit = nil
	if r.Pids != nil {
		res.PidsLimit = r.Pids.Limit
	}
	res.Unified = r.Unified
}

func applyCPU(res *cgroups.Resources, cpu specs.LinuxCPU) {
	if cpu.Idle != nil && cpu.Shares == nil {
		cpu.Shares = new(uint64) // an idle cgroup refuses a weight
	}
	// Quota and period are one setting for cgroup v2 and systemd. One that is
	// left out keeps its value; none at all removes both.
	var period uint64
	var quota int64
	set(&period, cpu.Period)
	set(&quota, cpu.Quota)
	if (period == 0) == (quota == 0) || period != 0 {
		res.CpuPeriod = period
	}
	if (period == 0) == (quota == 0) || quota != 0 {
		res.CpuQuota = quota
	}
	res.CpuBurst = cpu.Burst
	if cpu.Shares != nil {
		res.CpuShares = *cpu.Shares
		res.CpuWeight = cgroups.ConvertCPUSharesToCgroupV2Value(*cpu.Shares)
	}
	set(&res.CpuRtPeriod, cpu.RealtimePeriod)
	set(&res.CpuRtRuntime, cpu.RealtimeRuntime)
	res.CpusetCpus = cpu.Cpus
	res.CpusetMems = cpu.Mems
	res.CPUIdle = cpu.Idle
}

func applyBlockIO(res *cgroups.Resources, b *specs.LinuxBlockIO) {
	set(&res.BlkioWeight, b.Weight)
	set(&res.BlkioLeafWeight, b.LeafWeight)
	for _, d := range b.WeightDevice {
		var weight, leaf uint16
		set(&weight, d.Weight)
		set(&leaf, d.LeafWeight)
		res.BlkioWeightDevice = replace(res.BlkioWeightDevice, cgroups.NewWeightDevice(d.Major, d.Minor, weight, leaf),
			func(o *cgroups.WeightDevice) bool { return o.Major == d.Major && o.Minor == d.Minor })
	}
	for _, t := range []struct {
		to   *[]*cgroups.ThrottleDevice
		from []specs.LinuxThrottleDevice
	}{
		{&res.BlkioThrottleReadBpsDevice, b.ThrottleReadBpsDevice},
		{&res.BlkioThrottleWriteBpsDevice, b.ThrottleWriteBpsDevice},
		{&res.BlkioThrottleReadIOPSDevice, b.ThrottleReadIOPSDevice},
		{&res.BlkioThrottleWriteIOPSDevice, b.ThrottleWriteIOPSDevice},
	} {
		for _, d := range t.from {
			*t.to = replace(*t.to, cgroups.NewThrottleDevice(d.Major, d.Minor, d.Rate),
				func(o *cgroups.ThrottleDevice) bool { return o.Major == d.Major && o.Minor == d.Minor })
		}
	}
}

// replace puts v in the place of the elements that are the same device, in a
// list of its own.
func replace[T any](list []T, v T, same func(T) bool) []T {
	out := make([]T, 0, len(list)+1)
	for _, o := range list {
		if !same(o) {
			out = append(out, o)
		}
	}
	return append(out, v)
}
